"""What a model gets wrong, from mistakes.json: the confusion of classes, and the most wrong validation samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from syncbn.report.runs import Run, shorten
from syncbn.report.tables import each, safe, table

MOST_CLASSES = 20  # of a matrix that is shown whole; of more classes, the pairs that are confused most often
MOST_BYTES = 1_500_000  # of the pictures of a page; each run has an equal share
_NUM_PAIRS = 15
_PNG = re.compile(r"iVBORw0KGgo[A-Za-z0-9+/]+={0,2}")  # the beginning of every PNG
_ABSENT = (
    '<p class="absent">No mistakes were recorded (mistakes.json). A run whose targets are classes writes them at its'
    " end, and so does task=eval.</p>"
)
_Counts = dict[tuple[int, int], int]  # of samples or pixels, by class and predicted class


def gallery(runs: Sequence[Run]) -> str:
    """The section, as HTML."""
    return each(runs, lambda run: _of_run(run, MOST_BYTES // len(runs)))


def _of_run(run: Run, most_bytes: int) -> str:
    content = run.mistakes
    if content is None:
        return _ABSENT
    names = [str(name) for name in content["classes"]] if isinstance(content.get("classes"), list) else []
    counts = _counts(content.get("confusion"))
    examples = [one for one in _list(content.get("examples")) if isinstance(one, dict)]
    has_masks = any("dice" in one for one in examples)
    parts = [f"<p>{safe(_head(content, has_masks))}</p>"]
    if counts:
        num_classes = max(len(names), *(1 + max(pair) for pair in counts))
        whole = num_classes <= MOST_CLASSES
        counted = "pixels" if has_masks else "samples"
        parts.append(_matrix(counts, num_classes, names, counted) if whole else _pairs(counts, names, counted))
    shown, used = [], 0
    for one in examples:
        figure = _mask(one) if has_masks else _example(one, names)
        used += len(figure)
        if used > most_bytes:
            break
        shown.append(figure)
    if shown:
        parts.append(f"<h3>{safe(_caption(has_masks))}</h3>{_legend(content.get('colors'), names)}")
        parts.append(f'<div class="examples">{"".join(shown)}</div>')
    return "".join(parts)


def _head(content: dict[str, Any], has_masks: bool) -> str:
    wrong, total = content.get("num_wrong"), content.get("num_samples")
    what = "another foreground than the model predicts" if has_masks else "taken for another class"
    step = content.get("step")
    return (
        f"Wrong: {wrong} of {total} validation samples ({what}), by the weights of step {step}."
        if isinstance(total, int) and isinstance(wrong, int)
        else "How many validation samples are wrong is not on record."
    )


def _caption(has_masks: bool) -> str:
    if has_masks:
        return (
            "The worst by Dice over the foreground classes (all but 0): image, truth, prediction; gray does not count"
        )
    return "The most wrong, by the probability that the model gives to their label"


def _legend(colors: Any, names: Sequence[str]) -> str:
    """The colors of the classes of masks; empty without any, or for more than fit."""
    given = [one for one in _list(colors) if isinstance(one, str) and re.fullmatch("#[0-9a-f]{6}", one)]
    if not 0 < len(given) <= MOST_CLASSES:
        return ""
    swatches = (
        f'<span class="swatch" style="background:{one}"></span>{_name(k, names)}' for k, one in enumerate(given)
    )
    return f"<p>{' &nbsp; '.join(swatches)}</p>"


def _counts(entries: Any) -> _Counts:
    """The entries of the confusion matrix, without those that are none."""
    found: _Counts = {}
    for entry in _list(entries):
        if isinstance(entry, list) and len(entry) == 3 and all(type(part) is int and part >= 0 for part in entry):
            found[entry[0], entry[1]] = entry[2]
    return found


def _matrix(counts: _Counts, num_classes: int, names: Sequence[str], counted: str) -> str:
    """The matrix with a row for each class; the depth of a cell's color is its share of the row."""
    classes = range(num_classes)
    rows = []
    for truth in classes:
        total = sum(counts.get((truth, k), 0) for k in classes)
        right = counts.get((truth, truth), 0)
        cells = [_cell(counts.get((truth, k), 0), total, k == truth) for k in classes]
        recall = f"<td>{right / total:.3f}</td>" if total else "<td></td>"
        rows.append(f"<tr><th>{_name(truth, names)}</th>{''.join(cells)}{recall}</tr>")
    totals = [sum(counts.get((k, predicted), 0) for k in classes) for predicted in classes]
    precision = "".join(
        f"<td>{counts.get((k, k), 0) / total:.3f}</td>" if total else "<td></td>" for k, total in enumerate(totals)
    )
    head = "".join(f"<th>{_name(k, names)}</th>" for k in classes)
    return (
        f"<p>The {counted}, a row for each class, a column for each prediction; blue is right, orange is not, the"
        ' deeper the larger its share of the row.</p><div class="wide"><table class="confusion"><thead><tr><th></th>'
        f"{head}<th>recall</th></tr></thead><tbody>{''.join(rows)}<tr><th>precision</th>{precision}<td></td></tr>"
        "</tbody></table></div>"
    )


