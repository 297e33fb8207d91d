"""General questions put to pictures by a processor, and prompts of random words."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tests.report import folders
from torch_mdgd.prompts import QUESTIONS, question_batches, random_words
from torch_mdgd.report import drawn_probes
from torch_mdgd.report.answers import ask


class Tokenizer:
    all_special_ids = (0,)
    words = ("<pad>", "cat", "dog", "##s", "sun", "42")

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def decode(self, ids):
        return self.words[ids[0]]


class Processor:
    """What is asked of one of transformers'."""

    chat_template = "a template"
    image_token = "<image>"

    def apply_chat_template(self, messages, add_generation_prompt):
        assert add_generation_prompt
        (message,) = messages
        assert message["role"] == "user"
        picture, question = message["content"]
        assert picture == {"type": "image"}
        return f"USER: <image> {question['text']} ASSISTANT:"

    def __call__(self, images, text, return_tensors, padding):
        assert return_tensors == "pt"
        assert padding
        assert all(len(x) == 1 for x in images)
        return {"input_ids": torch.zeros(len(text), 3), "pixel_values": torch.ones(len(images), 1), "text": text}


def test_every_picture_gets_a_question():
    batches = list(question_batches(Processor(), list(range(10)), batch_size=4, seed=1))
    assert [len(b["pixel_values"]) for b in batches] == [4, 4, 2]
    texts = [text for b in batches for text in b["text"]]
    asked = [text.removeprefix("USER: <image> ").removesuffix(" ASSISTANT:") for text in texts]
    assert set(asked) <= set(QUESTIONS)
    assert len(set(asked)) > 1
    assert texts == [text for b in question_batches(Processor(), list(range(10)), seed=1) for text in b["text"]]


def test_a_processor_without_a_template():
    processor = Processor()
    processor.chat_template = None
    (batch,) = question_batches(processor, [0], ["What?"])
    assert batch["text"] == ["<image>\nWhat?"]
    processor.image_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an image token"):
        list(question_batches(processor, [0]))


def test_nothing_to_ask_or_to_show():
    with pytest.raises(ValueError, match="0 pictures"):
        list(question_batches(Processor(), []))
    with pytest.raises(ValueError, match="0 questions"):
        list(question_batches(Processor(), [0], []))


def test_random_words_are_words():
    prompts = random_words(Tokenizer(), 50, seed=2, least=2, most=4)
    assert len(prompts) == 50
    assert {word for prompt in prompts for word in prompt.split()} == {"cat", "dog", "sun"}
    assert {len(prompt.split()) for prompt in prompts} == {2, 3, 4}
    assert prompts == random_words(Tokenizer(), 50, seed=2, least=2, most=4)


def test_the_questions_are_many_and_different():
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 60


def test_a_text_begins_once_though_its_template_and_its_tokenizer_both_begin_it():
    processor, (probe, *_) = folders.processor(), drawn_probes(1)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    content = [{"type": "image", "image": probe.image()}, {"type": "text", "text": probe.question}]
    wanted = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    assert (wanted == 1).sum() == 1
    (batch,) = question_batches(processor, [probe.image()], [probe.question])
    for ids in (batch["input_ids"], ask(processor, [probe], folders.model())["input_ids"]):
        assert torch.equal(ids, wanted)
    # A template that leaves it to the tokenizer.
    processor.chat_template = processor.chat_template.replace("<s> ", "")
    (batch,) = question_batches(processor, [probe.image()], [probe.question])
    assert torch.equal(batch["input_ids"], wanted)
