"""Optimizers of other libraries' kinds, each as short as its kind allows."""

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class ScheduleFree(Optimizer):
    """Schedule-free SGD: z steps, x is the mean of all z, and gradients are taken at y between the two.

    Parameters hold y in training mode and x in evaluation mode, and must be in training mode for a step.
    """

    def __init__(self, params, lr=0.25, momentum=0.5, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "k": 0, "on": False})

    @torch.no_grad()
    def _turn(self, on, weight):
        for group in self.param_groups:
            for p in group["params"]:
                if group["on"] is not on and "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight(group["momentum"]))
            group["on"] = on

    def train(self):
        self._turn(True, lambda beta: 1 - beta)

    def eval(self):
        self._turn(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["on"]:
                raise Exception("not in train mode")
            group["k"] += 1
            c, lr, beta = 1 / group["k"], group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    g = p.grad + group["weight_decay"] * p
                    p.lerp_(z, c).add_(g, alpha=lr * (beta * (1 - c) - 1))
                    z.sub_(g, alpha=lr)


class Lamb(Optimizer):
    """A step as long as the parameter: of the whole of it, and of no element apart."""

    def __init__(self, params, lr=0.25):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * float(p.norm() / p.grad.norm().clamp(min=1e-12)))


class RowWise(Optimizer):
    """One second moment a row, as factored optimizers keep."""

    def __init__(self, params, lr=0.25):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    row = p.grad.square().mean(-1, keepdim=True)
                    p.sub_(p.grad / (row.sqrt() + 1e-8), alpha=group["lr"])


class ClippedMoves(Optimizer):
    """Moves whose mean square, over the whole parameter, is at most 9/4."""

    def __init__(self, params, lr=0.25):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["count"] = state.get("count", 0) + 1
                    state["sum"] = state.get("sum", 0) + p.grad.square()
                    move = p.grad / ((state["sum"] / state["count"]).sqrt() + 1e-8)
                    p.sub_(move / (move.square().mean().sqrt() / 1.5).clamp(min=1), alpha=group["lr"])


class MatricesOnly(SGD):
    """As Muon."""

    def step(self, closure=None):
        if any(p.dim() != 2 for group in self.param_groups for p in group["params"]):
            # Of no particular kind, as a library's own error may be.
            raise Exception("only matrices")
        return super().step(closure)


class TwoPhases(SGD):
    """As SAM: a step is two, each on the gradient at another place."""

    def first_step(self, zero_grad=False):
        raise NotImplementedError

    second_step = first_step


class Nested(SGD):
    """As Lookahead: a state dict around another's."""

    def state_dict(self):
        return {"lookahead_state": {}, "base_optimizer": super().state_dict()}


class Counting(SGD):
    """Holds a tensor of its own at the top of its state, beside the parameters'."""

    def step(self, closure=None):
        self.state["steps"] = self.state.get("steps", torch.zeros((), dtype=torch.float32, device="cpu")) + 1
        return super().step(closure)


class Offloading(SGD):
    """Steps on what hooks copied during the backward pass."""

    def __init__(self, params, lr=0.25):
        super().__init__(params, lr)
        self.held = {}
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self._keep)

    def _keep(self, p: Tensor) -> None:
        self.held[p] = p.grad.detach().clone()
