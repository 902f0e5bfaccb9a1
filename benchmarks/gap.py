"""The gap between training and evaluation mode, on Fashion-MNIST: the numbers of docs/train-eval-gap.md.

python benchmarks/gap.py momentum --csv docs/data/gap.csv
python benchmarks/gap.py dropout --csv docs/data/dropout.csv

`momentum` evaluates one set of weights with the statistics of the batch, with moving averages of four momenta, and with
population statistics. The momentum has no influence on the weights, so one training serves all of them. `dropout`
measures what dropout before batch normalization layers, or after the last one, does to the variance and the accuracy.

Images are not augmented, so nothing but normalization and dropout differs between training and evaluation. Models are
trained on the training images and evaluated on the 5,000 held out. Two trainings run at a time, one thread each.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn import SyncBatchNorm, audit, convert_sync_batchnorm, precise_bn
from syncbn.nn.moments import Moments
from syncbn.training.config.data import FashionMnistConfig
from syncbn.training.data import dataset, registry
from syncbn.training.data.sampler import Sampler
from syncbn.training.models.resnet import ResnetSmall

SEEDS = (0, 1, 2)
# The learning rate at the reference batch size, and that size: the rate is proportional to the batch size, as in
# Goyal et al. 2017.
LR, REFERENCE_BATCH = 0.1, 64
POPULATION = 3200  # training samples that population statistics are computed from
Row = dict[str, str]


def load(path: Path) -> dataset.Data:
    """Loads Fashion-MNIST, without augmentation."""
    config = FashionMnistConfig(
        name="fashion_mnist", path=str(path), classes=None, train_samples=None, shift=0, flip=False
    )
    return registry.load_data(config)


def train(model: nn.Module, data: dataset.Data, batch_size: int, seed: int, steps: tuple[int, int]) -> Iterator[int]:
    """Trains by SGD with momentum, first at a constant learning rate, then at one that falls linearly towards 0.

    Args:
        steps: the number at the constant rate, and the number at the falling one.

    Yields:
        The number of steps done, after every step.
    """
    peak = LR * batch_size / REFERENCE_BATCH
    optimizer = torch.optim.SGD(model.parameters(), peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    sampler = Sampler(len(data.train), batch_size, 1, seed, 0, 1)
    hot, falling = steps
    for step in range(hot + falling):
        optimizer.param_groups[0]["lr"] = peak * min(1.0, (hot + falling - step) / (falling + 1))
        [shard] = sampler.shards(step)
        images, labels = data.train_batch(shard.index, seed, sampler.epoch_of(step), torch.float32)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        yield step + 1


@torch.no_grad()
def judge(model: nn.Module, data: dataset.Data, batch_size: int = 500) -> tuple[float, float]:
    """Accuracy and mean loss on the validation images, in the current mode of the model."""
    correct = loss = 0.0
    for index in torch.arange(len(data.val)).split(batch_size):
        images, labels = data.eval_batch(data.val, index, torch.float32)
        logits = model(images)
        correct += float((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return correct / len(data.val), loss / len(data.val)


def with_population(model: nn.Module, data: dataset.Data, batch_size: int) -> nn.Module:
    """A copy in evaluation mode with statistics of POPULATION training images, gathered in batches of this size."""
    copied = copy.deepcopy(model)
    index = torch.arange(min(POPULATION, len(data.train)))
    precise_bn(copied, (data.eval_batch(data.train, part, torch.float32)[0] for part in index.split(batch_size)))
    return copied.eval()


# Momentum

BATCH_SIZES = (4, 16, 64)
MOMENTA: dict[str, float | None] = {"0.01": 0.01, "0.1": 0.1, "0.5": 0.5, "cumulative": None}
STATISTICS = ("batch", *MOMENTA, "precise", "precise, batches of 256")
HOT, FALLING = 16_000, 8_000  # samples to train on at the constant learning rate, and at the falling one


def statistics_of(model: nn.Module) -> Tensor:
    """A copy of all running means and variances, in one vector."""
    return torch.cat([buffer for buffer in model.buffers() if buffer.is_floating_point()])


def with_statistics(model: nn.Module, vector: Tensor) -> nn.Module:
    """A copy in evaluation mode with the running statistics of `statistics_of`."""
    copied = copy.deepcopy(model)
    buffers = [buffer for buffer in copied.buffers() if buffer.is_floating_point()]
    for buffer, part in zip(buffers, vector.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part)
    return copied.eval()


def moving_averages(model: nn.Module, steps: Iterator[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields, after every step, the running statistics that each of MOMENTA would have given."""
    averages = {name: statistics_of(model) for name in MOMENTA}
    for layer in model.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.momentum = 1.0  # the buffers are then the statistics of the last batch alone
    for step in steps:
        now = statistics_of(model)
        for name, momentum in MOMENTA.items():
            averages[name].lerp_(now, momentum or 1 / step)
        yield step, averages


