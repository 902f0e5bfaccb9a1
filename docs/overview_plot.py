"""Draws docs/overview.png, what the project does in one picture: python docs/overview_plot.py [TARGET]."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

INK, GRAY = "#333333", "#8a8a8a"
LAYER, SURGERY, SERVICE, SIGHT = "#0072B2", "#009E73", "#D55E00", "#CC79A7"  # Okabe and Ito's
SAMPLES = (7, 5, 0)
"""Samples of each rank of the picture."""


def box(axes: Axes, left: float, bottom: float, width: float, height: float, color: str, *, title: str = "") -> None:
    """A rounded box, its title above its upper left corner's inside."""
    style = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.12", linewidth=1.6,
                           edgecolor=color, facecolor=color + "12")  # fmt: skip
    axes.add_patch(style)
    axes.text(left + 0.15, bottom + height - 0.2, title, color=color, weight="bold", fontsize=11, va="top")


def say(axes: Axes, x: float, y: float, text: str, *, center: bool = True, size: float = 8.5, color: str = INK) -> None:
    """Text below or around a point."""
    axes.text(x, y, text, fontsize=size, color=color, ha="center" if center else "left", va="center", linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    """An arrow between two points."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.4})


def draw_surgery(axes: Axes) -> None:
    """A network whose layers are exchanged, and given back."""
    box(axes, 0.1, 2.3, 2.9, 3.6, SURGERY, title="surgery")
    for y, text in ((4.75, "your network\nnn.BatchNorm2d"), (2.9, "the same network\nSyncBatchNorm")):
        box(axes, 0.5, y - 0.35, 2.1, 0.7, GRAY)
        say(axes, 1.55, y, text)
    arrow(axes, (1.2, 4.35), (1.2, 3.3), SURGERY)
    arrow(axes, (1.9, 3.3), (1.9, 4.35), SURGERY)
    say(axes, 0.72, 3.83, "convert\nfreeze\nfuse")
    say(axes, 2.4, 3.83, "revert\nunfreeze")


def draw_layer(axes: Axes) -> None:
    """Ranks that sum what they have and normalize by the whole."""
    box(axes, 3.5, 2.3, 5.0, 3.6, LAYER, title="layer")
    for rank, samples in enumerate(SAMPLES):
        x = 4.5 + 1.5 * rank
        box(axes, x - 0.62, 4.45, 1.24, 0.75, GRAY)
        say(axes, x, 4.83, f"rank {rank}\n{samples} samples")
        arrow(axes, (x, 4.4), (x, 4.02), LAYER)
        arrow(axes, (x, 3.45), (x, 3.07), LAYER)
    box(axes, 3.85, 3.5, 4.3, 0.5, LAYER)
    say(axes, 6.0, 3.75, "one all-reduce: count, sums, sums of squares")
    say(axes, 6.0, 2.72, f"mean and variance of all {sum(SAMPLES)} samples, on every rank\n(backward: one more)")


def draw_service(axes: Axes) -> None:
    """What train.py does around them."""
    box(axes, 0.1, 0.1, 8.4, 1.75, SERVICE, title="service: train.py")
    for k, (what, how) in enumerate((
        ("data", "each sample once,\ncut over the ranks"),
        ("steps", "DDP, freezing by plan,\nany loss and optimizer"),
        ("checkpoints", "resumed bit for bit,\nor at another world size"),
        ("afterwards", "evaluate, predict,\nrecalibrate, export"),
    )):  # fmt: skip
        x = 1.2 + 2.06 * k
        axes.text(x, 1.12, what, fontsize=9, weight="bold", color=INK, ha="center", va="center")
        say(axes, x, 0.65, how)
    arrow(axes, (1.55, 1.9), (1.55, 2.25), SERVICE)
    arrow(axes, (6.0, 1.9), (6.0, 2.25), SERVICE)


def draw_sight(axes: Axes) -> None:
    """What looks at them."""
    box(axes, 9.0, 0.1, 2.9, 5.8, SIGHT, title="sight")
    for y, what, how in (
        (5.0, "monitor", "what each layer's\nstatistics do"),
        (3.7, "audit", "the classic mistakes,\nby layer, with a remedy"),
        (2.4, "parity", "does it train the same\non several ranks?"),
        (1.1, "report", "curves, mistakes, what\nsynchronizing changes"),
    ):
        axes.text(10.45, y, what, fontsize=9, weight="bold", color=INK, ha="center", va="center")
        say(axes, 10.45, y - 0.45, how)
    arrow(axes, (8.95, 4.1), (8.55, 4.1), SIGHT)
    arrow(axes, (8.95, 1.0), (8.55, 1.0), SIGHT)


def draw(target: Path) -> None:
    """The picture: surgery and layer above, the service below both, sight beside all."""
    figure, axes = pyplot.subplots(figsize=(10, 5.1), layout="constrained")
    for part in (draw_surgery, draw_layer, draw_service, draw_sight):
        part(axes)
    arrow(axes, (3.05, 2.9), (3.45, 2.9), SURGERY)
    axes.set(xlim=(0, 12), ylim=(0, 6), aspect="equal")
    axes.axis("off")
    figure.savefig(target, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "overview.png")
