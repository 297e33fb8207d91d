"""What a forward pass leaves behind it: moved random generators, and changed buffers of the model.

A step runs passes that plain training does not, at the reference and to measure. They see the random numbers of the
step's one pass at θ, so that dropout makes no drift, and leave no trace: statistics of batch normalisation, counters of
experts and the vectors of a spectral norm are afterwards as that one pass makes them.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Larger buffers are copied to main memory at the first look, so that a device needs no room for them.
LARGE = 1 << 20


class Traces:
    """The random generators as they are now, and what passes of a model change.

    Args:
        model: whose buffers are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.devices = drawing_devices({p.device for p in model.parameters()})
        self.start = Randomness(self.devices)

    @contextmanager
    def aside(self, begin: bool = True) -> Iterator[None]:
        """What is run inside leaves random numbers and buffers as they are.

        Args:
            begin: with the random numbers of the start, as a forward pass does.
        """
        now = Randomness(self.devices)
        if begin:
            self.start.rewind()
        try:
            with keeping_buffers(self.model):
                yield
        finally:
            now.rewind()


class Randomness:
    """The state of the random generators of torch, Python and NumPy.

    Args:
        devices: whose generators count, beside the CPU's.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        # Parameters that are offloaded have the device "meta" meanwhile.
        drawing = [device for device in devices if device.type not in ("cpu", "meta")]
        self.states = [(device, torch.get_device_module(device).get_rng_state(device)) for device in drawing]
        self.python = random.getstate()
        # Whoever has not imported it draws nothing from it.
        self.numpy: Any = sys.modules.get("numpy.random")
        self.numpy_state = None if self.numpy is None else self.numpy.get_state()

    def rewind(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.states:
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            self.numpy.set_state(self.numpy_state)

    def bits(self) -> list[Any]:
        """What is equal for equal states."""
        states = [state.cpu().numpy().tobytes() for state in (self.cpu, *(state for _, state in self.states))]
        words = [] if self.numpy_state is None else [self.numpy_state[1].tobytes(), *self.numpy_state[2:]]
        return [*states, self.python, *words]


def drawing_devices(devices: Iterable[torch.device]) -> list[torch.device]:
    """These devices, and all others of their kinds: a pass may draw on one that holds no parameter."""
    found = set(devices)
    for kind in {device.type for device in found} - {"cpu", "meta"}:
        module: Any = torch.get_device_module(kind)
        found |= {torch.device(kind, i) for i in range(getattr(module, "device_count", lambda: 0)())}
    # A device without an index is one of those with.
    counted = {device.type for device in found if device.index is not None}
    return sorted((d for d in found if d.index is not None or d.type not in counted), key=str)


class _Changing:
    """Which buffers of a model its passes change, as far as it is known.

    Attributes:
        modes: the modules' training flags.
        run: the names of modules that were run in these modes while their buffers were compared. A text alone does not
            run the vision tower.
        places: the buffers that were seen to change: the names of module and buffer.
    """

    def __init__(self) -> None:
        self.modes: tuple[bool, ...] = ()
        self.run: set[str] = set()
        self.places: set[tuple[str, str]] = set()


_CHANGING: WeakKeyDictionary[nn.Module, _Changing] = WeakKeyDictionary()


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """What passes inside change in a model's buffers is undone, with the numbers that modules keep beside them.

    The buffers of a module are copied and compared until it has been run, and anew whenever modules have gone between
    training and evaluation. From then on only those are copied that were seen to change.
    """
    owners = [(name, module) for name, module in model.named_modules() if module._buffers]
    known = _CHANGING.setdefault(model, _Changing())
    modes = tuple(module.training for _, module in owners)
    if known.modes != modes:
        known.modes, known.run = modes, set()
    unknown = [(name, module) for name, module in owners if name not in known.run]
    looking, run = {name for name, _ in unknown}, set[str]()
    handles = [module.register_forward_pre_hook(lambda *_, name=name: run.add(name)) for name, module in unknown]
    kept = [
        _Kept(module, key, (name, key), x, name in looking or (name, key) in known.places)
        for name, module in owners
        for key, x in module._buffers.items()
        if x is not None and x.device.type != "meta"
    ]
    numbers = [(module, _numbers(module)) for _, module in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        known.run |= run
        known.places |= {one.place for one in kept if one.undo(one.place in known.places)}
        for module, held in numbers:
            # Such as for what length the frequencies in a buffer were made.
            vars(module).update(held)


class _Kept:
    """A buffer as it was."""

    def __init__(self, module: nn.Module, key: str, place: tuple[str, str], x: Tensor, copy: bool) -> None:
        self.module, self.key, self.place, self.x, self.version = module, key, place, x, version_of(x)
        self.copied = _copy(x.detach()) if copy else None

    @torch.no_grad()
    def undo(self, changes: bool) -> bool:
        """Put it back; returns whether it has changed.

        Args:
            changes: it is known to, so that it need not be compared, which would wait for the device.
        """
        self.module._buffers[self.key] = self.x
        # Batch normalisation writes to its statistics unseen by versions.
        changed = changes or version_of(self.x) != self.version
        if self.copied is not None and (changed or not torch.equal(self.x.to(self.copied.device), self.copied)):
            # Unseen by autograd: a graph that is still needed may have been made with it.
            self.x.data.copy_(self.copied)
            changed = True
        return changed


def version_of(x: Tensor) -> int:
    """How often a tensor was written to; 0 of one made in inference mode, which does not count."""
    return 0 if x.is_inference() else x._version


def _copy(x: Tensor) -> Tensor:
    return x.to("cpu", copy=True) if x.numel() * x.element_size() > LARGE else x.clone()


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if type(value) in (int, float)}
