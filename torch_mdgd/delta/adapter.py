"""A delta as an adapter of peft: SHiRA, which adds to single elements of linear layers.

LoRA's product of two thin matrices is no form for a sparse delta, whose change of a matrix has full rank in general.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.delta.export import (
    Exported,
    appearing,
    base_model,
    digests_of,
    dtype_of,
    require_equal,
    stored_buffers,
    tensors_of,
)
from torch_mdgd.delta.file import Delta, read
from torch_mdgd.delta.model import apply_delta, same_bits
from torch_mdgd.delta.names import parameters_of
from torch_mdgd.models.folders import load_model

WEIGHTS = "adapter_model.safetensors"
INSTEAD = "export a checkpoint instead"


def export_adapter(
    base: str | os.PathLike[str], delta: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> Exported:
    """Write a delta as a SHiRA adapter of peft, and compare base and adapter, merged, with base + delta.

    Weights of 16 bits are equal bit for bit, unless one shrank below 2⁻¹³ of its size. In float32, an element that
    moved far in proportion to its size may be off by the rounding of an addition, as no W + v may round to it. Such
    elements are counted.

    Args:
        base: folder of the base model, of safetensors.
        delta: what :func:`~torch_mdgd.delta.save_delta` wrote.
        folder: to be made; empty if it is there.

    Raises:
        FileExistsError: the folder holds something.
        ImportError: transformers, peft or safetensors is not installed.
        OSError: no such base or delta.
        ValueError: the delta does not belong on the base, or no SHiRA adapter is equal to it: it changes something else
            than weights of linear layers, or too many of their elements.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters are written by peft: pip install peft") from error
    base, found = Path(base), read(delta)
    dtype = dtype_of(found)
    model: Any = base_model(base, found, dtype)
    layers, buffers = _layers(model, found), digests_of(stored_buffers(model))
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    apply_delta(model, delta)
    if digests_of(stored_buffers(model)) != buffers:
        raise ValueError(f"{delta} changes buffers of the model, which no adapter holds: {INSTEAD}")
    wanted, sizes = digests_of(tensors_of(model)), (len(parameters_of(model)), len(stored_buffers(model)))
    kind, elements = type(model).__name__, sum(x.numel() for x in tensors_of(model).values())
    rank = _rank(layers, found)
    adders = {name: _adder(name, before[name], found, rank * sum(before[name].shape)) for name in layers}
    model = load_model(base, dtype)
    places = {id(model.get_submodule(name)): at for name, (at, _) in adders.items()}
    config = peft.ShiraConfig(r=rank, target_modules=sorted(layers))
    config.mask_fn = lambda layer, r, **_: _mask(layer.weight, places[id(layer)])
    adapted: Any = peft.get_peft_model(model, config)
    for name, (_, values) in adders.items():
        adapted.get_submodule(f"base_model.model.{name}").shira_weight["default"].data = values
    with appearing(Path(folder)) as part:
        adapted.save_pretrained(str(part))
        del adapted, model
        back = peft.PeftModel.from_pretrained(load_model(base, dtype), str(part)).merge_and_unload()
        tensors, what = tensors_of(back), f"{folder}: the adapter, merged,"
        rounded = sum(_rounded(f"{name}.weight", before[name], tensors, found) for name in layers)
        changed = {f"{name}.weight" for name in layers}
        require_equal(_without(wanted, changed), _without(digests_of(tensors), changed), what)
    return Exported(Path(folder), (WEIGHTS,), (), kind, *sizes, elements, rounded)


def _rounded(name: str, old: Tensor, tensors: dict[str, Tensor], delta: Delta) -> int:
    """How many elements of a merged weight are others than base + delta; a ValueError if that is more than rounding.

    Rounding of v = W′ − W and of W + v is at most 2⁻²⁴ (|v| + |W′|), and below 2⁻²³ (|W| + |W′|).
    """
    positions, values = delta.changes[name]
    wanted = old.flatten().clone()
    wanted[positions.long()] = values
    merged = tensors[name].flatten()
    differing = ~same_bits(merged, wanted)
    error = (merged.double() - wanted.double()).abs()[differing]
    bound = (old.flatten().double().abs() + wanted.double().abs())[differing] * 2.0**-23
    if not bool((error <= bound).all()):
        raise ValueError(f"the adapter, merged, has other elements in {name!r} than base + delta: {INSTEAD}")
    return int(differing.sum())


def _without(x: dict[str, str], names: set[str]) -> dict[str, str]:
    return {name: value for name, value in x.items() if name not in names}


def _layers(model: nn.Module, delta: Delta) -> dict[str, nn.Linear]:
    """The linear layers whose weights a delta changes, by name; a ValueError if it changes anything else."""
    out = {}
    for name in delta.changes:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if last != "weight" or not isinstance(module, nn.Linear):
            raise ValueError(
                f"this delta changes {name!r} of a {type(module).__name__}, and a SHiRA adapter holds weights of "
                f"linear layers alone: {INSTEAD}"
            )
        out[owner] = module
    return out


def _rank(layers: dict[str, nn.Linear], delta: Delta) -> int:
    """SHiRA's one r, which is that all layers have room: r(m + n) elements of m × n."""
    counts = {name: delta.changes[f"{name}.weight"][0].numel() for name in layers}
    rank = max((-(-counts[name] // sum(layer.weight.shape)) for name, layer in layers.items()), default=1)
    for name, layer in layers.items():
        rows, columns = layer.weight.shape
        if rank * (rows + columns) > rows * columns:
            raise ValueError(
                f"this delta takes r = {rank}, at which a SHiRA adapter has {rank * (rows + columns)} elements of "
                f"{name!r}, which has {rows * columns}: {INSTEAD}"
            )
    return rank


def _adder(name: str, weight: Tensor, delta: Delta, count: int) -> tuple[Tensor, Tensor]:
    """Where a layer's adapter adds what: flat indices that ascend, and float32 values; both of this length.

    Where nothing changed it adds −0, which leaves everything as it is.
    """
    positions, new = delta.changes[f"{name}.weight"]
    old = weight.flatten()[positions.long()]
    added = (new.double() - old.double()).float()
    free = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    free[positions.long()] = False
    spare = free.nonzero().squeeze(1)[: count - len(positions)]
    at, order = torch.cat([positions.long(), spare]).sort()
    return at, torch.cat([added, added.new_full((len(spare),), -0.0)])[order]


def _mask(weight: Tensor, at: Tensor) -> Tensor:
    mask = weight.new_zeros(weight.numel())
    mask[at] = 1
    return mask.view(weight.shape)
