"""Probes that are drawn, and those of a user's file."""

import json
from collections import Counter

import pytest
from PIL import Image

from torch_mdgd.report import Probe, drawn_probes, read_probes
from torch_mdgd.report.drawn import COLOURS, FINER, GROUNDS, SIDE, TASKS
from torch_mdgd.report.probes import is_right


def test_drawn_probes_are_the_same_every_time():
    one, other = drawn_probes(3, seed=1), drawn_probes(3, seed=1)
    assert [(x.question, x.answer, x.choices, x.task) for x in one] == [
        (x.question, x.answer, x.choices, x.task) for x in other
    ]
    assert all(x.image().tobytes() == y.image().tobytes() for x, y in zip(one, other, strict=True))
    changed = drawn_probes(3, seed=2)
    assert any(x.image().tobytes() != y.image().tobytes() for x, y in zip(one, changed, strict=True))


def test_every_answer_is_right_equally_often():
    probes = drawn_probes(60)
    for task in TASKS:
        (choices,) = {x.choices for x in probes if x.task == task}
        counts = Counter(x.answer for x in probes if x.task == task)
        assert set(counts) == set(choices)
        assert set(counts.values()) == {60 // len(choices)}
    assert all(str(choice) in x.question for x in probes for choice in x.choices)


def test_a_picture_shows_what_its_answers_say():
    """Counts by regions of colour, the ground by a corner, and the side by where colours lie."""
    for probe in drawn_probes(20):
        image = probe.image()
        assert image.size == (SIDE, SIDE)
        if probe.task == "background":
            assert image.getpixel((0, SIDE - 1)) == GROUNDS[probe.answer]
        if probe.task == "colour":
            found = (
                Counter(image.getdata())
                if not hasattr(image, "get_flattened_data")
                else Counter(image.get_flattened_data())
            )
            seen = {name for name, colour in COLOURS.items() if found[colour] > 500}
            assert seen == {probe.answer}
        if probe.task == "count":
            assert _regions(image) == ("one", "two", "three", "four", "five").index(probe.answer) + 1
    assert FINER > 1


def _regions(image):
    """How many connected regions are not of the ground."""
    small = image.resize((56, 56), Image.Resampling.NEAREST)
    ground = small.getpixel((0, 0))
    left = {(x, y) for x in range(56) for y in range(56) if small.getpixel((x, y)) != ground}
    count = 0
    while left:
        count += 1
        edge = [left.pop()]
        while edge:
            x, y = edge.pop()
            for near in ((x + a, y + b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
    return count


def test_answers_are_right_whatever_their_case_and_full_stop():
    assert is_right(" Red.\n", "red")
    assert is_right("a  cat", "A cat")
    assert not is_right("reddish", "red")
    assert not is_right("", "red")


GOOD = {"image": "a.png", "question": "What?", "answer": "a cat", "choices": ["a cat", "a dog"], "task": "animals"}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png")
    return tmp_path


def write(folder, *lines):
    (folder / "data.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return folder / "data.jsonl"


def test_a_file_of_probes(folder):
    short = {"image": "a.png", "question": "Why?", "answer": "so"}
    path = write(folder, GOOD, "", short)
    for given in (path, folder):
        one, other = read_probes(given)
        assert one == Probe(folder / "a.png", "What?", "a cat", ("a cat", "a dog"), "animals")
        assert (other.choices, other.task, other.chance) == ((), "data", None)
        assert one.image().getpixel((0, 0)) == (255, 0, 0)


WRONG = {
    "json": ("{", "no JSON"),
    "list": ([1], "not an object with the keys answer, choices, image"),
    "unknown": ({**GOOD, "anwser": "x"}, "unknown key 'anwser'; known are answer"),
    "missing": ({k: v for k, v in GOOD.items() if k != "answer"}, "the key 'answer' is missing"),
    "number": ({**GOOD, "answer": 3}, "'answer' must be a text that is not empty, got 3"),
    "empty": ({**GOOD, "question": " "}, "'question' must be a text that is not empty"),
    "no picture": ({**GOOD, "image": "b.png"}, r"there is no picture .*b\.png"),
    "no image": ({**GOOD, "image": "data.jsonl"}, "cannot identify image file"),
    "answer": ({**GOOD, "answer": "a bird"}, "the answer 'a bird' is none of the choices"),
    "one choice": ({**GOOD, "choices": ["a cat"]}, "choices must be two or more different answers"),
    "twice": ({**GOOD, "choices": ["a cat", "a cat"]}, "choices must be two or more different answers"),
    "no choices": ({**GOOD, "choices": []}, "'choices' is empty: leave it out"),
    "text": ({**GOOD, "choices": "a cat"}, "'choices' must be a list of texts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named(folder, name):
    line, message = WRONG[name]
    path = write(folder, GOOD, line)
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: .*{message}"):
        read_probes(path)


def test_a_wrong_place_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"should hold one file \*.jsonl, and holds none"):
        read_probes(folder)
    write(folder)
    with pytest.raises(ValueError, match="holds no probes"):
        read_probes(folder)
    (folder / "more.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"holds data.jsonl, more.jsonl: name the file"):
        read_probes(folder)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_probes(folder / "nowhere")
