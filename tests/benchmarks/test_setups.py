"""The numbers that everything is timed with."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import setups


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A short draw, so that a vector is made of many pieces."""
    monkeypatch.setattr(setups, "DRAWN", 5000)
    setups._drawn.cache_clear()
    yield 5000
    setups._drawn.cache_clear()


@pytest.mark.parametrize("n", [1, 4999, 5000, 5001, 50_000])
def test_pieces_of_one_draw_are_normal_numbers(drawn: int, n: int) -> None:
    source = {float(x) for x in setups._drawn()}
    x = setups.normal((n,), generator())
    assert x.shape == (n,)
    # Scaled by 0.9 to 1.1, the scale of a piece; each number of the draw once in a whole piece.
    for piece in x.split(drawn):
        assert len(piece.unique()) == len(set(piece.tolist())) >= 0.99 * len(piece)
        assert max(map(abs, piece.tolist())) <= 1.1 * max(map(abs, source))
    if n == 50_000:
        assert float(x.mean()) == pytest.approx(0, abs=0.05)
        assert float(x.std()) == pytest.approx(1, abs=0.1)
        assert len(x.unique()) > 0.99 * n


def test_a_piece_goes_round_the_draw(drawn: int) -> None:
    x = setups.normal((drawn,), generator())
    scale = float(x.std() / setups._drawn().std())
    assert 0.9 <= scale <= 1.1
    torch.testing.assert_close(x.sort().values, (setups._drawn() * scale).sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_seed_says_the_numbers_and_memory_is_their_own(dtype: torch.dtype) -> None:
    first, again, other = (setups.normal((30, 40), generator(seed), dtype) for seed in (3, 3, 4))
    assert first.dtype == dtype
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first != other).float().mean() > 0.9
    again.zero_()
    assert first.abs().max() > 0
    assert setups._drawn().abs().max() > 0


def test_gradients_are_correlated_with_the_task() -> None:
    found = setups.gradients([(200, 300), (7,)])
    g, *others = (torch.cat([x.view(-1) for x in tensors]) for tensors in found.values())
    for x in others:
        # y + 0.3 g, both of size 1: a cosine of 0.3 / sqrt(1.09).
        assert float(torch.cosine_similarity(g, x, dim=0)) == pytest.approx(0.287, abs=0.05)
