"""Figures draw what is on disk: the right bars, curves and points, and nothing where nothing was measured."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from sklearn.neighbors import NearestNeighbors

from reproductions.paper.data import DATASETS
from reproductions.paper.report import figures
from reproductions.paper.report.analysis import curve, embed, masking, ranks
from reproductions.paper.report.published import published
from reproductions.paper.report.results import read_results
from tests.reproductions.paper.made_up_results import SHIFT, write_results

FLICKR = "llava-flickr30k"
METHODS = ("zero-shot", "fine-tune", "mdgd")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def runs(everything):
    return read_results(everything)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def shown(axis) -> list[str]:
    return [text.get_text() for text in axis.get_xticklabels()]


def test_every_figure_is_written(everything, tmp_path):
    written = figures.draw_all(everything, tmp_path / "new" / "folder")
    assert [path.name for path in written] == [f"figure{i}.png" for i in range(1, 6)]
    for path in written:
        image = np.asarray(Image.open(path).convert("L"))
        assert image.shape[0] > 300
        assert image.shape[1] > 900
        assert image.std() > 5
    # Drawing leaves no figure open.
    assert plt.get_fignums() == []


def test_without_results_there_is_nothing_to_draw(tmp_path):
    assert figures.draw_all(tmp_path, tmp_path / "figures") == []


@pytest.mark.parametrize(("draw", "methods"), [(figures.draw_ranks, METHODS),
                                               (figures.draw_ranks_before_and_after, METHODS[:2])])  # fmt: skip
def test_bars_are_effective_ranks(runs, draw, methods):
    axes = draw(runs).axes
    assert len(axes) == 4
    for axis, experiment in zip(axes, published().values(), strict=True):
        assert shown(axis) == [DATASETS[task].title for task in experiment.pretrained]
        assert len(axis.containers) == len(methods)
        for bars, method in zip(axis.containers, methods, strict=True):
            expected = [40 - 3 * SHIFT[method] + 2 * i for i in range(len(experiment.pretrained))]
            assert [bar.get_height() for bar in bars] == pytest.approx(expected)
            assert bars.get_label() == figures.LABELS[method]
    assert axes[0].get_title().startswith("(a) LLaVA")
    assert axes[3].get_title().startswith("(b) MiniCPM")


def test_one_system_is_no_comparison(tmp_path):
    assert figures.draw_ranks(read_results(write_results(tmp_path, [FLICKR], ["mdgd"]))) is None


def test_a_task_without_a_rank_leaves_a_gap(tmp_path):
    found = read_results(write_results(tmp_path, [FLICKR], METHODS))[FLICKR]
    (found["mdgd"].folder / "evaluation" / "pope.json").unlink()
    values = ranks(found, METHODS, ["gqa", "pope"])
    assert np.isnan(values["mdgd"][1])
    assert not np.isnan(values["fine-tune"][1])
    assert "mdgd" not in ranks(found, METHODS, ["pope"])


def test_learning_curves_and_masking_ratios(runs):
    axes = np.array(figures.draw_training(runs).axes).reshape(4, 3)
    left, middle, right = axes[0]
    steps, losses, _ = curve(runs[FLICKR]["fine-tune"])
    np.testing.assert_array_equal(left.lines[0].get_xdata(), steps)
    np.testing.assert_array_equal(left.lines[0].get_ydata(), losses)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["fine-tuned", "MDGD", "MDGD-GM"]
    np.testing.assert_allclose(middle.lines[0].get_xdata(), [10, 30, 50, 70, 90])
    np.testing.assert_allclose(middle.lines[0].get_ydata(), [0.91, 0.83, 0.75, 0.67, 0.59])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0.051, 0.059, 0.075, 0.099, 0.131])


def test_smoothing_follows_a_line_and_stills_noise(tmp_path):
    run = read_results(write_results(tmp_path, [FLICKR], ["mdgd"]))[FLICKR]["mdgd"]

    def smooth(losses):
        lines = [json.dumps({"step": i, "loss": float(loss)}) + "\n" for i, loss in enumerate(losses)]
        (run.folder / "training.jsonl").write_text("".join(lines))
        run.__dict__.pop("training", None)
        return curve(run)[2]

    straight = np.linspace(3, 1, 200)
    np.testing.assert_allclose(smooth(straight)[8:-8], straight[8:-8])
    assert np.isnan(smooth(straight)[[0, 7, -8, -1]]).all()
    noise = np.random.default_rng(0).normal(size=500)
    assert np.nanstd(smooth(noise)) < 0.35 * noise.std()
    np.testing.assert_allclose(smooth([2.0]), [2.0])
    assert smooth([]).size == 0


def test_the_legend_is_of_all_panels(tmp_path):
    write_results(tmp_path, [FLICKR], ["zero-shot", "mdgd"])
    found = read_results(write_results(tmp_path, ["llava-okvqa"], METHODS))
    (legend,) = figures.draw_ranks(found).legends
    assert [text.get_text() for text in legend.get_texts()] == ["pre-trained", "fine-tuned", "MDGD"]


def test_without_masking_ratios_only_curves_are_drawn(tmp_path):
    found = read_results(write_results(tmp_path, [FLICKR], METHODS))
    assert masking(found[FLICKR]) == {}
    left, middle, _ = figures.draw_training(found).axes
    assert len(left.lines) == 4
    assert not middle.lines
    assert middle.texts[0].get_text() == "not measured"


def test_features_that_drifted_lie_apart(runs):
    found = embed(runs[FLICKR], METHODS, "flickr30k", "visual")
    assert list(found.points) == list(METHODS)
    assert all(points.shape == (24, 2) for points in found.points.values())

    def nearest_of_the_pretrained(method):
        both = np.concatenate([found.points["zero-shot"], found.points[method]])
        places = NearestNeighbors(n_neighbors=2).fit(both).kneighbors(both[:24], return_distance=False)[:, 1]
        return float((places >= 24).mean())

    # Every MDGD feature moved a little from its own; the fine-tuned ones moved away together.
    assert nearest_of_the_pretrained("mdgd") > 0.5 > nearest_of_the_pretrained("fine-tune")


def test_features_of_one_system_are_not_embedded(runs):
    assert embed(runs[FLICKR], ("mdgd",), "flickr30k", "visual") is None
    assert embed(runs[FLICKR], METHODS, "no such task", "visual") is None


@pytest.mark.parametrize(("examples", "hidden", "value"), [(2, 8, None), (3, 1, None), (5, 4, 0.0)])
def test_few_or_constant_features_are_embedded(tmp_path, examples, hidden, value):
    found = read_results(write_results(tmp_path, [FLICKR], METHODS[:2]))[FLICKR]
    for i, run in enumerate(found.values()):
        features = np.random.default_rng(i).normal(size=(examples, hidden)).astype(np.float32)
        if value is not None:
            features[:] = value
        save_file({"visual": features}, run.folder / "features" / "flickr30k.safetensors")
    placed = embed(found, METHODS, "flickr30k", "visual")
    assert [points.shape for points in placed.points.values()] == [(examples, 2)] * 2
    assert all(np.isfinite(points).all() for points in placed.points.values())
    assert embed(found, METHODS, "flickr30k", "multimodal") is None


def test_features_that_diverged_are_left_out(tmp_path):
    found = read_results(write_results(tmp_path, [FLICKR], METHODS))[FLICKR]
    broken = np.full((24, 16), np.nan, dtype=np.float32)
    save_file({"visual": broken}, found["fine-tune"].folder / "features" / "flickr30k.safetensors")
    assert list(embed(found, METHODS, "flickr30k", "visual").points) == ["zero-shot", "mdgd"]


def test_t_sne_is_the_same_each_time(runs):
    one, same = (embed(runs[FLICKR], METHODS, "flickr30k", "visual").points["mdgd"] for _ in range(2))
    np.testing.assert_array_equal(one, same)


def test_panels_of_t_sne(runs):
    axes = figures.draw_features(runs, figures.LLAVA).axes
    assert [axis.get_title() for axis in axes] == [
        "(a) Flickr30k, multimodal: last instruction token", "(b) Flickr30k, visual: last image token",
        "(c) OK-VQA, multimodal: last instruction token", "(d) OK-VQA, visual: last image token",
    ]  # fmt: skip
    assert all(len(axis.collections) == 3 for axis in axes)


def marked(figure) -> list[bool]:
    """Which panels say that they are smoke."""
    return ["SMOKE" in [text.get_text() for text in axis.texts] for axis in figure.axes]


def test_panels_of_smoke_runs_are_marked_and_no_others(tmp_path):
    write_results(tmp_path, [FLICKR], METHODS)
    write_results(tmp_path, ["llava-okvqa"], METHODS, smoke=True)
    found = read_results(tmp_path)
    assert marked(figures.draw_ranks(found)) == [False, True]
    assert marked(figures.draw_ranks_before_and_after(found)) == [False, True]
    assert marked(figures.draw_training(found)) == [False] * 3 + [True] * 3
    assert marked(figures.draw_features(found, figures.LLAVA)) == [False] * 2 + [True] * 2
