"""What a row takes, from parameter and token counts: GPU hours, GPU memory, disk. Estimates, not measurements.

With P the language model's parameters, Q those that are trained, T the tokens of an example, f forward and b backward
passes a step, as many as the gradients take that the method's rule needs:

    training    T · (2 P (f + b c) + b (2 P + 2 Q)) + 2 V N     operations an example
    evaluation  2 P T + 2 V N operations, then a pass over all weights' bytes for each token of a batch's answers
    memory      2 bytes a frozen number, or half a one in 4 bits; 4 a trained one, what `bytes_a_number` says beside it,
                what the rule keeps by itself, and activations; or all weights in 2 bytes, while it is measured
    host        two copies of the weights in 2 bytes, of which one is compared with what was trained; 4 GB; and the
                reference, if it is there, each tensor in pinned memory of the next power of two

c is 1 if activations are computed again in backward passes; V and N are the vision tower's parameters and patches: it
is frozen and runs once an example. Gradients pass through all of the language model, since the connector is trained.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from reproductions.methods import METHODS, Method
from reproductions.methods.base import trained_parameters
from reproductions.methods.mdgd_gm import MDGDGM
from reproductions.paper.config import CARDS as NAMES
from reproductions.paper.config import Experiment, method_of
from reproductions.paper.data import DATASETS, Split
from reproductions.paper.models import MODELS, skeleton
from reproductions.paper.run.sparing import FOUR_BITS, PARTS, STATE, frozen, linear_layers, trains, why_not
from reproductions.paper.run.work import splits_of
from torch_mdgd import MDGD, connector, last_decoder_layers
from torch_mdgd.models.parts import text_decoder

UTILISATION = 0.35


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        title: a common one of its memory.
        memory: bytes.
        operations: a second, in bfloat16 without sparsity.
        bandwidth: bytes a second.
    """

    title: str
    memory: float
    operations: float
    bandwidth: float


CARDS: dict[str, Card] = {
    name: card
    for name, card in zip(
        NAMES,
        (
            Card("RTX 3090", 24e9, 71e12, 0.94e12),
            Card("RTX A6000", 48e9, 155e12, 0.77e12),
            Card("A100-80GB", 80e9, 312e12, 2.0e12),
        ),
        strict=True,
    )
}
ASSUMPTIONS = (
    "A100-80GB: 312 TFLOP/s in bfloat16 and 2 TB/s, at 35 % of either; one row uses one GPU, two GPUs do two rows at "
    "a time"
)
SPARE = 1.5e9
"""Bytes of a GPU that are not ours: its context, and what the allocator cannot use."""
PASSES = {1: (1, 1), 2: (2, 2), 4: (3, 4)}
"""Forward and backward passes, by how many gradients a step takes apart."""
GRADIENTS = {1: 1, 2: 2, 4: 3}
"""How many are held at the peak: the two at the reference become one."""
WORDS = 80
"""Tokens of an instruction and its answer."""


@dataclass(frozen=True)
class Size:
    """A model's shape.

    Attributes:
        total: parameters.
        language: of the decoder and the head, without embeddings.
        vision: of the vision tower.
        hidden: width of the decoder.
        depth: layers of the decoder.
        vocabulary: tokens.
        image_tokens: of one picture, as the decoder sees it.
        patches: of one picture, as the vision tower sees it.
    """

    total: int
    language: int
    vision: int
    hidden: int
    depth: int
    vocabulary: int
    image_tokens: int
    patches: int


@dataclass(frozen=True)
class Estimate:
    """What one row takes.

    Attributes:
        trained: numbers that may change; None where only the weights themselves can tell.
        training_hours: on one GPU.
        evaluation_hours: of all tasks.
        analysis_hours: of the short fine-tunings behind Figures 3b and 3c.
        memory: bytes of GPU memory at the peak.
        host: bytes of the host's memory.
        disk: bytes that stay.
        checkpoints: bytes while it trains: two checkpoints, for one is written before the last is removed.
    """

    trained: int | None
    training_hours: float
    evaluation_hours: float
    analysis_hours: float
    memory: float
    host: float
    disk: float
    checkpoints: float

    @property
    def hours(self) -> float:
        """Of everything."""
        return self.training_hours + self.evaluation_hours + self.analysis_hours


