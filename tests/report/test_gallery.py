"""The section on what a model gets wrong shows what mistakes.json holds, and takes it for data."""

import json
import re

import pytest

pytest.importorskip("bokeh")

from syncbn.report import gallery as module
from syncbn.report.gallery import gallery
from syncbn.report.runs import read_runs

PNG = "iVBORw0KGgo" + "A" * 100
CONTENT = {"step": 7, "num_samples": 10, "num_wrong": 3, "classes": ["cat", "dog<b>"],
           "confusion": [[0, 0, 5], [0, 1, 3], [1, 1, 2]]}  # fmt: skip
EXAMPLE = {"index": 4, "name": "photos/cat/1.jpg", "truth": 0, "prediction": 1, "probability_of_truth": 0.02,
           "probability": 0.9, "image": PNG}  # fmt: skip


def section(*directories, **content):
    for directory in directories:
        directory.mkdir()
        (directory / "metrics.jsonl").write_text("")
        (directory / "mistakes.json").write_text(json.dumps(CONTENT | content))
    return gallery(read_runs(directories))


def test_the_matrix_has_counts_recall_and_precision(tmp_path):
    text = section(tmp_path / "a")
    assert "Wrong: 3 of 10 validation samples (taken for another class), by the weights of step 7." in text
    cells = [re.findall(">([^<]*)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", text)]
    assert cells == [
        ["", "cat", "dog&lt;b&gt;", "recall"],
        ["cat", "5", "3", "0.625"],
        ["dog&lt;b&gt;", "", "2", "1.000"],
        ["precision", "1.000", "0.400", ""],
    ]


def test_of_many_classes_the_pairs_that_are_confused_most_and_the_lowest_recall_are_shown(tmp_path):
    confusion = [[k, k, 10 + k] for k in range(30)] + [[29, 3, 9], [4, 5, 10]]
    text = section(tmp_path / "a", confusion=confusion, classes=[])
    assert text.index("<td>4</td><td>5</td><td>10</td><td>0.417</td>") < text.index("<td>29</td><td>3</td><td>9</td>")
    assert "<td>4</td><td>0.583</td><td>24</td>" in text


def test_examples_say_what_they_are_what_they_were_taken_for_and_where_they_are(tmp_path):
    text = section(tmp_path / "a", examples=[EXAMPLE])
    assert "is cat (0.02)<br>taken for dog&lt;b&gt; (0.90)<br>" in text
    assert 'title="photos/cat/1.jpg"' in text
    assert text.count("<img") == text.count(f'src="data:image/png;base64,{PNG}"') == 1


def test_masks_are_image_truth_and_prediction(tmp_path):
    masks = {"index": 2, "name": "", "dice": 0.25, "image": PNG, "truth": PNG, "prediction": PNG}
    text = section(tmp_path / "a", examples=[masks], colors=["#000000", "#0072b2"])
    assert text.count("<img") == 3
    assert "Dice 0.25, sample 2" in text
    assert "background:#0072b2" in text


def test_pictures_of_all_runs_have_a_limit_together(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 2500)
    text = section(tmp_path / "a", tmp_path / "b", examples=[EXAMPLE] * 12)
    assert text.count("<img") == 2 * text.split("<h3>b</h3>")[1].count("<img") > 0
    assert len("".join(re.findall("<figure.*?</figure>", text))) <= 2500


@pytest.mark.parametrize("image", ['"><script>alert(1)</script>', "https://example.com/x.png", 3, None, PNG + '"'])
def test_what_is_no_picture_is_left_out(tmp_path, image):
    text = section(tmp_path / "a", examples=[EXAMPLE | {"image": image, "name": "<i>"}])
    assert not re.search("<img|<script|<i>", text)
    assert "taken for" in text


@pytest.mark.parametrize("value", [3, None, "x", [[1]], [{"index": {}}], [[-1, 0, 2], [0, 10**9, 1], [0, 1, "2"]]])
def test_damaged_parts_are_left_out(tmp_path, value):
    broken = dict.fromkeys(("confusion", "examples", "classes", "colors", "num_samples", "step"), value)
    assert "validation samples" in section(tmp_path / "a", **broken)


def test_without_the_file_it_says_once_what_writes_it(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    assert gallery(read_runs([tmp_path / "a", tmp_path / "b"])).count("task=eval") == 1
