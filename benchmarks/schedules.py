"""What the passes cost beside plain fine-tuning, on a small LLaVA: time and peak memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import allocation, figures
from benchmarks.language_model import Training
from benchmarks.report import Goal, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Contender, Ratio, digits, median_ratio, ratio, threads
from torch_mdgd import (
    MDGD,
    MDGDOptimizer,
    Project,
    Rule,
    connector,
    freeze_all_but,
    last_decoder_layers,
    mdgd_backward,
)

VOCABULARY = 512
IMAGE_TOKEN = VOCABULARY - 1
PICTURES, WORDS = 4, 32


@dataclass(frozen=True)
class Way:
    """One way through the passes.

    Args:
        name: as printed.
        rule: of the :class:`MDGDOptimizer`, without state of its own; None for plain AdamW.
    """

    name: str
    rule: Rule | None = None


PLAIN = Way("Fine-tune")
CHEAPER = Way("project, or regularize=0", Project())
PUBLISHED = Way("regularize", MDGD())
WAYS = (PLAIN, CHEAPER, PUBLISHED)


def llava(settings: Settings) -> nn.Module:
    """A random LLaVA, half as wide and twice as deep as the settings say, with 16 tokens a picture."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    hidden = settings.hidden // 2
    size: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": hidden * 43 // 16, "num_attention_heads": 4}
    depth = 2 * settings.layers
    vision = CLIPVisionConfig(**size, num_hidden_layers=depth, image_size=56, patch_size=14, projection_dim=hidden)
    text = LlamaConfig(**size, num_hidden_layers=depth, vocab_size=VOCABULARY, use_cache=False)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2)
    return LlavaForConditionalGeneration(config)


def batch() -> dict[str, Tensor]:
    """Pictures, each before a row of words; the second half of a row is the answer."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.full((PICTURES, 16), IMAGE_TOKEN)
    tokens = torch.cat([pictures, torch.randint(1, IMAGE_TOKEN, (PICTURES, WORDS), generator=generator)], dim=1)
    labels = tokens.clone()
    labels[:, : -WORDS // 2] = -100
    pixels = torch.randn(PICTURES, 3, 56, 56, generator=generator)
    return {"input_ids": tokens, "labels": labels, "pixel_values": pixels}


def parts(model: Any) -> dict[str, list[nn.Module]]:
    """What is trained, by its name in the table; the tower is frozen."""
    return {
        "connector and last 2 layers": [connector(model), *last_decoder_layers(model, 2)],
        "connector and whole decoder": [connector(model), model.get_decoder(), model.lm_head],
    }


def build(way: Way, settings: Settings, part: str) -> Training:
    """The way's model, AdamW(fused) and batch."""
    model = llava(settings).train()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(freeze_all_but(model, parts(model)[part]), lr=1e-5, fused=True)
    inputs = batch()
    if way.rule is None:
        return Training(model, optimizer, inputs, lambda: model(**inputs).loss.backward())
    wrapped = MDGDOptimizer(optimizer, way.rule)
    return Training(model, wrapped, inputs, lambda: mdgd_backward(model, wrapped, inputs))


def peak(way: Way, settings: Settings, part: str) -> int:
    """Bytes at the worst moment of later steps: what the model's parameters and buffers hold is not counted."""
    with allocation.fresh():
        training = build(way, settings, part)
        inherent = allocation.storages(
            [*training.model.parameters(), *training.model.buffers(), *training.batch.values()]
        )
        training.step()
        held = allocation.storages(
            [*allocation.live(), *allocation.tensors_in(list(training.optimizer.state.values()))]
        )
        stays = sum(size for at, size in held.items() if at not in inherent)
        return stays + allocation.peak(training.step)


def section(settings: Settings) -> Section:
    """Time all ways in turn, and measure the peak of each, for two choices of what is trained."""
    series: dict[str, dict[str, Ratio | None]] = {}
    rows: dict[str, list[str]] = {way.name: [] for way in WAYS}
    goals = []
    with threads(1):
        names = list(parts(llava(settings)))
        for part in names:
            times = settings.race([Contender(way.name, build(way, settings, part).step) for way in WAYS])
            peaks = {way.name: peak(way, settings, part) for way in WAYS}
            series[part] = {way.name: ratio(times, way.name, PLAIN.name) for way in WAYS}
            for way in WAYS:
                rows[way.name] += [str(series[part][way.name]), digits(peaks[way.name] / peaks[PLAIN.name])]
            what = f"{CHEAPER.name}, against {PUBLISHED.name}: {part}"
            goals.append(Goal(what, 1, median_ratio(times, CHEAPER.name, PUBLISHED.name)))
    columns = ("update", *(f"{part}: {what}" for part in names for what in ("time", "peak")))
    table = Table(
        "In steps of Fine-tune",
        columns,
        [(name, *cells) for name, cells in rows.items()],
        [
            "Time: median and quartiles of interleaved rounds, one thread. Peak: activations, gradients, optimizer "
            "state, φ and g~0 at the worst moment of later steps."
        ],
    )
    numbers = sum(p.numel() for p in llava(settings).parameters())
    about = (
        f"A random LLaVA of {numbers:,} numbers with {2 * settings.layers} decoder layers, its tower frozen and run "
        f"once a step; {PICTURES} pictures of 16 tokens with {WORDS} words each; AdamW(fused)."
    )
    figure = figures.bars("A training step", "steps of Fine-tune", series, log=False)
    return Section("schedules", "What the passes cost", about, [table], goals, figure)