def _cell(count: int, total: int, is_right: bool) -> str:
    if not count:
        return "<td></td>"
    color = "0,114,178" if is_right else "213,94,0"
    depth = 0.1 + 0.5 * count / total if is_right else min(0.7, 0.1 + 2 * count / total)
    return f'<td style="background:rgba({color},{depth:.2f})">{count}</td>'


def _pairs(counts: _Counts, names: Sequence[str], counted: str) -> str:
    """The pairs of classes that are confused most often, and the classes with the lowest recall."""
    totals: dict[int, int] = {}
    for (truth, _), count in counts.items():
        totals[truth] = totals.get(truth, 0) + count
    confused = sorted((-count, pair) for pair, count in counts.items() if pair[0] != pair[1])[:_NUM_PAIRS]
    often = [
        [_name(truth, names), _name(predicted, names), str(-count), f"{-count / totals[truth]:.3f}"]
        for count, (truth, predicted) in confused
    ]
    recalls = sorted((counts.get((k, k), 0) / total, k) for k, total in totals.items() if total)[:_NUM_PAIRS]
    low = [[_name(k, names), f"{recall:.3f}", str(totals[k])] for recall, k in recalls]
    return (
        '<div class="row"><div><h3>Confused most often</h3>'
        f"{table(('class', 'taken for', counted, 'share of the class'), often)}</div>"
        f"<div><h3>Lowest recall</h3>{table(('class', 'recall', 'of'), low)}</div></div>"
    )


def _example(one: dict[str, Any], names: Sequence[str]) -> str:
    said, truth = (
        f"{_name(one.get(key), names)} ({_number(one.get(probability), '.2f')})"
        for key, probability in (("prediction", "probability"), ("truth", "probability_of_truth"))
    )
    lines = f"is {truth}<br>taken for {said}<br>{_where(one)}"
    return f"<figure>{_picture(one.get('image'))}<figcaption>{lines}</figcaption></figure>"


def _mask(one: dict[str, Any]) -> str:
    pictures = "\n".join(_picture(one.get(key)) for key in ("image", "truth", "prediction"))
    caption = f"Dice {_number(one.get('dice'))}, {_where(one)}"
    return f'<figure class="mask">{pictures}<figcaption>{caption}</figcaption></figure>'


def _where(one: dict[str, Any]) -> str:
    name = one.get("name")
    if isinstance(name, str) and name:
        return f'<span title="{safe(name)}">{safe(shorten(name, 48))}</span>'
    return f"sample {safe(str(one.get('index')))}"


def _picture(content: Any) -> str:
    """An image element that holds its picture; empty for what is no PNG in base64."""
    if not isinstance(content, str) or not _PNG.fullmatch(content):
        return ""
    return f'<img alt="" src="data:image/png;base64,{content}">'


def _name(number: Any, names: Sequence[str]) -> str:
    known = isinstance(number, int) and 0 <= number < len(names)
    return safe(shorten(names[number] if known else str(number), 24))


def _number(value: Any, form: str = ".3g") -> str:
    return f"{value:{form}}" if isinstance(value, (int, float)) else "unknown"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
