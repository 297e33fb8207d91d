"""What every process of a test does in DeepSpeed's engine, and what one process does without DeepSpeed.

In float32, which the engine works in; rows are those of :mod:`tests.distributed.setups`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments

from tests import accelerate_state
from tests.distributed import setups
from tests.distributed.rules import prompts
from tests.distributed.setups import example
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, Anchor, DriftBudget, MDGDOptimizer, Project, StepProject, TopK, mdgd_backward
from torch_mdgd.integrations.transformers import MDGDTrainer
from torch_mdgd.loss import Reference, visual_loss

STEPS, MICRO_BATCHES, CLIP = 3, 2, 0.5
# By micro-batch: one of text alone comes first in its step, one last.
TEXT = (2, 5)

Rules = dict[str, Callable[[nn.Module], Any]]
RULES: Rules = {
    "align": lambda model: MDGD(1.0, regularize=0),
    "anchor and lazy": lambda model: Anchor(model, 0.02, rank=None, warmup=2, rule=MDGD(0.5, regularize=0, every=2)),
    "calibrated": lambda model: Anchor(model, 0.02, rank=None, every=2).calibrate(
        [{name: x.float() if x.is_floating_point() else x for name, x in batch.items()} for batch in prompts(0, 1)]
    ),
    "budget": lambda model: DriftBudget(MDGD(0.5, regularize=0), 0.05, measure_every=2),
    "published": lambda model: MDGD(),
    "project": lambda model: Project(0.5),
}
CASES = [
    (1, "anchor and lazy", "all"),
    (1, "published", "lora"),
    (2, "align", "all"),
    (2, "budget", "lora"),
    (2, "project", "all"),
    (3, "anchor and lazy", "all"),
    (3, "anchor and lazy", "lora"),
    (3, "calibrated", "all"),
    (3, "published", "all"),
]


def network(trained: str = "all", dropout: float = 0.0) -> nn.Module:
    model = llava(dropout)
    model.model.vision_tower.requires_grad_(False)
    if trained == "lora":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)"))
    return model.train()


def part(step: int, rank: int, world: int) -> dict[str, Tensor]:
    batch = setups.llava_part(step, rank, world, (step not in TEXT,) * 4)
    return {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)


def config(stage: int, **more: Any) -> dict[str, Any]:
    # So low that some parameters stay gathered, as small ones do, and others do not.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICRO_BATCHES, "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True, "zero_optimization": zero, "steps_per_print": 10**9, **more,
    }  # fmt: skip


@contextmanager
def engine_of(model: nn.Module, stage: int, optimizer: Any = None, **more: Any) -> Iterator[Any]:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=sgd(model) if optimizer is None else optimizer, config=config(stage, **more)
    )
    try:
        yield engine
    finally:
        engine.destroy()


# By hand.


def alone(form: str, trained: str) -> dict[str, Any]:
    """One process with the whole batch, and without DeepSpeed."""
    model = network(trained)
    optimizer = MDGDOptimizer(sgd(model), RULES[form](model))
    for step in range(STEPS * MICRO_BATCHES):
        last = step % MICRO_BATCHES == MICRO_BATCHES - 1
        mdgd_backward(model, optimizer, part(step, 0, 1), alignment="mse", weight=1 / MICRO_BATCHES, combine=last)
        if last:
            torch.nn.utils.clip_grad_norm_(optimizer.parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return {"weights": [p.detach() for p in optimizer.parameters], "diagnostics": optimizer.diagnostics}


def whole(mdgd: Any) -> list[Tensor]:
    return [mdgd.reference.theta(i).clone() for i in range(len(mdgd.trained))]


def train(mdgd: Any, rank: int, world: int, steps: Sequence[int]) -> dict[str, Any]:
    for step in steps:
        mdgd.backward(part(step, rank, world))
        mdgd.engine.step()
    return {"weights": whole(mdgd), "diagnostics": mdgd.diagnostics}


def by_hand(stage: int, form: str, trained: str, rank: int, world: int) -> dict[str, Any]:
    from torch_mdgd.integrations.deepspeed import MDGDEngine

    model = network(trained)
    with engine_of(model, stage) as engine:
        mdgd = MDGDEngine(engine, RULES[form](model), alignment="mse")
        return train(mdgd, rank, world, range(STEPS * MICRO_BATCHES))


def resumed(stage: int, trained: str, folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Uninterrupted; gone on with by an engine of other weights; and φ and the rule alone in another stage."""
    from torch_mdgd.integrations.deepspeed import MDGDEngine

    half, steps = STEPS // 2 * MICRO_BATCHES, STEPS * MICRO_BATCHES
    out = {}
    model = network(trained)
    with engine_of(model, stage) as engine:
        mdgd = MDGDEngine(engine, RULES["anchor and lazy"](model), alignment="mse")
        phi = whole(mdgd)
        train(mdgd, rank, world, range(half))
        engine.save_checkpoint(str(folder))
        mdgd.save(folder)
        out["whole"] = train(mdgd, rank, world, range(half, steps))
    for name, other in (("resumed", stage), ("elsewhere", 1)):
        model = network(trained)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        with engine_of(model, other) as engine:
            mdgd = MDGDEngine(engine, RULES["anchor and lazy"](model), alignment="mse")
            if other == stage:
                engine.load_checkpoint(str(folder))
            mdgd.load(folder)
            found = [mdgd.reference.phi(i) for i in range(len(mdgd.trained))]
            assert all(torch.equal(x, y) for x, y in zip(found, phi, strict=True))
            if name == "resumed":
                out[name] = train(mdgd, rank, world, range(half, steps))
    return out


