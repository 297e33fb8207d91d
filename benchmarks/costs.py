"""What a training step costs beside plain fine-tuning's, on a small LLaVA: time and peak memory of every way."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import allocation, figures
from benchmarks.language_model import Training
from benchmarks.report import Goal, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Contender, Ratio, Times, digits, median_ratio, ratio, threads
from torch_mdgd import (
    MDGD,
    Anchor,
    DriftBudget,
    MDGDOptimizer,
    Project,
    ProtectInputs,
    Rule,
    StepProject,
    VisualTap,
    connector,
    freeze_all_but,
    last_decoder_layers,
    mdgd_backward,
)

VOCABULARY = 512
IMAGE_TOKEN = VOCABULARY - 1
PICTURES, WORDS = 8, 32
# A picture is of SIDE × SIDE patches, each a token.
SIDE, PATCH = 8, 14
LORA_RANK = 8
EVERY = 8
PULL = f"the pull takes as long at any batch, and this one is of {PICTURES * (SIDE * SIDE + WORDS)} tokens alone"
# More than in a lap of other pages, since this one has no second.
ROUNDS = 5
WHOLE, LAST = "connector and whole decoder", "connector and last 2 layers"


@dataclass(frozen=True)
class Way:
    """One way to make a step.

    Args:
        name: as printed.
        rule: makes the rule of the :class:`MDGDOptimizer` from the model; None for plain AdamW.
        adapted: through LoRA on the linear layers of what is trained.
        whole_features: features at φ come from a whole run of the model, head and loss included.
        backward: keywords of :func:`mdgd_backward`.
        steps: how many steps are timed as one, and averaged: a round of what comes now and then.
    """

    name: str
    rule: Callable[[nn.Module], Rule] | None = None
    adapted: bool = False
    whole_features: bool = False
    backward: dict[str, Any] = field(default_factory=dict)
    steps: int = 1


def _align(every: int = 1) -> Callable[[nn.Module], Rule]:
    return lambda model: MDGD(1.0, 0, every=every)


def _budget(measure_every: int) -> Callable[[nn.Module], Rule]:
    return lambda model: DriftBudget(MDGD(1.0, 0), 0.05, measure_every=measure_every)


def _anchor(rank: int | None) -> Callable[[nn.Module], Rule]:
    # C is there after the warm-up: made once, its cost is not a step's.
    return lambda model: Anchor(model, 0.01, rank=rank, warmup=1)


PLAIN = Way("Fine-tune")
LORA = Way("LoRA", adapted=True)
TWO_PASSES = Way(
    "αv, two backward passes", _align(), whole_features=True, backward={"separate": True, "reuse_vision": False}
)
BARE = Way("αv, one backward pass", _align(), whole_features=True, backward={"reuse_vision": False})
ALIGN = Way("αv, one pass, both savings", _align())
LAZY = Way(f"αv, every {EVERY}th step", _align(EVERY), steps=EVERY)
PUBLISHED = Way("published", lambda model: MDGD())
LOW = Way("anchor, rank 8", _anchor(8))
FULL = Way("anchor, whole C", _anchor(None))
WAYS = (
    PLAIN,
    TWO_PASSES,
    BARE,
    Way("αv, one pass, without the head at φ", _align(), backward={"reuse_vision": False}),
    Way("αv, one pass, frozen parts once", _align(), whole_features=True),
    ALIGN,
    LAZY,
    PUBLISHED,
    Way("Project", lambda model: Project()),
    Way("StepProject", lambda model: StepProject()),
    Way("ProtectInputs", lambda model: ProtectInputs(model), steps=10),
    LOW,
    FULL,
    Way("DriftBudget, measured every step", _budget(1)),
    Way(f"DriftBudget, measured every {EVERY}th", _budget(EVERY), steps=EVERY),
)
LORA_WAYS = (
    LORA,
    Way("LoRA + αv, one pass", _align(), adapted=True),
    Way(f"LoRA + αv, every {EVERY}th step", _align(EVERY), adapted=True, steps=EVERY),
    Way("LoRA + anchor, rank 8", _anchor(8), adapted=True),
)


def llava(settings: Settings) -> nn.Module:
    """A random LLaVA, half as wide and twice as deep as the settings say."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    hidden = settings.hidden // 2
    size: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": hidden * 43 // 16, "num_attention_heads": 4}
    depth = 2 * settings.layers
    vision = CLIPVisionConfig(
        **size, num_hidden_layers=depth, image_size=SIDE * PATCH, patch_size=PATCH, projection_dim=hidden
    )
    text = LlamaConfig(**size, num_hidden_layers=depth, vocab_size=VOCABULARY, use_cache=False)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2)
    return LlavaForConditionalGeneration(config)


