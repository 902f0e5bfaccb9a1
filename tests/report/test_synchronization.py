"""The section on what synchronization changes judges layers by their recorded shares, and says what is not recorded."""

import json

import pytest

pytest.importorskip("bokeh")

from syncbn.report import synchronization as synchronization_module
from syncbn.report.runs import read_runs
from syncbn.report.synchronization import synchronization

OPERATORS = """
--------------------  ------------  ------------  ------------  ------------  ------------  ------------
                Name    Self CPU %      Self CPU   CPU total %     CPU total  CPU time avg    # of Calls
--------------------  ------------  ------------  ------------  ------------  ------------  ------------
       ProfilerStep*        10.00%      10.000ms        80.00%      80.000ms       8.000ms            10
    NormalizeByBatch        12.48%      72.352ms        30.00%     219.692ms       4.882ms            45
NormalizeByBatchBackward     1.00%      72.352ms        10.00%     219.692ms       4.882ms            45
--------------------  ------------  ------------  ------------  ------------  ------------  ------------
"""


def section(path, shares, config="batch_size: 64\naccumulate: 1\nbn: {group: world}\n", num_ranks=2, operators=""):
    (path / "profile").mkdir(parents=True)
    lines = [
        {"step": step} | {f"bn/{layer}/between_rank_share": values[step] for layer, values in shares.items()}
        for step in range(len(next(iter(shares.values()))))
    ]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (path / "config.yaml").write_text(config, encoding="utf-8")
    (path / "environment.json").write_text(json.dumps({"ranks": num_ranks}), encoding="utf-8")
    if operators:
        (path / "profile" / "operators.txt").write_text(operators, encoding="utf-8")
    (run,) = read_runs([path])
    return synchronization(run)


def test_layers_whose_ranks_differ_no_more_than_by_chance_need_none_and_the_collectives_are_counted(tmp_path):
    # Two ranks of 32 samples: 1 / 63 = 0.0159.
    text = section(tmp_path, {"a": [0.02, 0.01], "b": [0.4, 0.2], "c": [0.001, "nan"]})
    assert "up to 0.0159" in text
    assert "2 of 3 layers show no more" in text
    assert "Without it a step has 4 of 6 collectives less" in text
    assert text.index("<td>b</td><td>0.3</td><td>0.4</td><td>needed</td>") < text.index(
        "<td>a</td><td>0.015</td><td>0.02</td><td>not needed</td>"
    )
    assert "accuracy is not on record" in text
    assert "debug=profile measures it" in text


def test_groups_and_micro_batches_are_counted(tmp_path):
    config = "batch_size: 128\naccumulate: 2\nbn: {group: 2}\n"
    text = section(tmp_path, {"a": [0.03]}, config, num_ranks=4)
    assert "2 ranks with 16 samples each" in text
    assert "up to 0.0323" in text
    assert "4 of 4 collectives" in text


def test_few_samples_on_a_rank_need_it_whatever_the_share(tmp_path):
    text = section(tmp_path, {"a": [0.0]}, "batch_size: 8\n")
    assert "Every layer needs synchronization" in text
    assert "<td>needed</td>" in text


@pytest.mark.parametrize("config", ["", "batch_size: 64\nbn: {group: node}\n", "batch_size: many\n", "batch_size: 0\n"])
def test_without_the_number_of_samples_nothing_is_judged(tmp_path, config):
    text = section(tmp_path, {"a": [0.5]}, config)
    assert "is not on record" in text
    assert "needed</td>" not in text


def test_without_shares_it_says_what_records_them(tmp_path):
    assert "bn.sync=true" in section(tmp_path, {"a": ["nan"]})


def test_the_share_of_a_step_is_that_of_the_profile(tmp_path):
    assert "take 50% of a step" in section(tmp_path / "a", {"a": [0.5]}, operators=OPERATORS)
    assert "does not name" in section(tmp_path / "b", {"a": [0.5]}, operators=OPERATORS.replace("Normalize", "Other"))


def test_few_samples_are_those_of_the_audit():
    pytest.importorskip("torch")
    from syncbn.auditing.audit import FEW_SAMPLES

    assert synchronization_module.FEW_SAMPLES == FEW_SAMPLES
