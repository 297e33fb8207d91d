"""Takes into the site what its pages link to outside of ``docs/``: other READMEs, results, figures, examples.

A page keeps its path in the repository, so that one link works in a checkout and on the site.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Of a link or picture in Markdown: what is before the target, the target, its anchor.
LINK = re.compile(r"(\]\()(?![a-z]+:)([^)\s#]+)((?:#[^)\s]*)?\))")
FOLDER = re.compile(r"\[([^\]]+)\]\((?![a-z]+:)([^)\s#]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Entries of the navigation may lie outside of ``docs/`` too."""
    config.nav = _in_site(config.nav)
    return config


def _in_site(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_in_site(each) for each in entry]
    if isinstance(entry, dict):
        return {title: _in_site(each) for title, each in entry.items()}
    return uri((DOCS / entry).resolve())


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file that is linked to, directly or from a page that is added."""
    pending = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    pending += [ROOT / path for path in _leaves(config.nav) if not (DOCS / path).exists()]
    there = {Path(file.abs_src_path) for file in files if file.abs_src_path}
    while pending:
        path = pending.pop()
        if path not in there and (DOCS not in path.parents or path.suffix == ".py"):
            there.add(path)
            files.append(_file(path, config))
        if path.suffix == ".md":
            pending += [x for x in targets(path) if x not in there and x.is_file()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links are those of the repository; make them the site's."""
    here = page.file.src_uri
    source = DOCS / here if (DOCS / here).exists() else ROOT / here

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if not target.is_file():
            # As it was, for MkDocs to complain of.
            return match[0]
        return match[1] + os.path.relpath(uri(target), os.path.dirname(here) or ".") + match[3]

    def without_folder(match: re.Match[str]) -> str:
        # A checkout shows a folder, the site has no page of it.
        return match[1] if (source.parent / match[2]).is_dir() else match[0]

    return LINK.sub(moved, FOLDER.sub(without_folder, markdown))


def targets(page: Path) -> Iterator[Path]:
    """The files that a page links to."""
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        yield (page.parent / match[2]).resolve()


def uri(path: Path) -> str:
    """Where a file of the repository stands in the site; a program is shown on a page."""
    inside = path.relative_to(DOCS if DOCS in path.parents else ROOT).as_posix()
    return f"{inside.removesuffix('.py')}.py.md" if path.suffix == ".py" else inside


def _file(path: Path, config: MkDocsConfig) -> File:
    if path.suffix == ".py":
        name = path.relative_to(ROOT)
        return File.generated(config, uri(path), content=f"# `{name}`\n\n```python\n{path.read_text('utf-8')}```\n")
    return File.generated(config, uri(path), abs_src_path=str(path))


def _leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, list | dict):
        for each in entry.values() if isinstance(entry, dict) else entry:
            yield from _leaves(each)
    else:
        yield entry
