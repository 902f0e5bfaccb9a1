"""`python -m syncbn`: what it prints, and its exit codes."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from syncbn.__main__ import main


def trained():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(16))
    for _ in range(3):
        model(torch.randn(4, 1, 4, 4))
    return model


@pytest.fixture
def good(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "good.pt")
    return str(tmp_path / "good.pt")


@pytest.fixture
def bad(tmp_path):
    state = trained().state_dict()
    state["1.running_var"][0] = -1.0
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "bad.pt"
    )
    return str(tmp_path / "bad.pt")


def test_a_good_checkpoint(good, capsys):
    assert main(["audit", good]) == 0
    assert capsys.readouterr().out == f"{good}: 1 batch normalization layers\nno findings\n"


def test_a_bad_checkpoint_names_layer_rule_why_and_remedy(bad, capsys):
    assert main(["audit", bad]) == 1
    out = capsys.readouterr().out
    lines = out.splitlines()[1:]
    assert lines[0].split() == ["error", "invalid-statistics"]
    assert [line.split()[0] for line in lines[1:4]] == ["layer", "why", "remedy"]
    assert lines[1].split()[1] == "1"
    assert "a negative variance" in out


def test_findings_as_json(bad, capsys):
    assert main(["audit", "--json", bad]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["layers"] == 1
    [finding] = content["findings"]
    assert list(finding) == ["layer", "rule", "severity", "why", "remedy"]
    assert (finding["layer"], finding["rule"]) == ("1", "invalid-statistics")


def test_warnings_alone_are_no_failure(tmp_path, capsys):
    torch.save({"bn1.weight": torch.ones(3), "bn1.bias": torch.zeros(3)}, tmp_path / "parameters.pt")
    assert main(["audit", str(tmp_path / "parameters.pt")]) == 0
    assert "warning  no-running-statistics" in capsys.readouterr().out


def test_safetensors_and_names_at_the_root(tmp_path, capsys):
    save_file(trained()[1].state_dict(), tmp_path / "layer.safetensors")
    assert main(["audit", str(tmp_path / "layer.safetensors")]) == 0
    state = {"running_mean": torch.zeros(2), "running_var": torch.ones(2), "num_batches_tracked": torch.tensor(0)}
    save_file(state, tmp_path / "fresh.safetensors")
    assert main(["audit", str(tmp_path / "fresh.safetensors")]) == 1
    assert "(the model)" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"no checkpoint", b""])
def test_what_cannot_be_read_is_one_line_and_exit_code_2(tmp_path, capsys, content):
    path = tmp_path / "file.pt"
    if content is not None:
        path.write_bytes(content)
    assert main(["audit", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: PATH: ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"a": "b"}}, nn.Linear(1, 1)])
def test_what_is_no_state_dict_is_one_line_and_exit_code_2(tmp_path, capsys, content):
    torch.save(content, tmp_path / "file.pt")
    assert main(["audit", str(tmp_path / "file.pt")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def audited(tmp_path, capsys, content):
    """Exit code and output of an audit of this state dict."""
    torch.save(content, tmp_path / "file.pt")
    code = main(["audit", str(tmp_path / "file.pt")])
    captured = capsys.readouterr()
    assert (captured.out == "") == (code == 2)
    return code, captured.out or captured.err


def test_without_batch_normalization_there_is_nothing_to_judge(tmp_path, capsys):
    code, told = audited(tmp_path, capsys, nn.Linear(2, 2).state_dict())
    assert code == 2
    assert "file.pt' has no batch normalization" in told
    assert "nothing to judge" in told


UNREADABLE = {
    "complex64": lambda value: value.to(torch.complex64),
    "sparse": lambda value: value.to_sparse(),
    "quantized": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.quint8),
    "meta": lambda value: value.to("meta"),
    "16 times as many": lambda value: value[:1].expand(2**40),
    "a number per channel": lambda value: value.expand(3, -1).clone(),
    "of shape .2,.": lambda value: value[:2].clone(),
}


@pytest.mark.parametrize("message", UNREADABLE)
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_statistics_that_cannot_be_read_are_said_to_be(tmp_path, capsys, message):
    state = trained().state_dict()
    state["1.running_var"] = UNREADABLE[message](state["1.running_var"])
    code, told = audited(tmp_path, capsys, state)
    assert code == 2
    assert re.search(rf"^error: PATH: '.*file\.pt' .*{message}", told)
    assert len(told.splitlines()) == 1


def test_statistics_of_eight_bits_are_judged(tmp_path, capsys):
    state = {key: value.to(torch.float8_e4m3fn) for key, value in trained().state_dict().items()}
    assert audited(tmp_path, capsys, state) == (
        0,
        f"{tmp_path / 'file.pt'}: 1 batch normalization layers\nno findings\n",
    )
    state["1.running_var"] = (torch.zeros(4) - 1).to(torch.float8_e4m3fn)
    code, told = audited(tmp_path, capsys, state)
    assert code == 1
    assert "a negative variance" in told


def test_what_is_not_batch_normalization_may_be_anything(tmp_path, capsys):
    state = {**trained().state_dict(), "table.weight": torch.eye(2).to_sparse()}
    assert audited(tmp_path, capsys, state)[0] == 0


def test_an_empty_directory_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["audit", str(tmp_path)]) == 2
    assert "has no checkpoint under checkpoints/" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["audits"], ["audit"], ["audit", "a", "--xml"]])
def test_a_mistake_in_the_command_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_the_module_runs(bad):
    command = [sys.executable, "-m", "syncbn", "audit", bad]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "invalid-statistics" in done.stdout
