"""Each data set is read from files in its own schema, with the prompts of the tables."""

import json
import pickle
from collections import Counter

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reproductions.paper.data import DATASETS, DataError
from reproductions.paper.data.parquet import write_parquet
from reproductions.paper.data.prompts import CAPTION, LETTER, SHORT, UNANSWERABLE
from reproductions.paper.data.shapes import COLOURS, SHAPES
from reproductions.paper.metrics import METRICS
from tests.reproductions.paper.sample_files import edit, load, sample, seen, unreachable

SPLITS = [(name, split) for name, data in DATASETS.items() for split in data.splits]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_every_set_of_the_tables_is_there():
    assert list(DATASETS) == ["gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench", "flickr30k", "okvqa",
                              "aokvqa", "iconqa", "pathvqa", "textcaps"]  # fmt: skip
    for name, data in DATASETS.items():
        assert data.name == name
        assert data.metric in METRICS
        assert data.evaluation in data.splits
        assert data.training is None or data.training in data.splits
        assert all(split.examples > 0 and split.gigabytes > 0 for split in data.splits.values())
    trained = {name for name, data in DATASETS.items() if data.training}
    assert {"flickr30k", "okvqa", "pathvqa", "textcaps"} <= trained


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_a_sample_file_is_read(name, split, tmp_path):
    examples = DATASETS[name].load(split, source=sample(name, tmp_path, split))
    assert len(examples) == 6
    for example in examples:
        assert example.image.mode == "RGB"
        assert example.target in example.answers
        if example.choices:
            assert example.answers == (example.target,)
            assert example.target in "ABCDE"[: len(example.choices)]
    assert len({example.id for example in examples}) == 6


@pytest.mark.parametrize("name", DATASETS)
def test_the_answer_is_in_the_picture(name, tmp_path):
    found = 0
    for example in load(name, sample(name, tmp_path, n=24)):
        right = example.choices["ABCD".index(example.target)] if example.choices else example.target
        named = [colour for colour in COLOURS if colour in right.split()]
        if named:
            assert named == [seen(example.image)]
            found += 1
    # Yes-or-no questions and the icons' shapes name no colour in the answer.
    assert found >= 8 or name in ("pope", "iconqa")


@pytest.mark.parametrize("name", ["gqa", "okvqa", "pathvqa"])
def test_one_blind_answer_does_not_do(name, tmp_path):
    targets = [example.target for example in load(name, sample(name, tmp_path, n=40))]
    assert max(targets.count(target) for target in targets) <= 20


@pytest.mark.parametrize("name", DATASETS)
def test_samples_are_a_function_of_their_seed(name, tmp_path):
    def content(folder, seed):
        return [(e.question, e.answers, e.image.tobytes()) for e in load(name, sample(name, folder, seed=seed))]

    assert content(tmp_path / "a", 1) == content(tmp_path / "b", 1) != content(tmp_path / "c", 2)


def test_splits_of_one_folder_do_not_disturb_each_other(tmp_path):
    for name, data in DATASETS.items():
        for split in data.splits:
            sample(name, tmp_path / name, split, n=3)
        pictures = {
            e.image.tobytes(): split
            for split in data.splits
            for e in data.load(split, source=tmp_path / name)
            if len(data.load(split, source=tmp_path / name)) == 3
        }
        assert set(pictures.values()) == set(data.splits)


def test_a_limit_draws_rows_with_a_seed(tmp_path):
    folder = sample("pathvqa", tmp_path)
    everything, some = load("pathvqa", folder), load("pathvqa", folder, limit=3)
    assert [e.id for e in some] == [e.id for e in load("pathvqa", folder, limit=3)], "the same ones again"
    # An example is named after its row, wherever it stands in the sample.
    assert all(e == everything[int(e.id)] for e in some)
    drawn = {tuple(e.id for e in load("pathvqa", folder, limit=3, seed=seed)) for seed in range(8)}
    assert all(len(set(ids)) == 3 for ids in drawn)
    assert len(drawn) > 1
    assert len(load("pathvqa", folder, limit=99)) == 6
    with pytest.raises(ValueError, match="limit"):
        load("pathvqa", folder, limit=0)


