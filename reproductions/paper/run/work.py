"""One run's model and data, as methods and evaluation see them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reproductions.methods import METHODS
from reproductions.paper.config import Experiment
from reproductions.paper.data import DATASETS, Example, Examples
from reproductions.paper.models import MODELS, Batch, load_model, to_device
from torch_mdgd.models.parts import decoder_layers, text_decoder
from torch_mdgd.prompts import QUESTIONS


def measured_split(experiment: Experiment, task: str) -> str:
    """What a task is measured on."""
    data = DATASETS[task]
    return str(data.validation) if experiment.evaluation.split == "validation" else data.evaluation


def remembered(experiment: Experiment) -> list[str]:
    """Pre-trained tasks with a training split, which methods may remember examples of."""
    return [task for task in experiment.pretrained if DATASETS[task].training is not None]


def splits_of(experiment: Experiment, methods: Iterable[str]) -> list[tuple[str, str]]:
    """Every data set and split that rows read: what is measured, what is taught, and what is remembered."""
    kinds = [METHODS[name] for name in methods]
    found = [(task, measured_split(experiment, task)) for task in experiment.tasks]
    taught = [experiment.target] * any(kind.trains for kind in kinds)
    taught += remembered(experiment) * any(kind.remembers for kind in kinds)
    return list(dict.fromkeys([*found, *((task, str(DATASETS[task].training)) for task in taught)]))


class Workshop:
    """Loads what an experiment names.

    Args:
        experiment: the configuration.
        device: where the model is.
    """

    def __init__(self, experiment: Experiment, device: torch.device) -> None:
        self.experiment, self.device = experiment, device
        self.layers = experiment.layers

    @cached_property
    def model(self) -> Any:
        """The model, with its published weights when it is first asked for.

        Raises:
            ConfigError: it has fewer layers than are to be trained.
            ModelError: it cannot be had.
        """
        e = self.experiment
        found = load_model(e.model, e.source, e.dtype, self.device, trust_remote_code=e.trust_remote_code)
        # A folder may hold another size than the published.
        e.require_layers_of(e.source or MODELS[e.model].source, len(decoder_layers(text_decoder(found.network))))
        return found

    @property
    def network(self) -> nn.Module:
        """The model's network."""
        return self.model.network

    @property
    def pretrained(self) -> Mapping[str, Tensor]:
        """The published weights by parameter name, on the CPU."""
        e = self.experiment
        fresh = load_model(
            e.model, e.source, e.dtype, torch.device("cpu"), trust_remote_code=e.trust_remote_code
        ).network  # fmt: skip
        return {name: p.detach() for name, p in fresh.named_parameters()}

    def examples(self, task: str, split: str, limit: int = 0, seed: int = 0) -> Examples:
        """Examples of a data set, so many at random; 0 for all.

        A split that the folder of ``data.source`` lacks comes from the hub.
        """
        data = self.experiment.data
        options = tuple(data.options.get(task, {}).items())
        revision = data.revisions.get(f"{task}/{split}")
        return _open(task, split, data.source, data.organisation, revision, limit, seed, options)

    def training_examples(self) -> Sequence[Example]:
        """What the target task teaches with."""
        e = self.experiment
        found = self.examples(e.target, str(DATASETS[e.target].training), e.training.examples, e.seed)
        return found if e.training.captions == 1 else Captions(found, e.training.captions)

    def evaluation_examples(self, task: str) -> Sequence[Example]:
        """What a task is measured on: where it is a sample, the same one whatever the seed, so that runs compare."""
        return self.examples(task, measured_split(self.experiment, task), self.experiment.evaluation.examples)

    def memory(self) -> Sequence[Example]:
        """Training examples of those pre-trained tasks that have a training split; never those that are measured."""
        e = self.experiment
        limit, splits = e.training.examples, [(task, str(DATASETS[task].training)) for task in remembered(e)]
        return _Chained([self.examples(task, split, limit, e.seed) for task, split in splits])

    def target_batches(self, count: int) -> Iterator[Batch]:
        """Batches of one example of the target task, with labels."""
        yield from self._singles(self.training_examples(), count)

    def prompt_batches(self, count: int) -> Iterator[Batch]:
        """Batches of one picture of the target task under a general question, without labels."""
        examples, rng = self.training_examples(), np.random.default_rng(self.experiment.seed)
        for i in rng.permutation(len(examples))[:count]:
            asked = replace(examples[int(i)], question=QUESTIONS[int(rng.integers(len(QUESTIONS)))])
            yield to_device(self.model.collate([asked], answers=False), self.device)

    def memory_batches(self, count: int) -> Iterator[Batch]:
        """Batches of one example of what the model could answer before, with labels."""
        yield from self._singles(self.memory(), count)

    def _singles(self, examples: Sequence[Example], count: int) -> Iterator[Batch]:
        rng = np.random.default_rng(self.experiment.seed)
        for i in rng.permutation(len(examples))[:count]:
            yield to_device(self.model.collate([examples[int(i)]], answers=True), self.device)


class Captions(Sequence[Example]):
    """Each example as often as it has reference answers, up to a number, with one of them to learn each time."""

    def __init__(self, examples: Sequence[Example], most: int) -> None:
        self.examples = examples
        self.places = [(i, k) for i in range(len(examples)) for k in range(min(most, len(examples[i].answers)))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        place, answer = self.places[index]
        example = self.examples[place]
        return replace(example, target=example.answers[answer])


class _Chained(Sequence[Example]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][int(index) - (int(self.ends[part - 1]) if part else 0)]


_COMMITS: dict[str, str] = {}


def commits() -> dict[str, str]:
    """The commits of the hub's repositories that splits of this process came from, by "data set/split"."""
    return dict(_COMMITS)


@lru_cache(maxsize=64)
def _open(
    task: str,
    split: str,
    source: str,
    organisation: str,
    revision: str | None,
    limit: int,
    seed: int,
    options: tuple[tuple[str, Any], ...],
) -> Examples:
    data, folder = DATASETS[task].with_options(**dict(options)), Path(source) / task
    here = folder if source and data.holds(folder, split) else None
    if here is None:
        here = data.fetch(split, organisation, revision)
        if here.parent.name == "snapshots":
            _COMMITS[f"{task}/{split}"] = here.name
    return data.load(split, source=here, limit=limit or None, seed=seed)
