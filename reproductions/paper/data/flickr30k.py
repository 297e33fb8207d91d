"""Flickr30k (Young et al. 2014) with the splits of Karpathy and Fei-Fei (2015): 29,000, 1,014 and 1,000 pictures.

The hub's copy holds all 31,783 pictures in one split, so which picture belongs where comes from a list: either
`flickr_annotations_30k.csv` (of the hub's `nlphuji/flickr30k`) or `dataset_flickr30k.json` (Karpathy's own) in the
source folder, or else the former from the hub.
"""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import DataError, Example
from reproductions.paper.data.parquet import PICTURE, read_parquet, write_parquet
from reproductions.paper.data.prompts import CAPTION
from reproductions.paper.data.rows import Row
from reproductions.paper.data.shapes import draw

LISTS = ("flickr_annotations_30k.csv", "dataset_flickr30k.json")
_LIST_REPOSITORY = "nlphuji/flickr30k"


def read_list(path: Path) -> dict[str, str]:
    """File name of each picture -> "train", "val" or "test".

    Raises:
        DataError: the file is in neither of the two formats.
    """
    try:
        if path.suffix == ".json":
            return {image["filename"]: image["split"] for image in json.loads(path.read_text())["images"]}
        with path.open(newline="") as file:
            # A line holds all captions of a picture.
            csv.field_size_limit(sys.maxsize)
            return {line["filename"]: line["split"] for line in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"Flickr30k: {path} is not a list of file names and splits: {error!r}") from error


@dataclass(frozen=True)
class Flickr30k(DataSet):
    """Attributes:
    prompt: what is asked of every picture. Models that talk score far below the table's other rows where it leaves
        the length open.
    """

    name = "flickr30k"
    title = "Flickr30k"
    repository = "{organisation}/flickr30k"
    metric = "cider"
    splits: ClassVar = {"train": Split(29_000, 4.4), "val": Split(1_014, 4.4), "test": Split(1_000, 4.4)}
    evaluation = "test"
    training = "train"
    validation = "val"
    columns = ("image", "caption", "img_id", "filename")
    answer_tokens = 64

    prompt: str = CAPTION

    def example(self, row: Row) -> Example:
        captions = row.texts("caption")
        return Example(row.text("img_id"), row.picture(), self.prompt, captions, captions[0])

    def pattern(self, split: str) -> str:
        return f"{self.folder}/test-*.parquet"

    def rows(self, folder: Path, split: str) -> Sequence[Mapping[str, Any]]:
        table = read_parquet(self.title, folder, self.pattern(split), self.columns)
        belongs = read_list(self._list(folder))
        own = [i for i, name in enumerate(table["filename"]) if belongs.get(name) == split]
        if not own:
            raise DataError(
                f"{self.title}: split {split} is empty; the list of splits names none of {len(table)} files"
            )
        return table.select(own)

    def _list(self, folder: Path) -> Path:
        from huggingface_hub import hf_hub_download

        for name in LISTS:
            if (folder / name).is_file():
                return folder / name
        try:
            return Path(hf_hub_download(_LIST_REPOSITORY, LISTS[0], repo_type="dataset"))
        except Exception as error:
            raise DataError(
                f"{self.title}: {folder} holds no list of splits ({' or '.join(LISTS)}), and it could not be fetched "
                f"from the hub's {_LIST_REPOSITORY}: {error}"
            ) from error

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"image": PICTURE, "caption": datasets.List(text), "sentids": datasets.List(text), "img_id": text,
                "filename": text}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        captions = [f"A {drawing.text} on a white background.", f"There is a {drawing.text}.", f"A {drawing.text}.",
                    f"The picture shows a {drawing.text}.", f"One {drawing.text} is drawn here."]  # fmt: skip
        sentences = [str(5 * index + i) for i in range(5)]
        return {"image": drawing.stored, "caption": captions, "sentids": sentences, "img_id": str(index),
                "filename": f"{index:010d}.jpg"}  # fmt: skip

    def write_sample(self, folder: Path, split: str, n: int, seed: int) -> None:
        rows = list(self.sample_rows(split, n, seed))
        # One file a split, all of them of the hub's split "test", and one list that grows.
        write_parquet(folder / self.pattern(split).replace("*", f"{split}-00000-of-00001"), rows, self.features())
        path = folder / LISTS[1]
        images = json.loads(path.read_text())["images"] if path.exists() else []
        kept = [image for image in images if image["split"] != split]
        new = [{"filename": row["filename"], "split": split} for row in rows]
        path.write_text(json.dumps({"images": kept + new, "dataset": "flickr30k"}))
