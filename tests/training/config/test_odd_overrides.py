"""Three hundred odd overrides, each taken as train.py takes it: a checked configuration, or one line."""

import copy
import os
import random

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from syncbn.training.config.keys import TASKS
from syncbn.training.config.parsing import apply_overrides, parse, to_dict
from syncbn.training.launch import overrides, resolvers
from syncbn.training.launch.callbacks import Guard
from syncbn.training.launch.explain import clear_errors
from syncbn.training.launch.known_keys import known_keys
from tests.training.jobs import ROOT, compose_config

GROUPS = sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir() and path.name != "hydra")
CHOICES = sorted({path.stem for group in GROUPS for path in (ROOT / "configs" / group).glob("*.yaml")})
_KEYS = r"""
    freeze.a freeze.a.match freeze.a.until init.a init.backbone.path metrics.f1 metrics.f1._target_ data._target_
    model._target_ optimizer.lr.x hydra.run hydra.run.dir hydra.sweep.dir hydra.job.chdir hydra.verbose hydra.nope nope
    task.x data@model model@_global_ . a.b.c optimizer[0]
"""
_VALUES = r"""
    null true no 0 -1 1 0x10 1_000 1e400 1e-400 nan NaN inf -inf 5ep 0ep 10min 1e3ep 3x ??? [] {} [1,2] [0,0] [[[1]]]
    {a:1} {a:{b:[1,{c:null}]}} {match:backbone} {_target_:os.getcwd} {1:2} [a,null] a,b 1,2,3 range(3) choice(a,b)
    interval(0,1) shuffle(1,2) glob(*) sort(3,1) cast(1) int(a) json_str(1) ' " \ \' a\ ${seed} ${nope} ${oc.env:NOPE_X}
    ${oc.env:HOME} ${ $ ${seed ${${seed}} ${syncbn.nope:} ${syncbn.run_dir:a,b} ${.name} ${..x} ${now:} ${run} $(id)
    `id` a=b = == # % & * &a !!python/object:os.system .. ../x / ~ ~/x -x -- a/b /dev/null /proc/x world fp16
"""
KEYS = [*known_keys(), *GROUPS, *_KEYS.split(), "\u00e4"]
ODD = [*_VALUES.split(), "", " ", "a: b", "- a", "'a b'", "\"a 'b'\"", "\t", "a\nb", "\u0000", "\u0007", "\u00e9",
       "\u65e5\u672c", "\U0001f600", "\u202e", "1" * 400, "-" + "9" * 40, "a" * 300, *TASKS]  # fmt: skip
PREFIXES = ["", "", "", "", "+", "++", "~", "+~", "-", "@"]
KNOWN = ["~data=1000000", "data=null", "optimizer=[???]", "@hydra.sweep.dir=-1", "+metrics=[[[1]]]", "hydra=1", "~run",
         "hydra/help=1", "~task", "~hydra.run", "output_dir=[a]", "share={a:1}", "run={a:1}", "run=[1]"]  # fmt: skip


def odd_overrides(number):
    """So many overrides, the same at every call, out of keys of the schema and values that nobody means."""
    draw = random.Random(22)
    shapes = ["{0}{1}={2}"] * 8 + ["{0}{1}", "~{1}={2}", "{1}=[{2}]", "{1}={{a:{2}}}", "{1}.{1}={2}", "{2}"]
    made = list(KNOWN)
    while len(made) < number:
        text = draw.choice(shapes).format(draw.choice(PREFIXES), draw.choice(KEYS), draw.choice([*ODD, *CHOICES[:8]]))
        if not text.startswith("-"):  # a flag, for argparse to complain about
            made.append(text)
    return made


@pytest.fixture(scope="module")
def stored():
    """A stored configuration, as a task with `load` finds it."""
    return to_dict(compose_config())


@pytest.fixture(autouse=True)
def _configs(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load, loaded, mask = ConfigRepository.load_config, {}, os.umask(0o022)

    def load_once(self, config_path):
        """Reads a file of `configs/` once: most of the time of a composition."""
        if config_path not in loaded:
            loaded[config_path] = load(self, config_path)
        return copy.deepcopy(loaded[config_path])

    monkeypatch.setattr(ConfigRepository, "load_config", load_once)
    resolvers.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield
    os.umask(mask)


def take(given, stored):
    """What train.py does with its arguments before a task runs."""
    try:
        config = compose(
            "train", overrides._hold_back(list(map(overrides.open_override, given))), return_hydra_config=True
        )
        Guard().on_run_start(config)
        parse(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
        if held_back := overrides.held_back():
            parse(apply_overrides(stored, held_back))
    finally:
        overrides._held_back.clear()


def failures(commands, stored, capsys):
    """The commands that end with anything but success, or exit code 2 and one line that begins with `error: `."""
    found = []
    for given in commands:
        code = 0
        try:
            with clear_errors():
                take(given, stored)
        except SystemExit as left:
            code = left.code
        except Exception as error:
            found.append((given, repr(error)))
        lines = capsys.readouterr().err.splitlines()
        explained = code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        if not explained and (code, lines) != (0, []):
            found.append((given, code, lines))
    return found


@pytest.mark.slow
def test_no_odd_override_ends_with_a_traceback(stored, capsys):
    assert failures([[text] for text in odd_overrides(300)], stored, capsys) == []


@pytest.mark.slow
def test_nor_does_one_for_a_stored_configuration(stored, capsys):
    assert failures([["task=eval", "load=nowhere", text] for text in odd_overrides(300)], stored, capsys) == []
