"""Other people's converters must not replace our layers in silence."""

import copy
import pickle

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm, freeze, revert_sync_batchnorm


def make_model():
    class Own(nn.BatchNorm2d):
        pass

    return convert_sync_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sequential(Own(2))))


@pytest.mark.parametrize("build", [make_model, lambda: nn.Sequential(SyncBatchNorm(2)), lambda: SyncBatchNorm(2)])
def test_torch_s_converter_raises_and_leaves_the_model_as_it_was(build):
    model = build()
    freeze(model)
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    with pytest.raises(
        TypeError, match=r"convert_sync_batchnorm would replace a Sync\w+ of syncbn.*revert_sync_batchn"
    ):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before


def test_after_revert_torch_s_converter_takes_it():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(revert_sync_batchnorm(make_model()))
    assert type(model[1]) is nn.SyncBatchNorm


@pytest.mark.parametrize("name", ["convert_sync_batchnorm", "convert_syncbn_model", "revert_sync_batchnorm"])
def test_functions_of_these_names_in_any_package_raise(name):
    namespace = {"__name__": "timm.layers.norm_act"}
    exec(f"def {name}(module): return module.num_features", namespace)
    with pytest.raises(TypeError, match=rf"timm.layers.norm_act.{name} would replace"):
        namespace[name](SyncBatchNorm(2))


def test_everybody_else_reads_and_sets_the_width_as_ever():
    layer = SyncBatchNorm(2)
    assert layer.num_features == 2
    layer.num_features = 3
    assert (layer.num_features, layer.__dict__["num_features"]) == (3, 3)
    assert copy.deepcopy(layer).num_features == pickle.loads(pickle.dumps(layer)).num_features == 3
    lazy = convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))
    lazy(torch.randn(2, 5, 3, 3))
    assert lazy[0].num_features == 5


def test_lightning_s_switch_raises_too():
    layer_sync = pytest.importorskip("lightning.pytorch.plugins.layer_sync")
    with pytest.raises(TypeError, match=r"in Lightning: sync_batchnorm=False"):
        layer_sync.TorchSyncBatchNorm().apply(make_model())


def test_the_lightning_plugin_converts_what_is_selected_and_gives_it_back():
    plugin = pytest.importorskip("syncbn.integrations.lightning").SyncBatchNormLayers
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), SyncBatchNorm(2))
    adapter = plugin(exclude="1")
    assert [type(layer) for layer in adapter.apply(model)] == [SyncBatchNorm, nn.BatchNorm2d, SyncBatchNorm]
    assert [type(layer) for layer in adapter.revert(model)] == [nn.BatchNorm2d, nn.BatchNorm2d, SyncBatchNorm]


def test_the_lightning_plugin_leaves_what_was_synchronized_before_and_what_is_frozen():
    plugin = pytest.importorskip("syncbn.integrations.lightning").SyncBatchNormLayers
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    convert_sync_batchnorm(model, match="0")
    adapter = plugin()
    adapter.apply(model)
    freeze(model, "1")
    with pytest.warns(UserWarning, match="stays synchronized: .*statistics are frozen"):
        adapter.revert(model)
    assert [type(layer) for layer in model] == [SyncBatchNorm, SyncBatchNorm]
