"""Every classic mistake has a rule that finds it; no rule finds anything in what is right."""

import copy
import json
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from syncbn import (
    Finding,
    SyncBatchNorm,
    audit,
    convert_sync_batchnorm,
    freeze,
    new_bn_groups,
    unfreeze,
)
from syncbn.auditing.inputs import GAP
from syncbn.auditing.rules import RULES, SEVERITIES, ordered, table
from syncbn.auditing.state_dicts import audit_state_dict, bn_layers
from tests.counting import collectives
from tests.training.jobs import ROOT


def images(num=16):
    return torch.randn(num, 3, 6, 6)


def network(*, between=(), **options):
    """Convolution, batch normalization "1", ReLU, and whatever is to come before the last layer."""
    layers = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, **options), nn.ReLU(), *between)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def trained(model, steps=60):
    """The model after some forward passes in training, which is all that its statistics need."""
    model.train()
    for _ in range(steps):
        model(images())
    return model


def rules(model, **options):
    return [(finding.layer, finding.rule, finding.severity) for finding in audit(model, **options)]


def with_frozen_parameters():
    model = trained(network())
    model[:2].requires_grad_(False)
    return model


def with_statistics(mean=0.0, var=1.0, counter=0):
    model = trained(network(), steps=1)
    model[1].running_mean.fill_(mean)
    model[1].running_var.fill_(var)
    model[1].num_batches_tracked.fill_(counter)
    return model


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant, layer=nn.BatchNorm2d):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), layer(4))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class Branches(nn.Module):
    """Dropout beside a batch normalization, or in front of it through functions that are no modules."""

    def __init__(self, in_front, p=0.5):
        super().__init__()
        self.in_front, self.p = in_front, p
        self.bn, self.other = nn.BatchNorm2d(3), nn.Linear(6, 6)

    def forward(self, x):
        dropped = F.dropout(x, self.p, self.training)
        given = torch.cat([dropped, x])[: len(x)].relu() + 1 if self.in_front else x
        return self.bn(given) + self.other(dropped)


def optimized(model, parameters):
    return {"optimizer": torch.optim.SGD(parameters(model), lr=0.1, momentum=0.9)}


def with_gradients(model, frozen):
    model(images()).sum().backward()
    model[1].requires_grad_(not frozen)
    return model


def far_batch():
    return {"batch": 5 * images() + 20}


def with_batch_normalization_free():
    """finetune_bn_unfrozen: the convolutions as they were, batch normalization adapts."""
    model = convert_sync_batchnorm(trained(network()))
    freeze(model, stats=False, affine=False, weights=True)
    unfreeze(model, "5", weights=True)
    return model


def in_eval(model, name):
    model.train().get_submodule(name).eval()
    return model


def untracked(model):
    model[1].track_running_stats = False
    return model


