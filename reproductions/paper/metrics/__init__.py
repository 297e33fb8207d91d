"""Metrics of the tables, by the name that data sets give."""

from reproductions.paper.metrics.choice import IconQAMetric, Letter, MMBenchMetric
from reproductions.paper.metrics.cider import CIDEr
from reproductions.paper.metrics.exact import ExactMatch, YesNoOrOpen
from reproductions.paper.metrics.metric import Metric
from reproductions.paper.metrics.pope import POPEMetric
from reproductions.paper.metrics.vqa import VQA

__all__ = ["METRICS", "Metric"]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (VQA(), ExactMatch(), YesNoOrOpen(), Letter(), IconQAMetric(), MMBenchMetric(), POPEMetric(), CIDEr())
}
