"""What is done to a fine-tuned model before it is measured, by the registered methods that do it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from reproductions.methods import Work
from reproductions.methods import base as registry
from reproductions.methods.dare import DARE, DropSettings
from reproductions.methods.dg_hard import DGHard, ShrinkSettings
from reproductions.methods.wise_ft import MixSettings, WiseFT
from reproductions.mini.experiment.methods import Method


@dataclass(frozen=True)
class _Before:
    """As much of `Work` as these methods ask for."""

    pretrained: Mapping[str, Tensor]


def finish(model: nn.Module, method: Method, pretrained: Mapping[str, Tensor], seed: int) -> None:
    """Mix, drop or shrink what was learned, in place.

    Args:
        model: with the trained parameters still marked as such.
        method: how it was trained.
        pretrained: what they were before, by name.
        seed: of what is drawn.
    """
    for each in _methods(method, seed):
        each.finish(cast(Work, _Before(pretrained)), model)


def needs_pretrained(method: Method) -> bool:
    """Whether anything is done after training that needs the weights before it."""
    return method.tailor is not None or any(_methods(method, 0))


def _methods(method: Method, seed: int) -> Iterator[registry.Method]:
    if method.mix is not None:
        yield WiseFT(MixSettings(share=method.mix))
    if method.drop is not None:
        yield DARE(DropSettings(share=method.drop, seed=seed))
    if method.shrink is not None:
        yield DGHard(ShrinkSettings(scale=method.shrink))
