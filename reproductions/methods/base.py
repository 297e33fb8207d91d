"""What a way of fine-tuning consists of; each method is one file with a subclass.

A method knows neither the models nor the data of an experiment: what it needs of them is :class:`Work`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from reproductions.shared.fields import limited
from torch_mdgd import Rule, connector, freeze_all_but, last_decoder_layers
from torch_mdgd.masks import Mask

Batch = Mapping[str, Any]
"""What a model is called with: ``model(**batch)``."""

Penalty = Callable[[], Tensor]
Divergence = Callable[[Batch], Callable[[Any], Tensor]]


class Work(Protocol):
    """What a method may use: the model under way and data."""

    @property
    def network(self) -> nn.Module:
        """The network as it was loaded."""

    @property
    def layers(self) -> int:
        """How many of the last decoder layers are trained."""

    @property
    def pretrained(self) -> Mapping[str, Tensor]:
        """The weights before training, by parameter name, on the CPU; read when asked for."""

    def target_batches(self, count: int) -> Iterator[Batch]:
        """Batches of one example of the target task, labels included, on the model's device."""

    def prompt_batches(self, count: int) -> Iterator[Batch]:
        """Batches of one picture of the target task under a general question, without labels."""

    def memory_batches(self, count: int) -> Iterator[Batch]:
        """The same of what the model could answer before."""

    def memory(self) -> Sequence[Any]:
        """Training examples of what the model could answer before."""


@dataclass(frozen=True)
class Settings:
    """What can be set of every method, under ``[methods.NAME]``.

    Attributes:
        learning_rate: the method's own peak; 0 for that of ``[training]``.
    """

    learning_rate: float = limited(0.0, least=0)


class Method:
    """Fine-tuning of the last layers and the connector with AdamW, unless a subclass says otherwise.

    Attributes:
        name: on the command line and in folders.
        title: in tables.
        in_paper: whether the paper's tables have it.
        trains: False measures the weights as they are.
        begins_with: the method whose result is taken up in place of training; None for training.
        keeps: bytes beside each trained number that a penalty or a divergence holds.
        remembers: whether it takes training examples of what the model could answer before.
        rewrites: whether it begins with weights that are taken apart, which have to be there in full.
        rate: what the experiment's learning rate is multiplied with, where the method has none of its own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    in_paper: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    begins_with: ClassVar[str | None] = None
    remembers: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False
    rate: ClassVar[float] = 1.0
    keeps: ClassVar[int] = 0
    Settings: ClassVar[type] = Settings

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings or self.Settings()

    # What is trained.

    def prepare(self, work: Work) -> nn.Module:
        """Mark what is trained, and return the module to call: the network, perhaps with adapters."""
        return self.mark(work.network, work.layers)

    def mark(self, network: nn.Module, layers: int) -> nn.Module:
        """The part of :meth:`prepare` that needs shapes alone, so that numbers can be counted without weights."""
        train_last(network, layers)
        return network

    def trained_numbers(self, network: nn.Module, layers: int) -> int:
        """How many numbers may change, of a network that was just built; on the meta device too."""
        return self.trained(self.mark(network, layers)) if self.trains else 0

    def trained(self, module: nn.Module) -> int:
        """How many numbers of a module may change, once it is marked."""
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    # How a step is made.

    def rule(self, model: nn.Module) -> Rule | None:
        """What becomes of the gradients, new at each call; None for the plain optimizer."""
        return None

    def mask(self) -> Mask | None:
        """Which numbers may move; asked for where there is a rule."""
        return None

    @property
    def compact(self) -> bool:
        """Whether reference and optimizer state are kept for the mask's numbers alone."""
        return False

    def prepare_rule(self, rule: Rule, work: Work) -> None:
        """Give a new rule what it needs of the data."""

    def wrapper(self, model: nn.Module, work: Work | None = None) -> dict[str, Any] | None:
        """Keywords of ``MDGDOptimizer`` and of ``MDGDTrainer``; None for the plain optimizer."""
        rule = self.rule(model)
        if rule is not None and work is not None:
            self.prepare_rule(rule, work)
        return None if rule is None else {"rule": rule, "mask": self.mask(), "compact": self.compact}

    def needs(self, model: nn.Module) -> tuple[str, ...]:
        """The gradients that a step needs; one that chooses a mask needs all four."""
        rule = self.rule(model)
        if rule is None:
            return ("task",)
        weights = {name: torch.tensor([value]) for name, value in rule.weights.items()}
        return rule.needs(weights, self.mask() is not None)

    def penalty(self, work: Work, module: nn.Module) -> Penalty | None:
        """What is added to the task loss of the plain optimizer; built before a checkpoint is loaded."""
        return None

    def divergence(self, work: Work, module: nn.Module) -> Divergence | None:
        """The same, of each batch's output: called with the batch before its pass, it returns what makes the loss."""
        return None

    # What it is made from, and what is left.

    def examples(self, work: Work, examples: Sequence[Any], batch: int) -> Sequence[Any]:
        """What is trained on, from the target's training split and the size of a step's batch."""
        return examples

    def finish(self, work: Work, module: nn.Module) -> None:
        """Leave the result of training in the network's own parameters."""


def train_last(network: nn.Module, layers: int) -> list[nn.Parameter]:
    """Train the last decoder layers and the connector, as the paper does, but for what the network itself holds fixed.

    Returns:
        the trained parameters.
    """
    fixed = fixed_names(network)
    freeze_all_but(network, [*last_decoder_layers(network, layers), connector(network)])
    keep_fixed(network, fixed)
    return trained_parameters(network)


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What is trained of a module."""
    return [p for p in module.parameters() if p.requires_grad]


def fixed_names(network: nn.Module) -> set[str]:
    """Parameters that the network never trains, such as the positions of MiniCPM-V's resampler."""
    return {name for name, p in network.named_parameters() if not p.requires_grad}


def keep_fixed(module: nn.Module, fixed: set[str]) -> None:
    """Freeze them again, also where peft has copied or renamed them."""
    for name, p in module.named_parameters():
        original = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        if original in fixed:
            p.requires_grad_(False)
