"""A `_target_` that is not there is one line that says what is missing where; nothing else is printed."""

import sys

import pytest

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.instantiate import build_target

MINE = """
class Net:
    def __init__(self, width=4):
        self.width = width

def broken():
    return {}["nothing"]

constant = 3
"""


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Nett", {}, "{mine} has no 'Nett'; did you mean Net?"),
        ("zzz", {}, "{mine} has no 'zzz'; it has Net, broken"),
        ("Net.small", {}, "{mine}.Net has no 'small'"),
        ("Net", {"widht": 3}, "Net.__init__() got an unexpected keyword argument 'widht'; did you mean width?"),
        ("broken", {}, "KeyError: 'nothing' ({mine}.py, line 7)"),
        ("constant", {}, "expected a class or function, got a int; name one as {mine}.constant.Name"),
    ],
)
def test_what_a_module_lacks_and_what_its_code_raises(tmp_path, monkeypatch, capfd, name, arguments, message):
    (tmp_path / "mine_of_targets.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    target = f"mine_of_targets.{name}"
    with pytest.raises(ConfigError) as caught:
        build_target("model", {"_target_": target, **arguments})
    sys.modules.pop("mine_of_targets")
    assert str(caught.value) == f"model._target_={target}: {message.format(mine='mine_of_targets')}"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nowhere_at_all", "importing {name} fails, ModuleNotFoundError: No module named 'nowhere_at_all' "),
        ("def f(:", "importing {name} fails, SyntaxError: invalid syntax ({name}.py, line 1)"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, code, message):
    name = f"mine_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        build_target("data", {"_target_": f"{name}.Data"})
    assert message.format(name=name) in str(caught.value)
