"""What the figures of the study draw: labels, the masked cosine, embedded features."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from rich.console import Console

from reproductions.mini.experiment import embedding
from reproductions.mini.experiment.outcomes import load
from reproductions.mini.report.figures import draw_embeddings
from reproductions.mini.report.labels import label_points
from reproductions.mini.world.data import prompt_batch, target_data
from reproductions.shared.masked_cosine import masked_cosine

QUIET = Console(quiet=True)


def test_labels_cover_neither_each_other_nor_points_nor_what_is_written_there():
    figure, axis = plt.subplots(figsize=(8, 6))
    points = [(x / 10, y / 10) for x in range(3) for y in range(3)] + [(0.1, 0.1)]
    axis.set_xlim(-1, 1)
    axis.set_ylim(-1, 1)
    axis.text(0.21, 0.21, "H 95")
    figure.canvas.draw()
    label_points(axis, points, [f"a system {i}" for i in range(len(points))], ["k"] * len(points))
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    plt.close(figure)
    assert len(boxes) == 1 + len(points)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    places = axis.transData.transform(points)
    assert not any(box.contains(*place) for box in boxes for place in places)


def test_the_masked_cosine_is_of_what_moved():
    g, v = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([0.0, 0.0, 2.0])
    g0, v0 = torch.tensor([4.0, -3.0, 1.0]), torch.zeros(3)
    both, first = torch.tensor([True, True, True]), torch.tensor([True, False, True])
    assert masked_cosine([[g], [v], [g0], [v0]], [both]) == pytest.approx(0.0)
    assert masked_cosine([[g], [v], [g0], [v0]], [first]) == pytest.approx(12 / (3 * 17**0.5))
    assert masked_cosine([[g], [None], [g], [None]], [torch.zeros(3, dtype=torch.bool)]) == 0


def test_features_are_those_of_the_last_image_token_and_of_the_last_word(checkpoint):
    model, tokenizer = checkpoint
    data = target_data("caption", "test")[:3]
    found = embedding.features(model, tokenizer, data)
    batch = prompt_batch(data.examples[1:2], tokenizer)
    with torch.no_grad():
        hidden = model.model(**batch).last_hidden_state[0]
    last = int((batch["input_ids"][0] == model.config.image_token_id).nonzero().max())
    np.testing.assert_allclose(found["visual"][1], hidden[last], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["multimodal"][1], hidden[-1], rtol=1e-3, atol=1e-4)


def test_tsne_keeps_alike_features_together_and_is_drawn_from_what_was_kept(tmp_path):
    rng = np.random.default_rng(0)
    near, far = rng.standard_normal((20, 8)), 30 + rng.standard_normal((20, 8))
    systems = {"zero-shot": near, "fine-tune": far, "mdgd": near + 0.01}
    placed = embedding.embed({name: {"visual": x, "multimodal": x} for name, x in systems.items()})
    for kind in ("visual", "multimodal"):
        centre = {name: placed[f"{kind}/{name}"].mean(0) for name in systems}
        apart = np.linalg.norm(centre["fine-tune"] - centre["zero-shot"])
        assert np.linalg.norm(centre["mdgd"] - centre["zero-shot"]) < apart / 5
    np.savez(tmp_path / "tsne-digits-adamw.npz", **placed)
    (path,) = draw_embeddings(tmp_path, tmp_path / "out")
    assert path.name == "tsne-digits-adamw.png"
    assert embedding.embed_cells(tmp_path, load(tmp_path)[:1], QUIET) == [tmp_path / "tsne-digits-adamw.npz"]
