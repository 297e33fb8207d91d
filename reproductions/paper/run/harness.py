"""lmms-eval around a run's model: its tasks, prompts and metrics in place of ours. Needs `pip install lmms-eval`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lmms_eval import evaluator
from lmms_eval.api.model import lmms
from tenacity import RetryError

from reproductions.paper.config import Experiment
from reproductions.paper.data import DataError
from reproductions.paper.models import VisionLanguageModel, to_device
from reproductions.paper.run.weights import NAME, load_changes
from reproductions.paper.run.work import Workshop
from reproductions.shared.fields import build
from reproductions.shared.files import read_json

LONGEST = 64
"""Tokens of an answer to a task that does not say how many."""


@dataclass(frozen=True)
class Asked:
    """What a model needs of a request."""

    image: Any
    question: str
    target: str = ""


class Harnessed(lmms):
    """A model as lmms-eval calls it: greedy answers to one picture and one text at a time.

    Args:
        model: on its device.
        batch_size: requests in a pass.
    """

    def __init__(self, model: VisionLanguageModel, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.device = next(model.network.parameters()).device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests, cut where the task says that an answer ends.

        Raises:
            ValueError: a request without a picture, naming its task.
        """
        answers: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            some = [request.args for request in requests[start : start + self.batch_size]]
            settings = [settings for _, settings, *_ in some]
            longest = max(int(x.get("max_new_tokens", LONGEST)) for x in settings)
            batch = self.model.collate([self._asked(*args) for args in some], answers=False)
            texts = self.model.generate(to_device(batch, self.device), longest)
            answers += [cut(text, x.get("until")) for text, x in zip(texts, settings, strict=True)]
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """No task of the paper asks for it."""
        raise NotImplementedError("tasks that compare likelihoods are not supported; use one that generates answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """No task of the paper asks for it."""
        raise NotImplementedError("tasks of several rounds are not supported")

    def _asked(self, text: str, settings: Any, pictures: Any, number: int, task: str, split: str) -> Asked:
        found = pictures(self.task_dict[task][split][number])
        if len(found) != 1:
            raise ValueError(f"{task}: example {number} has {len(found)} pictures; these models are asked about one")
        return Asked(found[0], text.replace("<image>", "").strip())


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of the strings that end it."""
    for end in [until] if isinstance(until, str) else until or ():
        text = text.split(end)[0] if end else text
    return text.strip()


def load_run(folder: Path, device: torch.device) -> VisionLanguageModel:
    """The model of a run, with what it learned.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    values = read_json(folder / "config.json")["configuration"]
    work = Workshop(build(Experiment, values, str(folder)), device)
    if (folder / NAME).is_file():
        load_changes(work.network, folder / NAME)
    model: VisionLanguageModel = work.model
    return model


def measure(
    model: VisionLanguageModel, tasks: Sequence[str], *, tasks_folder: Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Scores of lmms-eval's tasks.

    Args:
        model: see :func:`load_run`.
        tasks: by lmms-eval's names.
        tasks_folder: of task files of one's own, in place of those that come with lmms-eval.
        limit: examples of each task.

    Raises:
        DataError: lmms-eval cannot load the data of a task.
    """
    own = {} if tasks_folder is None else {"include_path": str(tasks_folder), "include_defaults": False}
    try:
        found = evaluator.simple_evaluate(
            model=Harnessed(model), tasks=list(tasks), task_manager=evaluator.TaskManager(**own), limit=limit,
            bootstrap_iters=0, log_samples=False, cli_args=SimpleNamespace(output_path=None, process_with_media=False),
        )  # fmt: skip
    except RetryError as error:
        raise DataError(f"lmms-eval: {error.last_attempt.exception()}") from error
    results: dict[str, Any] = found["results"]
    return results
