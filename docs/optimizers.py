"""``python docs/optimizers.py``: try MDGD with other libraries' optimizers and adapters; print optimizers.md's tables.

Each trains the examples' LLaVA. Optimizers: a step has to be the wrapped optimizer's own on d, bit for bit; a run that
was saved and loaded has to go on as it would have; under a mask all other elements have to stay as they were.

Adapters: d has to be the gradient of L + αL_v, with a second model for the reference; a resumed Trainer has to be the
uninterrupted one; what is merged has to answer as what was trained.
"""

import copy
import importlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from torch_mdgd import MDGD, Anchor, MDGDOptimizer, Random, mdgd_backward
from torch_mdgd.loss import visual_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
tiny: Any = importlib.import_module("tiny")

STEPS = 4
RATE = 1e-2
# torchao leaves states below 4096 numbers as they are.
WIDTH = 64
ABSENT = "not installed"


def matrices(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What Muon takes, the matrices of the decoder's layers, and the rest."""
    named: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [p for name, p in named if p.dim() == 2 and ".layers." in name]
    return inside, [p for _, p in named if not any(p is x for x in inside)]


def simple(path: str, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """An optimizer of all trained parameters."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        module, _, name = path.rpartition(".")
        kind: Any = getattr(importlib.import_module(module), name)
        made: torch.optim.Optimizer = kind(
            [p for p in model.parameters() if p.requires_grad], **{"lr": RATE, **options}
        )
        return made

    return make


def muon_of_torch(model: nn.Module) -> torch.optim.Optimizer:
    """On matrices alone; the rest is frozen."""
    for p in matrices(model)[1]:
        p.requires_grad_(False)
    return torch.optim.Muon(matrices(model)[0], lr=RATE)


def muon_and_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """One optimizer with a group for each."""
    kind: Any = importlib.import_module("pytorch_optimizer").Muon
    groups = [{"params": part, "use_muon": use} for part, use in zip(matrices(model), (True, False), strict=True)]
    made: torch.optim.Optimizer = kind(groups, lr=RATE)
    return made


OPTIMIZERS: dict[str, tuple[str, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "AdamW": ("torch", simple("torch.optim.AdamW")),
    "AdamW, fused": ("torch", simple("torch.optim.AdamW", fused=True)),
    "Adafactor": ("torch", simple("torch.optim.Adafactor")),
    "Muon on matrices": ("torch", muon_of_torch),
    "Adafactor, its own rate": (
        "transformers",
        simple("transformers.optimization.Adafactor", lr=None, relative_step=True, warmup_init=True),
    ),
    "Muon + AdamW": ("pytorch_optimizer", muon_and_adamw),
    "Lion": ("pytorch_optimizer", simple("pytorch_optimizer.Lion")),
    "AdamW8bit": ("bitsandbytes", simple("bitsandbytes.optim.AdamW8bit", min_8bit_size=64)),
    "PagedAdamW8bit": ("bitsandbytes", simple("bitsandbytes.optim.PagedAdamW8bit", min_8bit_size=64)),
    "Lion8bit": ("bitsandbytes", simple("bitsandbytes.optim.Lion8bit", min_8bit_size=64)),
    "AdamWScheduleFree": ("schedulefree", simple("schedulefree.AdamWScheduleFree")),
    "SGDScheduleFree": ("schedulefree", simple("schedulefree.SGDScheduleFree")),
    "AdamW8bit of torchao": ("torchao", simple("torchao.optim.AdamW8bit")),
    "AdamW4bit": ("torchao", simple("torchao.optim.AdamW4bit")),
    "AdamWFp8": ("torchao", simple("torchao.optim.AdamWFp8")),
}


def batches(first: int, last: int) -> Iterator[dict[str, Tensor]]:
    """Of two samples each."""
    samples = tiny.make_samples(2 * STEPS)
    for i in range(first, last):
        yield default_collate(samples[2 * i : 2 * i + 2])


class Run:
    """A LLaVA and its wrapped optimizer."""

    def __init__(self, make: Callable[[nn.Module], torch.optim.Optimizer], **options: Any) -> None:
        self.model = tiny.make_model(WIDTH).train()
        base = make(self.model)
        self.optimizer = MDGDOptimizer(base, MDGD(0.5, regularize=0), **options)
        self.gradients: list[list[Tensor | None]] = []

    def steps(self, first: int, last: int) -> "Run":
        """Train on these batches."""
        mode: Any = getattr(self.optimizer, "train", lambda: None)
        mode()
        for batch in batches(first, last):
            mdgd_backward(self.model, self.optimizer, batch)
            self.gradients.append([None if p.grad is None else p.grad.clone() for p in self.optimizer.parameters])
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def weights(self) -> list[Tensor]:
        """Copies of all parameters."""
        return [p.detach().clone() for p in self.model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    """To rounding."""
    return all(bool((x - y).abs().max() <= 1e-6 * (1 + y.abs().max())) for x, y in zip(a, b, strict=True))


def steps_as_alone(make: Callable[[nn.Module], torch.optim.Optimizer]) -> str:
    """Whether the wrapped optimizer's own steps on the same d give the same weights."""
    run = Run(make).steps(0, STEPS)
    model = tiny.make_model(WIDTH).train()
    alone: Any = make(model)
    if hasattr(alone, "train"):
        alone.train()
    parameters = [p for group in alone.param_groups for p in group["params"]]
    for gradients in run.gradients:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = None if g is None else g.clone()
        alone.step()
        alone.zero_grad()
    if run.optimizer.diagnostics["visual_loss"] <= 0:
        return "no visual loss"
    return "works" if same(run.weights(), [p.detach() for p in model.parameters()]) else "other weights"


def resumes(make: Callable[[nn.Module], torch.optim.Optimizer]) -> str:
    """Whether a run that was written to a file and read goes on as it would have."""
    whole = Run(make).steps(0, 2)
    file = io.BytesIO()
    torch.save({"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()}, file)
    file.seek(0)
    whole.steps(2, STEPS)
    saved = torch.load(file, weights_only=True)
    resumed = Run(make)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    return "works" if close(resumed.steps(2, STEPS).weights(), whole.weights()) else "other weights"


def masked(make: Callable[[nn.Module], torch.optim.Optimizer], compact: bool) -> str:
    """Whether elements outside a mask stay as they were, and some inside move."""
    run = Run(make, mask=Random(0.3), compact=compact)
    before = copy.deepcopy(run.weights())
    run.steps(0, STEPS)
    moved = [x != y for x, y in zip(run.weights(), before, strict=True)]
    trained = sum(p.numel() for p in run.optimizer.parameters)
    count = sum(int(x.sum()) for x in moved)
    return "works" if 0 < count <= 0.31 * trained else f"{count} of {trained} moved"


CHECKS: dict[str, Callable[[Any], str]] = {
    "steps": steps_as_alone,
    "resumed": resumes,
    "mask": lambda make: masked(make, False),
    "compact": lambda make: masked(make, True),
}


DECODER = r".*language_model.*_proj"
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA on the decoder's linear layers": {"target_modules": DECODER},
    "LoRA with dropout": {"target_modules": DECODER, "lora_dropout": 0.1},
    "LoRA on all linear layers, tower and connector too": {"target_modules": "all-linear"},
    "LoRA, the connector trained whole": {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector"]},
    "rsLoRA": {"target_modules": DECODER, "use_rslora": True},
    "DoRA": {"target_modules": DECODER, "use_dora": True},
    "PiSSA": {"target_modules": DECODER, "init_lora_weights": "pissa"},
    "QLoRA, 4 bits": {"target_modules": DECODER},
    "QLoRA, the connector trained whole": {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector"]},
}


def adapted(name: str) -> Any:
    """The examples' LLaVA with adapters."""
    peft: Any = importlib.import_module("peft")
    model = tiny.make_model(WIDTH)
    if name.startswith("QLoRA"):
        transformers: Any = importlib.import_module("transformers")
        bits = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder, quantization_config=bits, device_map="cpu")
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **ADAPTERS[name])).train()


def adapter_run(name: str, rule: Any = None) -> tuple[Any, MDGDOptimizer]:
    """Adapters after some steps, and their optimizer."""
    model = adapted(name)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = MDGDOptimizer(torch.optim.AdamW(trained, lr=RATE), rule(model) if rule else MDGD(0.5, regularize=0))
    for batch in batches(0, 2):
        mdgd_backward(model, optimizer, batch)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def aligned(name: str) -> str:
    """Whether d is the gradient of L + αL_v, with the adapters as they began for a reference."""
    model, optimizer = adapter_run(name)
    batch = next(batches(2, 3))
    model.eval()
    mdgd_backward(model, optimizer, batch, alignment="mse")
    ours: list[Any] = [p.grad for p in optimizer.parameters]
    optimizer.zero_grad()
    output, visual = visual_loss(model, batch, reference=adapted(name).eval(), alignment="mse")
    (output.loss + 0.5 * visual).backward()
    wanted: list[Any] = [p.grad for p in optimizer.parameters]
    scale = max(float(x.abs().max()) for x in wanted)
    off = max(float((x - y).abs().max()) for x, y in zip(ours, wanted, strict=True))
    return "works" if float(visual) > 0 and off <= 1e-4 * scale else f"off by {off / scale:.0e}"


def reference(name: str) -> str:
    """What is held for φ."""
    _, optimizer = adapter_run(name)
    held = sum(entry["mdgd_reference"].numel() for entry in optimizer.state_dict()["state"].values())
    return "a copy" if held else "no copy"


def anchored(name: str) -> str:
    """Whether the anchor holds the layers."""
    model, _ = adapter_run(name, lambda model: Anchor(model, warmup=1))
    return "works" if all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad) else "not finite"


def resumed_trainer(name: str) -> str:
    """Whether a Trainer that goes on from a checkpoint is the uninterrupted one."""
    transformers: Any = importlib.import_module("transformers")
    trainer: Any = importlib.import_module("torch_mdgd.integrations.transformers").MDGDTrainer
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder, max_steps=STEPS, save_steps=2, per_device_train_batch_size=2, learning_rate=RATE,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", log_level="error",
        )  # fmt: skip
        found = []
        for checkpoint in (None, f"{folder}/checkpoint-2"):
            one = trainer(
                model=adapted(name), args=args, train_dataset=tiny.make_samples(2 * STEPS), rule=MDGD(0.5, regularize=0)
            )
            one.remove_callback(transformers.PrinterCallback)
            one.train(resume_from_checkpoint=checkpoint)
            found.append([p.detach() for p in one.model.parameters() if p.requires_grad])
    return "works" if close(*found) else "other weights"


