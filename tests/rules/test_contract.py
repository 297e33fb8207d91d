"""The contract of rules, run over each of the package and over one of a user's own."""

import torch

from tests.reference import equations
from tests.rules.contract import RuleContract
from torch_mdgd import MDGD, DriftBudget, Project, ProtectInputs, Rule, StepProject


class TestMDGD(RuleContract):
    @staticmethod
    def make(model):
        return MDGD(0.7, 1.3)

    @staticmethod
    def flat(kinds, masks, masked):
        if masked:
            return [equations.mdgd_gm(g, v, mask, 0.7) for g, v, mask in zip(*kinds[:2], masks, strict=True)]
        return [equations.mdgd(*row, 0.7, 1.3) for row in zip(*kinds, strict=True)]


class TestWithoutRegularizer(RuleContract):
    @staticmethod
    def make(model):
        return MDGD(0.7, regularize=0)

    @staticmethod
    def flat(kinds, masks, masked):
        return [equations.mdgd_gm(g, v, mask, 0.7) for g, v, mask in zip(*kinds[:2], masks, strict=True)]


class TestProject(RuleContract):
    @staticmethod
    def make(model):
        return Project(0.7)

    @staticmethod
    def flat(kinds, masks, masked):
        return [mask * equations.project(g, v, 0.7) for g, v, mask in zip(*kinds[:2], masks, strict=True)]


class TestStepProject(RuleContract):
    @staticmethod
    def make(model):
        return StepProject(0.1)

    @staticmethod
    def flat(kinds, masks, masked):
        return [mask * g for g, mask in zip(kinds[0], masks, strict=True)]

    @staticmethod
    def flat_move(move, v):
        return equations.step_project(move, v, 0.1)


class TestProtectInputs(RuleContract):
    storages = ("unmasked",)

    @staticmethod
    def make(model):
        return ProtectInputs(model, 0.5, refresh=2, text_module=model)

    @staticmethod
    def flat(kinds, masks, masked):
        return list(kinds[0])


class TestDriftBudget(RuleContract):
    @staticmethod
    def make(model):
        return DriftBudget(Project(0.7), 0.0625)

    @staticmethod
    def flat(kinds, masks, masked):
        # A drift of 1/8 is twice the budget.
        g, v = (torch.cat(kind) for kind in kinds[:2])
        align = 0.7 * 2.0**0.05 * 2 * float(g.norm() / v.norm())
        return [mask * equations.project(g, v, align) for g, v, mask in zip(*kinds[:2], masks, strict=True)]


class Opposed(Rule):
    """Where g and v point in opposite directions, the shorter of the two is left out."""

    def __init__(self, visual=1.0):
        self.weights = {"visual": visual}

    def coefficients(self, products, w, masked):
        out = torch.ones(products.shape[:2], dtype=torch.float64)
        if products.shape[-1] > 1:
            opposed, longer = products[:, 0, 1] < 0, products[:, 0, 0] >= products[:, 1, 1]
            out[:, 0] = 1 - (opposed & ~longer).double()
            out[:, 1] = w["visual"] * (1 - (opposed & longer).double())
            out[:, 2:] = 0
        return out


class TestOfAUsersOwn(RuleContract):
    @staticmethod
    def make(model):
        return Opposed()

    @staticmethod
    def flat(kinds, masks, masked):
        out = []
        for g, v, mask in zip(*kinds[:2], masks, strict=True):
            d = g + v if g @ v >= 0 else g if g @ g >= v @ v else v
            out.append(mask * d)
        return out