def measure_momentum(path: Path, scale: float, seed: int, batch_size: int) -> list[Row]:
    """Trains once; rows for all kinds of statistics, at the end of the constant learning rate and at the very end."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = load(path)
    model = convert_sync_batchnorm(ResnetSmall(1, 10, width=8, depth=1, stages=3))
    hot, falling = (max(1, math.ceil(samples * scale / batch_size)) for samples in (HOT, FALLING))
    rows = []
    for step, averages in moving_averages(model, train(model, data, batch_size, seed, (hot, falling))):
        if step in (hot, hot + falling):
            judged = {"batch": judge(copy.deepcopy(model).train(), data, batch_size)}
            judged |= {name: judge(with_statistics(model, vector), data) for name, vector in averages.items()}
            judged |= {"precise": judge(with_population(model, data, batch_size), data)}
            judged |= {"precise, batches of 256": judge(with_population(model, data, 256), data)}
            moment = "height" if step == hot else "end"
            for name, (accuracy, loss) in judged.items():
                rows.append(row(seed=seed, batch_size=batch_size, lr=moment, statistics=name, accuracy=accuracy,
                                loss=loss))  # fmt: skip
    return rows


def momentum_tables(rows: list[Row]) -> Iterator[str]:
    """Yields a Markdown table of the accuracy and one of the loss, with a line for each batch size and time."""
    for number in ("accuracy", "loss"):
        yield f"\n{number}\n\n| samples per batch | learning rate | {' | '.join(STATISTICS)} |"
        yield "|---" * (len(STATISTICS) + 2) + "|"
        for size, moment in product(BATCH_SIZES, ("height", "end")):
            cells = [spread(rows, number, batch_size=str(size), lr=moment, statistics=name) for name in STATISTICS]
            yield f"| {size} | at its {moment} | {' | '.join(cells)} |"


# Dropout

PLACES = ("nowhere", "behind the last BN", "in front of convolutions", "in front of each BN")
RATES = (0.2, 0.5)


def network(place: str, rate: float) -> nn.Module:
    """Three convolutions, each with BN and ReLU, and a linear head; dropout in one of PLACES."""
    parts: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(((1, 16), (16, 32), (32, 64))):
        if place == "in front of convolutions" and number > 0:
            parts.append(nn.Dropout(rate))
        parts.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        if place == "in front of each BN":
            parts.append(nn.Dropout(rate))
        parts += [nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if place == "behind the last BN":
        parts.append(nn.Dropout(rate))
    return convert_sync_batchnorm(nn.Sequential(*parts, nn.Linear(64, 10)))


def variance_shift(model: nn.Module, data: dataset.Data) -> list[float]:
    """For each BN layer the variance of its input in evaluation over its running variance; median over channels."""
    seen: dict[SyncBatchNorm, Moments] = {}

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, SyncBatchNorm)
        new = Moments.of(inputs[0])
        seen[layer] = seen[layer] + new if layer in seen else new

    handles = [layer.register_forward_pre_hook(look) for layer in model.modules() if isinstance(layer, SyncBatchNorm)]
    judge(model.eval(), data)
    for handle in handles:
        handle.remove()
    return [float((moments.var / layer.running_var).median()) for layer, moments in seen.items()]


def measure_dropout(path: Path, scale: float, seed: int, place: str, rate: float) -> list[Row]:
    """Trains once; returns one row: variance ratios, accuracy and loss, and findings of the audit."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = load(path)
    model = network(place, rate)
    steps = tuple(max(1, math.ceil(samples * scale / 64)) for samples in (HOT, FALLING))
    for _ in train(model, data, 64, seed, (steps[0], steps[1])):
        pass
    shifts = variance_shift(model, data)
    before, after = judge(model.eval(), data), judge(with_population(model, data, 64), data)
    findings = sum(finding.rule == "dropout-before-bn" for finding in audit(model.train()))
    ratios = {f"shift_{number}": shift for number, shift in enumerate(shifts, 1)}
    return [row(seed=seed, place=place, rate=rate, **ratios, accuracy=before[0], loss=before[1],
                precise_accuracy=after[0], precise_loss=after[1], findings=findings)]  # fmt: skip


