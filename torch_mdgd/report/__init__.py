"""A number for what was lost: a model before and after, on probes. ``docs/forgetting-report.md`` describes it."""

from torch_mdgd.report.drawn import drawn_probes
from torch_mdgd.report.probes import Probe, read_probes
from torch_mdgd.report.report import Comparison, ForgettingReport

__all__ = ["Comparison", "ForgettingReport", "Probe", "drawn_probes", "read_probes"]
