import pytest
import torch
from transformers import PreTrainedTokenizerFast

from reproductions.mini.world.data import pretrained_task_data, target_data
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.mini.world.text import answer_labels, conversation, encode, prompt


def test_every_sentence_survives_the_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    data = [pretrained_task_data(task, "train", 100) for task in PRETRAINED_TASKS]
    data += [target_data("digits", "train", 100), target_data("caption", "train", 100)]
    texts = [conversation([(example.question, example.answer)]) for task in data for example in task]
    for text, ids, mask in zip(texts, *encode(loaded, texts).values(), strict=True):
        assert loaded.decode(ids[mask.bool()]) == text
        assert mask.sum() == len(text.split())


def test_labels_are_the_answers_of_every_turn(tokenizer):
    ids = encode(tokenizer, [conversation([("is there a letter ?", "yes"), ("describe the image .", "a dog on red")])])
    labels = answer_labels(tokenizer, ids["input_ids"])
    assert tokenizer.decode(labels[labels != -100]) == "yes </s> a dog on red </s>"
    assert torch.equal(labels[labels != -100], ids["input_ids"][labels != -100])


def test_a_prompt_opens_its_conversation():
    assert conversation([("is there a letter ?", "no")]).startswith(prompt("is there a letter ?") + " no")


def test_a_conversation_without_a_picture_has_no_image_tokens():
    assert "<image>" not in conversation([("repeat : dog", "dog")], picture=False)


def test_unknown_words_are_named(tokenizer):
    with pytest.raises(ValueError, match="unicorn"):
        encode(tokenizer, ["what is a unicorn ?"])