def test_examples_are_a_sequence(tmp_path):
    examples = load("pathvqa", sample("pathvqa", tmp_path))
    assert examples[-1] == examples[5]
    assert len(examples[1:3]) == 2
    with pytest.raises(IndexError):
        examples[6]


@pytest.mark.parametrize("name", ["gqa", "iconqa", "okvqa"])
def test_examples_reach_worker_processes(name, tmp_path):
    examples = load(name, sample(name, tmp_path))
    sent = pickle.loads(pickle.dumps(examples))
    assert [e.image.tobytes() for e in sent] == [e.image.tobytes() for e in examples]


# Prompts, with the words of each set's own file.


def test_prompts(tmp_path):
    first = {name: load(name, sample(name, tmp_path / name))[0].question for name in DATASETS}
    assert first["gqa"] == "What color is the shape?" + SHORT
    assert first["vizwiz"] == "What colour is this?" + UNANSWERABLE + SHORT
    assert first["textvqa"].startswith("What is written on the sign?\nReference OCR token: ")
    assert first["okvqa"] == "What colour has this shape?" + UNANSWERABLE + SHORT
    assert first["flickr30k"] == first["textcaps"] == CAPTION
    for name in ("scienceqa", "aokvqa", "mmbench"):
        assert "\nA. " in first[name]
        assert "\nD. " in first[name]
        assert first[name].endswith(LETTER)
    assert first["iconqa"].endswith("\nPlease answer with the option letter from the given choices directly.")


def test_a_hint_is_the_context_of_scienceqa(tmp_path):
    without, hinted = load("scienceqa", sample("scienceqa", tmp_path))[:2]
    assert hinted.question.startswith("Context: Shapes come in four colours.\nWhich colour")
    assert without.question.startswith("Which colour")


def test_mmbench_leaves_out_what_is_nan(tmp_path):
    def fewer(rows):
        rows[0] |= {"D": "nan", "C": None, "answer": "A", "hint": "nan"}

    example = load("mmbench", edit(sample("mmbench", tmp_path), fewer))[0]
    assert len(example.choices) == 2
    assert "C." not in example.question
    assert "nan" not in example.question


def test_mmbench_has_a_fifth_option_where_its_files_have_one(tmp_path):
    folder = sample("mmbench", tmp_path)
    (file,) = folder.rglob("*.parquet")
    table = pq.read_table(file)
    fifth = pa.array(["purple", "nan", *[None] * (len(table) - 2)], pa.string())
    answers = pa.array(["E", *table["answer"].to_pylist()[1:]])
    table = table.append_column("E", fifth).set_column(table.column_names.index("answer"), "answer", answers)
    pq.write_table(table, file)
    first, second = load("mmbench", folder)[:2]
    assert (len(first.choices), first.answers) == (5, ("E",))
    assert "\nE. purple\n" in first.question
    assert len(second.choices) == 4


def test_mmbench_rotations_share_a_group(tmp_path):
    first, second, third = load("mmbench", sample("mmbench", tmp_path))[:3]
    assert first.extra["group"] == second.extra["group"] != third.extra["group"]
    assert first.choices != second.choices
    assert first.choices["ABCD".index(first.target)] == second.choices["ABCD".index(second.target)]


def test_options_of_a_data_set(tmp_path):
    plain = DATASETS["textvqa"].with_options(ocr=False)
    assert "OCR" not in plain.load("validation", source=sample("textvqa", tmp_path / "a"))[0].question
    talking = DATASETS["okvqa"].with_options(short=False)
    folder = sample("okvqa", tmp_path / "b")
    assert talking.load("val2014", source=folder)[0].question == "What colour has this shape?"


