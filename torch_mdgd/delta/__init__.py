"""A fine-tune as a file: the elements that changed, and their positions. ``docs/delta.md`` describes the format."""

from torch_mdgd.delta.model import AppliedDelta, apply_delta, save_delta
from torch_mdgd.delta.names import fingerprint

__all__ = ["AppliedDelta", "apply_delta", "fingerprint", "save_delta"]
