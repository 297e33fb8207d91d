"""Rules that were measured and are worth less than the package's own: their rows of the study run from here."""

from reproductions.mini.rules.history import History
from reproductions.mini.rules.pooled import Global
from reproductions.mini.rules.reference import Reference

__all__ = ["Global", "History", "Reference"]
