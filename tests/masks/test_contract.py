"""The contract of masks, run over each of the package and over one of a user's own."""

import torch
from torch import nn

from tests.masks.contract import MaskContract
from torch_mdgd import Given, Magnitude, MDGDOptimizer, Random, TopK
from torch_mdgd.masks import Mask


class TestTopK(MaskContract):
    @staticmethod
    def make(shapes):
        return TopK(0.3)


class TestMagnitude(MaskContract):
    @staticmethod
    def make(shapes):
        return Magnitude(0.3)


class TestRandom(MaskContract):
    @staticmethod
    def make(shapes):
        return Random(0.3, seed=1)


class TestAll(MaskContract):
    @staticmethod
    def make(shapes):
        return Magnitude(1.0)

    @staticmethod
    def kept(count):
        return count


class TestGiven(MaskContract):
    @staticmethod
    def make(shapes):
        return Given([torch.arange(torch.Size(s).numel()).view(s) == 0 for s in shapes])

    @staticmethod
    def kept(count):
        return 4


class Agreeing(Mask):
    """The elements in which the two task gradients have one sign."""

    scored = True

    def choose(self, parameters, gradients):
        return [g.sign() == g0.sign() for g, g0 in zip(gradients.g, gradients.g0_tilde, strict=True)]


class Even(Mask):
    """Every other element."""

    def choose(self, parameters, gradients):
        return [torch.arange(p.numel()).view(p.shape) % 2 == 0 for p in parameters]


class TestOfAUsersOwn(MaskContract):
    @staticmethod
    def make(shapes):
        return Even()

    @staticmethod
    def kept(count):
        return 15 + 4 + 1 + 6


def test_a_scored_mask_of_a_users_own_is_chosen_in_the_first_step():
    p = nn.Parameter(torch.zeros(4))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0), mask=Agreeing())
    g, g0 = torch.tensor([1.0, 2.0, -3.0, 4.0]), torch.tensor([5.0, -1.0, -1.0, 1.0])
    optimizer.set_gradients(task=[g], visual=[None], reference_task=[g0], reference_visual=[None])
    optimizer.step()
    assert p.tolist() == [-1.0, 0.0, 3.0, -4.0]
