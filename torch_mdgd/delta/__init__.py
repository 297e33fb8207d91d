"""A fine-tune as a file: the elements that changed, and their positions. ``docs/delta.md`` describes the format."""

from torch_mdgd.delta.adapter import export_adapter
from torch_mdgd.delta.export import Exported, export_checkpoint
from torch_mdgd.delta.model import AppliedDelta, apply_delta, save_delta
from torch_mdgd.delta.names import fingerprint

__all__ = [
    "AppliedDelta",
    "Exported",
    "apply_delta",
    "export_adapter",
    "export_checkpoint",
    "fingerprint",
    "save_delta",
]
