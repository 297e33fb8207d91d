"""Data that are missing or broken are named, with the data set and the row; and what the hub is asked for."""

from io import BytesIO

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from reproductions.paper.data import DATASETS, DataError
from tests.reproductions.paper.sample_files import edit, load, sample, unreachable

# Where a sample's rows lie in one parquet file that holds their pictures too.
PLAIN = [name for name in DATASETS if name not in ("gqa", "flickr30k")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", PLAIN)
def test_a_missing_column_is_named(name, tmp_path):
    sample(name, tmp_path)
    (file,) = tmp_path.rglob("*.parquet")
    for column in DATASETS[name].columns:
        table = pq.read_table(file)
        pq.write_table(table.drop_columns(column), tmp_path / "kept")
        broken = tmp_path / column / file.relative_to(tmp_path)
        broken.parent.mkdir(parents=True)
        (tmp_path / "kept").rename(broken)
        with pytest.raises(DataError, match=rf"{DATASETS[name].title}: .* has no column {column}; it has"):
            load(name, tmp_path / column)


@pytest.mark.parametrize("name", PLAIN)
def test_a_broken_picture_is_named(name, tmp_path):
    column = "query_image" if name == "iconqa" else "image"
    broken = edit(sample(name, tmp_path), lambda rows: rows[1].update({column: {"bytes": b"no picture", "path": None}}))
    examples = load(name, broken)
    place = (
        f"{DATASETS[name].title}, split {DATASETS[name].evaluation}, row 1: column '{column}' holds a broken picture: "
        "it is of no kind that is known$"
    )
    with pytest.raises(DataError, match=place):
        _ = examples[1].image
    assert examples[0].image.size == (56, 56)
    # Reading gigabytes of pictures would take longer than to miss one.
    examples.require_whole()


@pytest.mark.parametrize(
    ("mode", "scale"), [("1", 1), ("L", 1), ("LA", 1), ("P", 1), ("CMYK", 1), ("RGBA", 1), ("I;16", 256)]
)
def test_pictures_of_all_modes_are_seen(mode, scale, tmp_path):
    """Those of 16 bits too, which come out white where they are cut off at 255."""
    if mode == "I;16":
        stored = Image.fromarray(np.repeat(np.array([[60, 204]], dtype=np.uint16), 4, 0) * scale)
    else:
        stored = Image.new("RGB", (2, 4))
        stored.paste((255 if mode == "1" else 204,) * 3, (1, 0, 2, 4))
        stored = stored.convert(mode)
    file = BytesIO()
    stored.save(file, "TIFF" if mode == "CMYK" else "PNG")
    value = {"image": {"bytes": file.getvalue(), "path": None}}
    image = load("pathvqa", edit(sample("pathvqa", tmp_path), lambda rows: rows[1].update(value)))[1].image
    assert (image.mode, image.size) == ("RGB", (2, 4))
    dark, light = (image.getpixel((x, 0)) for x in (0, 1))
    assert dark == ((60,) * 3 if mode == "I;16" else (0, 0, 0))
    assert light == ((255 if mode == "1" else 204,) * 3)


@pytest.mark.parametrize("name", PLAIN)
def test_a_row_without_a_picture_is_named(name, tmp_path):
    column = "query_image" if name == "iconqa" else "image"
    examples = load(name, edit(sample(name, tmp_path), lambda rows: rows[1].update({column: None})))
    for read in (lambda: examples[1], examples.require_whole):
        with pytest.raises(DataError, match=f"row 1: column '{column}' holds no picture"):
            read()


@pytest.mark.parametrize("name", PLAIN)
def test_an_empty_split_is_named(name, tmp_path):
    with pytest.raises(DataError, match=rf"{DATASETS[name].title}: .* has no rows"):
        load(name, edit(sample(name, tmp_path), list.clear))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("gqa", {"question": None}, "GQA, split testdev, row 1: column 'question' is missing or empty"),
        ("gqa", {"answer": None}, "GQA, split testdev, row 1: column 'answer'"),
        (
            "vizwiz",
            {"answers": []},
            "VizWiz, split val, row 1: column 'answers' must be a list with at least 2 entries",
        ),
        ("vizwiz", {"answers": ["red", None]}, "row 1: column 'answers'"),
        ("okvqa", {"answers": ["red"]}, "row 1: column 'answers' must be a list with at least 2 entries"),
        ("scienceqa", {"answer": 4}, "ScienceQA, split test, row 1: the answer is none of the 4 options"),
        ("scienceqa", {"answer": -1}, "row 1: the answer is none of the 4 options"),
        ("textvqa", {"answers": None}, "TextVQA, split validation, row 1: column 'answers'"),
        ("pope", {"answer": "maybe"}, "POPE, split test, row 1: the answer must be yes or no, got 'maybe'"),
        ("mmbench", {"answer": "E"}, "MMBench, split dev, row 1: the answer is none of the 4 options"),
        ("mmbench", {"answer": ""}, "MMBench, split dev, row 1: the answer is none of the 4 options"),
        ("mmbench", {"B": None}, "MMBench, split dev, row 1: an option is missing between others"),
        ("aokvqa", {"correct_choice_idx": None}, "A-OKVQA, split validation, row 1: column 'correct_choice_idx'"),
        ("iconqa", {"ques_type": "draw"}, "IconQA, split test, row 1: ques_type must be"),
        ("iconqa", {"ques_type": "choose_txt", "choices": "a,b"}, "row 1: the answer is none of the 2 options"),
        ("flickr30k", {"caption": []}, "Flickr30k, split test, row 1: column 'caption'"),
        ("textcaps", {"caption_str": None}, "TextCaps, split val, row 1: column 'caption_str'"),
        ("pathvqa", {"answer": None}, "PathVQA, split test, row 1: column 'answer'"),
    ],
)
def test_a_bad_row_is_named(name, values, message, tmp_path):
    examples = load(name, edit(sample(name, tmp_path), lambda rows: rows[1].update(values)))
    for read in (lambda: examples[1], examples.require_whole):
        with pytest.raises(DataError, match=message):
            read()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="POPE: there is no folder"):
        load("pope", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"POPE: no file in .* matches data/test-\*.parquet"):
        load("pope", tmp_path)
    with pytest.raises(DataError, match="POPE: split must be one of test, got 'train'"):
        DATASETS["pope"].load("train", source=tmp_path)
    with pytest.raises(DataError, match="POPE: split must be one of test, got 'train'"):
        DATASETS["pope"].write_sample(tmp_path, "train", 1, 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-0.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"POPE: .*test-0.parquet is not a parquet file"):
        load("pope", tmp_path)


