"""One HTML page that needs no other file: its frame, links to its sections, and pictures inside it."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = Path(__file__).with_name("page.css")


def document(title: str, body: str, more_style: str = "") -> str:
    """The whole page, in the style of ``page.css``; with CSS of its own behind it."""
    style = _STYLE.read_text(encoding="utf-8") + more_style
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title, quote=False)}</title><style>{style}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def navigation(sections: Sequence[str]) -> str:
    """Links to sections; the id of each is its name in small letters."""
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
    return f"<nav>{links}</nav>"


def figure(path: Path, caption: str) -> str:
    """A PNG file with its caption."""
    return (
        f'<figure><img alt="{html.escape(path.stem)}" src="{embedded(path.read_bytes())}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def embedded(picture: bytes, kind: str = "png") -> str:
    """The address of a picture that stands in the page itself; the kind is "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
