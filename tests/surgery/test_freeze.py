"""Freezing by name: what is frozen does not move, and comes back as it was."""

import copy

import pytest
import torch
from torch import nn

from syncbn import FreezePlan, SyncBatchNorm, convert_sync_batchnorm, freeze, unfreeze
from syncbn.nn.patterns import named_modules
from syncbn.surgery.freeze_plan import FreezeRule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)
        convert_sync_batchnorm(self)

    def forward(self, input):
        return self.head(self.backbone(input).mean((2, 3)))


def train_steps(model, num_steps=5):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model.train()(torch.randn(6, 1, 8, 8)).square().sum().backward()
        optimizer.step()


def test_frozen_backbone_is_bit_equal_after_training_while_the_head_moves():
    model = Net()
    train_steps(model)
    touched = freeze(model, "backbone", weights=True)
    assert touched == ["backbone.0", "backbone.1", "backbone.2", "backbone.3"]
    before = copy.deepcopy(model.state_dict())
    train_steps(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if key.startswith("backbone."))
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_an_optimizer_that_has_momentum_from_before_does_not_move_frozen_parameters():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(torch.randn(6, 1, 8, 8)).sum().backward()
    optimizer.step()
    freeze(model, "backbone", weights=True)
    before = model.backbone[0].weight.clone()
    optimizer.step()  # no zero_grad in between: freezing has cleared the gradient
    assert torch.equal(model.backbone[0].weight, before)


def test_switches_are_separate():
    model = Net()
    freeze(model, "backbone", affine=False)
    assert model.backbone[1].stats_frozen
    assert not model.backbone[1].affine_frozen
    freeze(model, "backbone", stats=False)
    unfreeze(model, "backbone", affine=False)
    assert not model.backbone[1].stats_frozen
    assert model.backbone[1].affine_frozen
    assert all(p.requires_grad for p in model.backbone[0].parameters())


@pytest.mark.parametrize(
    ("match", "exclude", "expected"),
    [
        ("backbone", (), ["backbone.1", "backbone.3"]),
        ("backbone.*", (), ["backbone.1", "backbone.3"]),
        ("*.3", (), ["backbone.3"]),
        ("backbone.[13]", "backbone.1", ["backbone.3"]),
        (["backbone.1", "backbone.3"], None, ["backbone.1", "backbone.3"]),
        ("*", (), ["backbone.1", "backbone.3"]),
    ],
)
def test_patterns_are_globs_and_a_plain_name_selects_a_subtree(match, exclude, expected):
    assert freeze(Net(), match, exclude=exclude) == expected


def test_a_plain_name_is_no_prefix_of_other_names():
    model = nn.ModuleDict({"bn": SyncBatchNorm(2), "bn2": SyncBatchNorm(2)})
    assert freeze(model, "bn") == ["bn"]


@pytest.mark.parametrize("match", ["backbon", "backbone.9", "head.*"])
def test_a_pattern_without_a_match_is_an_error_with_near_misses(match):
    with pytest.raises(ValueError, match=r"selects no module; did you mean .*(backbone|head)"):
        freeze(Net(), match)


def test_a_freeze_that_touches_nothing_is_an_error():
    with pytest.raises(ValueError, match="selects nothing that has stats or affine to freeze"):
        freeze(Net(), "head")


def test_statistics_of_a_plain_batch_norm_cannot_be_frozen_and_nothing_else_is_then():
    model = nn.Sequential(SyncBatchNorm(2), nn.BatchNorm1d(2))
    with pytest.raises(TypeError, match=r"1 is a BatchNorm1d.*convert_sync_batchnorm"):
        freeze(model)
    assert not model[0].stats_frozen
    assert freeze(model, "1", stats=False) == ["1"]
    assert not model[1].weight.requires_grad


def test_names_carry_no_wrapper():
    wrapped = torch.compile(nn.Sequential(torch.optim.swa_utils.AveragedModel(Net())), backend="eager")
    names = [name for name, _ in named_modules(wrapped)]
    assert names[:4] == ["", "0", "0.backbone", "0.backbone.0"]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5), (4, 3, 2, 3, 4), (2, 3, 2, 2, 2, 2)], ids=str)
def test_layers_of_every_rank_freeze(shape):
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3) if len(shape) == 4 else SyncBatchNorm(3)))
    freeze(model)
    before = copy.deepcopy(model.state_dict())
    model.train()(torch.randn(shape) + 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tied_parameters_are_held_until_both_modules_let_go():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), SyncBatchNorm(4))
    model[1].weight = model[0].weight
    freeze(model, "0", stats=False, affine=False, weights=True)
    freeze(model, "1", stats=False, affine=False, weights=True)
    unfreeze(model, "0", stats=False, affine=False, weights=True)
    assert not model[0].weight.requires_grad  # the other module still holds it
    assert model[0].bias.requires_grad
    unfreeze(model, "1", stats=False, affine=False, weights=True)
    assert model[0].weight.requires_grad
    freeze(model, weights=True)
    unfreeze(model, weights=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_parametrized_layer_is_held_through_its_originals():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), SyncBatchNorm(3))
    freeze(model, weights=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unfreeze(model, weights=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_lazy_layer_cannot_be_frozen_before_it_has_seen_its_width():
    model = convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))
    with pytest.raises(ValueError, match="0 is lazy and has not seen its width"):
        freeze(model)
    model(torch.randn(4, 3))
    assert freeze(model) == ["0"]