def dropout_table(rows: list[Row]) -> Iterator[str]:
    """Yields a Markdown table with a line for each place and rate."""
    numbers = ("shift_1", "shift_2", "shift_3", "accuracy", "precise_accuracy", "loss", "precise_loss")
    yield "\n| dropout | rate | variance, BN 1 | BN 2 | BN 3 | accuracy | precise | loss | precise | audit |"
    yield "|---" * 10 + "|"
    for place, rate in dropouts():
        mine = [one for one in rows if (one["place"], one["rate"]) == (place, str(rate))]
        cells = [spread(mine, number) for number in numbers]
        yield f"| {place} | {rate or ''} | {' | '.join(cells)} | {mine[0]['findings']} |"


def dropouts() -> list[tuple[str, float]]:
    """The places of dropout with their rates; 0 where there is none."""
    return [(PLACES[0], 0.0), *product(PLACES[1:], RATES)]


# For both tables


def row(**values: object) -> Row:
    """A row of the CSV file; floats other than the rate have four decimals."""
    return {key: f"{value:.4f}" if isinstance(value, float) and key != "rate" else str(value)
            for key, value in values.items()}  # fmt: skip


def spread(rows: list[Row], number: str, **where: str) -> str:
    """Mean and standard deviation of a column over the seeds, of the rows that match `where`."""
    values = [float(one[number]) for one in rows if all(one[key] == value for key, value in where.items())]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


Case = tuple[Callable[..., list[Row]], tuple[object, ...]]


def run(case: Case) -> list[Row]:
    """Runs one training; a worker process calls it."""
    function, arguments = case
    return function(*arguments)


def main() -> None:
    """Runs all trainings of a table, writes the CSV file, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("momentum", "dropout"))
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--path", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--scale", type=float, default=1.0, help="a share of the training, for a try")
    arguments = parser.parse_args()
    same = (arguments.path, arguments.scale)
    cases: list[Case] = (
        [(measure_momentum, (*same, seed, size)) for seed in arguments.seeds for size in BATCH_SIZES]
        if arguments.table == "momentum"
        else [(measure_dropout, (*same, seed, *one)) for seed in arguments.seeds for one in dropouts()]
    )
    rows: list[Row] = []
    with (
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as two,
        arguments.csv.open("w", newline="", encoding="utf-8") as file,
    ):
        for of_one in two.map(run, cases):
            writer = csv.DictWriter(file, list(of_one[0]), lineterminator="\n")
            if not rows:
                writer.writeheader()
            writer.writerows(of_one)
            file.flush()  # keeps the finished rows if a later training fails
            rows += of_one
    print(f"torch {torch.__version__}, {len(arguments.seeds)} seeds")
    print("\n".join((momentum_tables if arguments.table == "momentum" else dropout_table)(rows)))


if __name__ == "__main__":
    main()
