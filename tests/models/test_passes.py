"""A loss that runs the model several times: z is of the pass that carries its gradient."""

import copy

import pytest
import torch
from torch import nn

from tests.models.families import make_text_model
from tests.properties import assert_near, assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, MDGDOptimizer, Project, VisualTap, mdgd_backward
from torch_mdgd.integrations.transformers import _Watching
from torch_mdgd.models.passes import carrying, loss_of

RULES = {"published": MDGD, "joint": lambda: MDGD(regularize=0), "project": Project}


def moved():
    """A model that has left its reference."""
    model = llava()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        start = copy.deepcopy(model.state_dict())
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model, start


def visual_loss(rule, loss, tap=None, steps=1):
    """L_v of a step whose loss is made by ``loss(model, batch)``; the weights do not move."""
    model, start = moved()
    here = copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), RULES[rule]())
    model.load_state_dict(here)
    for _ in range(steps):
        optimizer.zero_grad()
        mdgd_backward(model, optimizer, llava_batch(), tap=tap and tap(model), loss=lambda b: loss(model, b))
    return optimizer.diagnostics["visual_loss"]


def alone(model, batch):
    return model(**batch).loss


def blank(batch):
    return {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}


def blank_first(model, batch):
    with torch.no_grad():
        other = model(**blank(batch)).loss
    return model(**batch).loss + 0.1 * other


def blank_last(model, batch):
    loss = model(**batch).loss
    with torch.no_grad():
        other = model(**blank(batch)).loss
    return loss + 0.1 * other


def teacher(model, batch):
    """What DPO with an adapter does: its reference is the model itself, without gradients."""
    with torch.no_grad():
        target = model(**batch).logits
    output = model(**batch)
    return output.loss + (output.logits - target - 1).square().mean()


def two_of_a_kind(model, batch):
    """Two passes with gradients, of which one is thrown away."""
    model(**blank(batch))
    loss = model(**batch).loss
    model(**blank(batch))
    return loss


def shorter(model, batch):
    """Another pass over a sequence of another length."""
    with torch.no_grad():
        model(input_ids=batch["input_ids"][:, -2:])
    return model(**batch).loss


@pytest.mark.filterwarnings("ignore:.*has changed since the optimizer was wrapped")
@pytest.mark.parametrize("loss", [blank_first, blank_last, teacher, two_of_a_kind, shorter])
@pytest.mark.parametrize("rule", RULES)
def test_z_is_of_the_pass_that_carries_the_losss_gradient_at_both_weights(rule, loss):
    wanted = visual_loss(rule, alone)
    assert wanted > 0
    for steps in (1, 2):
        assert visual_loss(rule, loss, steps=steps) == wanted


def both(model, batch):
    return model(**batch).loss + 0.1 * model(**blank(batch)).loss


def test_several_passes_that_carry_the_gradient_are_refused():
    with pytest.raises(RuntimeError, match=r"run 2 times in one call, and the loss's gradient goes through 2"):
        visual_loss("project", both)


@pytest.mark.filterwarnings("ignore:.*has changed since the optimizer was wrapped")
@pytest.mark.parametrize("kind", [lambda tap: tap, _Watching], ids=["tap", "trainer's"])
def test_a_pass_aside_is_not_meant(kind):
    taps = []

    def tap(model):
        taps.append(kind(VisualTap.for_model(model)))
        return taps[-1]

    def loss(model, batch):
        loss = model(**batch).loss
        with taps[-1].aside():
            return loss + 0.1 * model(**blank(batch)).loss

    assert visual_loss("project", loss, tap) == visual_loss("project", alone)


def test_without_gradients_nothing_tells_which_pass_is_meant():
    model = llava()

    def twice(**batch):
        model(**blank(batch))
        return model(**batch)

    with torch.no_grad(), pytest.raises(RuntimeError, match="run 2 times in one call, and no pass carries a gradient"):
        VisualTap.for_model(model)(twice, llava_batch())


class Wrapper(nn.Module):
    """A module that runs the model a second time only when it is told to."""

    def __init__(self, model):
        super().__init__()
        self.model, self.twice = model, False

    def forward(self, **batch):
        if self.twice:
            with torch.no_grad():
                self.model(**blank(batch))
        return self.model(**batch)


def test_a_module_that_begins_to_run_several_passes_is_told_once_and_known_from_then_on():
    wrapper = Wrapper(llava())
    tap = VisualTap.for_model(wrapper.model)
    optimizer = MDGDOptimizer(torch.optim.SGD(wrapper.parameters(), lr=0.0), Project())
    mdgd_backward(wrapper, optimizer, llava_batch(), tap=tap)
    wrapper.twice = True
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="is known from now on: run the step again"):
        mdgd_backward(wrapper, optimizer, llava_batch(), tap=tap)
    mdgd_backward(wrapper, optimizer, llava_batch(), tap=tap)
    assert optimizer.diagnostics["visual_loss"] == 0