def batch() -> dict[str, Tensor]:
    """Pictures, each before a row of words; the second half of the words is the answer."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.full((PICTURES, SIDE * SIDE), IMAGE_TOKEN)
    tokens = torch.cat([pictures, torch.randint(1, IMAGE_TOKEN, (PICTURES, WORDS), generator=generator)], dim=1)
    labels = tokens.clone()
    labels[:, : -WORDS // 2] = -100
    pixels = torch.randn(PICTURES, 3, SIDE * PATCH, SIDE * PATCH, generator=generator)
    return {"input_ids": tokens, "labels": labels, "pixel_values": pixels}


def parts(model: Any) -> dict[str, list[nn.Module]]:
    """What is trained, by its name in the table; the tower is frozen."""
    return {
        WHOLE: [connector(model), model.get_decoder(), model.lm_head],
        LAST: [connector(model), *last_decoder_layers(model, 2)],
    }


class WholeTap(VisualTap):
    """Features from a whole run, as they were taken before the run could be cut short."""

    def features(self, model: Callable[..., Any], batch: Any, *, whole: bool = False) -> Tensor:
        with torch.no_grad():
            return self(model, batch)[1]


def build(way: Way, settings: Settings, part: str) -> Training:
    """The way's model, AdamW(fused) and batch.

    Raises:
        ModuleNotFoundError: LoRA without peft.
    """
    model: Any = llava(settings)
    trained: list[Any] = freeze_all_but(model, parts(model)[part])
    if way.adapted:
        model, trained = _adapt(model, part)
    model.train()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    inputs = batch()
    if way.rule is None:
        return Training(model, optimizer, inputs, lambda: model(**inputs).loss.backward())
    tap = VisualTap.for_model(model)
    if way.whole_features:
        tap = WholeTap(tap.text_module, tap.mask, tap.layers)
    with warnings.catch_warnings():
        # The anchor names what it does not hold.
        warnings.simplefilter("ignore", UserWarning)
        wrapped = MDGDOptimizer(optimizer, way.rule(model))
    return Training(model, wrapped, inputs, lambda: mdgd_backward(model, wrapped, inputs, tap=tap, **way.backward))


def _adapt(model: nn.Module, part: str) -> tuple[nn.Module, list[nn.Parameter]]:
    from peft import LoraConfig, get_peft_model

    inside = {m for module in parts(model)[part] for m in module.modules() if isinstance(m, nn.Linear)}
    head = getattr(model, "lm_head", None)
    targets = [name for name, m in model.named_modules() if m in inside and m is not head]
    adapted = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets))
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


def contender(way: Way, settings: Settings, part: str) -> Contender:
    """A round of the way's steps, from where they are all alike."""
    training = build(way, settings, part)
    # Adam's state, C, and all else that a first step makes.
    training.step()

    def run() -> None:
        for _ in range(way.steps):
            training.step()

    return Contender(way.name, run)


def race(ways: Sequence[Way], settings: Settings, part: str) -> dict[str, Times]:
    """By way, seconds of one step of it and of what it is held against: each way has these beside it in every round."""
    return {way.name: _beside(way, settings, part) for way in ways}


def _beside(way: Way, settings: Settings, part: str) -> Times:
    three = {one.name: one for one in (PLAIN, *([LORA] if way.adapted else []), way)}
    times = settings.race([contender(one, settings, part) for one in three.values()])
    return {name: [x / one.steps for x in times[name]] for name, one in three.items()}


@dataclass(frozen=True)
class Memory:
    """Bytes of a way, the model's own parameters not counted.

    Args:
        peak: all that was there at the worst moment of a round: activations, gradients, state, φ.
        reference: φ.
        state: of the wrapped optimizer.
        rule: what the rule holds.
    """

    peak: int
    reference: int
    state: int
    rule: int


def measure(way: Way, settings: Settings, part: str) -> Memory:
    """Count what stays between steps, and the allocator's peak over a round of steps."""
    with allocation.fresh():
        training = build(way, settings, part)
        model, optimizer = training.model, training.optimizer
        inherent = allocation.storages([*model.parameters(), *model.buffers(), *training.batch.values()])
        for _ in range(2):
            training.step()
        state = allocation.storages(allocation.tensors_in(list(optimizer.state.values())))
        held = {**allocation.storages(allocation.live()), **state}
        stays = sum(size for at, size in held.items() if at not in inherent)
        highest = max(allocation.peak(training.step) for _ in range(way.steps))
        reference = rule = 0
        if isinstance(optimizer, MDGDOptimizer):
            held = optimizer.state_dict()["state"].values()
            reference = sum(entry["mdgd_reference"].nbytes for entry in held if "mdgd_reference" in entry)
            rule = sum(size for at, size in _of_rule(optimizer.rule).items() if at not in inherent)
        return Memory(stays + highest, reference, sum(state.values()), rule)


