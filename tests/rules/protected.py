"""A small model with a projector and a decoder whose inputs are protected, and what enters its layers."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_mdgd import MDGDOptimizer, ProtectInputs


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Decoder(nn.Module):
    def __init__(self, bias=True, recompute=False):
        super().__init__()
        self.first = nn.Linear(6, 5, bias=bias)
        self.second = nn.Linear(5, 3, bias=bias)
        self.recompute = recompute

    def forward(self, x):
        hidden = checkpoint(self.first, x, use_reentrant=False) if self.recompute else self.first(x)
        return self.second(torch.tanh(hidden))


class Model(nn.Module):
    """A projector that sees pictures alone, a decoder that sees them among words, and a norm."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.projector = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.decoder = Decoder(**options)
        self.double()

    def forward(self, pictures, words):
        sequence = torch.cat([self.projector(pictures), self.norm(words)], dim=1)
        return self.decoder(sequence)


MASK = torch.tensor([[True, True, False, False, False]]).expand(2, 5)


def batch(seed=0):
    # Pictures of little energy beyond one direction, so that there is something left to learn with.
    pictures = normal(2, 2, 1, seed=seed) * torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    return pictures + 0.1 * normal(2, 2, 4, seed=seed + 7), normal(2, 3, 6, seed=seed + 1)


def wrap(model, energy=0.8, base=torch.optim.AdamW, **options):
    rule = ProtectInputs(model, energy, text_module=model.decoder, **options)
    return MDGDOptimizer(base(model.parameters(), lr=0.05), rule)


def train(model, optimizer, seeds, mask=MASK):
    for seed in seeds:
        with optimizer.rule.observe(mask):
            loss = (model(*batch(seed)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def layers(model):
    return {"projector": model.projector, "first": model.decoder.first, "second": model.decoder.second}


def seen(model, batches):
    """By hand: what enters each layer at image tokens, with the 1 of its bias."""
    pictures, words = (torch.cat(x) for x in zip(*batches, strict=True))
    sequence = torch.cat([model.projector(pictures), model.norm(words)], 1)[:, :2]
    found = {"projector": pictures, "first": sequence, "second": torch.tanh(model.decoder.first(sequence))}
    ones = torch.ones(len(pictures) * 2, 1, dtype=torch.float64)
    return {name: torch.cat([x.detach().reshape(-1, x.shape[-1]), ones], 1) for name, x in found.items()}


def covariances(optimizer):
    return list(optimizer.rule.covariances.values())