# Rule, a model with the mistake, one that comes near and is right, and what the audit is given of each.
CASES = {
    "parameters of a sub-network": (
        "parameters-frozen-statistics-moving", with_frozen_parameters, lambda: trained(network()), dict
    ),
    "convolutions alone": (
        "parameters-frozen-statistics-moving",
        with_frozen_parameters,
        with_batch_normalization_free,
        dict,
    ),
    "no parameters of its own": (
        "parameters-frozen-statistics-moving",
        lambda: nn.Sequential(network(affine=False)[:2].requires_grad_(False), nn.Linear(4, 2)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3).requires_grad_(False), network(affine=False)[1:]),  # a linear probe
        dict,
    ),
    "frozen fresh": (
        "frozen-at-initial-values",
        lambda: freeze(m := convert_sync_batchnorm(network()), "1") and m,
        lambda: freeze(m := convert_sync_batchnorm(trained(network())), "1") and m,
        dict,
    ),
    "kept in evaluation mode by hand": (
        "frozen-at-initial-values",
        lambda: in_eval(network(), "1"),
        lambda: in_eval(trained(network()), "1"),
        dict,
    ),
    "folded statistics": (
        "frozen-at-initial-values",
        lambda: in_eval(with_statistics(), "1"),
        lambda: in_eval(with_statistics(var=1 - 1e-5), "1"),
        dict,
    ),
    "evaluated fresh": ("never-updated", lambda: network().eval(), lambda: network().train(), dict),
    "loaded fresh": ("never-updated", network, lambda: trained(network(), 1), lambda: {"trained": True}),
    "NaN": ("invalid-statistics", lambda: with_statistics(mean=float("nan")), lambda: with_statistics(counter=1), dict),
    "negative": ("invalid-statistics", lambda: with_statistics(var=-1e-9), lambda: with_statistics(var=0.0), dict),
    "none kept": ("no-running-statistics", lambda: network(track_running_stats=False), network, dict),
    "switched off": ("statistics-switched-off", lambda: untracked(network()), network, dict),
    "momentum 0": (
        "momentum-zero",
        lambda: network(momentum=0.0),
        lambda: freeze(m := convert_sync_batchnorm(trained(network(momentum=0.0))), "1") and m,
        dict,
    ),
    "cumulative": ("momentum-cumulative", lambda: network(momentum=None), network, dict),
    "few, by number": (
        "few-values-per-channel", network, lambda: in_eval(trained(network()), "1"), lambda: {"batch_size": 4}
    ),
    "few, by batch": (
        "few-values-per-channel", network, lambda: in_eval(trained(network()), "1"), lambda: {"batch": images(2)}
    ),
    "dropout in a sequence": (
        "dropout-before-bn",
        lambda: network(between=(nn.Dropout(0.5), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
        lambda: network(between=(nn.Dropout(0.5), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))),
        dict,
    ),
    "dropout behind": (
        "dropout-before-bn",
        lambda: network(between=(nn.Sequential(nn.Dropout(0.2)), nn.Sequential(nn.BatchNorm2d(4)))),
        lambda: network(between=(nn.BatchNorm2d(4), nn.Dropout(0.5))),
        dict,
    ),
    "dropout that is none": (
        "dropout-before-bn",
        lambda: network(between=(nn.Dropout(0.1), nn.BatchNorm2d(4))),
        lambda: network(between=(nn.Dropout(0.0), nn.AlphaDropout(0.5), nn.BatchNorm2d(4))),
        dict,
    ),
    "dropout by function": (
        "dropout-before-bn", lambda: Branches(True), lambda: Branches(False), lambda: {"batch": images()}
    ),
    "checkpointing": (
        "updated-twice",
        lambda: Checkpointed(False),
        lambda: Checkpointed(False, SyncBatchNorm),
        lambda: {"batch": images()},
    ),
    "reentrant checkpointing": (
        "updated-twice",
        lambda: Checkpointed(True),
        lambda: Checkpointed(True).eval(),
        lambda: {"batch": images()},
    ),
    "a wrapper for checkpointing": (
        "updated-twice",
        lambda: nn.Sequential(checkpoint_wrapper(network()[:2])),
        lambda: nn.Sequential(checkpoint_wrapper(convert_sync_batchnorm(network()[:2]))),
        dict,
    ),
    "torch's converter": (
        "torch-syncbn", lambda: nn.SyncBatchNorm.convert_sync_batchnorm(network()),
        lambda: convert_sync_batchnorm(network()), dict,
    ),
    "other data": ("train-eval-gap", lambda: trained(nn.BatchNorm2d(3)), lambda: nn.BatchNorm2d(3), far_batch),
    "digits lost": (
        "activation-range", lambda: nn.BatchNorm2d(3), lambda: SyncBatchNorm(3), lambda: {"batch": images() + 2e4},
    ),
    "digits lost in bfloat16": (
        "activation-range", lambda: SyncBatchNorm(3),
        lambda: nn.Sequential(nn.LayerNorm(6).bfloat16(), SyncBatchNorm(3)),
        lambda: {"batch": (images() + 100).bfloat16()},
    ),
    "near the end of float16": (
        "activation-range", lambda: SyncBatchNorm(3), lambda: nn.Sequential(nn.Hardtanh(), SyncBatchNorm(3)),
        lambda: {"batch": (2e4 * images()).clamp(-5e4, 5e4).half()},
    ),
    "not finite": (
        "activation-range", lambda: SyncBatchNorm(3), lambda: nn.Sequential(nn.Hardtanh(), SyncBatchNorm(3)),
        lambda: {"batch": torch.full((16, 3, 2, 2), float("inf"))},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "wrong", "right", "options"), CASES.values(), ids=[*CASES])