def _of_rule(rule: Rule) -> allocation.Storages:
    """The storages that a rule holds, in its attributes and in those of what it holds."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo: list[Any] = list(vars(rule).values())
    while todo:
        x = todo.pop()
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, nn.Module | Rule) or id(x) in seen:
            continue
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, list | tuple):
            todo += x
        elif type(x).__module__.startswith("torch_mdgd.rules."):
            todo += vars(x).values()
        seen.add(id(x))
    return allocation.storages(found)


def layers_state(settings: Settings, part: str) -> int:
    """Bytes of AdamW's state of the linear layers that are trained: two numbers for each of theirs."""
    model = llava(settings)
    linear = {m for module in parts(model)[part] for m in module.modules() if isinstance(m, nn.Linear)}
    return 2 * sum(p.nbytes for m in linear for p in m.parameters())


def goals(part: str, times: dict[str, Times], memory: dict[str, Memory], layers: int) -> Iterator[Goal]:
    """The goals of the performance notes, beside what was reached."""

    def time(way: Way, limit: float, why: str = "") -> Goal:
        return Goal(f"{part}: {way.name}, time", limit, median_ratio(times[way.name], way.name, PLAIN.name), why=why)

    if part == WHOLE:
        yield time(ALIGN, 1.35)
        yield time(LAZY, 1.1)
        yield time(LOW, 1.05, PULL)
        yield time(PUBLISHED, 3.4)
    plain, align, low = (memory[way.name] for way in (PLAIN, ALIGN, LOW))
    yield Goal(
        f"{part}: {ALIGN.name}, peak beyond the weights θ and φ", 1.1, (align.peak - align.reference) / plain.peak
    )
    yield Goal(
        f"{part}: {LOW.name}, held, of the layers' AdamW state",
        0.02,
        low.rule / layers,
        why="2 · rank rows of each input's width are held, so narrow layers pay more",
    )


def reasons(part: str, times: dict[str, Times], memory: dict[str, Memory]) -> str:
    """Why a ratio is what it is, from the same run."""

    def of(way: Way) -> float:
        return median_ratio(times[way.name], way.name, PLAIN.name) or float("nan")

    plain, align = memory[PLAIN.name], memory[ALIGN.name]
    return (
        f"{part}: a pass at φ without a graph is a third of the passes of a step if all is trained, more if less is. "
        f"One backward pass in place of two takes {of(TWO_PASSES) - of(BARE):.2f} off, both savings "
        f"{of(BARE) - of(ALIGN):.2f}. "
        f"With φ, of {align.reference / 1e6:.1f} MB, the peak of αv is {align.peak / plain.peak:.2f}; without, "
        f"{(align.peak - align.reference) / plain.peak:.2f}."
    )


def section(settings: Settings) -> Section:
    """Time each way beside plain fine-tuning, and measure the memory of each, for two choices of what is trained."""
    series: dict[str, dict[str, Ratio | None]] = {}
    shown: list[Goal] = []
    tables = []
    with threads(1), _quiet():
        ways = [*WAYS, *(LORA_WAYS if _has_peft() else ())]
        for part in parts(llava(settings)):
            times = race(ways, replace(settings, rounds=ROUNDS), part)
            memory = {way.name: measure(way, settings, part) for way in ways}
            layers = layers_state(settings, part)
            series[part] = {way.name: ratio(times[way.name], way.name, PLAIN.name) for way in ways}
            plain = memory[PLAIN.name]
            rows = []
            for way in (*WAYS, *LORA_WAYS):
                if way.name not in memory:
                    rows.append((way.name, "not installed", *[""] * 5))
                    continue
                unit, found = (LORA if way.adapted else PLAIN).name, memory[way.name]
                cells = (found.peak / plain.peak, (found.peak - found.reference) / plain.peak)
                alike = str(ratio(times[way.name], way.name, unit)) if way.adapted else ""
                sizes = (digits(found.reference / 1e6), f"{found.rule / layers:.2%}")
                rows.append((way.name, str(series[part][way.name]), alike, *map(digits, cells), *sizes))
            columns = ("way", "time", "time, of LoRA's", "peak", "peak without φ", "φ, MB", "rule's own")
            tables.append(Table(f"{part}, in steps of Fine-tune", columns, rows, [reasons(part, times, memory)]))
            shown += goals(part, times, memory, layers)
    tables[-1].notes = [
        *tables[-1].notes,
        "Time: median and quartiles of rounds, each with a step of Fine-tune, and of LoRA, beside it; one thread. What "
        "comes now and then is averaged over a round of its steps, ProtectInputs over 10. Peak: activations, "
        "gradients, optimizer state and φ at the worst moment, the model's parameters not counted. Rule's own: what "
        "the rule holds, of AdamW's state of the trained linear layers.",
    ]
    numbers = sum(p.numel() for p in llava(settings).parameters())
    about = (
        f"A random LLaVA of {numbers:,} numbers with {2 * settings.layers} decoder layers, its tower frozen; "
        f"{PICTURES} pictures of {SIDE * SIDE} tokens with {WORDS} words each; AdamW(fused). LoRA has rank "
        f"{LORA_RANK}, on the linear layers of what is trained, the head aside."
    )
    figure = figures.bars("A training step", "steps of Fine-tune", series, log=False)
    return Section("costs", "What a step costs", about, tables, shown, figure)


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="(peft|transformers).*")
        yield
