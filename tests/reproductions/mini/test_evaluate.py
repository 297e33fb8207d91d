"""Scores agree with a slow, one-by-one reading of the model, and with answers that are known beforehand."""

import pytest
import torch

from reproductions.mini.model.evaluate import Evaluation, evaluate, visual_features
from reproductions.mini.model.llava import build_model
from reproductions.mini.world.data import pretrained_task_data, prompt_batch, target_data, training_batch
from reproductions.shared.scores import average, harmonic


def test_greedy_answers_equal_a_loop_over_single_unpadded_prompts(checkpoint):
    model, tokenizer = checkpoint
    # Two question lengths, so that the batch is padded.
    data = pretrained_task_data("existence", "validation", 12)
    assert len({len(example.question.split()) for example in data}) == 2
    score = evaluate(model, tokenizer, data, batch_size=5)
    for example, prediction, restricted in zip(data, score.predictions, score.restricted_predictions, strict=True):
        batch = prompt_batch([example], tokenizer)
        words, first = [], None
        while not words or (words[-1] != "</s>" and len(words) < 10):
            with torch.no_grad():
                logits = model(**batch).logits[0, -1]
            first = logits if first is None else first
            words.append(tokenizer.convert_ids_to_tokens(int(logits.argmax())))
            batch["input_ids"] = torch.cat([batch["input_ids"], logits.argmax().view(1, 1)], 1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        assert prediction == " ".join(words).removesuffix("</s>").strip()
        yes, no = first[tokenizer.convert_tokens_to_ids(["yes", "no"])]
        assert restricted == ("yes" if yes > no else "no")


def test_scores_are_percentages_of_equal_answers():
    score = Evaluation("letter", ("a", "b", "c", "d"), ("a", "x", "c c", "d"), ("a", "b", "a", "d"))
    assert score.exact == 50
    assert score.restricted == 75


def test_captions_have_no_restricted_score(checkpoint):
    score = evaluate(*checkpoint, target_data("caption", "test", 4))
    assert len(score.predictions) == 4
    assert score.restricted is None


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_leaves_the_mode_alone(tokenizer, training):
    model = build_model(tokenizer).train(training)
    evaluate(model, tokenizer, pretrained_task_data("count", "test", 2))
    assert model.training is training


def test_visual_features_are_the_last_hidden_states_of_image_tokens(checkpoint):
    model, tokenizer = checkpoint
    examples = pretrained_task_data("object", "test", 2).examples[:1] + target_data("caption", "test", 2).examples
    batch = training_batch(examples, tokenizer)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    # A conversation opens with <s> and the 16 image tokens.
    torch.testing.assert_close(visual_features(model, batch), hidden[:, 1:17].flatten(0, 1))


def test_visual_features_do_not_depend_on_padding(checkpoint):
    model, tokenizer = checkpoint
    examples = [pretrained_task_data("count", "test", 1)[0], pretrained_task_data("choice", "test", 1)[0]]
    together = visual_features(model, training_batch(examples, tokenizer))
    alone = visual_features(model, training_batch(examples[:1], tokenizer))
    torch.testing.assert_close(together[:16], alone, atol=1e-4, rtol=1e-4)


def test_empty_data_is_refused(checkpoint):
    with pytest.raises(ValueError, match="count"):
        evaluate(*checkpoint, pretrained_task_data("count", "test", 0))


def test_means():
    assert average({"P": 90.0, "T": 30.0}) == 60
    assert harmonic(90.0, 30.0) == pytest.approx(45.0)
    assert harmonic(90.0, 0.0) == 0
