"""What holds of every mask. Subclass :class:`MaskContract` in the tests of a new one."""

import copy
import pickle
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.properties import assert_same_bits, bits
from torch_mdgd import MDGDOptimizer
from torch_mdgd.masks import Mask, ScoreInputs
from torch_mdgd.rules.base import KINDS

SHAPES = [(6, 5), (7,), (), (3, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float32]


def normal(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(d) for s, d in zip(shapes, dtypes, strict=True)]


def parameters_of(shapes=SHAPES, dtypes=DTYPES, seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(x) for x in normal(shapes, dtypes, seed)]


class MaskContract:
    """A subclass says how its mask is made, and how many elements it keeps."""

    @staticmethod
    def make(shapes: Sequence[tuple[int, ...]]) -> Mask:
        """A new mask for trained parameters of these shapes."""
        raise NotImplementedError

    @staticmethod
    def kept(count: int) -> int:
        """Of how many elements there are, how many may move."""
        return max(1, round(0.3 * count))

    # What the tests do with a mask.

    def choose(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        mask = self.make([tuple(p.shape) for p in parameters])
        if not mask.scored:
            return mask.choose(parameters, None)
        g, v, g0 = (normal([p.shape for p in parameters], [p.dtype for p in parameters], i) for i in (1, 2, 3))
        a = torch.linspace(-1, 1, len(parameters), dtype=torch.float64)
        return mask.choose(parameters, ScoreInputs(g, v, g0, a))

    def wrap(self, parameters: Sequence[nn.Parameter], compact: bool = False) -> MDGDOptimizer:
        base = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
        trained = [tuple(p.shape) for p in parameters if p.requires_grad]
        return MDGDOptimizer(base, mask=self.make(trained), compact=compact)

    def step(self, optimizer: MDGDOptimizer, seed: int) -> None:
        gradients = {}
        for i, kind in enumerate(KINDS):
            given = iter(normal(*_specs(optimizer), 10 * seed + i))
            gradients[kind] = [next(given) if p.requires_grad else None for p in optimizer.parameters]
        optimizer.set_gradients(**{kind: gradients[kind] for kind in optimizer.needs()})
        optimizer.step()
        optimizer.zero_grad()

    def moved_by_a_step(self, optimizer: MDGDOptimizer, seed: int) -> Tensor:
        before = [bits(p).clone() for p in optimizer.parameters]
        self.step(optimizer, seed)
        return torch.cat([bits(p) != x for p, x in zip(optimizer.parameters, before, strict=True)])

    # The contract.

    def test_it_is_of_bools_of_the_parameters_shapes_and_exactly_so_many_are_true(self):
        parameters = parameters_of()
        masks = self.choose(parameters)
        assert [(m.dtype, m.shape) for m in masks] == [(torch.bool, p.shape) for p in parameters]
        assert sum(int(m.sum()) for m in masks) == self.kept(50)

    def test_it_is_the_same_each_time_and_draws_no_random_numbers_of_others(self):
        parameters = parameters_of()
        state = torch.get_rng_state()
        first = self.choose(parameters)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        assert all(map(torch.equal, first, self.choose(parameters)))
        turned = [nn.Parameter(p.detach().t().contiguous().t() if p.dim() == 2 else p.detach()) for p in parameters]
        assert not turned[0].is_contiguous()
        assert all(map(torch.equal, first, self.choose(turned)))

    @pytest.mark.parametrize("compact", [False, True])
    def test_elements_outside_it_stay_bit_identical_and_the_others_move(self, compact):
        parameters = parameters_of()
        start = [bits(p).clone() for p in parameters]
        optimizer = self.wrap(parameters, compact)
        for seed in range(3):
            self.step(optimizer, seed)
        moved = sum(int((bits(p) != x).sum()) for p, x in zip(parameters, start, strict=True))
        assert moved == self.kept(50)
        assert optimizer.diagnostics["kept_fraction"] == self.kept(50) / 50
        with optimizer.reference():
            assert all(torch.equal(bits(p), x) for p, x in zip(parameters, start, strict=True))

    @pytest.mark.parametrize("compact", [False, True])
    def test_dense_and_compact_have_one_mask(self, compact):
        moved = []
        for mode in (False, compact):
            parameters = parameters_of()
            start = [bits(p).clone() for p in parameters]
            self.step(self.wrap(parameters, mode), 0)
            moved.append([bits(p) != x for p, x in zip(parameters, start, strict=True)])
        assert all(map(torch.equal, *moved))

    @pytest.mark.parametrize("compact", [False, True])
    def test_frozen_parameters_do_not_count(self, compact):
        parameters = parameters_of()
        # The largest of all numbers, and whole ones, as of a model in 4 bits.
        frozen = [
            nn.Parameter(torch.full((90,), 100.0), requires_grad=False),
            nn.Parameter(torch.full((8,), 200, dtype=torch.uint8), requires_grad=False),
        ]
        start = [p.detach().clone() for p in parameters]
        optimizer = self.wrap([frozen[0], *parameters[:2], frozen[1], *parameters[2:]], compact)
        self.step(optimizer, 0)
        alone = parameters_of()
        self.step(self.wrap(alone, compact), 0)
        assert_same_bits(parameters, alone)
        assert sum(int((p != x).sum()) for p, x in zip(parameters, start, strict=True)) == self.kept(50)
        assert optimizer.diagnostics["kept_fraction"] == self.kept(50) / 50
        assert set(optimizer.state_dict()["state"]) == {1, 2, 4, 5}

    @pytest.mark.parametrize("compact", [False, True])
    def test_it_goes_on_bit_for_bit(self, compact):
        parameters = parameters_of()
        optimizer = self.wrap(parameters, compact)
        for seed in range(2):
            self.step(optimizer, seed)
        fresh = [nn.Parameter(p.detach().clone()) for p in parameters]
        resumed = self.wrap(fresh, compact)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        others = [resumed, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        self.step(optimizer, 2)
        for other in others:
            self.step(other, 2)
            assert_same_bits(other.parameters, parameters)

    @pytest.mark.parametrize("compact", [False, True])
    @pytest.mark.parametrize("steps", [0, 1])
    def test_a_state_dict_without_one_leaves_it_as_it_is(self, steps, compact):
        parameters, twins = (parameters_of(dtypes=[torch.float32] * len(SHAPES)) for _ in range(2))
        plain = torch.optim.AdamW(twins, lr=0.1, weight_decay=0.5)
        for p in twins:
            p.grad = torch.ones_like(p)
        plain.step()
        optimizer = self.wrap(parameters, compact)
        moved = []
        for seed in range(steps):
            moved.append(self.moved_by_a_step(optimizer, seed))
        with warnings.catch_warnings():
            # There is no reference in it.
            warnings.simplefilter("ignore")
            optimizer.load_state_dict(plain.state_dict())
        moved.append(self.moved_by_a_step(optimizer, 1))
        assert int(moved[-1].sum()) == self.kept(50)
        assert torch.equal(moved[-1], moved[0])


def _specs(optimizer: MDGDOptimizer) -> tuple[list[tuple[int, ...]], list[torch.dtype]]:
    trained = [p for p in optimizer.parameters if p.requires_grad]
    return [tuple(p.shape) for p in trained], [p.dtype for p in trained]
