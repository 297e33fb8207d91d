"""Fine-tuning the small LLaVA on a target task."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from reproductions.methods import PullTowards, Replay, lora, tailor_
from reproductions.methods import base as registry
from reproductions.methods.attention import Attention
from reproductions.methods.gate_up import GateUp
from reproductions.methods.lalora import LaLoRA, LaplaceSettings
from reproductions.methods.osf import OSF, OSFSettings
from reproductions.mini.experiment.adapters import PullOfAdapters, adapt_all
from reproductions.mini.experiment.afterwards import finish, needs_pretrained
from reproductions.mini.experiment.calibration import prompts
from reproductions.mini.experiment.losses import Additions
from reproductions.mini.experiment.methods import Method
from reproductions.mini.experiment.remembered import SAMPLES, answers, memory, samples
from reproductions.mini.experiment.scored_masks import Batches
from reproductions.mini.world.data import Example, TaskData, training_batch
from torch_mdgd import MDGDOptimizer, VisualTap, connector, last_decoder_layers, mdgd_backward

BATCH = 32
LAYERS = 2
"""How many of the last decoder layers are trained."""

PARTS: Mapping[str, type[registry.Method]] = {"attention": Attention, "gate-up": GateUp}

WARM_UP = 10
TRACED_EVERY = 5
# The first gradients are ten times as long as later ones: unclipped, SGD at a useful rate destroys the model at once.
LONGEST_SGD_GRADIENT = 1.0
_CALIBRATION = 128
# Batches from which numbers are scored for a mask.
_SCORING = 8

OnStep = Callable[[int, float], None]
"""Is told of each step and its loss."""


def nothing(step: int, loss: float) -> None:
    """What is done after each step if nothing is asked for."""


@dataclass
class Course:
    """What was seen during a fine-tuning.

    Attributes:
        trained: how many numbers could move.
        losses: the task loss of each step.
        traces: every fifth step's diagnostics, by name; empty for a plain optimizer.
    """

    trained: int = 0
    losses: list[float] = field(default_factory=list)
    traces: dict[str, list[float]] = field(default_factory=dict)


def trainable_parameters(model: LlavaForConditionalGeneration, layers: int = LAYERS) -> list[torch.nn.Parameter]:
    """Freeze all but the last decoder layers and the projector, as the paper does; return what is left to train."""
    model.requires_grad_(False)
    trained = [*last_decoder_layers(model, layers), connector(model)]
    parameters = [parameter for module in trained for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    return parameters


def finetune(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    data: TaskData,
    method: Method,
    *,
    seed: int,
    steps: int,
    batch_size: int = BATCH,
    on_step: OnStep = nothing,
    reference: Mapping[str, torch.Tensor] | None = None,
) -> Course:
    """Train in place: 10 warm-up steps, then linear decay to zero.

    Args:
        model: which is trained.
        tokenizer: of the model.
        data: training examples.
        method: how.
        seed: of the batches.
        steps: optimizer steps.
        batch_size: examples a step.
        on_step: is told of each step.
        reference: φ, by parameter name, for a method without adapters; None for the weights that training begins with.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: `reference` is given to a method with adapters, whose φ is the model without them.
    """
    if reference is not None and method.lora:
        raise ValueError(f"reference: the adapters of {method.name} begin as nothing at the present weights, their φ")
    names = {id(p): name for name, p in model.named_parameters()}
    trained, parameters = prepare(model, method, partial(samples, model, tokenizer, data, method, seed))
    pretrained = {names[id(p)]: p.detach().clone() for p in parameters} if needs_pretrained(method) else {}
    if reference is not None:
        pretrained = {name: reference[name] for name in pretrained}
    course = Course(max(1, round(method.fraction * sum(p.numel() for p in parameters))))
    course_of = training(
        trained, tokenizer, data, method, parameters, seed=seed, steps=steps, batch_size=batch_size, reference=reference
    )
    for step, (loss, optimizer) in enumerate(course_of):
        course.losses.append(loss)
        if not math.isfinite(loss):
            raise FloatingPointError(f"{method.name}: the loss is {loss} at step {step}")
        if step % TRACED_EVERY == TRACED_EVERY - 1 and isinstance(optimizer, MDGDOptimizer):
            for name, value in optimizer.diagnostics.items():
                course.traces.setdefault(name, []).append(value)
        on_step(step, loss)
    if trained is not model:
        trained.merge_and_unload()
    if method.tailor is not None:
        rng = np.random.default_rng([seed, 1])
        chosen = [data.examples[i] for i in rng.choice(len(data), _CALIBRATION, replace=False)]
        model.eval()
        calibration = [training_batch(chosen, tokenizer)]
        tailor_(model, pretrained, calibration, omega=method.tailor, connector=method.connector)
    finish(model, method, pretrained, seed)
    return course


def prepare(
    model: LlavaForConditionalGeneration, method: Method, known: Callable[[], Batches] = tuple
) -> tuple[Any, list[torch.nn.Parameter]]:
    """The model to train, which has adapters around it if the method says so, and the parameters that are trained.

    Args:
        model: as it was pre-trained.
        method: how it is trained.
        known: draws batches of one example of what the model knows, for CorDA.
    """
    if method.kept is not None:
        parts = OSF(OSFSettings(kept=method.kept)).mark(model, LAYERS)
        return parts, [p for p in parts.parameters() if p.requires_grad]
    if method.trained != "last":
        marked = PARTS[method.trained]().mark(model, LAYERS)
        return model, [p for p in marked.parameters() if p.requires_grad]
    if not method.lora:
        return model, trainable_parameters(model)
    adapted: Any
    if method.adapters == "paper":
        adapted = lora(model, method.lora)
    else:
        adapted = adapt_all(model, method.lora, known() if method.adapters == "corda" else None)
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


def training(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    data: TaskData,
    method: Method,
    parameters: list[torch.nn.Parameter],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    reference: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[tuple[float, Optimizer]]:
    """Make one step after the other, each when it is asked for, and give its task loss and the optimizer."""
    rng = np.random.default_rng(seed)
    present = exchanged(model, reference or {})
    answered = answers(model, tokenizer, data, method, seed)
    optimizer = method.optimizer(
        model,
        parameters,
        lambda: _scoring_batches(data, tokenizer, seed, batch_size),
        lambda **sizes: prompts(method.calibration, data, tokenizer, seed, **sizes),  # type: ignore[arg-type]
    )
    pull = _pull(model, parameters, method, partial(samples, model, tokenizer, data, method, seed))
    additions = Additions(model, method, tokenizer, answered, seed, pull)
    old = (answered if method.memory == "answers" else memory(seed)) if method.replay else []
    # Whatever looks at φ has been made.
    exchanged(model, present)
    tap = None if method.features == -1 else VisualTap.for_model(model, method.features)
    scheduler = LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / steps))
    model.train()
    for step in range(steps):
        examples: list[Example] = [data.examples[i] for i in rng.choice(len(data), batch_size, replace=False)]
        if old:
            examples = Replay(old, replayed(method.replay, batch_size, step) / batch_size)(examples, rng)
        batch = training_batch(examples, tokenizer)
        if isinstance(optimizer, MDGDOptimizer) and method.has_rule:
            with warnings.catch_warnings():
                if reference is not None:
                    warnings.filterwarnings("ignore", "parameter 0 has changed since the optimizer was wrapped")
                loss = mdgd_backward(model, optimizer, batch, tap=tap)
        else:
            added = additions(batch)
            output = model(**batch)
            loss = output.loss
            added(output).backward()
        if method.base == "sgd":
            torch.nn.utils.clip_grad_norm_(parameters, LONGEST_SGD_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        yield loss.item(), optimizer


@torch.no_grad()
def exchanged(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put these weights into the model, by parameter name, and return those that were there."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in weights}
    for name, value in weights.items():
        parameters[name].copy_(value)
    return before


def replayed(share: float, batch_size: int, step: int) -> int:
    """How many examples of a step are old: whole numbers whose mean over the steps is the share of the batch."""
    return math.floor((step + 1) * share * batch_size + 1e-9) - math.floor(step * share * batch_size + 1e-9)


@dataclass(frozen=True)
class _Known:
    """As much of `Work` as a penalty from samples asks for."""

    samples: Callable[[], Batches]

    def memory_batches(self, count: int) -> Batches:
        return self.samples()[:count]


def _pull(
    model: Any, parameters: list[torch.nn.Parameter], method: Method, known: Callable[[], Batches]
) -> Callable[[], torch.Tensor] | None:
    if method.laplace:
        work = cast(registry.Work, _Known(known))
        return LaLoRA(LaplaceSettings(weight=method.laplace, samples=SAMPLES)).penalty(work, model)
    if not method.pull:
        return None
    if method.lora and method.adapters == "all":
        return PullOfAdapters(model, method.pull)
    return PullTowards(parameters, method.pull)


def _scoring_batches(data: TaskData, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int) -> Batches:
    rng = np.random.default_rng([seed, 2])
    draws = (rng.choice(len(data), batch_size, replace=False) for _ in range(_SCORING))
    return [training_batch([data.examples[i] for i in drawn], tokenizer) for drawn in draws]
