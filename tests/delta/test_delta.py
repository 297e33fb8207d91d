"""A fine-tune as a file: bit-exact, small, refused wherever it does not belong, and undone."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_mdgd import MDGDOptimizer
from torch_mdgd.delta import apply_delta, fingerprint, save_delta
from torch_mdgd.masks import Random


def make_model(dtype: torch.dtype, width: int = 60) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, width), nn.BatchNorm1d(width), nn.Linear(width, 3), nn.Conv2d(3, 4, 3))
    model[3].to(memory_format=torch.channels_last)
    return model.to(dtype)


def fine_tune(model: nn.Module, fraction: float = 0.1, compact: bool = True) -> MDGDOptimizer:
    optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), mask=Random(fraction), compact=compact)
    for _ in range(2):
        kinds = [[torch.randn_like(p) for p in model.parameters()] for _ in range(2)]
        optimizer.set_gradients(task=kinds[0], visual=kinds[1])
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compact", [False, True])
def test_save_apply_undo(tmp_path: Path, dtype: torch.dtype, compact: bool) -> None:
    model = make_model(dtype)
    base = copy.deepcopy(model)
    optimizer = fine_tune(model, compact=compact)
    tuned = copy.deepcopy(model)
    moved = save_delta(model, tmp_path / "d.safetensors", optimizer)
    assert same(model, tuned), "saving changes nothing"
    assert 0 < moved <= round(0.1 * sum(p.numel() for p in model.parameters()))
    target = copy.deepcopy(base)
    applied = apply_delta(target, tmp_path / "d.safetensors")
    assert same(target, tuned)
    assert not same(target, base)
    applied.undo()
    assert same(target, base)
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors"]


def test_numbers_are_compared_bit_by_bit(tmp_path: Path) -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, float("nan"), 1.0, 2.0]]))
    base = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters()))
    with torch.no_grad():
        model.weight[0, 0] = -0.0
        model.weight[0, 3] = 3.0
    assert save_delta(model, tmp_path / "d", optimizer) == 2
    apply_delta(base, tmp_path / "d")
    assert base.weight.view(torch.int32).tolist() == model.weight.view(torch.int32).tolist()


def test_size_is_values_and_positions(tmp_path: Path) -> None:
    model = make_model(torch.float32, width=2000)
    n = sum(p.numel() for p in model.parameters())
    path = tmp_path / "d.safetensors"
    moved = save_delta(model, path, fine_tune(model))
    assert moved >= 0.099 * n
    buffers = sum(x.numel() * x.element_size() for x in model.buffers())
    assert path.stat().st_size <= 1.02 * 0.1 * n * (4 + 4) + buffers


def test_another_base_is_refused(tmp_path: Path) -> None:
    model = make_model(torch.float32)
    other = copy.deepcopy(model)
    save_delta(model, tmp_path / "d", fine_tune(model))
    with torch.no_grad():
        other[0].bias[0] += 1
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match="fingerprint"):
        apply_delta(other, tmp_path / "d")
    assert same(other, before)


def test_applying_twice_is_refused(tmp_path: Path) -> None:
    model = make_model(torch.float32)
    base = copy.deepcopy(model)
    save_delta(model, tmp_path / "d", fine_tune(model))
    apply_delta(base, tmp_path / "d")
    with pytest.raises(ValueError, match="fingerprint"):
        apply_delta(base, tmp_path / "d")


def test_a_cut_or_changed_file_is_refused_and_named(tmp_path: Path) -> None:
    model = make_model(torch.float32)
    base = copy.deepcopy(model)
    path = tmp_path / "d"
    save_delta(model, path, fine_tune(model))
    whole = path.read_bytes()
    for content in (
        whole[:-8],
        whole[: len(whole) // 2],
        b"",
        b"not a file of tensors",
        whole[:-3] + b"\x07" + whole[-2:],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            apply_delta(base, path)
    assert same(base, make_model(torch.float32))


def test_fingerprint_sees_every_bit_and_name_of_parameters_and_of_large_buffers() -> None:
    model = make_model(torch.float32)
    model.register_buffer("table", torch.zeros(65_537))
    model.register_buffer("scratch", torch.zeros(65_537), persistent=False)
    found = {fingerprint(model)}
    seen = [*dict(model.named_parameters()), "table"]
    for name in [*model.state_dict(), "scratch"]:
        changed = copy.deepcopy(model)
        x = {**changed.state_dict(), "scratch": changed.scratch}[name]
        x[(-1,) * x.dim()] += 1
        new = fingerprint(changed)
        assert (new in found) == (name not in seen), name
        found.add(new)
    assert len(found) == 1 + len(seen)
    renamed = nn.ModuleDict({"a": model})
    assert fingerprint(renamed) not in found
    assert fingerprint(model.to(torch.bfloat16)) not in found


def test_a_model_that_the_optimizer_does_not_hold_is_refused(tmp_path: Path) -> None:
    model = make_model(torch.float32)
    with pytest.raises(ValueError, match="parameter 0"):
        save_delta(copy.deepcopy(model), tmp_path / "d", fine_tune(model))
