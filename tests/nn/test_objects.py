"""A layer with a process group is still an object: it can be copied, pickled, averaged."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from syncbn import SyncBatchNorm, convert_sync_batchnorm, new_bn_groups
from tests.reference import make_batch, max_error


def check_deepcopy():
    group = dist.new_group([0, 1])
    layer = SyncBatchNorm(3, process_group=group)
    model = copy.deepcopy(nn.Sequential(layer, layer))
    assert model[0].process_group is group
    assert model[0] is model[1]  # what was shared stays shared
    assert model[0].weight is not layer.weight
    model(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0


def test_deepcopy_keeps_the_group_and_copies_the_rest(ranks):
    """torch's raises: a process group cannot be pickled."""
    ranks(2, check_deepcopy)


def check_pickle():
    pair = dist.new_group([0, 1])
    layer = SyncBatchNorm(3, process_group=pair).freeze(stats=False)
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.affine_frozen
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in loaded.state_dict().items())
    loaded.eval()(torch.randn(4, 3))  # evaluation needs no group
    with pytest.raises(RuntimeError, match="sub-group of 2 ranks, which pickling left out; set its process_group"):
        loaded.train()(torch.randn(4, 3))
    again = pickle.loads(pickle.dumps(loaded))  # still lost, not forgotten
    with pytest.raises(RuntimeError, match="pickling left out"):
        again(torch.randn(4, 3))
    loaded.process_group = pair
    loaded(torch.randn(4, 3))
    for everyone in (None, dist.group.WORLD):
        pickle.loads(pickle.dumps(SyncBatchNorm(3, process_group=everyone)))(torch.randn(4, 3))


def test_pickle_leaves_a_sub_group_out_and_never_falls_back_to_the_world_in_silence(ranks):
    ranks(2, check_pickle)


def check_save():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), SyncBatchNorm(3, process_group=dist.new_group([0, 1])))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    input = torch.randn(2, 1, 4, 4)
    assert torch.equal(loaded.eval()(input), model.eval()(input))


def test_a_whole_module_can_be_saved(ranks):
    ranks(2, check_save)


def check_averaged_model():
    group = new_bn_groups(2)
    model = convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), group)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    model(make_batch((6, 3))[0].float().chunk(2)[dist.get_rank()])
    averaged.update_parameters(model)
    assert type(averaged.module[1]) is SyncBatchNorm
    expected = model[1].running_mean  # the first update copies
    assert max_error(averaged.module[1].running_mean, expected.double()) == 0.0
    model(make_batch((6, 3), seed=3)[0].float().chunk(2)[dist.get_rank()])
    before = averaged.module[1].running_mean.clone()
    averaged.update_parameters(model)
    assert max_error(averaged.module[1].running_mean, (before + model[1].running_mean).double() / 2) < 1e-6


def test_ema_through_averaged_model(ranks):
    ranks(2, check_averaged_model)


def test_pickles_of_a_single_process_load_as_they_were():
    layer = SyncBatchNorm(3, activation="silu").freeze()
    loaded = pickle.loads(pickle.dumps(layer))
    assert repr(loaded) == repr(layer)
    assert loaded(torch.randn(4, 3)).shape == (4, 3)
