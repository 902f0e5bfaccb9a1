"""The report shows what run directories hold, says what they do not, needs no network, and takes any text as text."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("bokeh")

from syncbn.report.heatmaps import _grid
from syncbn.report.runs import read_runs, shorten_name
from syncbn.report.timeline import _bars, _rolled_up
from syncbn.report.write import add_arguments, command, write_report

LAYERS = ("backbone.bn1", "backbone.bn2")


def records(num_steps=5, layers=LAYERS):
    for step in range(10, 10 * num_steps + 1, 10):
        record = {"step": step, "epoch": step / 10, "train/loss": 1 / step, "train/lr": 0.1}
        record |= {"train/samples_per_second": 1000.0, "val/loss": 2 / step, "val/accuracy": 1 - 1 / step}
        for layer in layers:
            record |= {f"bn/{layer}/drift": 0.1, f"bn/{layer}/weight_abs": 1.0, f"bn/{layer}/dead_channels": 0.0}
        yield record


def make_run(path, lines, **files):
    path.mkdir(parents=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    for name, content in files.items():
        is_text = isinstance(content, str)
        suffix = ".yaml" if name == "config" else ".json"
        (path / f"{name}{suffix}").write_text(content if is_text else json.dumps(content), encoding="utf-8")
    return path


def write(*runs):
    path = runs[0].parent / "report.html"
    write_report(runs, path)
    return path.read_text(encoding="utf-8")


def own(page):
    """The page without Bokeh's scripts, which come before the body."""
    return page[page.rindex("<body>\n<h1>") :]


def num_plots(page):
    return page.count('<div id="plot-')


def test_a_full_run_has_every_figure(tmp_path):
    vectors = {kind: [0.5, 1.0, 2.0] for kind in ("running_mean", "running_var", "weight", "bias", "batch_mean")}
    lines = [{"step": 0, "freeze/backbone.bn1/stats": 1.0}]
    lines += [record | {"bn/backbone.bn1/between_rank_share": 0.2} for record in records()]
    run = make_run(tmp_path / "run", lines, layers={"step": 50, "layers": dict.fromkeys(LAYERS, vectors)})
    page = own(write(run))
    # loss, accuracy, learning rate, throughput; four heatmaps; the timeline; four histograms
    assert num_plots(page) == 4 + 4 + 1 + 4
    assert "0.98" in page  # the last val/accuracy
    assert "No audit was recorded" in page


def test_what_is_absent_is_said_and_draws_nothing(tmp_path):
    page = own(write(make_run(tmp_path / "empty", [])))
    assert num_plots(page) == 0
    for text in ("No between-rank share was recorded", "No freeze switch", "No configuration", "No environment"):
        assert text in page


def failed(reason="loss is not finite <at> step 3", overrides=("run=a b",)):
    return {"step": -1, "metrics": {}, "overrides": list(overrides), "stopped": False, "failed": reason}


def test_a_failed_run_begins_with_the_reason_and_what_to_do_and_has_no_empty_sections(tmp_path):
    page = own(write(make_run(tmp_path / "run", [], config="seed: 1\n", summary=failed())))
    assert page.index("run failed.</b> loss is not finite &lt;at&gt; step 3") < page.index("<h2>")
    assert "the same command begins anew" in page
    assert "<pre>train.py &#x27;run=a b&#x27;</pre>" in page
    assert re.findall("<h2>(.*?)</h2>", page) == ["Overview", "Configuration"]


def test_a_failed_run_with_a_checkpoint_goes_on_and_shows_what_it_recorded(tmp_path):
    run = make_run(tmp_path / "run", records(1), summary=failed())
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_00000010.pt").touch()
    page = own(write(run))
    assert "goes on from the last checkpoint" in page
    assert num_plots(page) == 4 + 3
    assert "was recorded" not in page


def test_runs_beside_a_failed_one_still_say_what_they_did_not_record(tmp_path):
    page = own(write(make_run(tmp_path / "a", [], summary=failed()), make_run(tmp_path / "b", [])))
    assert page.count("No audit was recorded") == 1


