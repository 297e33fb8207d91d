"""What holds of every rule. Subclass :class:`RuleContract` in the tests of a new one."""

import copy
import math
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.networks import network, train_step
from tests.properties import TOLERANCE, assert_same_bits, flat
from tests.strategies import Case, make_case
from torch_mdgd import MDGDOptimizer, Random, Rule
from torch_mdgd.rules.base import KINDS

SHAPES = [(6, 4), (7,), (3, 2, 2)]
STORAGES = {
    "unmasked": {},
    "dense": {"mask": Random(0.4)},
    "compact": {"mask": Random(0.4), "compact": True},
}


def copies(
    model: nn.Module, optimizer: MDGDOptimizer, wrap: Callable[[nn.Module], MDGDOptimizer]
) -> list[tuple[nn.Module, MDGDOptimizer]]:
    """The same run three times more: in another process, as far as that can tell, as a deep copy, and pickled."""
    other = network()
    fresh = wrap(other)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return [(other, fresh), copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]


def sgd(parameters: Sequence[Tensor] | Sequence[dict]) -> torch.optim.Optimizer:
    # Of a power of two, so that whatever multiplies with it rounds nothing.
    return torch.optim.SGD(parameters, lr=0.5)


def masks_of(parameters: Sequence[Tensor], storage: str) -> list[Tensor]:
    mask = STORAGES[storage].get("mask")
    return [torch.ones_like(p, dtype=torch.bool) for p in parameters] if mask is None else mask.choose(parameters, None)