@lru_cache
def size_of(model: str) -> Size:
    """The shape of a published model."""
    network: Any = skeleton(model)
    decoder: Any = text_decoder(network)
    total = count(network)
    embeddings = decoder.get_input_embeddings().weight
    # The head is of the embeddings' shape: their own weight, or one beside them.
    beside = sum(p.numel() for p in network.parameters() if p.shape == embeddings.shape) - embeddings.numel()
    language = count(decoder)
    vision = total - count(decoder) - beside - count(connector(network))
    image_tokens, patches = MODELS[model].picture
    return Size(
        total, language, vision, decoder.config.hidden_size, len(decoder.layers), decoder.config.vocab_size,
        image_tokens, patches,
    )  # fmt: skip


def require_layers(experiment: Experiment) -> None:
    """Raise ConfigError if more layers are to be trained than the published model has."""
    experiment.require_layers_of(experiment.model, size_of(experiment.model).depth)


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def trained_numbers(experiment: Experiment, method: Method) -> int | None:
    """How many numbers a method may change of the published model; None where only the weights themselves can tell."""
    return None if method.name == "osf" else _ask(experiment, method).trained


@dataclass(frozen=True)
class Asked:
    """What a method itself says of a published model.

    Attributes:
        trained: numbers that it may change.
        gradients: how many of a step it takes apart.
        passes: forward and backward, of a step in the mean.
        wraps: whether it holds the reference.
        corrects: whether it holds the values before a step.
        own: bytes that its rule or penalty keeps from step to step.
        pinned: bytes that its reference takes in the host's memory, if it is asked for there.
        frozen: numbers of Linear layers that it leaves frozen, by the part that 4 bits are asked for.
    """

    trained: int = 0
    gradients: int = 1
    passes: tuple[float, float] = (1, 1)
    wraps: bool = False
    corrects: bool = False
    own: int = 0
    pinned: int = 0
    frozen: Mapping[str, int] = field(default_factory=dict)


def _ask(experiment: Experiment, method: Method) -> Asked:
    require_layers(experiment)
    return _asked(experiment.model, experiment.layers, method.name, method.settings)


@lru_cache
def _asked(model: str, layers: int, name: str, settings: Any) -> Asked:
    method, network = METHODS[name](settings), skeleton(model)
    if name == "osf":
        return Asked()
    linears = {part: linear_layers(network, part) for part in PARTS}
    with warnings.catch_warnings():
        # What they are of is said where it is trained.
        warnings.simplefilter("ignore")
        trained = method.trained_numbers(network, layers)
        asked = _of_a_step(method, network, trained)
    held = trained_parameters(network) if asked.wraps and not method.compact else ()
    return replace(
        asked,
        pinned=sum(1 << (4 * p.numel() - 1).bit_length() for p in held),
        frozen={part: sum(layer.weight.numel() for layer in frozen(some)) for part, some in linears.items()},
    )


def _of_a_step(method: Method, network: nn.Module, trained: int) -> Asked:
    rule = method.rule(network)
    if rule is None:
        # One pass more, at φ.
        looks_back = type(method).divergence is not Method.divergence
        return Asked(trained, passes=(1 + looks_back, 1), own=method.keeps * trained)
    every, weights = getattr(rule, "every", 1), {k: torch.tensor([x]) for k, x in rule.weights.items()}
    gradients, lazy = len(method.needs(network)), isinstance(rule, MDGD) and every > 1
    passes: tuple[float, float] = PASSES[gradients]
    if lazy or rule.joint(weights, method.mask() is not None) is not None:
        # One backward pass of both losses, and one forward pass at φ without a graph.
        gradients, passes = 1, (1 + 1 / every, 1)
    rule.attach(trained_parameters(network), method.mask() is not None)
    kept = [x for tensors in rule.state().values() for x in (tensors if isinstance(tensors, Sequence) else [tensors])]
    return Asked(trained, gradients, passes, True, rule.corrects, sum(x.nbytes for x in kept))


