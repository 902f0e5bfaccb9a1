"""Whatever is typed after train.py: a checked configuration, or one message that names the key and the remedy."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from syncbn.training.config.errors import printable
from syncbn.training.config.parsing import to_dict
from syncbn.training.config.schema import Config
from syncbn.training.launch.explain import known_keys
from tests.training.jobs import ROOT, outcome, start

KEYS = [key for key in known_keys() if key not in ("run", "task", "load")]
GROUPS = sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir() and path.name != "hydra")
CHOICES = sorted({path.stem for group in GROUPS for path in (ROOT / "configs" / group).glob("*.yaml")})
keys = st.one_of(
    st.sampled_from(KEYS),
    st.builds(lambda key, at: key[:at] + key[at + 1 :] or "x", st.sampled_from(KEYS), st.integers(0, 8)),  # a typo
    st.builds("{}.{}.{}".format, st.sampled_from(["freeze", "init"]), st.sampled_from(["a", "backbone"]),
              st.sampled_from(["match", "exclude", "stats", "weights", "until", "path", "strict", "matchh"])),
    st.sampled_from(["freeze", "init", "freeze.a", "init.a", "nope", "data.nope.x", "optimizer.lr.x", "hydra.x"]),
    st.from_regex(r"[a-z_]{1,6}(\.[a-z_]{1,6}){0,2}", fullmatch=True),
)  # fmt: skip
values = st.one_of(
    st.sampled_from(["", "null", "true", "0", "-1", "1", "1e400", "nan", "inf", "-inf", "5ep", "10min", "3x", "abc",
                     "???", "[]", "{}", "[1,2]", "[0,0]", "{a:1}", "[[1]]", "'a b'", "${seed}", "${nope}",
                     "${oc.env:NOPE_X}",
                     "backbone", "*", "'[34]'", "[a,null]", "{match:backbone}", "{match:1}", "world", "fp16"]),
    st.integers(-10, 10**12).map(str),
    st.floats().map(str),
    st.text(max_size=6),
    st.text(alphabet="[]{}(),:='\"$\\* a1", max_size=8),
)  # fmt: skip
overrides = st.one_of(
    st.builds("{}{}={}".format, st.sampled_from(["", "", "", "+", "++"]), keys, values),
    st.builds("~{}".format, keys),
    st.builds("{}={}".format, st.sampled_from(GROUPS), st.one_of(st.sampled_from(CHOICES), st.just("nope"))),
    st.text(alphabet="abc=:.~+@'{[,$\\ \r\x1b\x9c\u00e9", max_size=8),
).filter(lambda text: not text.startswith("-"))  # a flag, for argparse to complain about


@settings(max_examples=60)
@example(["freeze=0"])
@example(["data=true"])
@example(["~seed"])
@example(["~optimizer.lrr"])
@example(["+seed=1"])
@example(["++freeze=null"])
@example(["\r"])
@given(st.lists(overrides, min_size=1, max_size=3))
def test_any_override_is_accepted_or_explained(given):
    result = outcome(given)
    if isinstance(result, Config):
        assert isinstance(to_dict(result), dict)
        return
    assert len(result.splitlines()) == 1, result
    assert names_what_is_wrong(result, given), (given, result)
    assert says_what_to_do(result), (given, result)


def names_what_is_wrong(message, given):
    """It begins with an override, with a key, or with a part of one that was given."""
    subject = message.split(": ")[0]
    return any(subject in printable(override) or root_of(override) == root_of(subject) for override in given)


def root_of(text):
    return re.split(r"[.=]", text.lstrip("+~"))[0].split("@")[0].strip()


def says_what_to_do(message):
    return re.search(
        r"expected|did you mean|known here|choose|lists them|required|quote|needs a \+|see python|give|use |leave out",
        message,
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["freeze=0"], "freeze: expected the name of a choice, as python train.py --help lists them, got 0"),
        (["~optimizer.lrr"], "optimizer.lrr: no such key; did you mean optimizer.lr?"),
        (["+seed=1"], "seed: there is one already; use seed=... without the +"),
        (["\rx"], "\\rx: not a valid override"),
    ],
)
def test_on_the_command_line_it_is_one_line_too(tmp_path, given, message):
    done = start(tmp_path, *given)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