def test_the_target_is_the_most_common_answer(tmp_path):
    def disagree(rows):
        rows[0]["answers"] = ["rot", "red", "red", "crimson"]

    assert load("vizwiz", edit(sample("vizwiz", tmp_path), disagree))[0].target == "red"


def test_gqa_finds_each_questions_image(tmp_path):
    sample("gqa", tmp_path)

    def lost(rows):
        rows[1]["imageId"] = "n404"

    with pytest.raises(DataError, match="GQA, split testdev, row 1: no image has the id 'n404'"):
        load("gqa", edit(tmp_path, lost))


def test_flickr_splits_follow_either_list(tmp_path):
    for split in ("train", "test"):
        sample("flickr30k", tmp_path, split, n=4)
    listed = json.loads((tmp_path / "dataset_flickr30k.json").read_text())["images"]
    assert [image["split"] for image in listed] == ["train"] * 4 + ["test"] * 4
    by_json = [example.id for example in load("flickr30k", tmp_path)]
    lines = [f'"[""a, b""]",{image["split"]},{image["filename"]},0' for image in listed]
    (tmp_path / "dataset_flickr30k.json").unlink()
    (tmp_path / "flickr_annotations_30k.csv").write_text("\n".join(["raw,split,filename,img_id", *lines]))
    assert [example.id for example in load("flickr30k", tmp_path)] == by_json
    with pytest.raises(DataError, match="Flickr30k: split val is empty"):
        DATASETS["flickr30k"].load("val", source=tmp_path)


def test_flickr_without_a_list_of_splits(tmp_path, monkeypatch):
    sample("flickr30k", tmp_path)
    (tmp_path / "dataset_flickr30k.json").write_text("[]")
    with pytest.raises(DataError, match="not a list of file names and splits"):
        load("flickr30k", tmp_path)
    (tmp_path / "dataset_flickr30k.json").unlink()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(DataError, match=r"no list of splits \(flickr_annotations_30k.csv or .*no network"):
        load("flickr30k", tmp_path)


def test_okvqa_trains_on_the_original_files(tmp_path):
    sample("okvqa", tmp_path, "train")
    example = DATASETS["okvqa"].load("train", source=tmp_path)[0]
    assert example.target == seen(example.image)
    (tmp_path / "train2014" / "COCO_train2014_000000000003.jpg").unlink()
    with pytest.raises(DataError, match=r"OK-VQA, split train, row 3: there is no picture .*_000000000003.jpg"):
        DATASETS["okvqa"].load("train", source=tmp_path)
    (tmp_path / "mscoco_train2014_annotations.json").write_text('{"annotations": []}')
    with pytest.raises(DataError, match="row 0: question 0 has no answers"):
        DATASETS["okvqa"].load("train", source=tmp_path)
    (tmp_path / "mscoco_train2014_annotations.json").unlink()
    with pytest.raises(DataError, match=r"there is no .*annotations.json; training needs .*allenai"):
        DATASETS["okvqa"].load("train", source=tmp_path)


