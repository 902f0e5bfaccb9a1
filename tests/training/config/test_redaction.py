"""No secret reaches the disk or the screen, and nothing is written outside the run directory."""

import base64
import os
import re

import pytest
import torch

from syncbn.training.checkpoint.files import read, write_atomically
from syncbn.training.config import redaction
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.redaction import HIDDEN, is_redacted, learn, redact, redacted
from syncbn.training.launch.explain import known_keys
from tests.training.checkpoint.test_resume import SMALL
from tests.training.jobs import ROOT, start

LOGIN = base64.b64encode(b"ann:pa55").decode()
SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "MY_DATABASE_PASSWORD": "open sesame"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://ann:pa55@host/x?y=1", f"https://{HIDDEN}@host/x?y=1"),
        ("s3://ghp_abc@host/x", f"s3://{HIDDEN}@host/x"),
        ("https://host/x?token=abc&y=1", f"https://host/x?token={HIDDEN}&y=1"),
        ("https://host/x?X-Secret=abc", f"https://host/x?X-Secret={HIDDEN}"),
        ("+model.api_key=abc", f"+model.api_key={HIDDEN}"),
        ("model.password=abc,def", f"model.password={HIDDEN},def"),
        (r"tracker.group=https\://ann\:pa55@host/x", rf"tracker.group=https\://{HIDDEN}@host/x"),  # as Hydra escapes it
        ("https://ann:p@55@host/x", f"https://{HIDDEN}@host/x"),
        ("+model.github_token=abc", f"+model.github_token={HIDDEN}"),
        ("+model.aws_secret_access_key=abc", f"+model.aws_secret_access_key={HIDDEN}"),
        ("https://host/x?X-Amz-Signature=ab&sig=a%2B", f"https://host/x?X-Amz-Signature={HIDDEN}&sig={HIDDEN}"),
        ("+model.tokens=[abc,def] a=1", f"+model.tokens={HIDDEN} a=1"),
        ("model.auth={user:ann,word:x} a=1", f"model.auth={HIDDEN} a=1"),
        ("+model.pwd='a b' a=1", f"+model.pwd='{HIDDEN}' a=1"),
        ("model.pwd=1234", f"model.pwd={HIDDEN}"),
        ('+model.headers={Authorization: "Bearer ab"}', f'+model.headers={{Authorization: "{HIDDEN}"}}'),
        ("+model.headers={X-Api-Key:ab,accept:json}", f"+model.headers={{X-Api-Key:{HIDDEN},accept:json}}"),
        ("{'Authorization': 'Bearer ab', 'n': 1}", f"{{'Authorization': '{HIDDEN}', 'n': 1}}"),
        ("-H 'Authorization: Bearer ab' x", f"-H 'Authorization: Bearer {HIDDEN}' x"),
        ("sent Bearer eyJhbGciOi.J9x", f"sent Bearer {HIDDEN}"),
        (f"sent Basic {LOGIN}", f"sent Basic {HIDDEN}"),
        ("bearer of the news, basic information", "bearer of the news, basic information"),
        (
            "model.api_key: is a secret, which x.pt does not hold",
            "model.api_key: is a secret, which x.pt does not hold",
        ),
        (
            "model.reg_tokens=4 model.use_auth=true model.auth=null",
            "model.reg_tokens=4 model.use_auth=true model.auth=null",
        ),
        ("author=ann {token_length:9,keyboard:x}", "author=ann {token_length:9,keyboard:x}"),
        ("mail ann@host", "mail ann@host"),
        ("model.num_tokens=3 model.tokenizer=x", "model.num_tokens=3 model.tokenizer=x"),
        ("https://host/a@b", "https://host/a@b"),
    ],
)
def test_what_is_a_secret_in_a_text(text, expected):
    assert redact(text) == expected
    assert redact(expected) == expected


def test_what_is_a_secret_in_a_configuration():
    config = {"a": {"token": "abc", "num_tokens": 3}, "b": ["https://u:p@h"], "password": None}
    assert redacted(config) == {"a": {"token": HIDDEN, "num_tokens": 3}, "b": [f"https://{HIDDEN}@h"], "password": None}


