"""What is measured of a model on one set of probes, or on batches of a user's own."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.models.parts import has_to_finish
from torch_mdgd.models.tap import VisualTap, image_tokens
from torch_mdgd.models.traces import Traces
from torch_mdgd.report.answers import answer_tokens, ask, generate
from torch_mdgd.report.probes import Probe, is_right

IGNORED = -100


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    Attributes:
        batch_size: probes that are run at once.
        new_tokens: the most tokens of a generated answer.
        kl_tokens: of all answers' tokens, how many distributions are kept for the KL divergence.
        feature_rows: of all image tokens, how many features are kept for ranks and drift.
    """

    batch_size: int = 8
    new_tokens: int = 32
    kl_tokens: int = 512
    feature_rows: int = 1024


@dataclass
class Measured:
    """What one model shows on a set, in the order of its examples; tensors on the CPU.

    Attributes:
        generated: answers; None in batches of a user's own, where nothing is generated.
        chosen: of the allowed answers, the likeliest; None where none are listed.
        exact: whether the generated answer is the right one.
        loss: −log p of a right answer's tokens, the mean over them, in nats.
        log_p: log-distributions at tokens of right answers, float32 (tokens, vocabulary).
        z: hidden states at image tokens by layer, float32 (layers, rows, hidden).
    """

    generated: list[str | None] = field(default_factory=list)
    chosen: list[str | None] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    log_p: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float32, device="cpu"))
    z: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.float32, device="cpu"))


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, random numbers and buffers are afterwards as they were.

    What accelerate has put around a model's forward, mixed precision, is off: it comes when training begins, and its
    rounding would be taken for drift.
    """
    modes = {module: module.training for module in model.modules()}
    names = {"forward", "_original_forward"}
    mixed = [(module, vars(module)["forward"]) for module in modes if names <= vars(module).keys()]
    for module, _ in mixed:
        vars(module)["forward"] = vars(module)["_original_forward"]
    model.eval()
    try:
        with torch.no_grad(), Traces(model).aside(begin=False):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, forward in mixed:
            vars(module)["forward"] = forward


def measure_probes(
    model: nn.Module, processor: Any, tap: VisualTap, probes: Sequence[Probe], limits: Limits, seen: Any
) -> Measured:
    """Answers to questions, and what stands behind them.

    Args:
        model: a model of transformers that generates.
        processor: its own.
        tap: at the layers that are measured.
        probes: what is asked.
        limits: how much.
        seen: called with the number of examples that are done.
    """
    out, log_p, z = Measured(), [], []
    tokens_each, rows_each = (max(1, x // len(probes)) for x in (limits.kl_tokens, limits.feature_rows))
    with watched(model):
        for start in range(0, len(probes), limits.batch_size):
            chunk = probes[start : start + limits.batch_size]
            batch = ask(processor, chunk, model)
            free = generate(model, processor, batch, limits.new_tokens)
            out.generated += processor.tokenizer.batch_decode(free.tokens, skip_special_tokens=True)
            likely = _Likelihoods(model, processor, batch, chunk, free.logits[0])
            out.chosen += likely.chosen()
            for row in likely.right():
                chosen = row.log_p[_even(len(row.tokens), tokens_each)]
                log_p.append(chosen.cpu())
                out.loss.append(-float(row.of_tokens().mean()))
            z.append(_features(tap, model, batch, rows_each))
            seen(len(chunk))
    out.generated = [str(x).strip() for x in out.generated]
    out.exact = [is_right(str(given), probe.answer) for given, probe in zip(out.generated, probes, strict=True)]
    out.log_p, out.z = torch.cat(log_p), torch.cat(z, 1)
    return out


def measure_batches(
    model: nn.Module, tap: VisualTap, batches: Sequence[Mapping[str, Any]], limits: Limits, seen: Any
) -> Measured:
    """The same of batches with ``labels``: an answer is exact if each of its tokens is the likeliest there.

    Greedy generation gives the right answer just then. Nothing is generated, so that other answers are not known.

    Args:
        model: called as ``model(**batch)``; its output has ``logits``, one for each label.
        tap: at the layers that are measured.
        batches: a user's own.
        limits: how much.
        seen: called with the number of examples that are done.

    Raises:
        ValueError: labels are not those of the logits, or a row has none.
    """
    out, log_p, z = Measured(), [], []
    examples = sum(len(batch["labels"]) for batch in batches)
    tokens_each, rows_each = (max(1, x // examples) for x in (limits.kl_tokens, limits.feature_rows))
    device = next(model.parameters()).device
    with watched(model):
        for given in batches:
            batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
            output, features = tap(model, batch)
            labels, logits = batch["labels"][:, 1:], output.logits[:, :-1]
            if labels.shape != logits.shape[:2]:
                raise ValueError(f"probe batch: {tuple(labels.shape)} labels for {tuple(logits.shape[:2])} logits")
            for wanted, row in zip(labels, logits, strict=True):
                at = wanted != IGNORED
                if not at.any():
                    raise ValueError("probe batch: a row has no labels, so no answer")
                scored = Scored(wanted[at], row[at].float().log_softmax(-1))
                out.exact.append(bool((scored.log_p.argmax(-1) == scored.tokens).all()))
                out.loss.append(-float(scored.of_tokens().mean()))
                log_p.append(scored.log_p[_even(len(scored.tokens), tokens_each)].cpu())
            z.append(_spread(features, tap, batch, rows_each))
            seen(len(labels))
    out.generated, out.chosen = [None] * examples, [None] * examples
    out.log_p, out.z = torch.cat(log_p), torch.cat(z, 1)
    return out


@dataclass(frozen=True)
class Scored:
    """The tokens of an answer, (tokens,), and the log-distribution before each, float32 (tokens, vocabulary)."""

    tokens: Tensor
    log_p: Tensor

    def of_tokens(self) -> Tensor:
        """The logarithm of each token's probability."""
        return self.log_p.gather(1, self.tokens[:, None]).squeeze(1)


