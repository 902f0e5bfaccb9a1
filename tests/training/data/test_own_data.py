"""Mistakes in a data set of one's own: one line that names the key, the split and the index."""

import pytest
import torch

from syncbn.training.config.errors import ConfigError, SampleError
from syncbn.training.data.custom import LabelRange
from syncbn.training.launch.explain import is_of_one_rank
from tests.training.jobs import start

MINE = """
import torch

class Part(torch.utils.data.Dataset):
    def __init__(self, fault=None, at=-1):
        self.fault, self.at = fault, at

    def __len__(self):
        return 24

    def __getitem__(self, index):
        image, label = torch.full((3, 6, 6), float(index % 3)), index % 3
        if index == self.at:
            if self.fault == "raises":
                raise OSError("row 7 is damaged")
            image, label = {"shape": (image[:, :4], label), "label": (image, 3), "-1": (image, -1)}[self.fault]
        return image, label

class Data:
    num_classes = 3

    def __init__(self, fault=None, split="train"):
        for name in ("train", "val", "test"):
            setattr(self, name, Part(fault, 7) if name == split else Part())
"""
FAULTS = [
    ("raises", "train", "raises OSError: row 7 is damaged; repair or leave out that sample"),
    ("shape", "train", "an image of shape (3, 4, 6), that of "),
    ("label", "train", "the label 3, expected 0 to 2; correct it, or leave such labels out with loss.ignore_index=3"),
    ("-1", "val", "the label -1, expected 0 to 2; correct it"),
]


def overrides(module, fault, split):
    data = ("data=custom", f"data._target_={module}.Data", f"+data.fault='{fault}'", f"+data.split={split}")
    return (*data, "model.width=2", "model.stages=1", "batch_size=6", "duration=1ep", "tracker=none", "run=a")


@pytest.mark.parametrize(("fault", "split", "text"), FAULTS)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_it_is_named_by_key_split_and_index(job, tmp_path, fault, split, text, workers):
    (tmp_path / "mine_of_own_data.py").write_text(MINE)
    with pytest.raises(SampleError) as error:
        job(*overrides("mine_of_own_data", fault, split), f"data.workers={workers}")
    where = f"data._target_=mine_of_own_data.Data: {split}["
    assert str(error.value).startswith(where)
    assert fault == "shape" or f"{split}[7]: " in str(error.value)
    assert text in str(error.value)


def test_the_rank_that_meets_it_reports_it_before_its_peers_fail():
    assert is_of_one_rank(SampleError("data: train[7]: ..."))
    assert not is_of_one_rank(ConfigError("data.path: ..."))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "split", "workers"), [("raises", "train", 0), *((fault, split, 1) for fault, split, _ in FAULTS)]
)
def test_it_is_one_line_where_only_one_of_two_ranks_meets_it(tmp_path, fault, split, workers):
    (tmp_path / "mine_of_own_data.py").write_text(MINE)
    done = start(tmp_path, *overrides("mine_of_own_data", fault, split), f"data.workers={workers}", num_ranks=2)
    assert done.returncode == 1, done.stderr
    ours = done.stderr.split("Traceback")[0]  # what follows is torchrun's own
    assert "torch/distributed/elastic" in done.stderr[len(ours) :], done.stderr
    assert "train.py" not in done.stderr[len(ours) :].split("ChildFailedError")[0].replace("  train.py FAILED", "")
    lines = [line for line in ours.splitlines() if "Data: " in line]
    assert len(lines) == 1, done.stderr
    assert f": data._target_=mine_of_own_data.Data: {split}[" in lines[0]


def test_labels_in_memory_are_looked_at_at_once(job, tmp_path):
    (tmp_path / "mine_in_memory.py").write_text(
        "import torch\n"
        "from syncbn.training.data.dataset import Split\n"
        "from syncbn.training.data.images import ImageData\n"
        "def data():\n"
        "    parts = [Split(torch.rand(12, 3, 6, 6), torch.arange(12) % 3) for _ in range(3)]\n"
        "    parts[1].labels[5] = -1\n"
        "    return ImageData(*parts, 3, 0, False)\n"
    )
    common = ("data=custom", "data._target_=mine_in_memory.data", "model.width=2", "duration=1", "tracker=none")
    with pytest.raises(ConfigError, match=r"^data._target_=mine_in_memory.data: val\[5\]: the label -1, expected 0 to"):
        job(*common, "run=a")


def test_the_range_of_labels_leaves_out_what_is_ignored():
    labels = torch.tensor([[0, 2], [255, 1], [1, 3]])
    assert LabelRange(3).first_outside(labels) == (1, 255)
    assert LabelRange(3, 255).first_outside(labels) == (2, 3)
    assert LabelRange(4, 255).first_outside(labels) is None


def test_a_folder_without_images_says_what_an_image_is(job, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.heic").write_text("")
    with pytest.raises(ConfigError, match=r"^data.path: no image in the directories a, b of .*extension \(.bmp, .gif"):
        job("data=image_folder", f"data.path={tmp_path / 'photos'}", "run=a")