def merged(name: str) -> str:
    """Whether the merged model answers as the adapters do."""
    model, _ = adapter_run(name)
    batch = next(batches(2, 3))
    # Merged before it answers: on a CPU bitsandbytes packs weights anew for answering, which peft does not know of.
    whole = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
        off = float((whole.eval()(**batch).logits - wanted).abs().max() / wanted.abs().max())
    if name.startswith("QLoRA"):
        return "rounded" if 1e-4 < off < 0.3 else f"off by {100 * off:.0f} %"
    return "works" if off <= 1e-4 else f"off by {100 * off:.0f} %"


ADAPTER_CHECKS: dict[str, Callable[[str], str]] = {
    "αv": aligned,
    "φ": reference,
    "Anchor": anchored,
    "resumed": resumed_trainer,
    "merged": merged,
}


def library_of(name: str) -> str:
    """Which library an optimizer or adapter needs."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name][0]
    return "bitsandbytes" if name.startswith("QLoRA") else "peft"


def outcome(name: str, check: str) -> str:
    """``works``, or ``refused: `` and the message; ``not installed`` without the library."""
    try:
        version(library_of(name))
    except PackageNotFoundError:
        return ABSENT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return CHECKS[check](OPTIMIZERS[name][1]) if name in OPTIMIZERS else ADAPTER_CHECKS[check](name)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            return f"refused: {' '.join(str(error).split())}"


def tables() -> Iterator[str]:
    """The lines of the tables; what the installed libraries do not know is left out, with a word to stderr."""
    for kind, names, checks in (("optimizer", OPTIMIZERS, CHECKS), ("adapter", ADAPTERS, ADAPTER_CHECKS)):
        refusals = []
        yield f"| {kind} | of | " + " | ".join(checks) + " |"
        yield "|---|---|" + "---|" * len(checks)
        for name in names:
            found = [outcome(name, check) for check in checks]
            if ABSENT in found:
                print(f"{name}: {library_of(name)} is {ABSENT}", file=sys.stderr)
                continue
            yield f"| {name} | {library_of(name)} | " + " | ".join(x.partition(":")[0] for x in found) + " |"
            # Brackets would be links.
            told = [x.replace("[", "\\[") for x in found]
            refusals += [f"- {name}, {check}: {x}" for check, x in zip(checks, told, strict=True) if ":" in x]
        yield from ("", *refusals, "")
    libraries = sorted({library_of(name) for name in (*OPTIMIZERS, *ADAPTERS)})
    yield "Versions: " + ", ".join(f"{name} {version(name).partition('+')[0]}" for name in libraries) + "."


if __name__ == "__main__":
    for line in tables():
        print(line)