def test_text_from_files_is_never_markup(tmp_path):
    evil = "</script><script>alert(1)</script><b>"
    finding = dict.fromkeys(("layer", "rule", "severity", "why", "remedy"), evil)
    run = make_run(
        tmp_path / "<script>alert(0)",
        [
            record | {f"freeze/{evil}/stats": 1.0, f"val/{evil}": 0.5, "val/$$x$$": 0.5}
            for record in records(layers=(evil, "naïve $$x$$"))
        ],
        config=f"key: '{evil}'\n",
        environment={evil: evil},
        audit={"findings": [finding]},
        layers={"step": 1, "layers": {evil: {"weight": [1.0]}}},
    )
    other = make_run(tmp_path / "other", records(), config="key: 1\n")
    page = own(write(run, other))
    assert page.count("<script") == 1  # the one that embeds the plots
    assert "<b>" + "</script" not in page
    assert "alert(0)" in page
    assert '"axis_label": "$ $x$ $"' in page  # or Bokeh would take it for TeX


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = write(make_run(tmp_path / "run", records()))
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
    assert not re.search(r"@import|url\(\s*['\"]?https?:", own(page))
    assert "<script" in page
    assert len(page) < 3_000_000


def test_the_same_files_give_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run", records())
    assert write(run) == write(run)


def test_a_later_record_wins_and_damaged_lines_are_left_out(tmp_path):
    lines = [
        {"step": 1, "train/loss": 5.0, "train/lr": 0.1},
        {"step": 1, "train/loss": "nan"},
        "[1]",
        '{"step": 2, "tr',
    ]
    (run,) = read_runs([make_run(tmp_path / "run", lines)])
    assert str(run.metrics["train/loss"].points[1]) == "nan"
    assert run.metrics["train/lr"].points == {1: 0.1}
    assert run.remarks == ["metrics.jsonl: 2 damaged line(s) left out"]
    page = own(write(run.path))
    assert "No finite train/loss or val/loss was recorded." in page


@pytest.mark.parametrize("name", ["layers", "audit", "environment", "summary"])
@pytest.mark.parametrize("content", ["{", "[1]", '{"layers": 3, "findings": 3, "metrics": [1], "overrides": 1}'])
def test_damaged_files_do_not_stop_it(tmp_path, name, content):
    page = write(make_run(tmp_path / "run", records(), **{name: content}))
    assert num_plots(page) >= 4  # the curves are there all the same


@pytest.mark.parametrize("name", ["layers.json", "config.yaml", "environment.json"])
def test_a_pipe_in_place_of_a_file_is_a_remark_and_is_not_waited_for(tmp_path, name):
    path = make_run(tmp_path / "run", records())
    os.mkfifo(path / name)
    (run,) = read_runs([path])
    assert run.remarks == [f"{name} is no regular file"]


def test_a_configuration_with_aliases_is_not_unfolded(tmp_path):
    text = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 60))
    (run,) = read_runs([make_run(tmp_path / "run", records(), config=text)])
    assert run.flat_config() == {}


def test_a_step_that_is_no_position_on_an_axis_is_a_damaged_line(tmp_path):
    steps = [{"step": step, "train/loss": 1.0} for step in (-1, 10**400)]
    (run,) = read_runs([make_run(tmp_path / "run", steps)])
    assert run.remarks == ["metrics.jsonl: 2 damaged line(s) left out"]


def test_one_layer_and_one_step(tmp_path):
    page = write(make_run(tmp_path / "run", records(1, layers=("schicht.ü",))))
    assert num_plots(page) == 4 + 3


def test_runs_side_by_side_list_the_keys_in_which_they_differ(tmp_path):
    a = make_run(tmp_path / "a", records(), config="optimizer: {lr: 0.1}\nseed: 7\n")
    b = make_run(tmp_path / "b", records(3), config="optimizer: {lr: 0.2}\nseed: 7\n")
    page = own(write(a, b))
    assert page.index("<tr><td>optimizer.lr</td><td>0.1</td><td>0.2</td></tr>") < page.index("<h2>Curves")
    assert "solid: train/loss" in page
    assert "dashed: val/loss" in page
    assert "<td>seed</td>" not in page
    assert num_plots(page) == 4 + 3 * 2


