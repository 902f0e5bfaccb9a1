"""What the README and docs/commands.md say is true: the example runs, commands compose, make targets exist."""

import re
import shlex

import pytest

from syncbn.training.config.keys import TASKS
from tests.training.jobs import ROOT, compose_config

README = (ROOT / "README.md").read_text()
TASKS_OF_ALL = README.split("## Common tasks")[1] + (ROOT / "docs/commands.md").read_text()
COMMANDS = list(
    dict.fromkeys(re.findall(r"`(?:torchrun --nproc-per-node \d )?(?:python )?train\.py([^`]*)`", TASKS_OF_ALL))
)


def test_the_example_runs():
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert not names["model"][1].stats_frozen


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 14


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command):
    arguments = [argument for argument in shlex.split(command) if not argument.startswith("-") and argument != "job"]
    if any("," in argument and "[" not in argument for argument in arguments):
        arguments = [argument.split(",")[0] for argument in arguments]  # a sweep: its first job
    assert compose_config(*arguments).task in TASKS


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 120