class RuleContract:
    """A subclass says how its rule is made, and what its float64 form is."""

    storages = tuple(STORAGES)

    @staticmethod
    def make(model: nn.Module) -> Rule:
        """A new rule."""
        raise NotImplementedError

    @staticmethod
    def flat(kinds: Sequence[Sequence[Tensor]], masks: Sequence[Tensor], masked: bool) -> list[Tensor]:
        """The d of these gradients, each of them flat and of float64."""
        raise NotImplementedError

    @staticmethod
    def flat_move(move: Tensor, v: Tensor) -> Tensor:
        """The corrected move, flat and of float64."""
        return move

    def pytest_generate_tests(self, metafunc):
        if "storage" in metafunc.fixturenames:
            metafunc.parametrize("storage", self.storages)

    # What the tests do with a rule.

    def wrap(self, model: nn.Module, storage: str = "unmasked", make_base=None) -> MDGDOptimizer:
        base = sgd(model.parameters()) if make_base is None else make_base(model.parameters())
        return MDGDOptimizer(base, self.make(model), **STORAGES[storage])

    def over(self, groups: Sequence[dict] | Sequence[Tensor], storage: str = "unmasked") -> MDGDOptimizer:
        """An optimizer over these groups or parameters."""
        base = sgd(groups)
        return MDGDOptimizer(base, self.make(holding(base)), **STORAGES[storage])

    def give(self, optimizer: MDGDOptimizer, gradients: dict[str, Sequence[Tensor | None]]) -> None:
        optimizer.set_gradients(**gradients)
        optimizer.rule.saw_features(torch.full((2, 3), 1.125), torch.ones(2, 3))

    def combined(self, case: Case, storage: str = "unmasked") -> list[Tensor | None]:
        """The d of a case, and its parameters after the step."""
        parameters = [nn.Parameter(p.detach().clone()) for p in case.parameters]
        optimizer = self.over(parameters, storage)
        self.give(optimizer, case.gradients)
        optimizer.combine()
        d = [p.grad if p.grad is None else p.grad.clone() for p in parameters]
        optimizer.step()
        return [*d, *(p.detach() for p in parameters)]

    # The contract.

    def test_what_it_needs_begins_with_the_task(self):
        optimizer = self.wrap(network())
        kinds = optimizer.needs()
        assert kinds == KINDS[: len(kinds)]
        assert kinds
        assert optimizer.needs(pictures=False) == KINDS[:1]

    def test_where_v_is_zero_nothing_is_removed(self, storage):
        case = make_case(SHAPES, (torch.float32,) * 3, 0)
        g = case.gradients["task"]
        masks = masks_of(case.parameters, storage)
        for none in ([torch.zeros_like(x) for x in g], [None] * len(g)):
            case.gradients = {kind: g if kind == "task" else none for kind in KINDS}
            found = self.combined(case, storage)
            wanted = [torch.where(mask, x, 0.0) for x, mask in zip(g, masks, strict=True)]
            assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=False))
            moved = [p.detach() - 0.5 * x for p, x in zip(case.parameters, wanted, strict=True)]
            assert_same_bits(found[len(g) :], moved)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_missing_gradient_is_zero(self, storage, kind):
        case = make_case(SHAPES, (torch.float64,) * 3, 1)
        outcomes = []
        for none in (None, torch.zeros(SHAPES[1], dtype=torch.float64)):
            x, _, y = case.gradients[kind]
            gradients = {**case.gradients, kind: [x, none, y]}
            outcomes.append(self.combined(Case(case.parameters, gradients), storage))
        for x, y in zip(*outcomes, strict=True):
            assert torch.equal(x, y)

    def test_where_no_kind_has_a_gradient_there_is_none(self, storage):
        missing = {(kind, 1) for kind in KINDS}
        case = make_case(SHAPES, (torch.float32,) * 3, 2, missing)
        found = self.combined(case, storage)
        assert found[1] is None
        assert_same_bits([found[4]], [case.parameters[1].detach()])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("kind", KINDS)
    def test_nan_and_inf_reach_the_gradient(self, storage, kind, value):
        case = make_case(SHAPES, (torch.float32,) * 3, 3)
        masks = masks_of(case.parameters, storage)
        for inside in {bool(x) for mask in masks for x in mask.flatten()}:
            place = int((masks[1] == inside).nonzero()[0])
            bad = {name: [x.clone() for x in row] for name, row in case.gradients.items()}
            bad[kind][1].view(-1)[place] = value
            d = self.combined(Case(case.parameters, bad), storage)[1]
            # A rule of g alone never looks at φ.
            assert not bool(d.isfinite().all())

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_every_dtype_is_near_the_float64_form(self, storage, dtype):
        case = make_case(SHAPES, (dtype,) * 3, 4)
        masks = masks_of(case.parameters, storage)
        kinds = [[flat([x], [x]) for x in row] for row in case.kinds]
        flat_masks = [flat([mask.double()], [mask]) for mask in masks]
        wanted = self.flat(kinds, flat_masks, storage != "unmasked")
        found = self.combined(case, storage)
        size = max(float(x.norm()) for x in (*wanted, *(y for row in kinds for y in row)))
        for t, p in enumerate(case.parameters):
            assert found[t].dtype == dtype
            assert (flat([found[t]], [p]) - wanted[t]).abs().max() <= 4 * TOLERANCE[dtype] * size
            move = self.flat_move(-0.5 * wanted[t], kinds[1][t] * flat_masks[t])
            after = flat([p], [p]) + move
            assert (flat([found[3 + t]], [p]) - after).abs().max() <= 4 * TOLERANCE[dtype] * (size + after.norm())

    def test_a_power_of_two_scales_d(self, storage):
        # As a loss scale does.
        case = make_case(SHAPES, (torch.float32,) * 3, 5)
        scaled = Case(case.parameters, {kind: [2.0**9 * x for x in row] for kind, row in case.gradients.items()})
        once, more = (self.combined(c, storage)[:3] for c in (case, scaled))
        assert_same_bits(more, [2.0**9 * x for x in once])

    def test_it_goes_on_bit_for_bit(self, storage):
        def wrap(model):
            return self.wrap(model, storage, lambda p: torch.optim.AdamW(p, lr=0.01))

        model = network()
        optimizer = wrap(model)
        for number in (1, 2):
            train_step(model, optimizer, number)
        others = copies(model, optimizer, wrap)
        train_step(model, optimizer, 3)
        assert all(p.isfinite().all() for p in model.parameters())
        for other, its_optimizer in others:
            train_step(other, its_optimizer, 3)
            assert_same_bits(list(other.parameters()), list(model.parameters()))

    def test_its_state_is_there_from_the_beginning_with_its_final_shapes(self):
        # torch.distributed.checkpoint loads what a fresh optimizer has, and nothing else.
        model = network()
        optimizer = self.wrap(model)

        def shapes():
            return {
                name: x.shape if isinstance(x, Tensor) else [y.shape for y in x]
                for name, x in optimizer.rule.state().items()
            }

        before = shapes()
        for number in (1, 2):
            train_step(model, optimizer, number)
        assert shapes() == before

    def test_a_parameter_frozen_in_the_middle_of_training_does_not_move(self, storage):
        model = network()
        optimizer = self.wrap(model, storage, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
        for number in (1, 2):
            train_step(model, optimizer, number)
        weight = model[0].weight
        weight.requires_grad_(False)
        held, bias = weight.detach().clone(), model[2].bias.detach().clone()
        for number in (3, 4):
            train_step(model, optimizer, number)
        assert_same_bits([weight], [held])
        assert not torch.equal(model[2].bias, bias)
        weight.requires_grad_(True)
        train_step(model, optimizer, 5)
        assert not torch.equal(weight, held)

    def test_a_parameter_frozen_from_the_start_does_not_move_and_takes_no_memory(self, storage):
        model = network()
        weight = model[0].weight.requires_grad_(False)
        held = weight.detach().clone()
        optimizer = self.wrap(model, storage, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
        for number in (1, 2, 3):
            train_step(model, optimizer, number)
        assert_same_bits([weight], [held])
        assert 0 not in optimizer.state_dict()["state"]

    def test_frozen_parameters_do_not_count(self, storage):
        case = make_case(SHAPES, (torch.float32,) * 3, 6)
        # Of a model in 4 bits.
        frozen = nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
        parameters = [nn.Parameter(p.detach().clone()) for p in case.parameters]
        optimizer = self.over([frozen, *parameters], storage)
        self.give(optimizer, {kind: [None, *row] for kind, row in case.gradients.items()})
        optimizer.combine()
        d = [p.grad.clone() for p in parameters]
        optimizer.step()
        # Not bit for bit: a sum over all parameters is of one number more.
        torch.testing.assert_close([*d, *parameters], self.combined(case, storage))
        assert frozen.tolist() == list(range(8))
        assert 0 not in optimizer.state_dict()["state"]

    def test_weights_belong_to_groups_and_may_change(self, storage):
        case = make_case(SHAPES, (torch.float32,) * 3, 7)
        for name in self.make(network()).weights:
            outcomes = []
            for which in ((), (0, 1, 2), (1,)):
                parameters = [nn.Parameter(p.detach().clone()) for p in case.parameters]
                key = f"mdgd_{name}"
                optimizer = self.over(
                    [{"params": [p], **({key: 2.5} if t in which[:1] else {})} for t, p in enumerate(parameters)],
                    storage,
                )
                for t in which[1:]:
                    optimizer.param_groups[t][key] = 2.5
                self.give(optimizer, case.gradients)
                optimizer.combine()
                d = [p.grad.clone() for p in parameters]
                optimizer.step()
                outcomes.append([*zip(d, parameters, strict=True)])
            own, others, mixed = outcomes
            wanted = [own[0], others[1], own[2]]
            assert_same_bits([x for pair in mixed for x in pair], [x for pair in wanted for x in pair])
            assert storage != "unmasked" or not all(torch.equal(x[1], y[1]) for x, y in zip(own, others, strict=True))

    def test_a_weight_out_of_range_is_refused(self):
        p = nn.Parameter(torch.ones(2))
        for name in self.make(network()).weights:
            with pytest.raises(ValueError, match=f"mdgd_{name} must be a finite number ≥ 0, got -1"):
                self.over([{"params": [p], f"mdgd_{name}": -1}])

    def test_wrapping_again_begins_anew(self):
        model = network()
        optimizer = self.wrap(model)
        for group in optimizer.param_groups:
            for name in optimizer.rule.weights:
                group[f"mdgd_{name}"] = 7.0
        train_step(model, optimizer, 1)
        now = copy.deepcopy(list(model.parameters()))
        again = MDGDOptimizer(optimizer.base, self.make(model))
        found = {key: value for key, value in again.param_groups[0].items() if key.startswith("mdgd_")}
        weights = {f"mdgd_{name}": value for name, value in again.rule.weights.items()}
        assert found == {"mdgd_rule": type(again.rule).__name__, **weights}
        train_step(model, again, 2)
        with again.reference():
            assert_same_bits(list(model.parameters()), now)

    def test_a_rule_with_state_belongs_to_one_optimizer(self):
        model = network()
        optimizer = self.wrap(model)
        train_step(model, optimizer, 1)
        held = copy.deepcopy(optimizer.rule.state())
        for base in (sgd(network().parameters()), optimizer.base):
            if held:
                with pytest.raises(ValueError, match="belongs to another optimizer already"):
                    MDGDOptimizer(base, optimizer.rule)
            else:
                MDGDOptimizer(base, optimizer.rule)
        for name, x in optimizer.rule.state().items():
            assert_same_bits(*([y] if isinstance(y, Tensor) else y for y in (x, held[name])))


def holding(base: torch.optim.Optimizer) -> nn.Module:
    """Linear layers around the matrices among an optimizer's parameters."""
    model = nn.Sequential()
    for p in (p for group in base.param_groups for p in group["params"]):
        if p.dim() == 2:
            model.append(nn.Linear(p.shape[1], p.shape[0], bias=False))
            model[-1].weight = p
    return model