@pytest.mark.parametrize("key", ["auth", "bearer", "tokens", "pwd", "Authorization", "Proxy-Authorization", "cookie",
                                 "Set-Cookie", "jwt", "sas", "sas_token", "sig", "signature", "x-api-key", "apiKey",
                                 "client_secret", "clientSecret", "db_pwd", "pass", "refresh-token", "oauth",
                                 "ssh_key", "account_key", "secrets", "passwords"])  # fmt: skip
def test_which_keys_are_secret_and_all_that_is_below_them(key):
    values = ["a", {"b": "c", "d": ["e", {"f": "g"}]}]
    hidden = [HIDDEN, {"b": HIDDEN, "d": [HIDDEN, {"f": HIDDEN}]}]
    assert redacted({"model": {key: values}}) == {"model": {key: hidden}}
    assert is_redacted(hidden)
    assert not is_redacted(values)


@pytest.mark.parametrize("key", ["token_length", "author", "num_tokens", "max_tokens", "num_prefix_tokens", "tokenizer",
                                 "keyboard", "key", "keys", "authority", "kansas", "passes", "n_pass", "cls_token",
                                 "pad_token", "cookie_size", "monkey", "design", "signal", "secretary"])  # fmt: skip
def test_which_keys_only_look_like_secrets(key):
    assert redacted({"model": {key: ["a", {"b": 3}]}}) == {"model": {key: ["a", {"b": 3}]}}


def test_no_key_of_this_configuration_looks_like_a_secret():
    config = {key.replace(".", "/"): "x" for key in known_keys()}
    assert not [key for key in known_keys() if redacted("x", key) == HIDDEN]
    assert redacted(config) == config


def test_which_numbers_are_secrets_and_that_no_switch_is_one():
    config = {"pwd": 1234, "password": {"a": [1.5]}, "token": 123456789, "reg_tokens": 4, "auth": {"retries": 3},
              "secret": True, "api_key": None}  # fmt: skip
    assert redacted(config) == {**config, "pwd": HIDDEN, "password": {"a": [HIDDEN]}, "token": HIDDEN}


def test_values_of_headers_are_secrets_under_any_key():
    config = {"headers": {"Authorization": "Bearer abc", "Accept": "json"}, "x": ["Bearer abc", f"Basic {LOGIN}"]}
    expected = {"Authorization": HIDDEN, "Accept": "json"}
    assert redacted(config) == {"headers": expected, "x": [f"Bearer {HIDDEN}", f"Basic {HIDDEN}"]}
    assert redacted({"x": "Basic blocks"}) == {"x": "Basic blocks"}


def test_the_name_of_code_below_a_secret_key_is_kept():
    config = {"auth": {"_target_": "mine.Login", "user": "ann"}}
    assert redacted(config) == {"auth": {"_target_": "mine.Login", "user": HIDDEN}}


def test_the_value_of_a_secret_key_is_hidden_wherever_it_appears(monkeypatch):
    monkeypatch.setattr(redaction, "_learned", set())
    learn({"model": {"api_key": "open sesame", "auth": [{"token": "short"}], "name": "resnet_small"}})
    assert redact("+model.api_key='open sesame' model=resnet_small") == f"+model.api_key='{HIDDEN}' model=resnet_small"
    assert redact("x open sesame x") == f"x {HIDDEN} x"
    assert redact("a short word") == "a short word"
    learn({"headers": {"Authorization": ["Bearer abcdefgh"]}, "tokens": {"a": "in a dictionary"}, "pwd": 12345678})
    assert redact("Bearer abcdefgh, in a dictionary, 12345678") == f"{HIDDEN}, {HIDDEN}, {HIDDEN}"


@pytest.mark.parametrize(("name", "is_secret"), [("WANDB_API_KEY", True), ("KEY", True), ("MY_PASSWORD", True),
                                                 ("MONKEY_MODE", False), ("KEYBOARD", False), ("SLURM_JWT", True),
                                                 ("DB_PWD", True), ("PWD", False), ("OLDPWD", False)])  # fmt: skip
