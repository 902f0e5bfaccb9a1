"""The way of docs/fine-tuning.md: from a file of weights for other classes to a prediction."""

import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests.training.downloaded import SMALL_NETWORK, Network, save_download
from tests.training.jobs import ROOT, read_metrics
from tests.training.trainer.test_train import load_last

TRUST = f"trust=[{Network.__module__}.Network]"


def predicted(photo, monkeypatch, directory, capsys):
    """What the five lines of the page, in the directory of an export, print about a photograph."""
    page = (ROOT / "docs/fine-tuning.md").read_text()
    code = page.partition("```python fragment\n")[2].partition("```")[0]
    monkeypatch.chdir(directory)
    head = "import json, numpy, torch\nfrom pathlib import Path\nfrom PIL import Image, ImageOps\n"
    capsys.readouterr()
    exec(head + textwrap.dedent(code), {"path": photo})
    return capsys.readouterr().out.strip()


def tune(job, directory, num_ranks):
    """A run of the experiment on a file for 1000 classes."""
    return job("experiment=fine_tuning", *SMALL_NETWORK, *save_download(directory), "tracker=none", "duration=4ep",
               "save.every=2ep", "save.keep=9", "run=tuned", num_ranks=num_ranks)  # fmt: skip


def test_the_head_warms_up_alone_then_all_but_batch_normalization_trains_at_a_tenth_of_its_rate(job, tmp_path):
    tuned = tune(job, tmp_path, num_ranks=1)
    file = load_file(tmp_path / "weights.safetensors")
    warm, after = (load_last(tuned, nth)["model"] for nth in (0, -1))
    frozen = {name for name in file if name.startswith(("bn1", "layer1.1"))}
    assert len(frozen) == 10
    for name, value in file.items():
        if not name.startswith("fc"):
            assert torch.equal(warm[name], value), name
            assert torch.equal(after[name], value) == (name in frozen), name
    assert not torch.equal(warm["fc.weight"], after["fc.weight"])
    rates = [group["lr"] for group in load_last(tuned, 0)["optimizer"]["param_groups"]]
    assert rates == pytest.approx([rates[0], 0.1 * rates[0]])
    told = [record["drift/model"] for record in read_metrics(tuned) if "drift/model" in record]
    assert told == [0.0] * 4


@pytest.mark.slow
def test_from_a_file_for_other_classes_to_a_prediction(job, tmp_path, monkeypatch, capsys):
    tuned = tune(job, tmp_path, num_ranks=2)
    [evaluated] = read_metrics(job("task=eval", f"load={tuned}", TRUST, "run=e"))
    assert evaluated["test/accuracy"] == read_metrics(tuned)[-1]["test/accuracy"]
    shipped = job("task=export", f"load={tuned}", TRUST, "export.formats=[pt2]", "run=shipped")
    photo = tmp_path / "photos/cat/000.png"
    best = torch.load(tuned / "checkpoints/best.pt", weights_only=True)
    model = Network(3).eval()
    model.load_state_dict(best["model"])
    pixels = torch.from_numpy(np.array(Image.open(photo)))[None, :, 2:18].permute(0, 3, 1, 2) / 255
    expected = model((pixels - best["data"]["mean"].float()) / best["data"]["std"].float()).argmax()
    assert predicted(photo, monkeypatch, shipped / "export", capsys) == ["bee", "cat", "dog"][expected]


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_networks_of_timm_and_torchvision_are_fine_tuned_from_their_files(job, tmp_path, library):
    module = pytest.importorskip("timm" if library == "timm" else "torchvision.models")
    network: nn.Module = module.create_model("resnet18") if library == "timm" else module.resnet18()
    own = ["model.model_name=resnet18"] if library == "timm" else [
        "model=custom", "model._target_=torchvision.models.resnet18", "+model.num_classes=data.num_classes"
    ]  # fmt: skip
    run = job("experiment=fine_tuning", *save_download(tmp_path, network), *own, "tracker=none", "duration=3ep",
              "data.size=32", "run=tuned")  # fmt: skip
    after, file = load_last(run)["model"], load_file(tmp_path / "weights.safetensors")
    assert torch.equal(after["layer1.0.bn1.running_mean"], file["layer1.0.bn1.running_mean"])
    assert not torch.equal(after["layer1.0.conv1.weight"], file["layer1.0.conv1.weight"])
    assert after["fc.weight"].shape == (3, 512)
