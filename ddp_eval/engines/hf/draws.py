"""Randomness while weights load: what is drawn is decided by --seed, alike on every rank and at every start.

Some weights are in no file: the rows of tokens that an adapter's tokenizer adds, what an adapter's method draws before it is
trained, buffers of a checkpoint's own code. On the leader other threads draw from torch's global generator meanwhile, and
lm_eval seeds it, so that a seed set there decides nothing. `Draws` therefore hands every operation of its own thread that
draws a generator of its own.

Memory that nobody has written to is random too. `Draws` fills it with what no model has there and finds what is left of that.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_eval.config import DEFAULT_SEED

log = logging.getLogger("ddp_eval")

_NAMES_OF_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_EMPTY = tuple(getattr(torch.ops.aten, name) for name in _NAMES_OF_EMPTY)


class Loading(NamedTuple):
    """Of one load. seeds: of random, numpy and torch, never None. speaks: whether this rank reports to the user."""

    seeds: tuple[int, int, int]
    speaks: bool


_OUTSIDE = Loading(DEFAULT_SEED[:3], True)
_loading: ContextVar[Loading] = ContextVar("loading")


def loading() -> Loading:
    """Of the load that this thread is in; lm_eval's default seeds outside of one."""
    return _loading.get(_OUTSIDE)


@contextlib.contextmanager
def loading_for(seed: Sequence[int | None], speaks: bool, own_code: bool = False) -> Iterator[None]:
    """Within the block, loads of this thread draw from `seed`, as --seed has it.

    Its None, which leaves lm_eval's generators unseeded, stands for the default here: all ranks must load the same weights.
    own_code: the checkpoint brings code, which may also draw from Python's and numpy's global generators. They are seeded and
        put back; no other thread may use them meanwhile.
    """
    seeds = [default if given is None else given for given, default in zip(seed, DEFAULT_SEED, strict=True)]
    token = _loading.set(Loading((seeds[0], seeds[1], seeds[2]), speaks))
    states = (random.getstate(), np.random.get_state()) if own_code else None
    try:
        if own_code:
            random.seed(seeds[0])
            np.random.seed(seeds[1])
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
        _loading.reset(token)


class Draws(TorchDispatchMode):
    """While it is on, what this thread draws from torch's global generators comes from generators of its own.

    A block that draws alone from a freshly seeded global generator comes to the same numbers as under this mode with that seed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._drawn: dict[int, StorageWeakRef] = {}
        self._unwritten: list[tuple[Any, int]] = []  # weak references to tensors, and their versions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            result = self._draw(func, args, kwargs)
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                self._remember(tensor)
            return result
        result = func(*args, **kwargs)
        if func.overloadpacket in _EMPTY:
            self._mark(result)
        return result

    def drew(self, tensor: torch.Tensor) -> bool:
        """Whether any of its memory was drawn under this mode. Whatever was written there later, it may hold some of it."""
        reference = self._drawn.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def left_unwritten(self, tensor: torch.Tensor) -> bool:
        """Whether it was made without values under this mode, and still has none."""
        versions = [version for reference, version in self._unwritten if reference() is tensor]
        return bool(versions) and tensor._version == versions[-1] and _is_filled(tensor)

    def _draw(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        device = _device_of(args, kwargs)
        if device.type == "meta" or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
            generator.manual_seed(self._seed)
        taking = _taking_generator(func)
        if taking is not None:
            return taking(*args, **{**kwargs, "generator": generator})
        with _as_global(generator):
            return func(*args, **kwargs)

    def _remember(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            self._drawn[storage._cdata] = StorageWeakRef(storage)

    def _mark(self, tensor: Any) -> None:
        if type(tensor) is torch.Tensor and tensor.device.type != "meta" and tensor.numel():
            with contextlib.suppress(RuntimeError):  # a type that nothing can be filled with
                tensor.fill_(_filling(tensor.dtype))
                self._unwritten.append((weakref.ref(tensor), tensor._version))


class ForwardDraws:
    """For a model whose forward draws (Reformer's hashes, code of a checkpoint's own): each from --seed and what goes into it.

    Others are let alone: a forward is looked at once. certain: it draws, though a short forward may not.
    """

    def __init__(self, device: torch.device, certain: bool = False) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._loading = loading()
        self._draws = self._certain = certain

    def _states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Find out, by a forward in the block, whether the model draws."""
        before = self._states()
        try:
            yield
        finally:
            moved = any(not torch.equal(*pair) for pair in zip(before, self._states(), strict=True))
            self._draws = self._certain or moved
        if self._draws and self._loading.speaks:
            log.warning("the model draws at random whenever it runs: from --seed, here %d, and its input", self._loading.seeds[2])

    @contextlib.contextmanager
    def seeded_by(self, *inputs: npt.NDArray[Any]) -> Iterator[None]:
        """What is drawn in the block is the same wherever and whenever it has these inputs."""
        if not self._draws:
            yield
            return
        digest = hashlib.sha256(str(self._loading.seeds[2]).encode())
        for one in inputs:
            digest.update(np.ascontiguousarray(one).tobytes())
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(int.from_bytes(digest.digest()[:7], "little"))
            yield


def _filling(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _is_filled(tensor: torch.Tensor) -> bool:
    value = _filling(tensor.dtype)
    return bool((tensor.isnan() if value != value else tensor == value).all())


def _device_of(args: Any, kwargs: dict[str, Any]) -> torch.device:
    tensor = next((one for one in args if isinstance(one, torch.Tensor)), None)
    if tensor is not None:
        return tensor.device
    return torch.device(kwargs.get("device") or "cpu")


def _taking_generator(func: Any) -> Any:
    """The overload of an operation that draws which takes a generator; None if there is none."""
    arguments = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    if any(name == "generator" for name, _ in arguments):
        return func
    for name in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, name)
        others = [(argument.name, str(argument.type)) for argument in other._schema.arguments]
        if len(others) > len(arguments) and [one for one in others if one[0] != "generator"] == arguments:
            return other
    return None


@contextlib.contextmanager
def _as_global(generator: torch.Generator) -> Iterator[None]:
    """For an operation that takes no generator: the global one of the device is this one for as long as it runs."""
    device = generator.device
    usual = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    state = usual.get_state()
    try:
        usual.set_state(generator.get_state())
        yield
    finally:
        generator.set_state(usual.get_state())
        usual.set_state(state)
