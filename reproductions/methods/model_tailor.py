"""Model Tailor (Zhu et al. 2024, arXiv 2402.12048): sew a tenth of a fine-tune onto the pre-trained model.

After fine-tuning, each Linear weight keeps the numbers that matter most, by how far they moved and by what the layer's
inputs say about them; all others go back to their pre-trained values, and what is still to come in the row makes up
for the change, as in optimal brain surgery and SparseGPT.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reproductions.methods import base
from reproductions.methods.base import Batch
from reproductions.shared.fields import limited
from torch_mdgd import connector as connector_of
from torch_mdgd.models.parts import decoder_layers, text_decoder

DAMPING = 0.01
"""Added to the Hessian's diagonal, relative to its mean."""

Sign = Literal["subtract", "add"]
Connector = Literal["revert", "keep", "tailor"]


@torch.no_grad()
def tailor_(
    model: nn.Module,
    pretrained: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    fraction: float = 0.1,
    omega: float = 0.5,
    sign: Sign = "subtract",
    samples: int = 128,
    block: int = 128,
    connector: Connector = "revert",
    run: Callable[[Batch], object] | None = None,
) -> dict[str, Tensor]:
    """Replace the fine-tuned weights of every Linear layer that was trained, in place.

    Biases, norms and embeddings stay as they were fine-tuned. As in the published code, the connector goes first and
    then one decoder layer after the other, each on the inputs that it gets from what was tailored before it. The
    Hessians take inputs² float32 numbers for every Linear of a decoder layer at a time.

    Args:
        model: fine-tuned.
        pretrained: the values before, by parameter name; it may hold only those that were trained.
        batches: calibration batches, ended after ``samples`` samples, which is rows of their first tensor. Where a
            batch has an ``attention_mask``, padding does not count.
        fraction: of each block's numbers that is kept.
        omega: ω, weight of the change |W − W_pre| in the score; 1 − ω weighs the sensitivity W² / diag(U)². The paper's
            is 0.5, its published scripts' 0.8.
        sign: of the compensation. "subtract" is that of optimal brain surgery; the published code adds.
        samples: how many calibration samples are used.
        block: columns that are scored together.
        connector: what becomes of its Linear layers: "revert" takes them back to pre-trained altogether, as the
            published code does; "keep" leaves them fine-tuned; "tailor" treats them as all others.
        run: runs the model on a batch; ``model(**batch)`` by default.

    Returns:
        for each tailored weight, by parameter name, which numbers were kept: bool, (outputs, inputs).

    Raises:
        ValueError: an argument is out of range; no Linear weight differs from its pre-trained value; no calibration
            sample.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"tailor_: fraction must lie in (0, 1], got {fraction}")
    if not 0 <= omega <= 1:
        raise ValueError(f"tailor_: omega must lie in [0, 1], got {omega}")
    if sign not in ("subtract", "add"):
        raise ValueError(f"tailor_: sign must be 'subtract' or 'add', got {sign!r}")
    if connector not in ("revert", "keep", "tailor"):
        raise ValueError(f"tailor_: connector must be 'revert', 'keep' or 'tailor', got {connector!r}")
    left, joint = _trained_linears(model, pretrained), connector_of(model)
    calibration = _calibration(batches, samples)
    run = run or (lambda batch: model(**batch))
    if connector != "tailor":
        for name, layer in _pop_inside(left, joint).items():
            if connector == "revert":
                _revert(name, layer, pretrained)
    masks = {}
    for part in (joint, *decoder_layers(text_decoder(model)), model):
        some = _pop_inside(left, part)
        for name, hessian in _hessians(some, calibration, run).items() if some else ():
            layer = some[name]
            before = pretrained[f"{name}.weight"].to(layer.weight)
            weight, mask = tailored(
                layer.weight.float(),
                before.float(),
                hessian,
                fraction,
                omega,
                1.0 if sign == "add" else -1.0,
                block,
            )
            layer.weight.copy_(weight)
            masks[f"{name}.weight"] = mask
    return masks


def tailored(
    weight: Tensor, before: Tensor, hessian: Tensor, fraction: float, omega: float, sign: float, block: int
) -> tuple[Tensor, Tensor]:
    """One weight: its new values and the mask of what was kept.

    Args:
        weight: fine-tuned W, shape (outputs, inputs), float32 or float64.
        before: pre-trained W_pre, of the same shape and dtype.
        hessian: H = (2/n) Σ x xᵀ of the layer's inputs, shape (inputs, inputs); not changed.
        fraction: of each block's numbers that is kept: at least one.
        omega: ω.
        sign: −1 subtracts the compensation, 1 adds it.
        block: columns that are scored together.
    """
    U = inverse_factor(hessian.to(weight.dtype))
    change, W = (weight - before).abs(), weight.clone()
    mask = torch.zeros_like(W, dtype=torch.bool)
    for start in range(0, W.shape[1], block):
        here = slice(start, start + block)
        columns = W[:, here].clone()
        local = U[here, here]
        score = omega * _standardised(change[:, here]) + (1 - omega) * _standardised((columns / local.diag()) ** 2)
        count = max(1, round(fraction * score.numel()))
        chosen = torch.zeros(score.numel(), dtype=torch.bool, device=W.device)
        chosen[score.flatten().topk(count).indices] = True
        mask[:, here] = chosen.view_as(score)
        errors = torch.zeros_like(columns)
        for i in range(columns.shape[1]):
            w = columns[:, i]
            q = torch.where(mask[:, start + i], w, before[:, start + i])
            errors[:, i] = (w - q) / local[i, i]
            columns[:, i + 1 :] += sign * torch.outer(errors[:, i], local[i, i + 1 :])
            columns[:, i] = q
        W[:, here] = columns
        W[:, start + block :] += sign * errors @ U[here, start + block :]
    return W, mask


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular with H⁻¹ = Uᵀ U, after a zero on the diagonal became 1 and the diagonal was damped."""
    H = hessian.clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def _standardised(x: Tensor) -> Tensor:
    """Each row less its mean, by its deviation; a constant row is 0: it ranks nothing."""
    deviation = x.std(dim=1, keepdim=True, correction=1 if x.shape[1] > 1 else 0)
    return torch.where(deviation > 0, (x - x.mean(dim=1, keepdim=True)) / deviation, torch.zeros_like(x))


