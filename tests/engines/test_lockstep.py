"""The order in which a rank joins in gathering weights: the same in every step, whatever happens in it."""

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ddp_eval.distributed import sharding
from ddp_eval.engines.hf.lockstep import Lockstep
from ddp_eval.errors import OutOfStep, is_out_of_memory

STEP = ["layer 0", "layer 1", "head"]


class Part(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 1

    def reshard(self) -> None:
        pass


class Model(Part):
    """Modules that are defined in another order than they are called in, and a tower that text does not come to."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tower = Part(), Part()
        self.layers = torch.nn.ModuleList([Part(), Part()])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


class Alone:
    """The pace of one rank."""

    rank = 3

    def agree(self, state: int) -> bool:
        return state == sharding.RUNS

    def note_gather(self, module: Any) -> None:
        pass

    def close(self) -> None:
        pass


class Gathering:
    """A model in lockstep that writes down what is gathered. fail: the number of each gathering that memory does not do for."""

    def __init__(self) -> None:
        self.model = Model()
        self.gathered: list[str] = []
        self.there: set[str] = set()
        self.fail: list[int] = []
        self.numbers = itertools.count()
        self.held: Any = lambda: None
        names = dict(zip(self.parts, ["head", "tower", "layer 0", "layer 1"], strict=True))
        for part, name in names.items():
            part.register_forward_pre_hook(lambda module, args, name=name: self.gather(name))
            part.register_forward_hook(lambda module, args, output, name=name: self.there.discard(name))

    @property
    def parts(self) -> list[Any]:
        return [self.model.head, self.model.tower, *self.model.layers]

    def gather(self, name: str) -> None:
        if name in self.there:
            return
        if next(self.numbers) in self.fail:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert self.held() is None, "the tensors of a forward that had no memory are still there"
        self.gathered.append(name)
        self.there.add(name)

    def begin(self, *fail: int) -> None:
        self.gathered, self.fail, self.numbers = [], list(fail), itertools.count()


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gathering, Lockstep]]:
    """After the forward that shows the order."""
    seen = Gathering()
    monkeypatch.setattr(sharding, "sharded_modules", lambda model: [seen.model, *seen.parts])
    monkeypatch.setattr(sharding, "_states", lambda model: [])
    monkeypatch.setattr(sharding, "drop_received", lambda module: None)
    lockstep = Lockstep(seen.model, Alone())  # type: ignore[arg-type]
    with contextlib.closing(lockstep):
        assert float(seen.model(torch.zeros(()))) == 3.0
        assert seen.gathered == STEP, "a tower that is not called stays as it is"
        seen.begin()
        yield seen, lockstep


def test_idle_ranks_join_in_what_is_called(gathering: tuple[Gathering, Lockstep]) -> None:
    """Catches a rank without work that gathers a tower while the others gather layers: other sizes end the process."""
    seen, lockstep = gathering
    lockstep.run(lambda: None)
    assert seen.gathered == STEP


def test_a_failed_forward_lets_go_of_its_tensors(gathering: tuple[Gathering, Lockstep]) -> None:
    """Catches weights that are gathered while the traceback still holds what filled the memory, and gatherings left out."""
    seen, _ = gathering

    def fill_memory(hidden: torch.Tensor) -> torch.Tensor:
        large = torch.zeros(3)
        seen.held = weakref.ref(large)
        raise torch.OutOfMemoryError("CUDA out of memory")

    seen.model.layers[0].forward = fill_memory
    with pytest.raises(torch.OutOfMemoryError):
        seen.model(torch.zeros(()))
    assert seen.gathered == STEP


@pytest.mark.parametrize("works", [True, False])
def test_a_gathering_that_failed_is_joined_in_again(works: bool, gathering: tuple[Gathering, Lockstep]) -> None:
    """Catches a rank that begins the step anew: it would send a layer's weights for those of another one."""
    seen, lockstep = gathering
    seen.begin(1)
    with pytest.raises(torch.OutOfMemoryError):
        lockstep.run(lambda: lockstep.own_forward(torch.zeros(())) if works else None)
    assert seen.gathered == STEP


def test_a_gathering_that_fails_twice_ends_the_rank(gathering: tuple[Gathering, Lockstep]) -> None:
    """Catches a rank that runs its pack in halves while the others wait for it in a collective, where neither ever ends."""
    seen, lockstep = gathering
    seen.begin(1, 2)
    with pytest.raises(
        OutOfStep, match=r"^rank 3 cannot gather the weights that its shard group waits for: CUDA out of"
    ) as found:
        lockstep.run(lambda: None)
    assert not is_out_of_memory(found.value)