def test_a_rule_finds_its_mistake_and_leaves_what_is_right(rule, wrong, right, options):
    assert rule in {finding.rule for finding in audit(wrong(), **options())}
    assert rule not in {finding.rule for finding in audit(right(), **options())}


def test_nothing_is_found_in_a_model_that_is_converted_frozen_and_evaluated():
    model = convert_sync_batchnorm(trained(network(between=(nn.Dropout(0.3), nn.BatchNorm2d(4)))))
    freeze(model, weights=True)
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    assert audit(model, batch=images(), optimizer=optimizer, batch_size=2, trained=True) == []


@pytest.mark.parametrize("convert", [False, True])
def test_nothing_is_found_in_a_fresh_model_nor_in_a_trained_one(convert):
    model = network()
    if convert:
        convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    assert audit(model, batch=images(), optimizer=optimizer, batch_size=16) == []
    trained(model)
    for mode in (True, False):
        assert audit(model.train(mode), batch=images(), optimizer=optimizer, batch_size=16, trained=True) == []


def test_frozen_affine_parameters_behind_a_convolution_that_trains_are_a_warning():
    model = network()
    model[1].requires_grad_(False)
    assert rules(model) == [("1", "parameters-frozen-statistics-moving", "warning")]
    model[0].requires_grad_(False)
    assert rules(model) == [("1", "parameters-frozen-statistics-moving", "error")]


def test_a_single_value_per_channel_is_an_error_though_the_layer_raises():
    model = nn.Sequential(nn.Conv2d(3, 4, 6), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(images(1))
    assert rules(model, batch=images(1)) == [("1", "few-values-per-channel", "error")]


def test_another_error_of_the_model_is_not_swallowed():
    with pytest.raises(RuntimeError, match="channels"):
        audit(network(), batch=torch.randn(4, 2, 6, 6))


def test_a_frozen_parameter_that_the_optimizer_still_moves():
    model = with_gradients(trained(network()), frozen=True)
    options = optimized(model, lambda m: m.parameters())
    assert ("1", "frozen-parameter-updated", "error") in rules(model, **options)
    before = model[1].weight.clone()
    options["optimizer"].step()
    assert not torch.equal(model[1].weight, before)  # it is one
    unfrozen = with_gradients(trained(network()), frozen=False)
    assert rules(unfrozen, **optimized(unfrozen, lambda m: m.parameters())) == []
    held = convert_sync_batchnorm(with_gradients(trained(network()), frozen=False))
    freeze(held, "1")
    assert rules(held, **optimized(held, lambda m: m.parameters())) == []


def test_parameters_that_no_optimizer_has():
    model = trained(network())
    assert rules(model, **optimized(model, lambda m: m[0].parameters())) == [("1", "affine-not-optimized", "warning")]
    convert_sync_batchnorm(model)
    freeze(model, "1")
    assert rules(model, **optimized(model, lambda m: m[0].parameters())) == []


class WithAnAuxiliaryHead(nn.Module):
    """The head runs in training alone, and nobody has trained it."""

    def __init__(self):
        super().__init__()
        self.bn, self.auxiliary = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(x)


def test_what_does_not_run_need_not_have_been_updated():
    model = trained(WithAnAuxiliaryHead()).eval()
    assert rules(model) == [("auxiliary", "never-updated", "error")]
    assert audit(model, batch=images()) == []


class Backwards(nn.Sequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


def test_the_order_of_modules_counts_only_where_it_is_the_order_of_calls():
    assert rules(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))) == [("1", "dropout-before-bn", "warning")]
    model = Backwards(nn.Dropout(0.5), nn.BatchNorm2d(3))
    assert audit(model) == audit(model, batch=images()) == []


