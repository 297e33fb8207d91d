"""What is timed side by side computes the same."""

import numpy as np
import pytest
import torch

from benchmarks import combine, masking, naive
from benchmarks.setups import Captured, count, gradients, llava, minicpm
from tests.reference import equations

N = 1000


def flat(originals: dict) -> list[torch.Tensor]:
    return [tensors[0] for tensors in originals.values()]


def test_naive_transcription_is_the_oracle_in_float64() -> None:
    g, v, g0, v0 = flat(gradients([(N,)], torch.float64))
    expected = equations.mdgd(g, v, g0, v0, align=0.7, regularize=1.3)
    torch.testing.assert_close(naive.mdgd(g, v, g0, v0, align=0.7, regularize=1.3), expected)
    torch.testing.assert_close(naive.project(g, v), equations.decouple(g, v))


def test_naive_transcription_equals_the_library() -> None:
    originals = gradients([(N,)])
    ours = Captured(originals)
    for _ in range(2):
        ours.prepare()
        torch.testing.assert_close(ours.combine(), naive.mdgd(*flat(originals)))


def test_preparing_again_changes_no_result() -> None:
    """combine() overwrites what was captured; what is timed in the second round must be what was in the first."""
    originals = gradients([(3, 5), (7,)])
    kept = {kind: [x.clone() for x in tensors] for kind, tensors in originals.items()}
    ours = Captured(originals)
    ours.prepare()
    first = ours.combine()
    assert first is not None
    first = first.clone()
    ours.prepare()
    second = ours.combine()
    assert second is not None
    assert torch.equal(first, second)
    for kind, tensors in kept.items():
        assert all(torch.equal(x, y) for x, y in zip(tensors, originals[kind], strict=True)), kind


@pytest.mark.parametrize("name", combine.NAMES)
def test_every_update_is_finite(name: str) -> None:
    rows = combine.contenders(N, names=[name])
    if len(rows) == 1:
        pytest.skip(f"{name}: not installed")
    rows[1].prepare()
    result = rows[1].run()
    assert isinstance(result, torch.Tensor)
    assert result.shape == (N,)
    assert result.isfinite().all()


@pytest.mark.parametrize("k", [1, 10, N // 2, N])
def test_every_mask_is_the_same(k: int) -> None:
    scores = torch.from_numpy(np.random.default_rng(0).permutation(N).astype(np.float32))
    expected = scores >= N - k
    for rival in (masking.by_topk, masking.by_kthvalue, masking.by_partition):
        assert torch.equal(rival(scores, k), expected), rival.__name__


def test_masks_that_are_timed_have_the_exact_count() -> None:
    for row in masking.contenders(N, 0.1)[1:]:
        result = row.run()
        mask = result[0] if isinstance(result, list) else result
        assert isinstance(mask, torch.Tensor)
        assert int(mask.sum()) == N // 10, row.name


def test_shapes_are_those_of_the_published_counts() -> None:
    assert count(llava()) == 1_235_279_872
    assert count(minicpm()) == 517_777_920
