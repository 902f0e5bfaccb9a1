"""What the documentation says is true: its programs run and print what it says, its commands compose, its links lead
somewhere.

In pages, a block marked `python` runs (all of a page in order, as one program), one marked `python two-ranks` runs by
itself on two ranks, one marked `python fragment` is an excerpt of a user's program and does not. A block marked `text`
that follows one that runs is what that one prints.
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from functools import cache

import pytest

import syncbn
from syncbn.training.config.keys import TASKS
from syncbn.training.config.model import FreezeRuleConfig, InitConfig
from syncbn.training.config.optim import GroupConfig
from syncbn.training.config.schema import Config
from syncbn.training.launch.known_keys import known_keys
from tests.training.jobs import ROOT, compose_config, warm_command

README = ROOT / "README.md"  # its commands and its program: tests/test_readme.py
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
_BLOCK = re.compile(r"^```(\S*)(?: ([^\n]*))?\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def named(page):
    return str(page.relative_to(ROOT))


def blocks(page, kind, mark):
    """(line number, text, what it prints or None) of the page's blocks that are marked so."""
    text = page.read_text()
    found = [match for match in _BLOCK.finditer(text) if match[1] == kind and (match[2] or "") == mark]
    return [(text.count("\n", 0, match.start(3)), match[3], match[4]) for match in found]


def anchors(page):
    """The names that a host of repositories gives to the headings of a page."""
    seen: Counter[str] = Counter()
    names = []
    for heading in re.findall(r"^#+ (.*)$", _CODE.sub("", page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page):
    prose = re.sub(r"`[^`\n]*`(?!\])", "", _CODE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        assert leads_to.is_relative_to(ROOT), target
        assert leads_to.exists(), target
        assert not anchor or anchor in anchors(leads_to), target


def test_what_is_no_heading_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b_c` d?\n\n## [Same](x.md)\n\n## Same\n\n## Same\n\n```\n# a comment\n```\n")
    assert anchors(page) == ["a-b_c-d", "same", "same-1", "same-2"]


@pytest.mark.parametrize("page", [page for page in PAGES if page != README and blocks(page, "python", "")], ids=named)
def test_the_program_of_a_page_runs_and_prints_what_the_page_says(page):
    names: dict[str, object] = {"__name__": "page"}
    for line, code, printed in blocks(page, "python", ""):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + code, str(page), "exec"), names)
        assert printed is None or out.getvalue() == printed, out.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", "two-ranks")], ids=named)
def test_a_program_for_two_ranks_runs_on_two_ranks(page, tmp_path):
    for _, code, _ in blocks(page, "python", "two-ranks"):
        (tmp_path / "program.py").write_text(code)
        run(warm_command(str(tmp_path / "program.py"), num_ranks=2))


def test_a_block_of_python_is_marked_as_one_of_three():
    marks = {mark or "" for page in PAGES for kind, mark, _, _ in _BLOCK.findall(page.read_text()) if kind == "python"}
    assert marks == {"", "two-ranks", "fragment"}
    for page in PAGES:
        for line, code, _ in blocks(page, "python", "fragment"):
            compile("\n" * line + code, str(page), "exec")


def commands(page):
    """What stands behind train.py, wherever the page says it."""
    lines = [line for kind, _, text, _ in _BLOCK.findall(page.read_text()) if kind in ("", "bash", "sh") for line in
             text.replace("\\\n", " ").splitlines()]  # fmt: skip
    lines += re.findall(r"`([^`\n]+)`", _CODE.sub("", page.read_text()))
    starts = re.compile(r"(\w+=\S* )*(python|torchrun|srun)\b.*train\.py")
    return [line.split("train.py", 1)[1] for line in lines if starts.match(line)]


_ALL = sorted({(page, command) for page in PAGES if page != README for command in commands(page)})


@cache
def composed(*overrides):
    """The configuration, composed once for all pages that name the same command."""
    return compose_config(*overrides)


