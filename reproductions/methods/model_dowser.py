"""Model-Dowser (Hwang et al. 2026, arXiv 2602.04509): of each weight only what matters least to the output may move.

For a Linear layer with inputs h and outputs z = Wh, and f the logits of the next token behind a prompt,

    S_ij = ‖J_i‖ · |W_ij| · |h_j|,   J_i = ∂f / ∂z_i

as the mean over prompts. As in the published code (github.com/nguyendinhson-kaist/Model-Dowser), ‖J_i‖ is the mean of
|∂⟨ξ, f⟩ / ∂z_i| over a prompt's tokens and over random signs ξ, |h_j| the mean over its tokens, and a share ρ of each
weight with the lowest S moves. Published prompts are texts that the model writes behind random tokens, beside pictures
of noise or none; here they are given.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import freeze_all_but, last_decoder_layers

PROMPTS, PROBES = 64, 8
"""As in the published commands."""


def importance(
    model: nn.Module, layers: Sequence[nn.Linear], prompts: Iterable[base.Batch], probes: int = PROBES, seed: int = 0
) -> list[Tensor]:
    """S of each layer's weight.

    Args:
        model: not changed.
        layers: with weights that require a gradient, or behind such.
        prompts: for ``model(**prompt)``, of one row each, without padding.
        probes: vectors ξ for each prompt.
        seed: of ξ.

    Returns:
        tensors of the weights' shapes, at least float32; zero of a layer that no prompt reaches.

    Raises:
        ValueError: no prompts.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], z: Tensor) -> None:
        seen[layer] = inputs[0].detach(), z

    sums = [torch.zeros_like(x.weight, dtype=torch.promote_types(x.weight.dtype, torch.float32)) for x in layers]
    generator, count = torch.Generator().manual_seed(seed), 0
    handles = [layer.register_forward_hook(see) for layer in layers]
    try:
        for prompt in prompts:
            seen.clear()
            f = model(**prompt).logits[:, -1]
            reached = [(total, *seen[layer]) for total, layer in zip(sums, layers, strict=True) if layer in seen]
            for _ in range(probes):
                xi = (torch.randint(0, 2, f.shape, generator=generator) * 2 - 1).to(f)
                J = torch.autograd.grad((xi * f).sum(), [z for *_, z in reached], retain_graph=True)
                for (total, h, _), j in zip(reached, J, strict=True):
                    total.addr_(_size(j, total), _size(h, total))
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("importance: prompts is empty")
    return [total / count * layer.weight.detach().abs() for total, layer in zip(sums, layers, strict=True)]


def _size(x: Tensor, like: Tensor) -> Tensor:
    """Mean of |x| over all but the last dimension."""
    return x.to(like.dtype).abs().flatten(0, -2).mean(0)


def least(scores: Tensor, share: float) -> Tensor:
    """Bool tensor of the scores' shape: true at this share of the lowest, at least one; ties to the lowest index."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().argsort(stable=True)[: _count(scores, share)]] = True
    return chosen.view_as(scores)


def least_important(
    model: nn.Module, parameters: Sequence[Tensor], prompts: Iterable[base.Batch], share: float, **probing: Any
) -> list[Tensor]:
    """Which numbers of parameters may move: a share of each Linear layer's weight; of others none, without a score.

    Args:
        model: not changed.
        parameters: trained ones of the model.
        prompts: as of :func:`importance`.
        share: ρ, in (0, 1].
        **probing: as of :func:`importance`.

    Returns:
        bool tensors of the parameters' shapes.
    """
    owners: Mapping[int, nn.Linear] = {id(x.weight): x for x in model.modules() if isinstance(x, nn.Linear)}
    layers = [owners[id(p)] for p in parameters if id(p) in owners]
    scores = importance(model, layers, prompts, **probing)
    found = {id(x.weight): least(S, share) for x, S in zip(layers, scores, strict=True)}
    return [found[id(p)] if id(p) in found else torch.zeros_like(p, dtype=torch.bool) for p in parameters]


def _inside(mask: Tensor, g: Tensor) -> Tensor:
    return g.masked_fill(~mask, 0)


def _count(weight: Tensor, share: float) -> int:
    return max(1, round(share * weight.numel()))


@dataclass(frozen=True)
class ProbeSettings(base.Settings):
    """Settings of Model-Dowser.

    Attributes:
        ratio: ρ, share of each weight that may move.
        prompts: how many S is the mean over.
        probes: random vectors for each prompt.
    """

    ratio: float = limited(0.1, least=1e-9, most=1)
    prompts: int = limited(PROMPTS, least=1)
    probes: int = limited(PROBES, least=1)


class ModelDowser(base.Method):
    """The Linear layers of the last decoder layers, without the connector, as in the published commands.

    Gradients are zero outside the mask, so that there must be no weight decay.
    """

    name = "model-dowser"
    title = "Model-Dowser"
    in_paper = False
    # For each number that moves there are nine, at the default ratio, with gradient and moments; and the mask.
    keeps = 9 * 12 + 10
    Settings = ProbeSettings

    def mark(self, network: nn.Module, layers: int) -> nn.Module:
        """Train the weights that have a score."""
        inside = (part for layer in last_decoder_layers(network, layers) for part in layer.modules())
        linear = [part for part in inside if isinstance(part, nn.Linear)]
        freeze_all_but(network, linear)
        for part in linear:
            if part.bias is not None:
                part.bias.requires_grad_(False)
        return network

    def trained(self, module: nn.Module) -> int:
        """The masks'."""
        return sum(_count(p, self.settings.ratio) for p in base.trained_parameters(module))

    def prepare(self, work: base.Work) -> nn.Module:
        """Score the weights by general questions about the target's pictures, and stop gradients outside the masks."""
        module = super().prepare(work)
        parameters = base.trained_parameters(module)
        prompts = work.prompt_batches(self.settings.prompts)
        masks = least_important(module, parameters, prompts, self.settings.ratio, probes=self.settings.probes)
        for p, mask in zip(parameters, masks, strict=True):
            p.register_hook(partial(_inside, mask))
        return module
