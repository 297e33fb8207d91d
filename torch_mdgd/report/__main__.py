"""``python -m torch_mdgd.report BEFORE AFTER --data DATA``: what a fine-tune has lost."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from torch_mdgd.checks import require_whole
from torch_mdgd.delta import apply_delta
from torch_mdgd.models.folders import dtype_of, load_model, load_processor, require_safetensors
from torch_mdgd.report.drawn import drawn_probes
from torch_mdgd.report.probes import Probe, read_probes
from torch_mdgd.report.report import ForgettingReport

ADAPTER = "adapter_config.json"
DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def require_weights(after: Path) -> None:
    """The errors of :func:`load_after` that can be known before anything is measured."""
    if not after.is_file():
        if not any((after / name).is_file() for name in (ADAPTER, "config.json")):
            raise FileNotFoundError(f"{after} is no folder of a model or an adapter, and no delta")
        require_safetensors(after)


def load_after(before: Path, after: Path, dtype: Any) -> Any:
    """The second weights: a folder of their own; or an adapter's folder or a delta's file, put on the first.

    Raises:
        ImportError: an adapter, and peft is not installed.
        OSError: no such folder or file.
        ValueError: it holds no safetensors, or does not belong on the first weights.
    """
    if after.is_file():
        model = load_model(before, dtype)
        apply_delta(model, after)
        return model
    if not (after / ADAPTER).is_file():
        return load_model(after, dtype)
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{after} is an adapter, which peft loads: pip install peft") from error
    return peft.PeftModel.from_pretrained(load_model(before, dtype), str(after)).eval()


def dtype_of_both(before: Path, after: Path) -> Any:
    """The wider of two models' dtypes where they differ, else "auto": rounding of one alone is no drift."""
    if not (after / "config.json").is_file() or (after / ADAPTER).is_file():
        return "auto"
    first, second = dtype_of(before), dtype_of(after)
    if first is None or second is None or first == second:
        return "auto"
    dtype = torch.promote_types(first, second)
    print(f"BEFORE is in {first} and AFTER in {second}: both are measured in {dtype}".replace("torch.", ""))
    return dtype


def probes_of(path: Path | None, limit: int | None) -> list[Probe]:
    """Those of a file or folder, or the drawn ones; the first of them if there is a limit."""
    return (drawn_probes() if path is None else read_probes(path))[:limit]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    out = argparse.ArgumentParser(
        prog="python -m torch_mdgd.report",
        description="Measure what a fine-tune has lost: scores, KL, effective rank and drift before and after.",
    )
    out.add_argument("before", type=Path, metavar="BEFORE", help="folder of a model and its processor")
    out.add_argument("after", type=Path, metavar="AFTER", help="folder of a model or of a peft adapter, or a delta")
    out.add_argument("--data", type=Path, help="probes: a JSON lines file, or a folder with one (default: drawn ones)")
    out.add_argument("--new-task", type=Path, help="the same about what was learned")
    out.add_argument(
        "--out", type=Path, default=Path("forgetting-report"), help="folder for report.html and report.json"
    )
    out.add_argument("--limit", type=int, help="take the first so many probes of each set")
    out.add_argument("--batch-size", type=int, default=8)
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    out.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights (default: the checkpoints', the wider if they differ)",
    )
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = parser().parse_args(arguments)
    try:
        run(given)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(given: argparse.Namespace) -> None:
    """Measure both, one after the other in memory; print and write what is found."""
    if given.limit is not None:
        require_whole("--limit", given.limit)
    require_weights(given.after)
    dtype = dtype_of_both(given.before, given.after) if given.dtype == "auto" else DTYPES[given.dtype]
    probes = probes_of(given.data, given.limit)
    new_task = None if given.new_task is None else probes_of(given.new_task, given.limit)
    model = load_model(given.before, dtype).to(given.device)
    report = ForgettingReport(
        model,
        load_processor(given.before),
        probes,
        new_task=new_task,
        batch_size=given.batch_size,
        show_progress=True,
    )
    del model
    model = load_after(given.before, given.after, dtype).to(given.device)
    found = report.measure(model, before=str(given.before), after=str(given.after))
    given.out.mkdir(parents=True, exist_ok=True)
    found.save_json(given.out / "report.json")
    found.save_html(given.out / "report.html")
    found.show()
    print(f"written: {given.out / 'report.html'}, {given.out / 'report.json'}")


if __name__ == "__main__":
    sys.exit(main())
