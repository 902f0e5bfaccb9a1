"""Programs that tests run in a warm interpreter behave as those that a user starts."""

import os
import signal
import subprocess

import pytest

from tests import warm

TIMEOUT = 60.0


@pytest.fixture
def run_script(tmp_path):
    """Runs the text of a script on the server, in `tmp_path`."""

    def run(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        script = tmp_path / "script.py"
        script.write_text(text)
        return subprocess.run(warm.command_of(str(script), *arguments), cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, **environment}, timeout=TIMEOUT)  # fmt: skip

    return run


def test_a_program_has_its_own_arguments_directory_environment_and_output(run_script, tmp_path):
    script = "import os, sys\nprint(__name__, sys.argv[1:], os.getcwd(), os.environ['OWN'])\nsys.stderr.write('e')"
    done = run_script(script, "a=1", "b c", OWN="here")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"__main__ ['a=1', 'b c'] {tmp_path} here\n", "e")


@pytest.mark.parametrize(
    ("ending", "code", "error"),
    [("sys.exit(3)", 3, ""), ("sys.exit('wrong')", 1, "wrong"), ("sys.exit()", 0, ""), ("1 / 0", 1, "ZeroDivision")],
)
def test_the_exit_code_and_the_traceback_arrive(run_script, ending, code, error):
    done = run_script(f"import sys\n{ending}")
    assert done.returncode == code
    assert error in done.stderr


def test_nothing_of_one_program_is_left_for_the_next(run_script):
    run_script("import torch, os; torch.set_default_dtype(torch.float64); os.environ['LEFT'] = 'yes'")
    assert run_script("import torch, os; print(torch.get_default_dtype(), 'LEFT' in os.environ)").stdout == (
        "torch.float32 False\n"
    )


def test_what_an_environment_says_at_import_may_not_differ(run_script):
    script = "from syncbn.nn import rank_checks"
    assert run_script(script).returncode == 0
    done = run_script(script, SYNCBN_DEBUG="yes")
    assert done.returncode == 1
    assert "start this program cold" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_program_and_its_client(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text("import threading; print('started', flush=True); threading.Event().wait()")
    client = subprocess.Popen(warm.command_of(str(script)), stdout=subprocess.PIPE, text=True)
    with client:
        assert client.stdout.readline() == "started\n"
        client.send_signal(number)
        assert client.wait(TIMEOUT) == -number
        assert client.stdout.read() == ""  # which returns when the program has ended
