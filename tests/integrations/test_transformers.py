"""MDGDTrainer against the plain Trainer, a loop written by hand, and itself uninterrupted."""

from collections import defaultdict

import pytest
import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from tests.passes import trainable
from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch, text_batch
from torch_mdgd import MDGD, Anchor, DriftBudget, MDGDOptimizer, ProtectInputs, StepProject, TopK, mdgd_backward
from torch_mdgd.backward import find_optimizer
from torch_mdgd.integrations.transformers import MDGDTrainer, MDGDTrainerMixin, load_weights
from torch_mdgd.loss import Reference, visual_loss

# d = g: what is left is the Trainer.
OFF = {"rule": MDGD(align=0.0, regularize=0.0)}


def dataset(count=8):
    out = []
    for seed in range(count):
        batch = llava_batch(seed, images=1)
        # Answers of different lengths, so that the mean over tokens is not that over micro-batches.
        batch["labels"][:, -1 - seed % 3 :] = batch["input_ids"][:, -1 - seed % 3 :]
        out.append({name: x[0] for name, x in batch.items()})
    return out


def arguments(folder, **more):
    defaults = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.02,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 3,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **more})


def train(cls, folder, model=None, data=None, resume=None, settings=None, **more):
    model = model or llava(dropout=0.2)
    trainable(model)
    data = {"train_dataset": data or dataset(), "eval_dataset": dataset(2)}
    trainer = cls(model=model, args=arguments(folder, **more), **data, **(settings or {}))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


PLAIN_ARGUMENTS = {
    "accumulation": {"gradient_accumulation_steps": 2, "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.01},
    "bf16": {"bf16": True, "activation_checkpointing": True},
    "smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3},
    # Defaults; evaluation leaves the model in its mode for that, without dropout.
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.parametrize("name", PLAIN_ARGUMENTS)
def test_without_its_terms_it_is_the_plain_trainer_bit_for_bit(name, tmp_path):
    plain = train(Trainer, tmp_path, **PLAIN_ARGUMENTS[name])
    ours = train(MDGDTrainer, tmp_path, settings=OFF, **PLAIN_ARGUMENTS[name])
    assert_same_bits(weights(ours), weights(plain))
    logs = [[entry.get("loss") for entry in trainer.state.log_history] for trainer in (ours, plain)]
    assert logs[0] == logs[1]
    norms = [[entry.get("grad_norm") for entry in trainer.state.log_history] for trainer in (ours, plain)]
    assert norms[0] == norms[1]


def test_gradient_checkpointing_changes_nothing_but_rounding(tmp_path):
    # On some processors the plain Trainer, too, gives other bits with it. SGD and a smooth L_v do not enlarge that.
    start, outcomes = [p.detach() for p in llava().parameters()], []
    for more in ({}, {"activation_checkpointing": True}):
        trainer = train(MDGDTrainer, tmp_path, settings={"alignment": "mse"}, optim="sgd", **more)
        assert trainer.model.is_activation_checkpointing == bool(more)
        visual = [entry["visual_loss"] for entry in trainer.state.log_history if "visual_loss" in entry]
        outcomes.append((weights(trainer), visual))
    moved = max(float((x - y).abs().max()) for x, y in zip(outcomes[0][0], start, strict=True))
    for x, y in zip(outcomes[0][0], outcomes[1][0], strict=True):
        assert (x - y).abs().max() <= 1e-3 * moved
    assert outcomes[1][1] == pytest.approx(outcomes[0][1], rel=1e-3)
    assert outcomes[0][1][0] == outcomes[1][1][0] == 0 < outcomes[0][1][1]


class WithoutCounts(Trainer):
    """Of a model whose loss is the mean over its micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


class MDGDWithoutCounts(MDGDTrainerMixin, WithoutCounts):
    pass


def test_a_loss_that_is_not_normalised_over_micro_batches_is_divided(tmp_path):
    more = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "optim": "sgd"}
    plain = train(WithoutCounts, tmp_path, **more)
    assert_same_bits(weights(train(MDGDWithoutCounts, tmp_path, settings=OFF, **more)), weights(plain))


class Scaled(MDGDTrainer):
    """With the gradient scaler of float16, which accelerate has for accelerators alone."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)


def test_a_gradient_scaler_changes_nothing(tmp_path):
    # Powers of two round nothing away, and accelerate unscales for clipping in float16 alone.
    more = {"max_grad_norm": 0.0, "optim": "sgd"}
    scaled = train(Scaled, tmp_path, **more)
    assert_same_bits(weights(scaled), weights(train(MDGDTrainer, tmp_path, **more)))
    assert scaled.accelerator.scaler.get_scale() == 2.0**10


def test_every_train_call_of_model_init_has_a_model_and_a_reference_of_its_own(tmp_path):
    def model_init():
        model = llava()
        trainable(model)
        return model

    def rule(model):
        models.append(model)
        return DriftBudget(MDGD(), 0.05)

    models, outcomes = [], []
    trainer = MDGDTrainer(model_init=model_init, args=arguments(tmp_path), train_dataset=dataset(), rule=rule)
    for _ in range(2):
        trainer.train()
        outcomes.append((weights(trainer), [entry.get("visual_loss") for entry in trainer.state.log_history]))
    assert_same_bits(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]
    assert outcomes[0][1][1] > 0
    assert models[1] is trainer.model is not models[0]


def test_equals_a_loop_by_hand_with_accumulation(tmp_path):
    model = llava()
    trainable(model)
    args = arguments(
        tmp_path, gradient_accumulation_steps=2, warmup_steps=2, max_grad_norm=0.5, lr_scheduler_type="linear"
    )
    trainer = MDGDTrainer(model=model, args=args, train_dataset=dataset(), rule=MDGD(align=0.5), alignment="mse")
    trainer.train()

    model = llava().train()
    parameters = trainable(model)
    optimizer = MDGDOptimizer(torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0, fused=True), MDGD(align=0.5))
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=3)
    data = dataset()
    batches = [{name: torch.stack([data[i][name], data[i + 1][name]]) for name in data[0]} for i in (0, 2, 4, 6, 0, 2)]
    for pair in (batches[:2], batches[2:4], batches[4:]):
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in pair)
        for i, batch in enumerate(pair):

            def loss(inputs, tokens=tokens):
                return model(**inputs, num_items_in_batch=tokens).loss

            mdgd_backward(model, optimizer, batch, loss=loss, visual_weight=0.5, combine=i == 1, alignment="mse")
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_same_bits(weights(trainer), [p.detach() for p in model.parameters()])