def loss_form(stage: int | None, rank: int, world: int) -> dict[str, Any]:
    """L + L_v as one loss of one's own; without a stage in a plain loop."""
    model = network()
    if stage is None:
        optimizer, reference = sgd(model), Reference(model)
        for step in range(3):
            output, visual = visual_loss(model, part(step % 2, 0, 1), reference=reference, alignment="mse")
            (output.loss + visual).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"weights": [p.detach() for p in model.parameters() if p.requires_grad], "diagnostics": {}}
    from torch_mdgd.integrations.deepspeed import ZeroReference

    with engine_of(model, stage, gradient_accumulation_steps=1, gradient_clipping=0.0) as engine:
        reference = ZeroReference(engine)
        for step in range(3):
            output, visual = visual_loss(engine, part(step % 2, rank, world), reference=reference, alignment="mse")
            engine.backward(output.loss + visual)
            engine.step()
        weights = [reference.theta(i).clone() for i in range(len(reference.trained))]
    return {"weights": weights, "diagnostics": {}}


def in_bfloat16(rank: int, world: int) -> list[float]:
    """L_v by step, with dropout and gradient checkpointing."""
    from torch_mdgd.integrations.deepspeed import MDGDEngine

    model = network(dropout=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    more = {"bf16": {"enabled": True}, "gradient_accumulation_steps": 1}
    with engine_of(model, 3, **more) as engine:
        mdgd = MDGDEngine(engine, Anchor(model, 0.02, rule=MDGD(regularize=0)))
        found = []
        for step in (0, 1, 3):
            batch = part(step, rank, world)
            mdgd.backward({**batch, "pixel_values": batch["pixel_values"].bfloat16()})
            engine.step()
            found.append(mdgd.diagnostics["visual_loss"])
    return found


# accelerate and the Trainer.


def accelerated(stage: int, rank: int, world: int) -> dict[str, Any]:
    with accelerate_state.accelerators():
        model = network()
        from torch_mdgd.integrations.deepspeed import MDGDEngine

        plugin = DeepSpeedPlugin(hf_ds_config=config(stage))
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=MICRO_BATCHES)
        engine, _ = accelerator.prepare(model, sgd(model))
        mdgd = MDGDEngine(engine, RULES["align"](model), alignment="mse")
        out = train(mdgd, rank, world, range(STEPS * MICRO_BATCHES))
        engine.destroy()
        return out


TRAINERS: dict[str, dict[str, Any]] = {
    "anchor and lazy": {"rule": RULES["anchor and lazy"]},
    "published": {},
}