class _Likelihoods:
    """How likely a model finds answers to a batch of probes.

    An answer of one token is read off the first logits. Longer ones are forced, the i-th of each probe together.
    """

    def __init__(self, model: Any, processor: Any, batch: Any, probes: Sequence[Probe], first: Tensor) -> None:
        self.probes = probes
        self.found: list[dict[str, Scored]] = [{} for _ in probes]
        longer: list[list[tuple[str, list[int]]]] = []
        for row, probe in enumerate(probes):
            log_p = first[row].float().log_softmax(-1)
            longer.append([])
            for answer in dict.fromkeys([probe.answer, *probe.choices]):
                tokens = answer_tokens(processor, probe.question, answer)
                if len(tokens) == 1:
                    self.found[row][answer] = Scored(log_p.new_tensor(tokens, dtype=torch.int64), log_p[None])
                else:
                    longer[row].append((answer, tokens))
        for i in range(max(map(len, longer))):
            taken = [one[i] if i < len(one) else ("", []) for one in longer]
            steps = max(len(tokens) for _, tokens in taken)
            forced = generate(model, processor, batch, steps, [tokens for _, tokens in taken])
            for row, (answer, tokens) in enumerate(taken):
                if tokens:
                    log_p = torch.stack([x[row] for x in forced.logits[: len(tokens)]]).float().log_softmax(-1)
                    self.found[row][answer] = Scored(log_p.new_tensor(tokens, dtype=torch.int64), log_p)

    def right(self) -> list[Scored]:
        """Those of the right answers."""
        return [found[probe.answer] for found, probe in zip(self.found, self.probes, strict=True)]

    def chosen(self) -> list[str | None]:
        """Of each probe's choices, the one with the largest Σ log p over its tokens; None without choices."""
        sums = [{answer: float(x.of_tokens().sum()) for answer, x in found.items()} for found in self.found]
        return [
            max(probe.choices, key=likelihood.__getitem__) if probe.choices else None
            for probe, likelihood in zip(self.probes, sums, strict=True)
        ]


def _features(tap: VisualTap, model: nn.Module, batch: Mapping[str, Any], each: int) -> Tensor:
    return _spread(tap.features(model, batch, whole=has_to_finish(model)), tap, batch, each)


def _spread(z: Tensor, tap: VisualTap, batch: Mapping[str, Any], each: int) -> Tensor:
    """Of each example's image tokens so many, evenly spread: float32 (layers, rows, hidden) on the CPU."""
    counts = image_tokens(tap, batch).sum(1).tolist()
    starts = [sum(counts[:i]) for i in range(len(counts))]
    rows = [start + i for start, count in zip(starts, counts, strict=True) for i in _even(count, each)]
    by_layer = z.detach().view(len(tap.layers), -1, z.shape[-1])
    return by_layer[:, rows].float().cpu()


def _even(count: int, most: int) -> list[int]:
    """Of ``count`` indices at most ``most``, evenly spread."""
    if count <= most:
        return list(range(count))
    return [i * count // most for i in range(most)]


def progress(total: int, label: str, show: bool) -> Any:
    """What is called with each number of examples that are done: a bar of tqdm, or nothing."""
    if not show:
        return lambda done: None
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        warnings.warn("no progress is shown: pip install tqdm", stacklevel=2)
        return lambda done: None
    return tqdm(total=total, desc=label, unit="probe", mininterval=0.5).update


def examples_in(items: Iterable[Any]) -> int:
    """How many probes, or rows of batches."""
    return sum(1 if isinstance(item, Probe) else len(item["labels"]) for item in items)