@pytest.mark.parametrize(("page", "command"), _ALL, ids=lambda value: value if isinstance(value, str) else named(value))
def test_every_command_composes(page, command):
    words = [word for word in shlex.split(command, comments=True) if word != "job" and not word.startswith("-")]
    if "--config-dir" in command:
        pytest.skip("somebody's own package: tests/training/test_own_package.py")
    if any("," in word and "[" not in word for word in words):
        words = [word if "[" in word else word.split(",")[0] for word in words]  # a sweep: its first job
    assert composed(*words).task in TASKS


def test_there_are_commands_of_many_pages_to_check():
    assert len(_ALL) >= 12
    assert len({page for page, _ in _ALL}) >= 6


_ROOTS = {field.name for field in fields(Config)} | {"experiment", "debug"}
_NAMED = {"freeze": FreezeRuleConfig, "init": InitConfig}  # open dictionaries of named rules
_FILES = re.compile(r".*\.(pt2|onnx|safetensors|yaml|jsonl?|lock)")


def is_key(key):
    """Whether there is such a key: `bn.sync`, `eval.*`, `init.<subnet>.path`, `init.<subnet>`."""
    root, _, rest = key.partition(".")
    if root in _NAMED and re.fullmatch(r"\w+|<\w+>", rest):
        return True
    if root in _NAMED and rest.count(".") == 1:
        return rest.partition(".")[2] in {"*", *(field.name for field in fields(_NAMED[root]))}
    if found := re.fullmatch(r"optimizer\.groups\.[^.]+\.(\w+)", key):
        return found[1] in {field.name for field in fields(GroupConfig)}
    if key.startswith("data.augment."):
        return True  # an open dictionary too, of transforms and their arguments
    known = known_keys()
    return any(one.startswith(key[:-1]) for one in known) if key.endswith(".*") else key in known


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_key_of_the_configuration_that_is_named_exists(page):
    for word in re.findall(r"`([a-z_]+(?:\.[\w<>*]+)*(?:=[^`\s]*)?)`", _CODE.sub("", page.read_text())):
        key, equals, value = word.partition("=")
        root, _, rest = key.partition(".")
        if root not in _ROOTS or _FILES.fullmatch(word):
            continue
        if rest:
            assert is_key(key), word
        elif equals and (ROOT / "configs" / root).is_dir():
            assert not value or (ROOT / "configs" / root / f"{value}.yaml").exists(), word
        elif equals and value.strip("."):
            assert composed(word, "load=x", "predict.path=x"), word


def test_a_key_that_does_not_exist_is_found():
    assert [key for key in ("bn.snyc", "evals.*", "init.<subnet>.pth", "nope") if is_key(key)] == []


@pytest.mark.slow
def test_the_reference_has_every_public_name_and_no_leftovers_of_markup(tmp_path):
    pytest.importorskip("pdoc")
    done = run([sys.executable, "-W", "error::UserWarning:pdoc", "docs/reference.py", str(tmp_path)])
    page = (tmp_path / "syncbn.html").read_text()
    assert done.split() == [str(tmp_path / "index.html")]
    for name in syncbn.__all__:
        assert f'<section id="{name}">' in page
        assert f'href="#{name}"' in page
    text = page.partition("<body>")[2]
    assert "<table>" in text
    assert not re.search(r"<p>[^<]*(::|=====|\| )", text)


def run(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("program", ["own_loop", "lightning_loop", "accelerate_loop"])
def test_a_loop_prints_the_same_at_one_and_two_ranks(program):
    pytest.importorskip(program.removesuffix("_loop") if program != "own_loop" else "torch")
    alone, pair = (run(warm_command(f"docs/{program}.py", num_ranks=num_ranks)) for num_ranks in (0, 2))
    numbers = [[float(number) for number in re.findall(r"-?\d+\.\d+", text)] for text in (alone, pair)]
    assert len(numbers[0]) == 4
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
    assert numbers[0][0] > 0.9


def test_every_test_that_the_documentation_names_exists():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    defined = {name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named
    assert named <= defined
