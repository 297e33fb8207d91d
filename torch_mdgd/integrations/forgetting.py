"""A :class:`~torch_mdgd.report.ForgettingReport` every few steps of a Trainer of transformers."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torch_mdgd.checks import require_whole
from torch_mdgd.report import ForgettingReport


class ForgettingCallback(TrainerCallback):
    """Measures while a Trainer trains, and at its end: ``trainer.add_callback(ForgettingCallback(report, every=100))``.

    Training goes on as without it, bit for bit. Each comparison stands in ``report.history``; its numbers are logged
    with the prefix ``forgetting_``. In several processes each measures the same; only the first logs.

    Args:
        report: made before training, of the weights that it begins with.
        every: after how many optimizer steps.
        log: called with the numbers by name, such as ``trainer.log``; if None, they are put into the Trainer's
            ``log_history`` alone.

    Raises:
        ValueError: ``every`` is no whole number of at least 1.
    """

    def __init__(
        self, report: ForgettingReport, every: int, log: Callable[[dict[str, float]], None] | None = None
    ) -> None:
        self.report, self.every, self.log = report, require_whole("every", every), log

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure, if it is time."""
        if model is not None and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            found = self.report.measure(model, step=state.global_step)
            numbers = {f"forgetting_{name}": value for name, value in found.numbers.items()}
            if self.log is not None:
                # The Trainer's log ends a wish to log, and its own is still to come.
                wished = control.should_log
                self.log(numbers)
                control.should_log = wished
            elif state.is_world_process_zero:
                state.log_history.append({**numbers, "step": state.global_step})