def test_the_page_is_one_column_in_a_narrow_window_and_no_point_is_cut(tmp_path):
    page = own(write(make_run(tmp_path / "run", records())))
    assert '"sizing_mode":"stretch_width"' in page.replace(": ", ":")
    assert '"frame_width"' not in page
    start, end = re.search(r'"start": (-[\d.]+), "end": ([\d.]+)', page).groups()
    assert float(start) < 0
    assert float(end) > 50


def test_a_heatmap_cell_reaches_back_to_the_record_before(tmp_path):
    lines = [{"step": step, "bn/a/drift": value} for step, value in ((10, 1.0), (20, "nan"), (40, 3.0))]
    (run,) = read_runs([make_run(tmp_path / "run", lines)])
    extent, cells, was_averaged = _grid(run, ["a", "b"], "drift", 100)
    assert extent == (0, 40)
    assert [str(value) for value in cells[0]] == ["1.0", "nan", "3.0", "3.0"]
    assert [str(value) for value in cells[1]] == ["nan"] * 4
    assert not was_averaged
    extent, cells, was_averaged = _grid(run, ["a"], "drift", 2)
    assert [float(value) for value in cells[0]] == [1.0, 3.0]
    assert was_averaged


def test_modules_that_share_their_times_share_a_row_unless_a_layer_below_is_not_frozen(tmp_path):
    lines = [
        {
            "step": 0,
            "freeze/a.bn1/stats": 1.0,
            "freeze/a.bn2/stats": 1.0,
            "freeze/b.bn1/stats": 1.0,
            "bn/b.bn2/drift": 0.1,
        },
        {"step": 20, "freeze/a.bn1/stats": 0.0, "freeze/a.bn2/stats": 0.0},
        {"step": 50, "train/loss": 1.0},
    ]
    (run,) = read_runs([make_run(tmp_path / "run", lines)])
    rows = _rolled_up(_bars(run), run.layers)
    assert rows == {"a (2 modules)": {"stats": ((0.0, 20.0),)}, "b.bn1": {"stats": ((0.0, 50.0),)}}


def test_long_names_keep_what_tells_them_apart():
    names = [f"backbone.layer3.{k}.residual_branch.convolution.bn2" for k in range(20)]
    short = {shorten_name(name) for name in names}
    assert len(short) == 20
    assert max(map(len, short)) <= 34


def call(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return command(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_writes_into_the_run_and_takes_a_multirun_for_its_jobs(tmp_path, capsys):
    summary = {"step": 1, "metrics": {}, "stopped": False, "failed": ""}
    for number in (0, 1, 10):
        overrides = ["run=m", f"seed={number}"]
        make_run(tmp_path / "m" / str(number), records(), summary=summary | {"overrides": overrides})
    assert call(tmp_path / "m") == 0
    page = own((tmp_path / "m" / "report.html").read_text(encoding="utf-8"))
    assert re.findall(r"</span>(m/\d+ seed=\d+)</td>", page) == ["m/0 seed=0", "m/1 seed=1", "m/10 seed=10"]
    assert capsys.readouterr().out.strip() == str(tmp_path / "m" / "report.html")


def test_a_directory_that_is_no_run_is_one_line_and_code_2(tmp_path, capsys):
    assert call(tmp_path) == 2
    assert call(tmp_path / "absent") == 2
    run = make_run(tmp_path / "run", [])
    assert call(run, "--output", tmp_path / "no" / "report.html") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)


def test_without_bokeh_the_error_names_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh.plotting", None)
    assert call(make_run(tmp_path / "run", [])) == 2
    assert "syncbn[report]" in capsys.readouterr().err


def test_it_needs_neither_torch_nor_the_trainer():
    code = "import sys, syncbn.report.write, syncbn.report.page; print([m for m in sys.modules if m in "
    code += "('torch', 'syncbn.training', 'hydra')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