def bytes_a_number(
    asked: Asked, mask: MDGDGM | None = None, state: float = STATE["adamw"], *, on_host: bool = False
) -> tuple[float, float]:
    """Bytes beside each trained number's own 4, at the peak of the first step and of later ones.

    AdamW's moments 8, each gradient 4; of what is wrapped φ 4, and autocast's copy 2, which lives while gradients are
    there; the values before a step that is corrected or masked 4, and a mask 1. In a compact mask that holds a share ρ:
    moments, φ and positions 16 ρ, and in a step its values and gradients 8 ρ; to choose it two gradients and autocast's
    copy 10, or two gradients, the mask, positions and φ 9 + 8 ρ. ``test_bytes_a_number_are_those_of_a_step`` holds all
    of them to a profile of steps.

    Args:
        asked: of a method.
        mask: the method, if it has one.
        state: bytes of the optimizer's state.
        on_host: whether φ is in the host's memory.
    """
    if mask is not None and mask.compact:
        ratio = mask.settings.ratio
        later = max(16 * ratio + 4 + 2, 24 * ratio + 4)
        return max(10, 9 + 8 * ratio, later), later
    reference = (0 if on_host else 4) if asked.wraps else 0
    if mask is not None:
        return max(8 + 2, state + 4 + 4 + 1) + reference, state + 4 + 4 + 1 + reference
    dense = state + 4 * GRADIENTS[asked.gradients] + reference + 2 * asked.wraps + 4 * asked.corrects
    return dense, dense


def _in_a_checkpoint(asked: Asked, mask: MDGDGM | None, state: float) -> float:
    """Bytes of the optimizer's state a trained number: moments, φ, and the mask or where its numbers stand."""
    if mask is not None and mask.compact:
        return 16 * float(mask.settings.ratio)
    return state + 4 * asked.wraps + (mask is not None)


def estimate(experiment: Experiment, name: str, card: str = NAMES[-1]) -> Estimate:
    """What a row of the tables takes, on one of ``CARDS``."""
    method, size, t = method_of(experiment, name), size_of(experiment.model), experiment.training
    asked = _ask(experiment, method)
    trained, masks = asked.trained, _masks(experiment, method)
    dense = round(trained / method.settings.ratio) if isinstance(method, MDGDGM) else trained
    tokens = size.image_tokens + WORDS
    target = DATASETS[experiment.target]
    examples = t.examples or target.splits[str(target.training)].examples
    rounds = t.steps * t.batch * t.accumulation / examples if t.steps else t.epochs
    one, learns = 0.0, trains(method)
    if learns:
        f, b = asked.passes
        one = tokens * (2 * size.language * (f + b * t.checkpointing) + b * 2 * (size.language + dense))
        looks = f if MODELS[experiment.model].tiles_in_turn else 1
        one = (one + 2 * size.vision * size.patches * looks) / (CARDS[card].operations * UTILISATION) / 3600
    short = experiment.masking if isinstance(method, MDGDGM) else None
    # While it is measured, the published weights with what was trained.
    memory = 2 * size.total + _activations(experiment, size, False)
    if learns:
        weights = 2 * (size.total - dense) - (2 - FOUR_BITS) * asked.frozen.get(t.quantize, 0) + 4 * dense
        on_host = t.reference == "cpu"
        beside = dense * max(max(bytes_a_number(asked, m, STATE[t.optimizer], on_host=on_host)) for m in masks)
        memory = max(memory, weights + beside + asked.own + _activations(experiment, size, True))
    elif method.trains:
        memory += 4 * sum(side**2 for side in _inputs(experiment))
    state = dense * max(_in_a_checkpoint(asked, m, STATE[t.optimizer]) for m in masks) + asked.own * asked.wraps
    return Estimate(
        trained if name != "osf" else None,
        one * rounds * examples,
        sum(_evaluation(experiment, size, task, CARDS[card]) for task in experiment.tasks) / 3600,
        one * len(short.ratios) * short.steps * t.batch * t.accumulation if short else 0.0,
        memory,
        4 * size.total + 4e9 + (asked.pinned if t.reference == "cpu" else 0),
        2 * dense,
        2 * (4 * dense + state) if learns else 0.0,
    )


