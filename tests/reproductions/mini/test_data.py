"""Splits do not meet, answers are right, and everything is a function of its seed."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch

from reproductions.mini.world.data import TaskData, pretrained_task_data, prompt_batch, target_data, training_batch
from reproductions.mini.world.pictures import COLOURS, KIND_OF, KINDS, KNOWN, LETTERS, SPARE, draw_picture
from reproductions.mini.world.questions import NUMBERS, PRETRAINED_TASKS
from reproductions.mini.world.scenes import POSITIONS, SPLITS, Scene
from reproductions.mini.world.text import ANSWER, END, IMAGE, IMAGE_TOKENS, PAD


@cache
def all_data(split, seed) -> list[TaskData]:
    tasks = [pretrained_task_data(task, split, 80, seed) for task in PRETRAINED_TASKS]
    return [*tasks, target_data("caption", split, seed=seed), target_data("digits", split, seed=seed)]


def objects_of(scene: Scene) -> dict[str, str]:
    """Position -> object, told from the cells alone."""
    return {place: name for place, name in zip(POSITIONS, scene.cells, strict=True) if len(name) > 1}


def solve(task: str, question: str, scene: Scene) -> set[str]:
    """Right answers to a question, worked out from the scene's description and the words of the question."""
    objects = objects_of(scene)
    letters = [name for name in scene.cells if len(name) == 1]
    place = next((place for place in POSITIONS if place in question), None)
    match task:
        case "object":
            return {objects[place]}
        case "kind":
            return {kind for kind, drawings in KINDS.items() if objects[place] in drawings}
        case "existence":
            found = bool(letters) if "letter" in question else place in objects
            return {"yes" if found else "no"}
        case "letter":
            return set(letters)
        case "choice":
            offered = question.removeprefix("which is shown , ").removesuffix(" ?").split(" or ")
            assert len(set(offered)) == 4
            return set(offered) & set(objects.values())
        case "count":
            return {NUMBERS[len(objects)]}
        case "colour":
            return {scene.background}
        case "caption":
            return {" and ".join(f"a {name}" for name in objects.values()) + f" on {scene.background}"}
    raise AssertionError(task)


@pytest.mark.parametrize("task", [*PRETRAINED_TASKS, "caption"])
def test_each_answer_is_the_only_right_one(task):
    data = target_data("caption", "train", 200) if task == "caption" else pretrained_task_data(task, "train", 200)
    for example in data:
        assert solve(task, example.question, example.source) == {example.answer}
        assert not data.answers or example.answer in data.answers


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_splits_share_no_scene_no_picture_no_sentence_and_no_scan(one, other):
    # Two seeds: the split has to hold whatever the seed is.
    first, second = all_data(one, seed=0), all_data(other, seed=1)
    for seen in (lambda e: e.picture.tobytes(), lambda e: key_of(e.source)):
        assert {seen(e) for data in first for e in data}.isdisjoint({seen(e) for data in second for e in data})
    captions = [{e.answer for data in split if data.task == "caption" for e in data} for split in (first, second)]
    assert all(captions)
    assert captions[0].isdisjoint(captions[1])


def key_of(source: Scene | int) -> object:
    return source if isinstance(source, int) else (*objects_of(source).values(), source.background)


def test_splits_of_the_digits_cover_every_scan_once():
    sources = [example.source for split in SPLITS for example in target_data("digits", split)]
    assert sorted(sources) == list(range(1797))


def test_targets_are_new():
    assert not set(SPARE) & set(KNOWN)
    scenes = [e.source for task in PRETRAINED_TASKS for e in pretrained_task_data(task, "train", 100)]
    assert {name for scene in scenes for name in scene.cells} <= {"", *KNOWN, *LETTERS}
    assert {name for e in target_data("caption", "train", 300) for name in objects_of(e.source).values()} == set(SPARE)


@pytest.mark.parametrize("form", ["letter", "thing"])
def test_existence_is_balanced(form):
    data = pretrained_task_data("existence", "train", 2000)
    answers = [example.answer for example in data if form in example.question]
    # Four standard deviations of a fair coin.
    assert abs(answers.count("yes") - len(answers) / 2) < 2 * len(answers) ** 0.5
    assert len(answers) > 800


def test_every_class_occurs():
    for task, properties in PRETRAINED_TASKS.items():
        assert {example.answer for example in pretrained_task_data(task, "train", 600)} == set(properties.answers)


@pytest.mark.parametrize("make", [lambda seed: pretrained_task_data("choice", "test", 30, seed),
                                  lambda seed: target_data("caption", "test", 30, seed),
                                  lambda seed: target_data("digits", "test", 30, seed)])  # fmt: skip
def test_data_is_a_function_of_the_seed(make):
    def content(data):
        return [(e.question, e.answer, e.source, e.picture.tobytes()) for e in data]

    assert content(make(3)) == content(make(3))
    assert content(make(3)) != content(make(4))


def test_pictures_show_the_scene():
    rng = np.random.default_rng(0)
    picture = draw_picture(("dog", "", "a", ""), "red", rng)
    assert picture.shape == (3, 48, 48)
    assert picture.dtype == np.uint8
    red = np.array(COLOURS["red"])[:, None, None]
    quarters = [picture[:, :24, :24], picture[:, :24, 24:], picture[:, 24:, :24], picture[:, 24:, 24:]]
    assert [bool((quarter == red).all()) for quarter in quarters] == [False, True, False, True]


def test_every_drawing_differs():
    pictures = {draw_picture((name, "", "", ""), "white", np.random.default_rng(0)).tobytes()
                for name in (*KIND_OF, *SPARE, *LETTERS, "")}  # fmt: skip
    assert len(pictures) == len(KIND_OF) + len(SPARE) + len(LETTERS) + 1


def test_training_batch(tokenizer):
    examples = [*pretrained_task_data("object", "train", 2), *target_data("caption", "train", 2)]
    batch = training_batch(examples, tokenizer)
    assert batch["pixel_values"].shape == (4, 3, 48, 48)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].abs().max() <= 1
    for row, example in enumerate(examples):
        ids = batch["input_ids"][row]
        assert (ids == tokenizer.convert_tokens_to_ids(IMAGE)).sum() == IMAGE_TOKENS
        kept = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row][kept], ids[kept])
        assert tokenizer.decode(ids[kept]) == f"{example.answer} {END}"
        assert torch.equal(batch["attention_mask"][row] == 0, ids == tokenizer.convert_tokens_to_ids(PAD))


def test_prompt_batch_ends_where_the_answer_begins(tokenizer):
    examples = [*pretrained_task_data("object", "train", 2), *pretrained_task_data("choice", "train", 2)]
    batch = prompt_batch(examples, tokenizer)
    assert "labels" not in batch
    assert (batch["input_ids"][:, -1] == tokenizer.convert_tokens_to_ids(ANSWER)).all()
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()


def test_a_slice_keeps_the_task():
    data = pretrained_task_data("kind", "test", 5)
    assert len(data[1:3]) == 2
    assert data[1:3].answers == tuple(KINDS)
    assert data[1:3][0] is data[1]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: pretrained_task_data("smell", "train", 1), "task"),
        (lambda: pretrained_task_data("kind", "dev", 1), "split"),
        (lambda: target_data("faces", "train"), "name"),
        (lambda: target_data("digits", "dev"), "split"),
        (lambda: target_data("digits", "test", 301), "n is 301"),
        (lambda: draw_picture(("unicorn", "", "", ""), "red", np.random.default_rng(0)), "unicorn"),
    ],
)
def test_bad_arguments_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()
