"""Whether the disks have room for what rows fetch and write, before hours are spent."""

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from reproductions.paper.config import Experiment, run_name
from reproductions.paper.data import DATASETS
from reproductions.paper.models import MODELS
from reproductions.paper.run.estimate import estimate, size_of
from reproductions.paper.run.weights import CHECKPOINTS, NAME
from reproductions.paper.run.work import splits_of
from reproductions.shared.fields import ConfigError


def require_room(experiment: Experiment, name: str, folder: Path) -> None:
    """Look whether what a row writes has room.

    Raises:
        ConfigError: it has not.
    """
    found = estimate(experiment, name)
    wanted, free = found.disk + found.checkpoints - _there(folder), shutil.disk_usage(_disk(folder)).free
    if wanted > free:
        raise ConfigError(
            f"{folder}: {experiment.name} {name} writes about {wanted / 1e9:.1f} GB while it trains, and "
            f"{free / 1e9:.1f} GB are free: choose other --results"
        )


def require_room_for_rows(
    experiments: Mapping[str, Experiment], rows: Mapping[str, Sequence[str]], results: Path, at_once: int
) -> None:
    """Look whether what several rows write has room together, with so many that train at a time.

    Raises:
        ConfigError: it has not.
    """
    stay, pass_by = 0.0, []
    for name, methods in rows.items():
        for method in methods:
            folder = results / experiments[name].name / run_name(method, experiments[name].seed)
            if not (folder / NAME).is_file():
                found = estimate(experiments[name], method)
                stay += found.disk
                pass_by.append(found.checkpoints - _there(folder / CHECKPOINTS))
    wanted, free = stay + sum(sorted(pass_by)[-at_once:]), shutil.disk_usage(_disk(results)).free
    if wanted > free:
        raise ConfigError(
            f"{results}: these rows write about {wanted / 1e9:.1f} GB, checkpoints of {at_once} at a time among them, "
            f"and {free / 1e9:.1f} GB are free: choose other --results, or fewer rows"
        )


def require_room_to_fetch(experiments: Mapping[str, Experiment], rows: Mapping[str, Sequence[str]]) -> None:
    """Look whether the hub's cache has room for the weights and the data that it lacks, and for `datasets`' copies.

    Raises:
        ConfigError: it has not.
    """
    # Once for all rows: what two of them need is fetched once.
    lacking = dict(one for name, methods in rows.items() for one in _lacking(experiments[name], methods))
    # Both caches mostly lie on one disk, and share its room.
    disks = defaultdict(list)
    for what, (folder, size) in lacking.items():
        disks[_disk(folder).stat().st_dev].append((what, folder, size))
    for here in disks.values():
        wanted, free = sum(size for _, _, size in here), shutil.disk_usage(_disk(here[0][1])).free
        if wanted > free:
            sizes = ", ".join(f"{what} {size / 1e9:.1f}" for what, _, size in here)
            raise ConfigError(
                f"{here[0][1]}: about {wanted / 1e9:.1f} GB are to be fetched ({sizes}), and {free / 1e9:.1f} GB are "
                "free: set HF_HOME to a folder with room, or pass --data FOLDER and --set source=FOLDER"
            )


def _lacking(experiment: Experiment, methods: Sequence[str]) -> Iterator[tuple[str, tuple[Path, float]]]:
    """What is to be fetched, to which folder, and its bytes."""
    hub, source = Path(constants.HF_HUB_CACHE), MODELS[experiment.model].source
    if not experiment.source:
        folder = hub / repo_folder_name(repo_id=source, repo_type="model")
        yield source, (hub, max(0.0, 2.0 * size_of(experiment.model).total - _there(folder)))
    for task, split in splits_of(experiment, methods):
        data, given = DATASETS[task], experiment.data.source
        folders = [
            hub / repo_folder_name(repo_id=repository, repo_type="dataset")
            for repository in data.repositories(split, experiment.data.organisation)
        ]
        if (given and data.holds(Path(given) / task, split)) or any(
            data.holds(at, split) for folder in folders for at in folder.glob("snapshots/*")
        ):
            continue
        size = data.splits[split]
        # Several splits may lie in one file.
        what = f"{data.title} {data.pattern(split)}"
        yield what, (hub, 1e9 * size.gigabytes)
        yield f"a copy of {what}", (Path(datasets.config.HF_DATASETS_CACHE), 1e9 * size.unpacked)


def _there(folder: Path) -> int:
    """Bytes of a folder's files; a link, as the hub's cache is full of, counts nothing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _disk(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