def trainer(
    world: int, stage: int | None, form: str, folder: Path, trained: str = "all", resume: str | None = None, **more: Any
) -> dict[str, Any]:
    with accelerate_state.accelerators() if stage is not None else accelerate_state.fresh():
        zero = None if stage is None else {
            **config(stage), **dict.fromkeys(
                ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
            ),
        }  # fmt: skip
        arguments = {
            "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4 // world,
            "gradient_accumulation_steps": MICRO_BATCHES, "max_grad_norm": CLIP, "use_cpu": stage is None,
            "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 3, "optim": "sgd",
            "learning_rate": 0.05, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
            "deepspeed": zero,
        }  # fmt: skip
        # Not after the arguments of ZeRO-3, under which transformers draws other weights.
        model = network(trained)
        args = TrainingArguments(**{**arguments, **more})
        found = MDGDTrainer(
            model=model, args=args, train_dataset=rows(), data_collator=collate, **TRAINERS[form], alignment="mse",
            effective_rank_steps=1,
        )  # fmt: skip
        found.train(resume_from_checkpoint=resume)
        # transformers counts no operations of partitioned parameters.
        kept = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
        logs = [{k: v for k, v in entry.items() if k not in kept} for entry in found.state.log_history]
        if stage is None:
            weights = [p.detach() for p in model.parameters() if p.requires_grad]
        else:
            weights = whole(found.mdgd_engine)
            found.mdgd_engine.engine.destroy()
        return {"weights": weights, "diagnostics": {}, "logs": logs}


def rows() -> list[dict[str, Tensor]]:
    """Answers of different lengths; all with pictures, so that processes run the same modules."""
    out = []
    for seed in range(4 * MICRO_BATCHES * STEPS):
        row = {name: x[0] for name, x in llava_batch(seed, images=1).items()}
        row["labels"][-1 - seed % 3 :] = row["input_ids"][-1 - seed % 3 :]
        out.append(row)
    return out


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def resumed_trainer(folder: Path) -> list[dict[str, Any]]:
    """Uninterrupted, and gone on with after the second of three steps."""
    more = {"save_strategy": "steps", "save_steps": 2}
    return [
        trainer(2, 3, "anchor and lazy", folder, "lora", resume, **more)
        for resume in (None, str(folder / "checkpoint-2"))
    ]


# What is refused.


def refusals(error: Callable[..., str], folder: Path, rank: int, world: int) -> dict[str, str]:
    from torch_mdgd.integrations.deepspeed import MDGDEngine

    out = {}
    model = network()
    with engine_of(model, 3) as engine:
        out["a correcting rule"] = error(MDGDEngine, engine, StepProject())
        out["no rule"] = error(MDGDEngine, engine, "mdgd")
        out["an optimizer"] = error(MDGDOptimizer, sgd(model))
        out["the model"] = error(mdgd_backward, engine, MDGDOptimizer(sgd(network())), part(0, rank, world))
        out["hold"] = error(Anchor(model).hold)
        mdgd = MDGDEngine(engine, MDGD(regularize=0))
        out["nothing saved"] = error(mdgd.load, folder / "nowhere")
        out["pictures on one rank"] = error(mdgd.backward, part(0 if rank else 2, rank, world))
    model = network()
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "mdgd_align": 0.5}]
    with engine_of(model, 1, torch.optim.SGD(groups, lr=0.1)) as engine:
        out["weights of a group"] = error(MDGDEngine, engine)
    with engine_of(network(), 0) as engine:
        out["stage 0"] = error(MDGDEngine, engine)
    out["a model"] = error(MDGDEngine, network())
    out["a mask"] = error(masked_trainer, folder)
    return out


def masked_trainer(folder: Path) -> None:
    with accelerate_state.accelerators():
        args = TrainingArguments(
            str(folder), deepspeed=config(1), per_device_train_batch_size=2, gradient_accumulation_steps=MICRO_BATCHES,
            max_grad_norm=CLIP, report_to=[],
        )  # fmt: skip
        MDGDTrainer(model=network(), args=args, mask=TopK(0.1))


def trainer_example(folder: Path) -> str:
    with accelerate_state.accelerators():
        return example("deepspeed_trainer", folder)


def run(case: Callable[..., None], error: Callable[..., str], folder: Path, rank: int, world: int) -> None:
    for stage, form, trained in CASES:
        case(f"{stage}, {form}, {trained}", by_hand, stage, form, trained, rank, world)
    for stage, trained in ((3, "all"), (1, "lora")):
        case(f"resumed, {stage}", resumed, stage, trained, folder / f"resumed {stage}", rank, world)
    for stage in (1, 3):
        case(f"loss, {stage}", loss_form, stage, rank, world)
    case("bfloat16", in_bfloat16, rank, world)
    case("refusals", refusals, error, folder, rank, world)
    case("accelerate", accelerated, 3, rank, world)
    case("trainer", trainer, world, 2, "published", folder / "trainer")
    case("example, engine", example, "deepspeed_engine", folder)
    case("example, trainer", trainer_example, folder)
    case("resumed trainer", resumed_trainer, folder / "resumed trainer")
