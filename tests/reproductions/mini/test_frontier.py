"""The frontier's figure: what it shows, and that names can be read."""

import json
from itertools import combinations

import matplotlib.pyplot as plt
from matplotlib.text import Text

from reproductions.mini.experiment.outcomes import load
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.report.frontier import draw_frontier
from reproductions.mini.report.opening import SHOWN
from tests.reproductions.mini.made_up import SCORES, made_up


def test_the_frontier_says_which_examples_it_shows(tmp_path):
    titles = {}
    for name, frontier in (("with", ("mdgd",)), ("without", ())):
        cell = load(made_up(tmp_path / name, frontier=frontier))[0]
        figure = draw_frontier(cell)
        titles[name] = figure.axes[1].get_title()
        assert (len(cell.frontier["mdgd"][1]) == 5) if frontier else not cell.frontier
        plt.close(figure)
    assert titles["with"].startswith("test, one setting varied")
    assert titles["without"].startswith("validation")


def test_systems_outside_are_named_inside_the_figure(tmp_path):
    far = {name: (20, 80, 60) for name in SYSTEMS if name not in SCORES}
    figure = draw_frontier(load(made_up(tmp_path, SCORES | far, noise=0))[0])
    figure.canvas.draw()
    (text,) = (text for text in figure.texts if text.get_text().startswith("outside"))
    box, told = text.get_window_extent(), text.get_text().replace("\n", " ")
    plt.close(figure)
    assert all(SYSTEMS[name].label in told for name in far)
    assert figure.bbox.contains(box.x0, box.y0)
    assert figure.bbox.contains(box.x1, box.y1)


def test_a_curve_that_leaves_the_figure_is_named_where_it_can_be_seen(tmp_path):
    path = made_up(tmp_path, frontier=("fine-tune",)) / "frontier.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    fastest = max(line["settings"]["learning_rate"] for line in lines)
    lines = [x | ({"T": 1.0, "P": 1.0} if x["settings"]["learning_rate"] == fastest else {}) for x in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = draw_frontier(load(tmp_path)[0])
    figure.canvas.draw()
    right = figure.axes[1]
    (name,) = (text for text in right.texts if text.get_text() == SYSTEMS["fine-tune"].label)
    box = Text.get_window_extent(name)
    plt.close(figure)
    assert right.bbox.contains(box.x0, box.y0)
    assert right.bbox.contains(box.x1, box.y1)


def test_of_many_systems_the_first_are_named_and_no_name_covers_another(tmp_path):
    others = [name for name in SYSTEMS if name not in {"zero-shot", *SHOWN}]
    near = {name: (88 + i % 2, 92, 60) for i, name in enumerate([*others[:20], *SHOWN])}
    figure = draw_frontier(load(made_up(tmp_path, {"zero-shot": SCORES["zero-shot"], **near}, noise=0))[0])
    figure.canvas.draw()
    left, names = figure.axes[0], {system.marked for system in SYSTEMS.values()}
    texts = [text for text in left.texts if text.get_text() in names]
    first = {SYSTEMS[name].marked for name in SHOWN}
    boxes = [Text.get_window_extent(text) for text in texts if text.get_text() not in first]
    far = [text for text in texts if text.get_text() in first and text.arrow_patch is not None]
    told = [text.get_text() for text in figure.texts]
    plt.close(figure)
    assert first <= {text.get_text() for text in texts}
    assert 0 < len(boxes) < len(near) - len(SHOWN)
    assert not far, "others have not taken the places near by"
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert any(f"some of these {len(near)}" in text for text in told)