@pytest.mark.parametrize("there", [["0-of-00002"], ["0-of-00001", "0-of-00001-3f2a"]])
def test_parts_that_are_missing_or_there_twice_are_named(there, tmp_path):
    (file,) = sample("pope", tmp_path).rglob("*.parquet")
    content = file.read_bytes()
    file.unlink()
    for name in there:
        file.with_name(f"test-0000{name}.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"POPE: .* does not hold each part of test once; .* there are 0 of [12]"):
        load("pope", tmp_path)


def test_rows_that_are_not_drawn_may_be_broken(tmp_path):
    folder = edit(sample("flickr30k", tmp_path), lambda rows: rows[1].update({"image": None}))
    whole, drawn = load("flickr30k", folder), load("flickr30k", folder, limit=3)
    assert 1 not in drawn.places
    drawn.require_whole()
    with pytest.raises(DataError, match="row 1: column 'image' holds no picture"):
        whole.require_whole()


def test_a_file_that_breaks_off_is_named(tmp_path):
    sample("pope", tmp_path, n=60)
    (file,) = tmp_path.rglob("*.parquet")
    content = bytearray(file.read_bytes())
    # The footer with the schema is at the end; the pages before it are lost.
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"POPE: cannot read data/test-\*.parquet"):
        load("pope", tmp_path)


# The hub.


def test_the_hub_is_asked_for_one_split_alone(tmp_path, monkeypatch):
    asked = []

    def download(repository, *, repo_type, allow_patterns, revision):
        asked.append((repository, repo_type, allow_patterns, revision))
        return str(sample("gqa", tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(DATASETS["gqa"].load("testdev", organisation="someone", revision="abc")) == 6
    instructions, images = (f"testdev_balanced_{part}/testdev-*.parquet" for part in ("instructions", "images"))
    assert asked == [("someone/GQA", "dataset", [instructions, images], "abc")]


def test_the_new_organisation_is_asked_and_then_the_old(tmp_path, monkeypatch):
    asked = []

    def download(repository, **settings):
        asked.append(repository)
        if repository.startswith("lmms-lab-encoder"):
            raise OSError("no such repository")
        return str(sample("gqa", tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(DATASETS["gqa"].load("testdev")) == 6
    assert asked == ["lmms-lab-encoder/GQA", "lmms-lab/GQA"]


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    where = (
        r"MMBench: could not fetch lmms-lab-encoder/MMBench or lmms-lab/MMBench .*no network.*"
        r"--data FOLDER, for FOLDER/mmbench/en/dev-.*moved"
    )
    with pytest.raises(DataError, match=where):
        DATASETS["mmbench"].load("dev")
    with pytest.raises(DataError, match=r"A-OKVQA: could not fetch HuggingFaceM4/A-OKVQA (?!.*moved)"):
        DATASETS["aokvqa"].load("validation")
    with pytest.raises(DataError, match=r"OK-VQA: could not fetch Multimodal-Fatima/OK-VQA_train .*FOLDER/okvqa, with"):
        DATASETS["okvqa"].load("train")
