"""Checkpoints of torch.distributed, saved and loaded by any number of processes."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from torch_mdgd import MDGDOptimizer
from torch_mdgd.storage.entries import load_distributed


def state(net: nn.Module, optimizer: MDGDOptimizer) -> dict[str, Any]:
    weights, optimizer_state = get_state_dict(net, optimizer)
    return {"model": weights, "optimizer": optimizer_state}


def restore(net: nn.Module, optimizer: MDGDOptimizer, folder: Path) -> None:
    saved = state(net, optimizer)
    load_distributed(saved, folder)
    set_state_dict(net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
