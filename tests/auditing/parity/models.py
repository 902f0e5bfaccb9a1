"""Right models and planted faults, which new processes import."""

from __future__ import annotations

import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.training.losses.losses import CrossEntropy

cross_entropy = CrossEntropy()
masked = CrossEntropy(ignore_index=255)


def images(num=12, classes=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, 8, 8, generator=generator), torch.arange(num) % classes


class Net(nn.Module):
    """A stem and two branches that are added."""

    def __init__(self, norm=SyncBatchNorm):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = norm(4)
        self.left = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(4, 4, 1), norm(4))
        self.head = nn.Linear(4, 3)

    def features(self, x):
        x = F.relu(self.bn(self.stem(x)))
        return self.left(x) + self.right(x)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def right():
    return Net()


def torch_sync():
    return Net(nn.SyncBatchNorm)


def group_norm():
    return Net(lambda width: nn.GroupNorm(2, width))


def frozen_in_part():
    model = Net()
    model.stem.requires_grad_(False)
    model.bn.freeze()
    model.right.eval()
    return model


def unconverted_branch():
    model = Net()
    model.right[1] = nn.BatchNorm2d(4)
    return model


class Functional(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        return self.head(F.batch_norm(self.features(x), self.mean, self.var, training=True).mean((2, 3)))


class Head(nn.Module):
    """A linear layer whose input is normalized by function."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(F.batch_norm(x, None, None, training=True))


def functional():
    model = Net()
    model.head = Head()
    return model


def mean_loss(outputs, targets):
    return F.cross_entropy(outputs, targets)


def sum_loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum")


def masked_mean_loss(outputs, targets):
    return F.cross_entropy(outputs, targets, ignore_index=0)


def dropout():
    model = Net()
    model.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3))
    return model


class Dropped(Net):
    """Leaves a branch out now and then, by Python's random numbers."""

    def features(self, x):
        x = F.relu(self.bn(self.stem(x)))
        return self.left(x) + self.right(x) * (random.random() + 0.5)


class Shuffled(Net):
    """Shuffles, and puts back: draws, and nothing depends on it."""

    def forward(self, x):
        order = torch.randperm(len(x))
        return super().forward(x[order])[order.argsort()]


class Queue(nn.Module):
    """Compares features with those of earlier batches (MoCo), which a queue holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.randn(4, 16))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        output = x @ self.queue.clone()
        with torch.no_grad():
            start = int(self.pointer)
            index = (torch.arange(len(x)) + start) % 16
            queue = self.queue.clone()
            queue[:, index] = F.normalize(x.detach()).T
            self.queue.copy_(queue)
            self.pointer.fill_((start + len(x)) % 16)
        return output


def with_queue():
    model = Net()
    model.head = nn.Sequential(Queue(), nn.Linear(16, 3))
    return model


def contrastive():
    model = Net()
    model.head = nn.Linear(4, 8)
    return model


def info_nce(outputs, targets):
    """A sum over samples, each compared with all samples of the rank; no positive pairs but by label."""
    z = F.normalize(outputs)
    logits = z @ z.T / 0.5
    same = (targets[:, None] == targets[None]).to(z.dtype)
    return -(same * logits.log_softmax(1)).sum(), torch.tensor(float(len(z)))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def centred():
    model = Net()
    model.left.append(Centred())
    return model


class Unused(Net):
    """A layer that only rank 0 uses."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(4, 4)

    def features(self, x):
        x = super().features(x)
        if dist.get_rank() == 0:
            x = x + self.extra(x.mean((2, 3)))[:, :, None, None]
        return x


class Expert(Net):
    """A layer for the samples that need it, of which one rank has none."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(4, 3)

    def forward(self, x):
        y = self.features(x).mean((2, 3))
        chosen = x[:, 0, 0, 0] > 100
        output = self.head(y)
        if chosen.any():
            output = output.index_add(0, chosen.nonzero()[:, 0], self.expert(y[chosen]))
        return output


def expert_images():
    x, y = images()
    x[:2, 0, 0, 0] = 101.0
    return x, y


class Counted(nn.Module):
    """A buffer that rank 0 alone moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if dist.get_rank() == 0:
            self.steps.add_(1)
        return x


def counted():
    model = Net()
    model.left.append(Counted())
    return model


class Averaged(nn.Module):
    """A buffer fed by the samples of the rank, which training does not use."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        self.average.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x


def averaged():
    model = Net()
    model.left.append(Averaged())
    return model


def branch_and_dropout():
    model = unconverted_branch()
    model.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3))
    return model


def functional_and_queue():
    model = functional()
    model.left.append(nn.Sequential(nn.Flatten(1), nn.Linear(256, 4), Queue(), nn.Linear(16, 4), Spread()))
    return model


class Spread(nn.Module):
    def forward(self, x):
        return x[:, :, None, None]


class ByRank(Net):
    """Asks for its rank."""

    def forward(self, x):
        return super().forward(x) * (1 + dist.get_rank())


class OfSeven(Net):
    """Has the size of its batch written down."""

    def forward(self, x):
        return super().forward(x.view(-1, 7 if len(x) == 7 else 12, 3, 8, 8).flatten(0, 1))


class InFloat32(Net):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(4, 4)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)) @ self.scale)


class ByView(Net):
    def forward(self, x):
        y = self.features(x).mean((2, 3))
        return self.head(y.view(y.size(0), 1, -1)[:, 0] if len(y) else y.view(0, -1))


class Hanging(Net):
    def forward(self, x):
        if dist.get_world_size() > 1 and dist.get_rank() == 0:
            dist.barrier()
        return super().forward(x)


class LossInside(Net):
    """Returns its loss, a mean over the rank's samples, beside the outputs."""

    def forward(self, x, labels):
        outputs = super().forward(x)
        return {"loss": F.cross_entropy(outputs, labels), "outputs": outputs}


def inner_loss(outputs, targets):
    return outputs["loss"]


def unet():
    from syncbn.training.models.unet import UnetSmall

    return convert_sync_batchnorm(UnetSmall(3, 3, 4, 1))


def masks():
    x, _ = images()
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(0, 3, (12, 8, 8), generator=generator)
    y[:3] = 255
    return x, y


def resnet():
    from syncbn.training.models.resnet import ResnetSmall

    return convert_sync_batchnorm(ResnetSmall(3, 3, 8, 1, 2, nn.BatchNorm2d))


def plain_resnet():
    from syncbn.training.models.resnet import ResnetSmall

    return ResnetSmall(3, 3, 8, 1, 2, nn.BatchNorm2d)


class Standardized(Net):
    """Standardizes its weights by `F.batch_norm` (weight standardization), which looks at no sample."""

    def forward(self, x):
        weight = self.stem.weight
        flat = F.batch_norm(weight.reshape(1, 4, -1), None, None, training=True)
        x = F.relu(self.bn(F.conv2d(x, flat.reshape(weight.shape), self.stem.bias, padding=1)))
        return self.head((self.left(x) + self.right(x)).mean((2, 3)))


class Torchvision:
    """Builds a network of torchvision, converted and without dropout."""

    def __init__(self, name):
        self.name = name

    def __call__(self):
        import torchvision

        options = {"image_size": 64} if self.name.startswith("vit") else {}
        return without_dropout(torchvision.models.get_model(self.name, num_classes=3, **options))


class Timm:
    """Builds a network of timm, converted and without dropout."""

    def __init__(self, name):
        self.name = name

    def __call__(self):
        import timm

        options = {"img_size": 64} if self.name.startswith("vit") else {}
        return without_dropout(timm.create_model(self.name, num_classes=3, **options))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return convert_sync_batchnorm(model)