def test_requires_grad_set_by_hand_shows():
    layer = SyncBatchNorm(3).freeze()
    layer.weight.requires_grad_(True)
    assert not layer.affine_frozen


def test_the_optimizer_keeps_its_parameters_and_their_order_over_a_switch():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(4):
        FreezePlan({"a": FreezeRule("backbone", weights=True, start=1, until=3)}).apply(model, step)
        optimizer.zero_grad()
        model(torch.randn(6, 1, 8, 8)).sum().backward()
        optimizer.step()
    after = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert after == before == [id(parameter) for parameter in model.parameters()]


class TestPlan:
    def test_a_switch_is_frozen_while_any_active_rule_selects_it(self):
        model = Net()
        plan = FreezePlan(
            {
                "all": FreezeRule("backbone", until=10),
                "first": FreezeRule("backbone.1", affine=False, start=5, until=20),
            }
        )
        states = {}
        for step in (0, 5, 10, 20):
            plan.apply(model, step)
            states[step] = [
                (layer.stats_frozen, layer.affine_frozen) for layer in (model.backbone[1], model.backbone[3])
            ]
        assert states[0] == states[5] == [(True, True), (True, True)]
        assert states[10] == [(True, False), (False, False)]
        assert states[20] == [(False, False), (False, False)]

    def test_the_order_of_rules_does_not_matter(self):
        rules = {"a": FreezeRule("backbone", until=5), "b": FreezeRule("backbone.1", start=3)}
        model = Net()
        for step in range(8):
            forward = FreezePlan(rules).frozen_at(model, step)
            backward = FreezePlan(dict(reversed(rules.items()))).frozen_at(model, step)
            assert forward == backward

    def test_applying_reports_changes_once(self):
        model, plan = Net(), FreezePlan({"a": FreezeRule("backbone.1", until=3)})
        changes = [[(c.module, c.switch, c.frozen) for c in plan.apply(model, step)] for step in range(5)]
        assert changes[0] == [("backbone.1", "affine", True), ("backbone.1", "stats", True)]
        assert changes[1] == changes[2] == changes[4] == []
        assert changes[3] == [("backbone.1", "affine", False), ("backbone.1", "stats", False)]

    def test_modules_that_no_rule_selects_are_left_as_the_user_froze_them(self):
        model = Net()
        freeze(model, "backbone.3")
        FreezePlan({"a": FreezeRule("backbone.1", until=3)}).apply(model, 5)
        assert model.backbone[3].stats_frozen

    def test_switches_that_no_rule_names_stay_as_the_user_froze_them(self):
        model = Net()
        model.backbone[1].freeze(stats=False)
        changes = FreezePlan({"a": FreezeRule("backbone.1", affine=False, until=3)}).apply(model, 0)
        assert [change.switch for change in changes] == ["stats"]
        assert model.backbone[1].affine_frozen

    def test_a_module_with_two_names_is_one_module_in_any_order_of_rules(self):
        shared = SyncBatchNorm(4)
        model = nn.ModuleDict({"a": shared, "b": shared})
        rules = {"x": FreezeRule("a"), "y": FreezeRule("b", until=5)}
        for ordered in (rules, dict(reversed(rules.items()))):
            FreezePlan(ordered).apply(model, 5)
            assert shared.stats_frozen

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            (FreezeRule("nothing"), "mine: match='nothing' selects no module"),
            (FreezeRule("head"), "mine: match='head' selects nothing"),
            (FreezeRule("backbone", start=5, until=5), r"mine.until: expected a time after its start \(5\), got 5"),
        ],
    )
    def test_a_rule_that_cannot_work_is_an_error_before_training(self, rule, message):
        with pytest.raises(ValueError, match=message):
            FreezePlan({"mine": rule}).check(Net())

    def test_a_rule_may_be_a_mapping_of_its_fields(self):
        plan = FreezePlan({"a": {"match": "backbone.1", "affine": False, "until": 3}})
        assert plan.rules == {"a": FreezeRule("backbone.1", affine=False, until=3)}

    @pytest.mark.parametrize(
        ("rule", "error", "message"),
        [
            ({"match": "a", "matchh": "b"}, ValueError, "^mine.matchh: expected one of match, exclude, stats"),
            ({"until": 3}, ValueError, "^mine.match: expected a pattern of module names"),
            ("backbone", TypeError, "^mine: expected a FreezeRule or a mapping of its fields, got str"),
        ],
    )
    def test_a_mapping_that_is_no_rule_is_an_error_that_names_the_rule_and_the_field(self, rule, error, message):
        with pytest.raises(error, match=message):
            FreezePlan({"mine": rule})

    def test_a_rule_without_effect_is_a_warning(self):
        late = FreezePlan({"late": FreezeRule("backbone", start=100)})
        assert "starts at step 100" in late.check(Net(), num_steps=50)[0]
        covered = FreezePlan({"all": FreezeRule("backbone"), "part": FreezeRule("backbone.1", until=3)})
        assert covered.check(Net()) == ["part: other rules freeze all of it from beginning to end; it has no effect"]
