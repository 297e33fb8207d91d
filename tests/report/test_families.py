"""Every family of the tap: batches of one's own, and answers that generation is made to give."""

from types import SimpleNamespace

import pytest
import torch

from tests.models.families import FAMILIES, make_batch, make_model
from torch_mdgd.report import ForgettingReport
from torch_mdgd.report.answers import generate


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_before_and_after(name):
    model, batch = make_model(name), make_batch(name)
    report = ForgettingReport(model, probes=[batch])
    (same,) = report.measure(model).sets
    assert same.kl == 0
    assert {x.drift for x in same.layers} == {0}
    assert len(same.layers) == model.config.get_text_config().num_hidden_layers + 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    (moved,) = report.measure(model).sets
    assert moved.kl > 0
    assert all(x.drift > 0 for x in moved.layers)


# Its prompts attend both ways, and one pass over prompt and answer would let them see the answer.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"paligemma"}))
def test_forced_answers_are_as_likely_as_in_one_pass(name):
    model, batch = make_model(name).eval(), make_batch(name)
    answers = batch["input_ids"][:, -2:]
    rows = {key for key, x in batch.items() if x.shape == batch["input_ids"].shape}
    prompts = {key: x[:, :-2] if key in rows else x for key, x in batch.items() if key != "labels"}
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=2))
    with torch.no_grad():
        forced = generate(model, processor, prompts, 2, answers.tolist())
        plain = model(**batch).logits[:, -3:-1]
    assert torch.equal(forced.tokens, answers)
    torch.testing.assert_close(torch.stack(list(forced.logits), 1), plain.float(), rtol=1e-3, atol=1e-3)