def test_the_gap_of_a_healthy_model_is_far_below_what_counts():
    """Measured on the digits too: at most 0.14 from step 20 on, 0.04 at the end, with batches of 8 to 64 samples."""
    from syncbn.auditing.inputs import _divergence
    from syncbn.auditing.probe import probe

    layer = trained(nn.BatchNorm2d(3))
    for number in (8, 64):
        seen = probe(layer, {"": layer}, images(number))[""]
        assert _divergence(seen, layer.running_mean, layer.running_var, layer.eps) < GAP / 10
    shifted = probe(layer, {"": layer}, images(64) + 1.2)[""]
    assert _divergence(shifted, layer.running_mean, layer.running_var, layer.eps) == pytest.approx(1.2**2 / 2, rel=0.3)


def test_a_dataflow_without_dropout_in_front_of_the_layer_is_no_finding_though_it_runs_later():
    assert audit(Branches(in_front=False), batch=images()) == []
    assert rules(Branches(in_front=True), batch=images()) == [("bn", "dropout-before-bn", "warning")]
    assert audit(Branches(in_front=True, p=0.05), batch=images()) == []


class Restless(nn.Module):
    """Draws random numbers, has a buffer that is no statistic, and switches a mode in forward."""

    def __init__(self):
        super().__init__()
        self.bn = SyncBatchNorm(3)
        self.plain = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.plain.training = not self.plain.training
        return F.dropout(self.plain(self.bn(x)) + torch.randn_like(x), 0.5, self.training)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_leaves_no_trace(training):
    model = Restless().train(training)
    model(images()).sum().backward()
    modes = [module.training for module in model.modules()]
    buffers = dict(model.named_buffers())
    state, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    audit(model, batch=[images(), "labels"])
    random_of_images = torch.get_rng_state()
    torch.set_rng_state(random)
    images()
    assert torch.equal(torch.get_rng_state(), random_of_images)  # nothing was drawn but the batch
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), gradients, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Masked(nn.Module):
    def __init__(self, is_named):
        super().__init__()
        self.is_named = is_named
        self.bn = SyncBatchNorm(3)

    def forward(self, input):
        mask = (torch.arange(len(input)) % 2 == 0).view(-1, 1, 1, 1)
        return self.bn(input=input, mask=mask) if self.is_named else self.bn(input, mask)


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("padding", [1e3, float("nan")])
def test_what_a_mask_hides_is_no_finding_and_what_it_leaves_is(is_named, padding):
    model = trained(Masked(is_named))
    batch = images()
    batch[1::2] = padding
    assert rules(model, batch=batch) == []
    assert rules(model, batch=batch + 1e3) == [("bn", "train-eval-gap", "warning")]


def test_names_are_those_without_wrappers_and_a_shared_layer_comes_once():
    layer = nn.BatchNorm2d(3, momentum=0.0)
    model = torch.compile(nn.Sequential(layer, nn.Sequential(layer)))
    assert rules(model, batch=images()) == [("0", "momentum-zero", "warning")]
    assert [finding.layer for finding in audit(nn.BatchNorm2d(3, momentum=0.0))] == [""]


def test_lazy_layers_are_passed_over_and_a_batch_for_them_is_refused():
    model = nn.Sequential(nn.LazyBatchNorm2d(momentum=0.0))
    assert audit(model) == []
    with pytest.raises(ValueError, match="lazy layers that have not seen their width"):
        audit(model, batch=images())