RESUMED = {
    "refreshed": {"mask": TopK(0.2, refresh=3)},
    "compact": {"mask": TopK(0.2), "compact": True},
    "step": {"rule": StepProject(restore=0.05)},
    "budget": {"rule": lambda model: DriftBudget(MDGD(), 0.05)},
    "inputs": {"rule": ProtectInputs},
    "lazy": {"rule": lambda model: MDGD(0.5, regularize=0, every=3)},
    "anchor": {"rule": lambda model: calibrated(model)},
    "anchor in the making": {"rule": lambda model: Anchor(model, 0.5, warmup=3)},
}


@pytest.mark.filterwarnings("error:the state dict holds no reference", "ignore:Anchor holds linear layers")
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    settings = RESUMED[name]
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    more |= {"train_sampling_strategy": "random", "warmup_steps": 2}
    whole = train(MDGDTrainer, tmp_path, settings=settings, **more)
    # Other weights than the checkpoint's and the beginning's: nothing may depend on them.
    other = llava(dropout=0.2)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    resumed = train(MDGDTrainer, tmp_path, other, resume=str(tmp_path / "checkpoint-2"), settings=settings, **more)
    assert_same_bits(weights(resumed), weights(whole))
    states = [find_optimizer(trainer.optimizer).state_dict() for trainer in (resumed, whole)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for key, entry in states[1]["state"].items():
        names = sorted(entry)
        assert sorted(states[0]["state"][key]) == names
        assert_same_bits(*[[torch.as_tensor(state["state"][key][name]) for name in names] for state in states])
    tails = [[x["loss"] for x in trainer.state.log_history if "loss" in x][2:] for trainer in (resumed, whole)]
    assert tails[0] == tails[1]


def test_the_best_model_is_loaded_in_the_end(tmp_path):
    more = {
        "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "learning_rate": 1.0,
    }  # fmt: skip
    model = llava()
    trainable(model)
    data = dataset(2)
    trainer = MDGDTrainer(model=model, args=arguments(tmp_path, **more), train_dataset=data, eval_dataset=data)
    trainer.train()
    saved = llava()
    best = trainer.state.best_model_checkpoint
    load_weights(saved, best)
    assert_same_bits(weights(trainer), [p.detach() for p in saved.parameters()])
    assert any(
        entry["eval_loss"] > trainer.state.best_metric for entry in trainer.state.log_history if "eval_loss" in entry
    )


def test_weights_that_are_not_there_are_refused(tmp_path):
    text = llava().model.language_model
    text.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not hold the weights of this LlavaForConditionalGeneration: it lacks"):
        load_weights(llava(), str(tmp_path))


def test_weights_of_two_dtypes_are_loaded_bit_for_bit(tmp_path):
    model = llava().to(torch.bfloat16)
    model.lm_head.float()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-6)
    model.save_pretrained(tmp_path)
    other = llava().to(torch.bfloat16)
    other.lm_head.float()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    load_weights(other, str(tmp_path))
    assert_same_bits(list(other.parameters()), list(model.parameters()))