def test_which_variables_are_secrets(monkeypatch, name, is_secret):
    monkeypatch.setenv(name, "synthetic")
    redaction._environment_values.cache_clear()
    assert (redact("data=synthetic") != "data=synthetic") == is_secret
    monkeypatch.delenv(name)
    redaction._environment_values.cache_clear()


def files_with(directory, secret):
    return [path for path in directory.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("num_ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_no_secret_in_any_file_of_a_run_nor_on_the_screen(tmp_path, monkeypatch, num_ranks):
    (tmp_path / "mine.py").write_text(MODEL)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    done = start(
        tmp_path, "model=custom", "model._target_=mine.Net", "+model.api_key=k3y-in-config",
        "tracker.group=https://ann:pa55word@host/group", "+model.note='${oc.env:MY_DATABASE_PASSWORD}'",
        "duration=1,2", "run=a", "-m", num_ranks=num_ranks,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for secret in (*SECRETS.values(), "k3y-in-config", "pa55word"):
        assert files_with(tmp_path / "outputs", secret) == []
        assert secret not in done.stdout + done.stderr
    assert len(list((tmp_path / "outputs/a").glob("*/wandb/offline-run-*"))) == 2
    evaluated = start(tmp_path, "task=eval", "load=outputs/a/0", "model.api_key=k3y-in-config", "model.note=x", "run=b",
                      "trust=[mine.*]")  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr  # the tracker's group, a secret, is of no use to it
    assert files_with(tmp_path / "outputs/b", "k3y-in-config") == []


def test_a_mistake_or_failure_leaves_no_secret_either(tmp_path):
    (tmp_path / "mine.py").write_text(MODEL.replace("assert ", "raise RuntimeError(api_key)\n        assert "))
    options = ["model=custom", "model._target_=mine.Net", "+model.api_key=k3y-in-config", "+model.note=x", "run=a"]
    for overrides in (["precision=fp7"], ["tracker=none"]):
        done = start(tmp_path, *options, *overrides)
        assert done.returncode != 0
        assert "k3y-in-config" not in done.stdout + done.stderr
        assert files_with(tmp_path, "k3y-in-config") == []


def test_an_error_shows_no_secret_either(tmp_path):
    done = start(tmp_path, "data=fashion_mnist", "data.path=https://ann:pa55word@host/")
    assert done.returncode == 2
    assert "pa55word" not in done.stdout + done.stderr
    assert done.stderr.startswith("error: data.path: ")


def test_a_run_goes_on_with_the_secret_given_again_and_names_it_if_it_is_not(job, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    model = ["model=custom", "model._target_=mine.Net", "tracker=none", "+model.note=x"]
    first = job(*model, "+model.api_key=k3y", "duration=2", "run=a")
    assert read(first / "checkpoints/step_00000002.pt", "load")["config"]["model"]["api_key"] == HIDDEN
    job(*model, "+model.api_key=k3y", "duration=3", "run=a")
    assert (first / "checkpoints/step_00000003.pt").exists()
    with pytest.raises(ConfigError, match=r"^model.api_key: is a secret"):
        job("task=eval", f"load={first}", "trust=[mine.*]", "run=b")
    job("task=eval", f"load={first}", "trust=[mine.*]", "model.api_key=k3y", "run=b")


NESTED = ["+model.headers={Authorization: Bearer abc}", "+model.tokens=[abcdef,xyz]", "+model.pwd=1234",
          "+model.auth={user: annabel, rounds: 3}"]  # fmt: skip


def test_a_run_goes_on_with_the_dictionaries_and_lists_that_hold_its_secrets_given_again(job):
    model = [*(option for option in SMALL if option != "model.width=4"), "model=custom",
             f"model._target_={__name__}.WithSecrets"]  # fmt: skip
    run = job(*model, *NESTED, "duration=2", "run=a")
    stored = read(run / "checkpoints/step_00000002.pt", "load")["config"]["model"]
    assert stored == {
        "_target_": f"{__name__}.WithSecrets", "headers": {"Authorization": HIDDEN}, "tokens": [HIDDEN, HIDDEN],
        "pwd": HIDDEN, "auth": {"user": HIDDEN, "rounds": 3},
    }  # fmt: skip
    for secret in ("Bearer abc", "abcdef", "annabel"):
        assert files_with(run, secret) == []
    job(*model, *NESTED, "duration=3", "run=a")
    assert (run / "checkpoints/step_00000003.pt").exists()
    evaluate = ["task=eval", f"load={run}", "trust=[tests.*]", "run=b"]
    for left_out in range(len(NESTED)):
        given = [override for position, override in enumerate(NESTED) if position != left_out]
        with pytest.raises(ConfigError, match=r"^model\.(headers|tokens|pwd|auth)[.\w]*: is a secret, which "):
            job(*evaluate, *given)
    job(*evaluate, *NESTED)


class WithSecrets(torch.nn.Module):
    def __init__(self, headers, tokens, pwd, auth):
        super().__init__()
        given = headers["Authorization"], list(tokens), pwd, dict(auth)
        assert given == ("Bearer abc", ["abcdef", "xyz"], 1234, {"user": "annabel", "rounds": 3})
        self.head = torch.nn.Linear(192, 4)

    def forward(self, x):
        return self.head(x.flatten(1))


MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self, api_key, note):
        super().__init__()
        assert "*" not in api_key
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1))
"""


def everything_below(directory):
    return {path.relative_to(directory) for path in directory.rglob("*")}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["hydra.run.dir=../elsewhere"], marks=pytest.mark.slow),
        ["hydra.run.dir=elsewhere"],
        pytest.param(["run=../elsewhere"], marks=pytest.mark.slow),
        ["run=link"],
        ["hydra.job.chdir=true"],
        ["-m", "hydra.sweep.dir=../elsewhere"],
        pytest.param(["-m", "hydra.sweep.subdir=../../elsewhere"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_directory_elsewhere_is_an_error_that_names_the_key_before_anything_is_written(tmp_path, overrides):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    (cwd / "outputs").mkdir()
    (tmp_path / "target").mkdir()
    (cwd / "outputs/link").symlink_to(tmp_path / "target")
    before = everything_below(tmp_path)
    done = start(cwd, *overrides, *SMALL, "duration=1")
    assert done.returncode == 2
    assert re.match(r"error: (hydra\.[a-z.]+|run): expected ", done.stderr)
    written = everything_below(tmp_path) - before
    assert not [path for path in written if path.parts[:2] != ("cwd", "outputs") or path.suffix]


def test_a_checkpoint_does_not_say_where_to_write(job, tmp_path):
    run = job(*SMALL, "duration=2", "run=a", cwd=tmp_path)
    path = run / "checkpoints/step_00000002.pt"
    content = read(path, "load")
    content["config"] |= {"run": "../../evil", "resume": "../../evil"}
    content["tracker"] = {"id": "../../evil", "run": "b"}
    evil = tmp_path / "evil.pt"
    write_atomically(evil, content)
    before = everything_below(tmp_path)
    job("duration=3", f"resume={evil}", "run=b", cwd=tmp_path)
    job("task=eval", f"load={evil}", "run=c", cwd=tmp_path)
    written = everything_below(tmp_path) - before
    assert {path.parts[:2] for path in written} == {("outputs", "b"), ("outputs", "c")}


def test_no_code_in_a_checkpoint_runs(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"step": 1, "config": {}, "model": Runs()}, tmp_path / "evil.pt")
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        read(tmp_path / "evil.pt", "load")
    assert not (tmp_path / "ran").exists()


def test_nothing_starts_a_shell_or_listens():
    forbidden = re.compile(
        r"os\.system|os\.popen|shell=True|import subprocess|import pickle|\.listen\(\d|socketserver|http\.server"
    )
    known = {
        ROOT / "syncbn/training/tracking/environment.py",  # asks git for the commit, by fixed arguments
        ROOT / "syncbn/training/launch/loopback.py",  # starts train.py with the arguments it was given, to check them
        ROOT / "syncbn/nn/empty_batches.py",  # packs an empty batch for the other ranks of the job
        ROOT / "syncbn/nn/even_steps.py",  # takes it, as dist.all_gather_object would
    }
    sources = [ROOT / "train.py", *(path for path in (ROOT / "syncbn").rglob("*.py") if path not in known)]
    assert [str(path) for path in sources if forbidden.search(path.read_text())] == []