def test_a_model_without_batch_normalization_has_no_findings():
    assert audit(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), batch=torch.randn(3, 2), batch_size=1) == []


def test_findings_come_worst_first_and_each_once():
    one = Finding("a", "momentum-zero", "warning", "remedy")
    worse = Finding("b", "never-updated", "error", "remedy", "why")
    assert ordered([one, worse, one]) == [worse, one]
    assert json.loads(json.dumps(worse.as_dict()))["why"] == "why"
    text = table([one, worse])
    assert text.index("never-updated") < text.index("momentum-zero")
    assert table([]) == "no findings"


def test_the_documentation_lists_every_rule_with_its_severity():
    page = (ROOT / "docs/audit.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| (\w+)", page, re.MULTILINE))
    assert listed == {name: rule.severity for name, rule in RULES.items()}
    assert {rule.severity for rule in RULES.values()} == set(SEVERITIES)


# What a file tells.


def state_of(model, **changes):
    return {**model.state_dict(), **changes}


def test_a_state_dict_of_a_trained_model_has_no_findings():
    model = nn.Sequential(trained(network()), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.LSTM(2, 2))
    assert audit_state_dict(model.state_dict()) == []
    assert list(bn_layers(model.state_dict())) == ["0.1"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("1.running_mean"), "missing-statistics"),
        (lambda state: [state.pop("1.running_mean"), state.pop("1.running_var")], "missing-statistics"),
        (lambda state: state["1.running_var"].fill_(-1), "invalid-statistics"),
        (lambda state: state["1.running_mean"].fill_(float("inf")), "invalid-statistics"),
        (
            lambda state: [state["1.running_mean"].zero_(), state["1.running_var"].fill_(1),
                           state["1.num_batches_tracked"].zero_()],
            "never-updated",
        ),
    ],
)  # fmt: skip
def test_a_state_dict_tells_what_is_missing_or_wrong(change, expected):
    state = trained(network()).state_dict()
    change(state)
    assert [(finding.layer, finding.rule) for finding in audit_state_dict(state)] == [("1", expected)]


def test_parameters_alone_are_told_by_the_name_of_the_layer():
    model = nn.ModuleDict({"bn1": nn.BatchNorm2d(4), "norm1": nn.LayerNorm(4), "downsample_bn": nn.BatchNorm2d(4)})
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    findings = audit_state_dict(parameters)
    assert [(f.layer, f.rule) for f in findings] == [
        ("bn1", "no-running-statistics"),
        ("downsample_bn", "no-running-statistics"),
    ]


def test_a_file_without_a_counter_is_not_said_to_be_never_updated():
    state = with_statistics().state_dict()
    del state["1.num_batches_tracked"]
    assert audit_state_dict(state) == []


# Several ranks.


def test_what_peers_functions_freeze_of_a_converted_layer_is_found():
    """`timm.utils.freeze` freezes all parameters, but exchanges the layers of torch's own classes alone."""
    model = convert_sync_batchnorm(trained(network()))
    assert not any(isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in model.modules())
    for parameter in model[:2].parameters():
        parameter.requires_grad = False
    assert rules(model) == [("1", "parameters-frozen-statistics-moving", "error")]
    freeze(model, "1", affine=False)
    assert rules(model) == []


def check_same_findings_everywhere(make):
    findings = audit(make(dist.get_rank()))
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, findings)
    assert all(theirs == findings for theirs in everybodys)
    return [(finding.rule, finding.severity) for finding in findings]


def statistics_of_rank(rank):
    model = convert_sync_batchnorm(network())
    model[1].running_mean.fill_(float(rank))
    return model


def frozen_on_one(rank):
    model = convert_sync_batchnorm(with_statistics(counter=3))
    if rank == 1:
        freeze(model, "1", affine=False)
    return model


