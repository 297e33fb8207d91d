"""Measuring one task: answers, scores, the effective rank of what is seen, and features for t-SNE.

Every answer is written as it comes, so that a killed evaluation goes on after the last whole batch.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from reproductions.paper.data import DATASETS
from reproductions.paper.metrics import METRICS
from reproductions.paper.models import to_device
from reproductions.paper.run.work import Workshop
from reproductions.paper.run.workers import errors_of_workers
from reproductions.shared.files import FileError, read_json, read_until_cut, write
from torch_mdgd import VisualTap, effective_rank

THUMBNAILS, THUMBNAIL = 12, (224, 224)
RESULT = ("scores", "effective_rank")
"""What a task's file has to have."""


def evaluate(work: Workshop, task: str, folder: Path, bars: Progress) -> dict[str, Any]:
    """Measure a task, unless its file is there.

    Args:
        work: with the model to measure.
        task: a data set.
        folder: of the run.
        bars: where progress is shown.

    Returns:
        what ``evaluation/<task>.json`` holds.
    """
    done = folder / "evaluation" / f"{task}.json"
    if done.is_file():
        found: dict[str, Any] = read_json(done, *RESULT)
        return found
    done.parent.mkdir(parents=True, exist_ok=True)
    examples, metric = work.evaluation_examples(task), DATASETS[task].metric
    bar = bars.add_task(task, total=len(examples))
    predictions = answer(work, task, examples, done.with_suffix(".predictions.jsonl"), bars, bar)
    settings = work.experiment.evaluation
    # Figures show features of the target alone.
    count = settings.feature_examples if task == work.experiment.target else settings.rank_examples
    rank = look(work, examples, folder / "features" / f"{task}.safetensors", count)
    scores = METRICS[metric].score(predictions, examples)
    each = METRICS[metric].each(predictions, examples)
    keep_thumbnails(examples[:THUMBNAILS], done.with_suffix(".pictures"))
    lines = [_line(x, p, score) for x, p, score in zip(examples, predictions, each, strict=True)]
    write(done.with_suffix(".predictions.jsonl"), "".join(lines))
    result = {"task": task, "metric": metric, "scores": scores, "effective_rank": rank, "n": len(examples)}
    write(done, json.dumps(result, indent=1))
    bars.remove_task(bar)
    return result


def answer(work: Workshop, task: str, examples: Sequence[Any], path: Path, bars: Progress, bar: TaskID) -> list[str]:
    """Answers to all examples; those that the file holds are not asked for again.

    Raises:
        FileError: the file is of other examples.
    """
    settings = work.experiment.evaluation
    longest = settings.answer_tokens or DATASETS[task].answer_tokens
    known = read_until_cut(path)
    write(path, "".join(json.dumps(line) + "\n" for line in known))
    for line, example in zip(known, examples, strict=False):
        if line["id"] != example.id:
            raise FileError(f"{path} holds answers to other examples ({line['id']}, not {example.id}): remove it")
    predictions = [line["prediction"] for line in known]
    work.network.eval()
    with path.open("a", encoding="utf-8") as file:
        for inputs in batches(work, examples, len(predictions)):
            texts = work.model.generate(
                inputs, longest, beams=settings.beams, repetition_penalty=settings.repetition_penalty
            )
            batch = examples[len(predictions) : len(predictions) + len(texts)]
            file.write("".join(_line(x, text, None) for x, text in zip(batch, texts, strict=True)))
            file.flush()
            predictions += texts
            bars.update(bar, completed=len(predictions))
    return predictions


@torch.no_grad()
def look(work: Workshop, examples: Sequence[Any], path: Path, count: int) -> float:
    """The effective rank (4) of the last hidden layer at image tokens; features of so many examples go to a file.

    The file holds "visual", (examples, hidden) at each picture's last token, and "multimodal" at each instruction's.
    """
    settings, tap = work.experiment.evaluation, work.model.tap()
    everywhere = VisualTap(tap.text_module, lambda batch: torch.ones_like(batch["input_ids"], dtype=torch.bool))
    places = {"visual": tap.last_image_token().mask, "multimodal": tap.last_instruction_token().mask}
    features: dict[str, list[Tensor]] = {name: [] for name in places}
    seen: list[Tensor] = []
    work.network.eval()
    for inputs in batches(work, examples, 0, max(count, settings.rank_examples)):
        hidden = everywhere(work.network, inputs)[1].unflatten(0, inputs["input_ids"].shape)
        for name, mask in places.items():
            features[name].append(hidden[mask(inputs)].float().cpu())
        room = settings.rank_examples - len(seen)
        if room > 0:
            image = tap.mask(inputs)
            seen += [row[where].float() for row, where in zip(hidden[:room], image[:room], strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({name: torch.cat(rows) for name, rows in features.items()}, part)
    os.replace(part, path)
    return effective_rank(torch.cat(seen))


def keep_thumbnails(examples: Sequence[Any], folder: Path) -> None:
    """Small copies of the first pictures, for the report."""
    folder.mkdir(exist_ok=True)
    for i, example in enumerate(examples):
        picture = example.image.convert("RGB")
        picture.thumbnail(THUMBNAIL)
        picture.save(folder / f"{i}.jpg", quality=80)


def batches(work: Workshop, examples: Sequence[Any], start: int, stop: int | None = None) -> Iterator[dict[str, Any]]:
    """Batches of the questions from one to before another, on the model's device, prepared by worker processes."""
    e, places = work.experiment, range(start, min(len(examples), stop or len(examples)))
    loader: Iterable[dict[str, Any]] = DataLoader(
        places, e.evaluation.batch, num_workers=e.training.workers,  # type: ignore[arg-type]
        collate_fn=lambda some: work.model.collate([examples[i] for i in some], answers=False),
    )  # fmt: skip
    with errors_of_workers():
        for batch in loader:
            yield to_device(batch, work.device)


def _line(example: Any, prediction: str, score: float | None) -> str:
    line = {
        "id": example.id, "question": example.question, "answers": list(example.answers), "prediction": prediction,
        "score": score,
    }  # fmt: skip
    return json.dumps(line, ensure_ascii=False) + "\n"
