"""A small Llama to train, plainly, through peft's adapters and with MDGD: for whole training steps and their memory."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.llama import batch_of, llama
from benchmarks.methods import FRACTION, Method
from benchmarks.settings import Settings
from torch_mdgd import MDGDOptimizer, mdgd_backward


@dataclass
class Training:
    """A model, its optimizer, and one training step."""

    model: nn.Module
    optimizer: Optimizer
    batch: dict[str, Tensor]
    backward: Callable[[], object]
    trained: int = field(init=False)

    def __post_init__(self) -> None:
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def step(self) -> None:
        """Forward and backward passes, the optimizer's step, gradients cleared."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def rank(model: nn.Module) -> int:
    """The rank at which an adapter of all linear layers trains FRACTION of the model's numbers."""
    widths = [m.in_features + m.out_features for name, m in model.named_modules() if _adapted(name, m)]
    return max(1, round(FRACTION * sum(p.numel() for p in model.parameters()) / sum(widths)))


def build(method: Method, settings: Settings) -> Training:
    """The method's model and AdamW(fused), and a batch whose first half of each row is image tokens.

    Raises:
        ModuleNotFoundError: an adapter without peft.
    """
    model = llama(settings.hidden, settings.layers)
    if method.adapter is not None:
        model = _adapt(model, method.adapter)
    model.train()
    batch = batch_of(4, 32)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    wrapper = method.wrapper(model)
    if wrapper is None:
        return Training(model, optimizer, batch, lambda: model(**batch).loss.backward())
    wrapped = MDGDOptimizer(optimizer, **wrapper)
    return Training(model, wrapped, batch, lambda: mdgd_backward(model, wrapped, batch))


def _adapted(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def _adapt(model: nn.Module, adapter: str) -> nn.Module:
    from peft import LoraConfig, ShiraConfig, get_peft_model

    targets = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _adapted(name, module)})
    r = rank(model)
    if adapter == "LoRA":
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=targets))
    return get_peft_model(model, ShiraConfig(r=r, random_seed=0, target_modules=targets))