def not_finite_on_one(rank):
    model = convert_sync_batchnorm(network())
    if rank == 1:
        model[1].running_var.fill_(float("nan"))
    return model


def plain(rank):
    return network()


def plain_after_a_step(rank):
    model = network()
    model[1].running_mean.fill_(float(rank))
    return model


def healthy(rank):
    return convert_sync_batchnorm(network())


def of_torch(rank):
    return nn.SyncBatchNorm.convert_sync_batchnorm(network())


def another_model(rank):
    return convert_sync_batchnorm(network() if rank else nn.Sequential(*network()[:1]))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (healthy, []),
        (statistics_of_rank, [("ranks-differ-in-statistics", "error")]),
        (frozen_on_one, [("ranks-differ-in-mode", "error")]),
        (not_finite_on_one, [("invalid-statistics", "error"), ("ranks-differ-in-statistics", "error")]),
        (
            plain_after_a_step,
            [("plain-bn-in-distributed-job", "warning"), ("ranks-differ-in-statistics", "warning")],
        ),
        (plain, [("plain-bn-in-distributed-job", "warning")]),
        (of_torch, [("torch-syncbn", "error")]),
        (another_model, [("ranks-differ-in-mode", "error")]),
    ],
)
def test_ranks_are_compared_and_all_return_the_same(ranks, make, expected):
    assert ranks(2, check_same_findings_everywhere, make) == [expected, expected]


def check_groups(spoil):
    rank, group = dist.get_rank(), new_bn_groups(2)
    model = convert_sync_batchnorm(network(), group)
    model[1].running_mean.fill_(float(rank // 2 if not spoil or rank < 3 else 7))
    return [finding.rule for finding in audit(model)]


def test_groups_may_differ_and_members_of_a_group_may_not(ranks):
    assert ranks(4, check_groups, False) == [[]] * 4
    assert ranks(4, check_groups, True) == [["ranks-differ-in-statistics"]] * 4


def check_sizes():
    model, local = convert_sync_batchnorm(network()), network()
    assert audit(model, batch_size=8) == []
    assert "few-values-per-channel" in {finding.rule for finding in audit(local, batch_size=8)}
    assert audit(model, batch=images(4)) == []
    [finding] = audit(model, batch=images(2))
    assert (finding.rule, "4 samples" in finding.why) == ("few-values-per-channel", True)


def check_a_rank_outside_of_the_group():
    model = convert_sync_batchnorm(network(), dist.new_group([0]))
    model[1].running_mean.fill_(float(dist.get_rank()))
    assert audit(model) == []


def test_a_rank_outside_of_the_group_of_a_layer_has_statistics_of_its_own(ranks):
    ranks(2, check_a_rank_outside_of_the_group)


def test_samples_are_counted_over_the_ranks_that_a_layer_sums_over(ranks):
    ranks(2, check_sizes)


def check_gap_of_all_ranks():
    model = convert_sync_batchnorm(network())
    torch.manual_seed(dist.get_rank())
    trained(model)
    assert audit(model, batch=images(8 + dist.get_rank())) == []
    assert audit(model, batch=images(12)[: 12 * dist.get_rank()]) == []  # a rank without samples
    rank_0_is_off = images(8) if dist.get_rank() else images(8) * 9
    return [finding.rule for finding in audit(model, batch=rank_0_is_off)]


def test_a_batch_is_that_of_all_ranks(ranks):
    assert ranks(2, check_gap_of_all_ranks) == [["train-eval-gap"]] * 2


def check_collectives():
    model = convert_sync_batchnorm(network(between=(nn.BatchNorm2d(4), nn.BatchNorm2d(4))))
    with collectives() as sent:
        audit(model)
    assert len(sent) <= 2  # the lengths of what is gathered, and the gather
    assert sum(number for number, _ in sent) < 10_000


def test_the_ranks_compare_digests_not_statistics(ranks):
    ranks(2, check_collectives)
