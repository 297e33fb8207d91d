"""The twelve data sets of the tables, each read into `Example`s from the hub or from local files of its own schema."""

from reproductions.paper.data.aokvqa import AOKVQA
from reproductions.paper.data.dataset import ORGANISATIONS, DataSet, Examples, Split
from reproductions.paper.data.examples import DataError, Example
from reproductions.paper.data.flickr30k import Flickr30k
from reproductions.paper.data.gqa import GQA
from reproductions.paper.data.iconqa import IconQA
from reproductions.paper.data.mmbench import MMBench
from reproductions.paper.data.okvqa import OKVQA
from reproductions.paper.data.pathvqa import PathVQA
from reproductions.paper.data.pope import POPE
from reproductions.paper.data.scienceqa import ScienceQA
from reproductions.paper.data.textcaps import TextCaps
from reproductions.paper.data.textvqa import TextVQA
from reproductions.paper.data.vizwiz import VizWiz

__all__ = ["DATASETS", "ORGANISATIONS", "DataError", "DataSet", "Example", "Examples", "Split"]

DATASETS: dict[str, DataSet] = {
    data.name: data
    for data in (
        GQA(), VizWiz(), ScienceQA(), TextVQA(), POPE(), MMBench(), Flickr30k(), OKVQA(), AOKVQA(), IconQA(),
        PathVQA(), TextCaps(),
    )
}  # fmt: skip
"""By name, in the order of the tables."""
