"""What a report says is what plain passes of the model say."""

import copy

import pytest
import torch

from tests.report import folders
from torch_mdgd import VisualTap, effective_rank
from torch_mdgd.report import ForgettingReport, Probe, drawn_probes


@pytest.fixture(scope="module")
def processor():
    return folders.processor()


@pytest.fixture(scope="module")
def probes():
    """Drawn ones, with one whose answers have several words and one without a list of answers."""
    first, *others = drawn_probes(1)
    long = Probe(first.picture, first.question, "dark circle", ("dark circle", "light square", "star"), "words")
    free = Probe(first.picture, "Which colour is the circle?", "light red", (), "free")
    return [first, *others, long, free]


@pytest.fixture(scope="module")
def compared(processor, probes):
    model = folders.model()
    before = copy.deepcopy(model)
    report = ForgettingReport(model, processor, probes, batch_size=3, new_tokens=6)
    folders.moved(model)
    return before, model, report.measure(model)


@torch.no_grad()
def log_p(model, processor, probe, answer):
    """Of an answer's tokens, from one plain pass over one unpadded row: (tokens, vocabulary), and the tokens."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": probe.question}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    batch = processor(images=[probe.image()], text=[f"{text} {answer}"], return_tensors="pt")
    tokens = batch["input_ids"][0, -len(answer.split()) :]
    logits = model(**batch).logits[0, -len(tokens) - 1 : -1]
    return logits.double().log_softmax(-1), tokens


def likelihood(model, processor, probe, answer):
    found, tokens = log_p(model, processor, probe, answer)
    return float(found.gather(1, tokens[:, None]).sum())


def test_the_restricted_answer_is_the_likeliest_of_those_allowed(compared, processor, probes):
    *models, found = compared
    for probe, answer in zip(probes, found.sets[0].answers, strict=True):
        for model, chosen in zip(models, answer.chosen, strict=True):
            if not probe.choices:
                assert chosen is None
                continue
            all_of_them = {x: likelihood(model, processor, probe, x) for x in probe.choices}
            # Of answers that are as likely but for rounding, either may be chosen.
            assert all_of_them[chosen] >= max(all_of_them.values()) - 1e-5
    assert len({x.chosen for x in found.sets[0].answers}) > 2


def test_loss_and_kl_are_those_of_right_answers(compared, processor, probes):
    before, after, found = compared
    losses, divergences = [], []
    for probe in probes:
        p, tokens = log_p(before, processor, probe, probe.answer)
        q, _ = log_p(after, processor, probe, probe.answer)
        losses.append([-float(x.gather(1, tokens[:, None]).mean()) for x in (p, q)])
        divergences.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    assert found.sets[0].loss == pytest.approx([sum(x) / len(losses) for x in zip(*losses, strict=True)], rel=1e-4)
    assert found.sets[0].kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert found.sets[0].kl > 1e-3


def test_ranks_and_drift_are_those_of_features_at_image_tokens(compared, processor, probes):
    before, after, found = compared
    kept = []
    for model in (before, after):
        rows = []
        for probe in probes:
            turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": probe.question}]}]
            text = processor.apply_chat_template(turns, add_generation_prompt=True)
            batch = processor(images=[probe.image()], text=[text], return_tensors="pt")
            states = model(**batch, output_hidden_states=True).hidden_states
            image = batch["input_ids"][0] == model.config.image_token_id
            rows.append(torch.stack([x[0, image] for x in states]).detach())
        kept.append(torch.cat(rows, 1))
    assert [x.layer for x in found.sets[0].layers] == [0, 1, 2]
    for layer, z, z_after in zip(found.sets[0].layers, *kept, strict=True):
        assert layer.rank_before == pytest.approx(effective_rank(z), rel=1e-3)
        assert layer.rank_after == pytest.approx(effective_rank(z_after), rel=1e-3)
        assert layer.drift == pytest.approx(100 * float((z_after - z).abs().mean() / z.abs().mean()), rel=1e-3)


def test_generated_answers_are_greedy_whatever_the_model_prefers(compared, processor, probes):
    before, _, found = compared
    model = copy.deepcopy(before)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2)
    again = ForgettingReport(model, processor, probes, batch_size=3, new_tokens=6).measure(model)
    assert [x.generated[0] for x in again.sets[0].answers] == [x.generated[0] for x in found.sets[0].answers]
    likely = log_p(before, processor, probes[0], "red")[0][0].argmax()
    assert found.sets[0].answers[0].generated[0].split()[0] == processor.tokenizer.decode([int(likely)])


def test_equal_weights_have_lost_nothing(processor, probes):
    model = folders.model()
    found = ForgettingReport(model, processor, probes, new_tokens=2).measure(model).sets[0]
    assert found.kl == 0
    assert [x.drift for x in found.layers] == [0, 0, 0]
    assert {x.outcome for x in found.answers} == {"unchanged"}
    assert found.total.restricted.before == found.total.restricted.after
    assert found.total.restricted.half == 0


def test_measuring_leaves_the_model_as_it_was(processor, probes):
    model = folders.model().train()
    model.model.multi_modal_projector.eval()
    modes = [m.training for m in model.modules()]
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ForgettingReport(model, processor, probes[:2], new_tokens=2)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    hooks = [hook for m in model.modules() for hook in m._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__.startswith("torch_mdgd")]


def test_limits_keep_features_and_distributations_few(processor, probes):
    report = ForgettingReport(folders.model(), processor, probes, new_tokens=1, kl_tokens=7, feature_rows=14)
    measured = report.before["probes"]
    assert measured.log_p.shape == (7, len(processor.tokenizer))
    assert measured.z.shape == (3, 14, 16)


def as_batch(processor, probes):
    """What a user's own collator makes: questions with their answers, padded on the right."""
    texts, answers = [], []
    for probe in probes:
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": probe.question}]}]
        texts.append(f"{processor.apply_chat_template(turns, add_generation_prompt=True)} {probe.answer}")
        answers.append(len(probe.answer.split()))
    batch = dict(processor(images=[[x.image()] for x in probes], text=texts, return_tensors="pt", padding=True))
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (mask, count) in enumerate(zip(batch["attention_mask"], answers, strict=True)):
        end = int(mask.sum())
        labels[row, end - count : end] = batch["input_ids"][row, end - count : end]
    return {**batch, "labels": labels}


