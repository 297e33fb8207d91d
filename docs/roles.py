"""Roles in docstrings, such as ``:class:`MDGDOptimizer```, become links where the site has the thing, and code else."""

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object

ROLE = re.compile(r":(?:class|func|meth|attr|mod):`(?:[^`<]*<)?(~?)([\w.]+)>?`")


class Roles(Extension):
    """Rewrites every docstring when its object is known."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Put links of the plugin ``autorefs`` in the place of roles."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda match: _link(obj, match), obj.docstring.value)


def _link(obj: Object, match: re.Match[str]) -> str:
    name = match[2]
    shown = name.rpartition(".")[2] if match[1] else name
    return f'<autoref identifier="{_path(obj, name)}" optional><code>{shown}</code></autoref>'


def _path(obj: Object, name: str) -> str:
    scope: Any = obj if obj.is_class else obj.parent
    for path in (name, f"{scope.path}.{name}" if scope is not None and scope.is_class else name):
        if path.startswith("torch_mdgd."):
            return path
    try:
        return obj.resolve(name)
    except NameResolutionError:
        return name