def test_okvqa_trains_on_the_hubs_copy_where_no_folder_has_the_original_files(tmp_path, monkeypatch):
    asked = []

    def download(repository, **settings):
        asked.append((repository, settings["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    data = DATASETS["okvqa"]
    rows = list(data.sample_rows("train", 3, 0))
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows, data.features())
    example = data.load("train")[0]
    assert example.target == seen(example.image)
    assert asked == [("Multimodal-Fatima/OK-VQA_train", ["data/train-*.parquet"])]
    # Of a copy with other columns, the files by hand are the way out.
    bare = [{key: row[key] for key in ("image", "question")} for row in rows]
    features = {key: data.features()[key] for key in ("image", "question")}
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", bare, features)
    with pytest.raises(DataError, match=r"no column answers, question_id; .*training needs .*FOLDER/okvqa"):
        data.load("train")


def test_a_sample_of_mmbench_has_all_rotations_of_its_questions(tmp_path):
    folder = sample("mmbench", tmp_path, n=12)
    for limit in (4, 5):
        groups = Counter(e.extra["group"] for e in load("mmbench", folder, limit=limit))
        assert sorted(groups.values()) == [2, 2]


def test_the_prompt_of_a_caption_can_be_set(tmp_path):
    data = DATASETS["flickr30k"].with_options(prompt="Describe it.")
    assert data.load("test", source=sample("flickr30k", tmp_path))[0].question == "Describe it."


def test_the_copy_that_datasets_makes_is_counted():
    # 0.79 GB of parquet became 5.48.
    splits = DATASETS["pathvqa"].splits.values()
    assert sum(split.unpacked for split in splits) == pytest.approx(5.48, abs=0.05)
    for data in DATASETS.values():
        assert all(split.unpacked >= split.gigabytes for split in data.splits.values())


def test_iconqa_has_three_kinds_of_questions(tmp_path):
    words, number, pictures = load("iconqa", sample("iconqa", tmp_path, n=3))
    assert words.choices["ABC".index(words.target)] in SHAPES
    assert number.target == "1"
    assert number.choices == ()
    assert number.question.endswith("single word or phrase.")
    assert pictures.choices == ("The first image.", "The second image.")
    # The sheet: the question's picture above, both others below it and beside each other.
    assert pictures.image.size == (2 * (56 + 24), 56 + 24 + 56)
    sheet, size = pictures.image, (56, 56)
    left = ["AB".index(pictures.target) * 80 + 24, 80]
    asked, right = (sheet.crop((x, y, x + 56, y + 56)) for x, y in ((0, 0), left))
    assert asked.size == size
    assert asked.tobytes() == right.tobytes()


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        ("1,000,2,000", "1,000", ("1,000", "2", "000")),
        ("100,1,000", "1,000", ("100", "1,000")),
        ("one, two,three", "two", ("one", "two", "three")),
    ],
)
def test_iconqa_keeps_an_answer_with_commas_whole(choices, answer, expected, tmp_path):
    values = {"ques_type": "choose_txt", "choices": choices, "answer": answer}
    example = load("iconqa", edit(sample("iconqa", tmp_path), lambda rows: rows[0].update(values)))[0]
    assert example.choices == expected
    assert example.choices["ABC".index(example.target)] == answer


def test_iconqa_leaves_out_what_cannot_be_answered(tmp_path):
    def lose(rows):
        rows[2] |= {"answer": "choice_3.png"}
        rows[5] |= {"answer": "choice_1.png", "choice_image_1": None}

    examples = load("iconqa", edit(sample("iconqa", tmp_path, n=9), lose))
    assert [example.id for example in examples] == [str(1_200_000 + i) for i in (0, 1, 3, 4, 6, 7, 8)]


def test_answers_may_be_as_long_as_lmms_eval_lets_them():
    longest = {name: data.answer_tokens for name, data in DATASETS.items()}
    assert (longest["gqa"], longest["scienceqa"], longest["iconqa"], longest["pope"]) == (16, 16, 32, 128)
    assert longest["flickr30k"] == longest["textcaps"] == 64
    # An option's whole text counts as the answer, and so does a web address in a picture.
    assert longest["mmbench"] == 256
    assert min(longest[name] for name in ("vizwiz", "textvqa", "okvqa", "pathvqa")) == 128


def test_a_folder_knows_which_splits_it_holds(tmp_path):
    sample("okvqa", tmp_path / "a", "train")
    sample("okvqa", tmp_path / "b", "val2014")
    held = {(part, split) for part in "ab" for split in ("train", "val2014")
            if DATASETS["okvqa"].holds(tmp_path / part, split)}  # fmt: skip
    assert held == {("a", "train"), ("b", "val2014")}
    assert not DATASETS["pope"].holds(tmp_path / "nowhere", "test")