def _trained_linears(model: nn.Module, pretrained: Mapping[str, Tensor]) -> dict[str, nn.Linear]:
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and f"{name}.weight" in pretrained
        and not torch.equal(module.weight, pretrained[f"{name}.weight"].to(module.weight))
    }
    if not found:
        raise ValueError("tailor_: no Linear weight of the model differs from its value in pretrained")
    return found


def _pop_inside(layers: dict[str, nn.Linear], part: nn.Module) -> dict[str, nn.Linear]:
    """Take out those that are in a part of the model."""
    inside = set(part.modules())
    return {name: layers.pop(name) for name, layer in list(layers.items()) if layer in inside}


def _revert(name: str, layer: nn.Linear, pretrained: Mapping[str, Tensor]) -> None:
    layer.weight.copy_(pretrained[f"{name}.weight"])
    if f"{name}.bias" in pretrained:
        layer.bias.copy_(pretrained[f"{name}.bias"])


def _calibration(batches: Iterable[Batch], samples: int) -> list[Batch]:
    """The first batches, as many as hold so many samples."""
    kept: list[Batch] = []
    for batch in batches:
        kept.append({name: value[:samples] for name, value in batch.items()})
        samples -= _rows(kept[-1])
        if not samples:
            break
    if not sum(map(_rows, kept)):
        raise ValueError("tailor_: batches hold no calibration sample")
    return kept


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _hessians(
    layers: Mapping[str, nn.Linear], batches: Iterable[Batch], run: Callable[[Batch], object]
) -> dict[str, Tensor]:
    hessians = {
        name: torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        for name, layer in layers.items()
    }
    real: Tensor | None = None

    def add_to(hessian: Tensor) -> Callable[[nn.Module, Any], None]:
        def add(module: nn.Module, inputs: Any) -> None:
            x: Tensor = inputs[0].detach()
            x = x[real.to(x.device)] if real is not None and real.shape == x.shape[:-1] else x.flatten(0, -2)
            hessian.addmm_(x.float().T, x.float(), alpha=2.0)

        return add

    handles = [layer.register_forward_pre_hook(add_to(hessians[name])) for name, layer in layers.items()]
    seen = 0
    try:
        for batch in batches:
            real = batch["attention_mask"].bool() if "attention_mask" in batch else None
            run(batch)
            seen += _rows(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: hessian / seen for name, hessian in hessians.items()}


@dataclass(frozen=True)
class TailorSettings(base.Settings):
    """Settings of Model Tailor.

    Attributes:
        fraction: of each weight's numbers that is kept.
        omega: weight of how far a number moved; the paper's is 0.5, its published scripts' 0.8.
        sign: of the compensation: "subtract" as in optimal brain surgery, "add" as in the published code.
        connector: what becomes of it: "revert" as in the published code, "keep" for as it was fine-tuned, "tailor".
        samples: of the target task, to see what each layer's inputs are like.
    """

    fraction: float = limited(0.1, least=1e-9, most=1)
    omega: float = limited(0.5, least=0, most=1)
    sign: str = limited("subtract", choices=("subtract", "add"))
    connector: str = limited("revert", choices=("revert", "keep", "tailor"))
    samples: int = limited(128, least=1)


class ModelTailor(base.Method):
    """Post-hoc, on the result of plain fine-tuning."""

    name = "model-tailor"
    title = "Model Tailor"
    begins_with = "fine-tune"
    Settings = TailorSettings

    def finish(self, work: base.Work, module: nn.Module) -> None:
        """Tailor the fine-tuned weights."""
        s = self.settings
        # Each batch is one sample, and stays whole: rows of pictures are not rows of samples in every family.
        batches, every = work.target_batches(s.samples), sys.maxsize
        tailor_(
            module, work.pretrained, batches, fraction=s.fraction, omega=s.omega, sign=s.sign, samples=every,
            connector=s.connector,
        )  # fmt: skip