def test_features_stop_early_only_while_one_pass_is_known_to_be_run():
    model = llava()
    tap, heads = VisualTap.for_model(model), []
    model.lm_head.register_forward_hook(lambda *args: heads.append(None))

    def run(**batch):
        return model(**batch)

    wanted = tap(model, llava_batch())[1].detach()
    fresh = VisualTap.for_model(llava())
    heads.clear()
    assert_near([tap.features(run, llava_batch())], [wanted])
    assert not heads
    # Nothing is known of another model's function.
    other = llava()
    other.lm_head.register_forward_hook(lambda *args: heads.append(None))
    fresh = VisualTap.for_model(other)
    for count in (1, 1):
        assert_near([fresh.features(lambda **batch: other(**batch), llava_batch())], [wanted])
        assert len(heads) == count


def test_the_graph_tells_which_passes_a_loss_depends_on():
    x = torch.randn(3, requires_grad=True)
    passes = [{0: x * 2}, {0: x + 1, 1: x - 1}, {0: torch.randn(3)}]
    assert carrying((passes[0][0] * passes[1][1]).sum(), passes) == [0, 1]
    assert carrying(passes[1][1].sum(), passes) == [1]
    assert carrying(x.sum(), passes) == []


@pytest.mark.filterwarnings("ignore:.*has changed since the optimizer was wrapped")
@pytest.mark.parametrize("form", RULES)
def test_return_dict_false_is_not_taken_for_missing_labels(form):
    outcomes = []
    for return_dict in (True, False):
        model = llava()
        optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), RULES[form]())
        loss = mdgd_backward(model, optimizer, {**llava_batch(), "return_dict": return_dict})
        outcomes.append([loss, *(p.grad for p in model.parameters())])
    assert_same_bits(*outcomes)
    batch = {key: x for key, x in llava_batch().items() if key != "labels"}
    batch["return_dict"] = False
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="does the batch have labels"):
        mdgd_backward(model, optimizer, batch)


def test_the_loss_in_what_a_model_returns():
    loss, logits = torch.ones(()), torch.ones(1, 2, 3)
    assert loss_of(loss) is loss_of((loss, logits)) is loss_of({"loss": loss, "logits": logits}) is loss
    assert loss_of((logits,)) is loss_of({"logits": logits}) is loss_of(()) is loss_of(None) is None


def test_a_mask_of_integers_is_refused():
    model = llava()
    tap = VisualTap(model.model.language_model, lambda batch: batch["attention_mask"])
    with pytest.raises(TypeError, match=r"the mask must be a bool tensor, true at image tokens, got torch.int64"):
        tap(model, llava_batch())
    with pytest.raises(TypeError, match="bool tensor"):
        mdgd_backward(model, MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1)), llava_batch(), tap=tap)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", ["pixel_values_images", "image_pixel_values", "flattened_patches"])
def test_the_warning_about_unmarked_pictures_knows_what_families_call_them(key, nested):
    model = make_text_model()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    ids = torch.tensor([[1, 2, 3]])
    batch = {"input_ids": ids, "labels": ids, key: torch.ones(1, 3, 2, 2)}
    if nested:
        # One list for each sample, the first of text alone.
        batch[key] = [[], [batch[key]]]
    tap = VisualTap(model.model, lambda batch: torch.zeros_like(batch["input_ids"], dtype=torch.bool))
    with pytest.warns(UserWarning, match=f"the batch holds {key}, but the tap marks no image token"):
        mdgd_backward(model, optimizer, batch, tap=tap, loss=lambda b: model(input_ids=ids, labels=ids).loss)


def packed(rows):
    """Rows one behind the other in one sequence, told apart by their positions."""
    lengths = [rows["input_ids"].shape[1]] * len(rows["input_ids"])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {
        "input_ids": rows["input_ids"].reshape(1, -1), "labels": rows["labels"].reshape(1, -1),
        "position_ids": positions, "pixel_values": rows["pixel_values"],
    }  # fmt: skip


def test_packed_rows_are_exact():
    """Attention tells rows of one sequence apart by their positions, and does so only without a cache of keys."""
    rows = llava_batch()
    rows["attention_mask"][:] = 1
    model = llava()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Project())
    seen = []
    model.model.language_model.register_forward_hook(lambda module, args, output: seen.append(output))
    mdgd_backward(model, optimizer, packed(rows))
    assert all(output.past_key_values is None for output in seen)
    found = seen[-1].last_hidden_state
    assert model.config.get_text_config().use_cache
    apart = model.model(**{k: x for k, x in rows.items() if k != "labels"}).last_hidden_state
    torch.testing.assert_close(found, apart.reshape(1, -1, apart.shape[-1]))
