"""Frozen parts, computed once a batch: all passes of a step see the same pictures and words."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from torch_mdgd.models.families import TOWERS
from torch_mdgd.models.parts import decoder_layers, text_decoder, unwrap
from torch_mdgd.models.traces import Randomness, version_of


@contextmanager
def reuse_frozen_parts(model: nn.Module, exchanged: Collection[Tensor] = ()) -> Iterator[None]:
    """Inside, parts that no training reaches return their last outputs when their inputs are the same again.

    Those are the frozen parts of the vision tower, and the frozen layers at the beginning of the text decoder. For
    passes over one batch: same inputs, bit for bit, same mode of modules and autocast. A part is run as ever if one of
    its parameters is trained or exchanged, if its inputs or its output carry a graph, if it draws random numbers or
    changes its buffers, as dropout and batch normalisation in training mode do, or if a hook listens to a module
    inside, as what collects the logits of routers does. So results are those without this, bit for bit. What it keeps
    until it ends is the output of each such part: of the tower, or of each of its blocks if its connector inside is
    trained (Qwen-VL), and of each decoder layer.

    Args:
        model: any module; one without such parts is left alone.
        exchanged: parameters that have other values in some of the passes.
    """
    with ExitStack() as stack:
        for part in [*frozen_vision_parts(model, exchanged), *_first_frozen_layers(model, exchanged)]:
            stack.enter_context(_remembering(part))
        yield


def frozen_vision_parts(model: nn.Module, exchanged: Collection[Tensor] = ()) -> list[nn.Module]:
    """The largest modules of the vision tower that hold parameters, none of them trained or exchanged."""
    moved = {id(p) for p in exchanged}
    return [part for tower in dict.fromkeys(_towers(unwrap(model))) for part in _frozen(tower, moved)]


def _towers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost ones."""
    for name, child in module.named_children():
        if name in TOWERS:
            yield child
        else:
            yield from _towers(child)


def _frozen(module: nn.Module, exchanged: set[int]) -> Iterator[nn.Module]:
    if _is_frozen(module, exchanged) and not isinstance(module, nn.ModuleList):
        yield module
    else:
        for child in module.children():
            yield from _frozen(child, exchanged)


def _first_frozen_layers(model: nn.Module, exchanged: Collection[Tensor]) -> list[nn.Module]:
    try:
        layers = decoder_layers(text_decoder(model))
    except (TypeError, ValueError):
        return []
    moved = {id(p) for p in exchanged}
    return list(takewhile(lambda layer: _is_frozen(layer, moved), layers))


def _is_frozen(module: nn.Module, exchanged: set[int]) -> bool:
    # The first that is trained ends the walk.
    count = 0
    for p in module.parameters():
        if p.requires_grad or id(p) in exchanged:
            return False
        count += 1
    return bool(count)


@contextmanager
def _remembering(module: nn.Module) -> Iterator[None]:
    original = module.forward
    patched = "forward" in vars(module)
    module.forward = _Remembered(module, original)
    try:
        yield
    finally:
        if patched:
            module.forward = original
        else:
            del module.forward


class _Remembered:
    """A module's forward that keeps one output: its tensors, since models write into the containers around them."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module
        self.forward = forward
        self.inputs: list[tuple[Any, int]] = []
        self.outputs: list[tuple[Any, int]] = []
        self.spec: TreeSpec | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = tree_flatten((args, kwargs))[0]
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            # What is remembered has no graph, and this pass may need one.
            return self.forward(*args, **kwargs)
        if self.spec is not None and _unchanged(self.outputs) and self._saw(inputs) and not _is_heard(self.module):
            return tree_unflatten([x for x, _ in self.outputs], self.spec)
        before = self._fingerprint(inputs)
        output = self.forward(*args, **kwargs)
        leaves, spec = tree_flatten(output)
        pure = before == self._fingerprint(inputs) and all(_is_plain(x) for x in leaves) and _can_be_made_again(spec)
        self.inputs, self.outputs, self.spec = [], [], None
        if pure:
            self.inputs = [(x, _version(x)) for x in inputs]
            self.outputs, self.spec = [(x, _version(x)) for x in leaves], spec
        return output

    def _saw(self, inputs: list[Any]) -> bool:
        held = [x for x, _ in self.inputs]
        return len(inputs) == len(held) and _unchanged(self.inputs) and all(map(_same, inputs, held))

    def _fingerprint(self, inputs: list[Any]) -> tuple[list[Any], list[int]]:
        """What a forward pass changes if it is more than a function of its inputs."""
        devices = {x.device for x in inputs if isinstance(x, Tensor)}
        return Randomness(devices).bits(), [version_of(x) for x in self.module.buffers()]


def _is_heard(module: nn.Module, collects: bool = False) -> bool:
    """Whether a hook listens to a module inside, but those of torch itself, as ``fully_shard`` has.

    What hooks of transformers collect inside one of its models, that model returns.
    """
    collects = collects or hasattr(module, "_can_record_outputs")
    quiet = {"torch", "transformers"} if collects else {"torch"}
    for child in module.children():
        hooks = [*child._forward_pre_hooks.values(), *child._forward_hooks.values()]
        if any(str(hook.__module__).partition(".")[0] not in quiet for hook in hooks) or _is_heard(child, collects):
            return True
    return False


def _can_be_made_again(spec: TreeSpec) -> bool:
    """Not an output of transformers that has been given more keys than its class declares."""
    try:
        tree_unflatten([None] * spec.num_leaves, spec)
    except TypeError:
        return False
    return True


def _is_plain(x: Any) -> bool:
    """Whether it can be handed out again: a constant, or a tensor without a graph."""
    return not x.requires_grad if isinstance(x, Tensor) else x is None or isinstance(x, int | float | str)


def _unchanged(held: list[tuple[Any, int]]) -> bool:
    return all(_version(x) == version for x, version in held)


def _version(x: Any) -> int:
    return version_of(x) if isinstance(x, Tensor) else 0


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and x.device == y.device and x.shape == y.shape and bool(torch.equal(x, y))
    return type(x) is type(y) and not isinstance(x, Tensor) and bool(x == y)
