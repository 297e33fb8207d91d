"""``ForgettingReport``: measures a model now, and compares it with itself later."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torch_mdgd.checks import require_whole
from torch_mdgd.models.parts import decoder_layers
from torch_mdgd.models.tap import VisualTap
from torch_mdgd.report.comparison import Compared, compare
from torch_mdgd.report.drawn import drawn_probes
from torch_mdgd.report.measure import Limits, Measured, examples_in, measure_batches, measure_probes, progress
from torch_mdgd.report.page import page
from torch_mdgd.report.probes import Probe, is_batch
from torch_mdgd.report.table import plain, show

Probes = Sequence[Probe] | Sequence[Mapping[str, Any]]


class Comparison(Compared):
    """A model before and after, as :meth:`ForgettingReport.measure` returns it; as a text it is a table.

    Args:
        before: what the first weights are called.
        after: what the second are called.
        step: of training; None where it is about none.
        sets: scores, KL and layers of the probes, and of the new task where there is one.
        pictures: the probes of each set.
        trace: the numbers of earlier steps.
    """

    def __str__(self) -> str:
        return plain(self)

    def show(self) -> None:
        """Print the table, with rich where that is installed."""
        show(self)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write all numbers and answers as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page with pictures and answers, which needs no other file and no script."""
        Path(path).write_text(page(self), encoding="utf-8")


class ForgettingReport:
    """What a model could before, to compare with what it can after: ``report.measure(model)``.

    The model is measured at once. It is not kept, so a report holds distributions and features alone.

    Args:
        model: a vision-language model of transformers, also inside DistributedDataParallel, torch.compile or a
            PeftModel.
        processor: its own; not needed where all probes are batches.
        probes: about what should not be forgotten: :class:`Probe` objects, or batches with ``labels`` as the model is
            called with. The drawn ones if None.
        new_task: the same about what is learned; none if None.
        tap: where image tokens and their features are; ``VisualTap.for_model(model, layers)`` if None.
        layers: whose features are measured, as :class:`VisualTap` counts; all if None.
        batch_size: probes that are run at once.
        new_tokens: the most tokens of a generated answer.
        kl_tokens: how many distributions over the vocabulary are kept of each set; they take 4 bytes a number.
        feature_rows: how many features of image tokens are kept of each set and layer.
        show_progress: whether to show a bar.

    Raises:
        ImportError: transformers or Pillow is needed and not installed, naming the extra.
        TypeError: probes that are neither kind; or not a model of transformers, and ``tap`` is None.
        ValueError: no probes; probes of both kinds; questions without a processor; a number below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        probes: Probes | None = None,
        *,
        new_task: Probes | None = None,
        tap: VisualTap | None = None,
        layers: Sequence[int] | None = None,
        batch_size: int = 8,
        new_tokens: int = 32,
        kl_tokens: int = 512,
        feature_rows: int = 1024,
        show_progress: bool = False,
    ) -> None:
        numbers = {
            "batch_size": batch_size,
            "new_tokens": new_tokens,
            "kl_tokens": kl_tokens,
            "feature_rows": feature_rows,
        }
        self.limits = Limits(**{name: require_whole(name, value) for name, value in numbers.items()})
        self.processor, self.show_progress = processor, show_progress
        given = {"probes": drawn_probes() if probes is None else probes, "new task": new_task}
        self.sets: dict[str, Probes] = {name: found for name, found in given.items() if found is not None}
        for name, found in self.sets.items():
            kinds = {is_batch(item) for item in found}
            if len(kinds) != 1:
                raise ValueError(f"ForgettingReport: {name} {'mix Probe objects and batches' if kinds else 'are none'}")
            if processor is None and False in kinds:
                raise ValueError(f"ForgettingReport: {name} ask questions, which takes the model's processor")
        self._given_tap, self._given_layers = tap, layers
        self.history: list[Comparison] = []
        self.before = self._measure(model, "before")

    def measure(
        self, model: nn.Module, *, step: int | None = None, before: str = "before", after: str = "after"
    ) -> Comparison:
        """Compare the model as it is now with what was measured first.

        The model's modes, buffers and the random numbers are afterwards as they were.

        Args:
            model: with other weights.
            step: of training; comparisons with steps stand in ``history``.
            before: what the first weights are called.
            after: what these are called.

        Raises:
            ValueError: another network.
        """
        now = self._measure(model, after)
        layers = list(range(len(self._tap(model).layers))) if self._given_layers is None else list(self._given_layers)
        compared = tuple(
            compare(name, probes, self.before[name], now[name], layers) for name, probes in self.sets.items()
        )
        pictures = tuple(tuple(p for p in probes if isinstance(p, Probe)) for probes in self.sets.values())
        trace = tuple({"step": x.step or 0, **x.numbers} for x in self.history) if step is not None else ()
        found = Comparison(before, after, step, compared, pictures, trace)
        if step is not None:
            self.history.append(found)
        return found

    def _measure(self, model: nn.Module, label: str) -> dict[str, Measured]:
        tap = self._tap(model)
        seen = progress(sum(map(examples_in, self.sets.values())), label, self.show_progress)
        out = {}
        for name, probes in self.sets.items():
            if is_batch(probes[0]):
                out[name] = measure_batches(model, tap, probes, self.limits, seen)  # type: ignore[arg-type]
            else:
                out[name] = measure_probes(model, self.processor, tap, probes, self.limits, seen)  # type: ignore[arg-type]
        return out

    def _tap(self, model: nn.Module) -> VisualTap:
        tap = self._given_tap or VisualTap.for_model(model)
        if self._given_layers is not None:
            return VisualTap(tap.text_module, tap.mask, self._given_layers)
        try:
            count = len(decoder_layers(tap.text_module))
        except ValueError:
            return tap
        return VisualTap(tap.text_module, tap.mask, range(count + 1))