def _masks(experiment: Experiment, method: Method) -> Sequence[MDGDGM | None]:
    """MDGD-GM at its own ratio and at those of Figures 3b and 3c; None alone for a method without a mask."""
    if not isinstance(method, MDGDGM):
        return (None,)
    ratios = (method.settings.ratio, *experiment.masking.ratios)
    return [MDGDGM(replace(method.settings, ratio=ratio)) for ratio in ratios]


SETTINGS = {"r": ("reference", "cpu"), "8": ("optimizer", "adamw8bit"), "q": ("quantize", "all")}
"""What spares memory, of ``[training]``, by a letter."""
ORDER = ("", "r", "8", "8 r", "q", "q r", "q 8", "q 8 r")
"""The first changes nothing, the second no number; 4 bits are the coarsest."""


def with_settings(experiment: Experiment, letters: str) -> Experiment:
    """The experiment with some of ``SETTINGS``, named by their letters."""
    settings: dict[str, Any] = dict(SETTINGS[x] for x in letters.split())
    return replace(experiment, training=replace(experiment.training, **settings))


def fitting(experiment: Experiment, name: str) -> dict[str, tuple[str, Estimate] | None]:
    """For each of ``CARDS`` the first of ``ORDER`` with which a row fits, and what it takes then; None for none."""
    method = method_of(experiment, name)
    tried = [(letters, with_settings(experiment, letters)) for letters in (ORDER if trains(method) else ORDER[:1])]
    found = [(letters, estimate(e, name)) for letters, e in tried if why_not(e, method) is None]
    return {
        card: next((one for one in found if one[1].memory + SPARE <= CARDS[card].memory), None) for card in CARDS
    }  # fmt: skip


def _inputs(experiment: Experiment) -> list[int]:
    """Widths of the inputs of every Linear of a layer: Model Tailor keeps a matrix of each, one layer at a time."""
    (layer,) = last_decoder_layers(skeleton(experiment.model), 1)
    return [part.in_features for part in layer.modules() if isinstance(part, nn.Linear)]


def _evaluation(experiment: Experiment, size: Size, task: str, card: Card) -> float:
    """Seconds to measure a task."""
    data, e = DATASETS[task], experiment.evaluation
    n = data.splits[data.evaluation].examples
    n = min(n, e.examples) if e.examples else n
    # Answers end long before they may: two tokens a word, and captions are of a dozen words.
    answer = 24 if data.metric == "cider" else 4
    reading = 2 * size.language * (size.image_tokens + WORDS) + 2 * size.vision * size.patches
    writing = answer * 2 * size.total / e.batch
    return n * (reading / (card.operations * UTILISATION) + writing / (card.bandwidth * UTILISATION))


def _activations(experiment: Experiment, size: Size, trains: bool) -> float:
    """Bytes: what each layer hands on, the inside of one layer, and the logits with their gradient in float32."""
    t, e = experiment.training, experiment.evaluation
    rows = t.batch if trains else e.batch
    tokens = rows * (size.image_tokens + WORDS)
    inside = 34 * size.hidden * tokens
    layers = size.depth * size.hidden * tokens * 2
    if not trains:
        # Keys and values of what was read.
        return inside + 2 * layers
    kept = layers + inside if t.checkpointing else size.depth * inside
    return kept + 3 * 4 * tokens * size.vocabulary


def downloads(experiment: Experiment, methods: Sequence[str]) -> dict[str, float]:
    """Gigabytes to fetch for rows of these methods: the weights, and each data set's splits."""
    weights = {experiment.model: 2 * size_of(experiment.model).total / 1e9}
    return weights | _of_data(experiment, methods, lambda split: split.gigabytes)


def copies(experiment: Experiment, methods: Sequence[str]) -> dict[str, float]:
    """Gigabytes of the copies that `datasets` makes of each data set's splits."""
    return _of_data(experiment, methods, lambda split: split.unpacked)


def _of_data(experiment: Experiment, methods: Sequence[str], size: Callable[[Split], float]) -> dict[str, float]:
    # Several splits may lie in one file.
    of_files = {
        (task, DATASETS[task].pattern(split)): size(DATASETS[task].splits[split])
        for task, split in splits_of(experiment, methods)
    }
    return {task: sum(x for (name, _), x in of_files.items() if name == task) for task in experiment.tasks}