def test_the_log_holds_the_diagnostics(tmp_path):
    model = llava()
    trainable(model)
    args = arguments(tmp_path, max_steps=4)
    trainer = MDGDTrainer(
        model=model, args=args, train_dataset=dataset(), eval_dataset=dataset(2), mask=TopK(0.25),
        effective_rank_steps=2,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        assert {"visual_loss", "kept_fraction", "grad_norm", "learning_rate"} <= set(entry)
    # The mask was chosen from gradients apart; d = g + αv came from one backward pass after that.
    assert ["cos_task_visual" in entry for entry in logs] == [True, False, False, False]
    assert logs[0]["visual_loss"] == 0 < logs[3]["visual_loss"]
    assert "cos_task_reference" in logs[0]
    assert "effective_rank" not in logs[0]
    assert 1 < logs[1]["effective_rank"] <= 8
    assert logs[1]["effective_rank"] == logs[2]["effective_rank"] != logs[3]["effective_rank"]
    assert "visual_loss" not in next(entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_batches_with_and_without_pictures(tmp_path):
    texts = [{name: x[0] for name, x in text_batch().items()} for _ in range(2)]
    data = [*dataset(2), *texts, *dataset(1)]
    more = {"per_device_train_batch_size": 1, "max_steps": 5}
    trainer = train(MDGDTrainer, tmp_path, data=data, **more)
    visual = [entry["visual_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [x > 0 for x in visual] == [False, True, False, False, True]


class CountingTrainer(Trainer):
    """Counts as TRL's trainers do, and changes the inputs as they do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics = {"train": defaultdict(list)}
        self._total_train_tokens = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["use_cache"] = False
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._metrics["train"]["loss"].append(loss.item())
        self._total_train_tokens += inputs["attention_mask"].sum().item()
        return (loss, outputs) if return_outputs else loss


class MDGDCountingTrainer(MDGDTrainerMixin, CountingTrainer):
    pass


@pytest.mark.parametrize("settings", [OFF, {"rule": MDGD(align=0.0, regularize=1e-12)}], ids=["2 passes", "3 passes"])
def test_a_mixin_for_trainers_that_count_in_compute_loss(settings, tmp_path):
    model = llava()
    trainable(model)
    plain = CountingTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset())
    plain.train()
    ours = train(MDGDCountingTrainer, tmp_path, llava(), settings=settings)
    assert ours._total_train_tokens == plain._total_train_tokens
    assert ours._metrics["train"]["loss"] == pytest.approx(plain._metrics["train"]["loss"])


@pytest.mark.filterwarnings("ignore:.*is called again")
def test_a_second_train_call_does_not_wrap_again(tmp_path):
    trainer = train(MDGDTrainer, tmp_path, max_steps=1, settings={"rule": MDGD(align=0.5)})
    first = find_optimizer(trainer.optimizer)
    trainer.train()
    assert find_optimizer(trainer.optimizer) is first


def test_an_optimizer_of_ones_own_is_wrapped_and_a_wrapped_one_kept(tmp_path):
    for wrapped in (False, True):
        model = llava()
        optimizer = base = torch.optim.SGD(trainable(model), lr=0.1)
        if wrapped:
            optimizer = MDGDOptimizer(base, MDGD(align=0.25))
        trainer = MDGDTrainer(
            model=model, args=arguments(tmp_path, max_steps=1), train_dataset=dataset(), optimizers=(optimizer, None),
            rule=None if wrapped else MDGD(align=0.25),
        )  # fmt: skip
        trainer.train()
        found = find_optimizer(trainer.optimizer)
        assert found.base is base
        assert found.param_groups[0]["mdgd_align"] == 0.25


# The rules of one backward pass, and the anchor.


def calibrated(model, every=2):
    """With batches of its own, and v at one step of so many."""
    batches = [{name: x for name, x in llava_batch(seed).items() if name != "labels"} for seed in (20, 21)]
    return Anchor(model, 0.5, rule=MDGD(0.5, regularize=0, every=every)).calibrate(batches)


def passes(trainer):
    """The steps of all backward passes through the decoder's last norm."""
    counted = []
    norm = trainer.model.model.language_model.norm
    norm.register_full_backward_hook(lambda *_: counted.append(trainer.state.global_step))
    return counted


@pytest.mark.filterwarnings("ignore:Anchor holds linear layers")
def test_the_loss_form_in_a_plain_trainer_is_the_mdgd_trainer(tmp_path):
    """Of SGD and a smooth L_v, which do not enlarge rounding."""

    class LossForm(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.reference, self.anchor = Reference(self.model), calibrated(self.model).hold()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
            output, visual = visual_loss(model, inputs, reference=self.reference, alignment="mse")
            # The loss is over all micro-batches already; a mean over them is not.
            rest = 0.5 * visual + self.anchor.loss()
            return output.loss + rest / self.current_gradient_accumulation_steps

    more = {"optim": "sgd", "gradient_accumulation_steps": 2, "learning_rate": 0.1, "max_grad_norm": 0}
    ours = train(
        MDGDTrainer, tmp_path, settings={"rule": lambda model: calibrated(model, every=1), "alignment": "mse"}, **more
    )
    plain = train(LossForm, tmp_path, **more)
    assert ours.state.log_history[1]["visual_loss"] > 0
    moved = 0.0
    for x, y, start in zip(weights(ours), weights(plain), llava().parameters(), strict=True):
        assert (x - y).abs().max() <= 1e-6 * (1 + y.abs().max())
        moved = max(moved, float((x - start).detach().abs().max()))
    assert moved > 0.01


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_effective_rank_of_one_backward_pass_is_that_of_two(accumulated, tmp_path):
    ranks = []
    for separate in (False, True):
        settings = {"rule": MDGD(0.5, regularize=0), "effective_rank_steps": 1, "separate": separate}
        trainer = train(MDGDTrainer, tmp_path, settings=settings, gradient_accumulation_steps=accumulated, optim="sgd")
        ranks.append([entry["effective_rank"] for entry in trainer.state.log_history if "effective_rank" in entry])
    assert len(ranks[0]) == 3
    assert ranks[0] == pytest.approx(ranks[1], rel=1e-4)
    assert min(ranks[0]) > 1


MEASURED = {
    # Of 12 steps the second backward pass is taken at these.
    "separate": ({"separate": True}, 1, range(12)),
    "never": ({"diagnose_every": 0}, 1, []),
    "every fifth": ({"diagnose_every": 5}, 1, [4, 9]),
    "no more often than every tenth": ({}, 1, [9]),
    "at steps that are logged": ({}, 4, [11]),
    "at all that are logged": ({}, 12, [11]),
}


@pytest.mark.parametrize("name", MEASURED)
def test_when_g_and_v_are_taken_apart(name, tmp_path):
    settings, logging_steps, wanted = MEASURED[name]
    model = llava()
    trainable(model)
    trainer = MDGDTrainer(
        model=model, args=arguments(tmp_path, max_steps=12, logging_steps=logging_steps), train_dataset=dataset(),
        rule=MDGD(0.5, regularize=0), **settings,
    )  # fmt: skip
    counted = passes(trainer)
    trainer.train()
    assert counted == sorted([*range(12), *wanted])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        assert ("cos_task_visual" in entry) == (entry["step"] - 1 in wanted)