def test_batches_of_ones_own_tell_the_same_as_questions(compared, processor, probes):
    before, after, found = compared
    batches = [as_batch(processor, probes[:4]), as_batch(processor, probes[4:])]
    model = copy.deepcopy(before)
    report = ForgettingReport(model, probes=batches)
    model.load_state_dict(after.state_dict())
    own = report.measure(model).sets[0]
    assert own.loss == pytest.approx(found.sets[0].loss, rel=1e-4)
    assert own.kl == pytest.approx(found.sets[0].kl, rel=1e-3)
    assert [x.drift for x in own.layers] == pytest.approx([x.drift for x in found.sets[0].layers], rel=1e-3)
    assert own.total.count == len(probes)
    assert own.total.restricted is None
    assert own.answers == ()


def test_a_batch_is_exact_where_every_token_is_the_likeliest(processor, probes):
    model = folders.model()
    batch = as_batch(processor, probes[:3])
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1)
    answers = batch["labels"] != -100
    # The first two rows are labelled with what the model says.
    for row in (0, 1):
        batch["labels"][row, answers[row]] = said[row, answers[row].nonzero().squeeze(1) - 1]
    batch["labels"][2, answers[2]] = (said[2, answers[2].nonzero().squeeze(1) - 1] + 1) % 30
    found = ForgettingReport(model, probes=[batch]).measure(model).sets[0]
    assert found.total.exact.before == pytest.approx(200 / 3)


def test_a_tap_and_layers_of_ones_own(processor, probes):
    model = folders.model()
    tap = VisualTap.for_model(model)
    found = ForgettingReport(model, processor, probes[:1], tap=tap, layers=[1], new_tokens=1).measure(model)
    assert [x.layer for x in found.sets[0].layers] == [1]


def test_what_is_wrong_is_named(processor, probes):
    model = folders.model()
    for arguments, kind, message in (
        ({"probes": []}, ValueError, "probes are none"),
        ({"probes": probes, "new_task": []}, ValueError, "new task are none"),
        ({"probes": [probes[0], as_batch(processor, probes)]}, ValueError, "probes mix Probe objects and batches"),
        ({"probes": ["what?"]}, TypeError, "Probe objects or batches with 'labels', got a str"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1"),
    ):
        with pytest.raises(kind, match=message):
            ForgettingReport(model, processor, **arguments)
    with pytest.raises(ValueError, match="takes the model's processor"):
        ForgettingReport(model, probes=probes)
    batch = as_batch(processor, probes)
    batch["labels"][1] = -100
    with pytest.raises(ValueError, match="a row has no labels"):
        ForgettingReport(model, probes=[batch])
