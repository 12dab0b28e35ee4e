"""Forwards of a model that is sharded over ranks: each is the same sequence of gathered modules on every rank of the group.

    rank 0   agree   root  layer 0  layer 1  …  head    agree   root  layer 0  …      agree   (done, keeps pace)
    rank 1   agree   root  layer 0  layer 1  …  head    agree   (done, keeps pace)    agree

A step is one call of the model itself, so that FSDP gathers what belongs to it; within it, body and head may be called by
themselves. Before a step the ranks agree that some of them run one (`distributed.sharding.Pace`). A rank without work takes
part with a step in which nothing is computed. One that fails in a step calls the rest of the modules with nothing in them, so
that the others get their weights, and says afterwards that it has failed.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ddp_eval.distributed import sharding
from ddp_eval.distributed.contact import naming_lost_ranks
from ddp_eval.distributed.sharding import DONE, FAILED, RUNS, Pace
from ddp_eval.errors import LostContact, OutOfStep, is_out_of_memory, one_line

Result = TypeVar("Result")


class Lockstep:
    """Installed on a sharded model until `close`, which leaves it as it was, with all weights sharded.

    root: what gathers the rest of the weights: the model itself, or what an adapter has put around it. It is called once a step.
    own_forward: the model's, without hooks: to be called within a step.
    """

    def __init__(self, model: Any, pace: Pace, root: Any = None) -> None:
        self._model, self._pace = model, pace
        self._root = model if root is None else root
        self.own_forward: Callable[..., Any] = model.forward
        self._modules = sharding.sharded_modules(self._root)
        # Until a forward of the whole model has shown which are called, and in what order: as they are defined.
        self._order = [module for module in self._modules if module is not self._root]
        self._is_known = False
        self._entered: list[Any] = []
        self._open: list[Any] = []
        self._kept: set[int] = set()
        self._keeping = sharding.Kept()
        self._is_stepping = self._is_skipping = self._in_head = self._is_paced = self._is_whole = self._has_begun = False
        self._compute: Callable[[], None] | None = None
        self._past: sharding.ForwardOrder | None = None
        self._undo = contextlib.ExitStack()
        self._install()

    def close(self) -> None:
        self._undo.close()
        self._keeping.release()
        self._reshard()
        self._pace.close()

    def run(self, compute: Callable[[], Result], is_whole: bool = False) -> Result:
        """`compute()`, which calls the model's body once and its head any number of times, as one step.

        is_whole: it is the model's own forward.
        """
        if self._is_stepping:
            return compute()
        results: list[Result] = []
        self._compute, self._is_whole, self._has_begun = lambda: results.append(compute()), is_whole, False
        try:
            self._root()
        except LostContact:
            raise
        except Exception as error:
            if not self._has_begun:
                self._rejoin(error)
            raise
        finally:
            self._compute = None
        return results[0]

    def _rejoin(self, error: Exception) -> None:
        """Gather the root's weights again, which failed here and the others wait for. Raises OutOfStep if it fails again."""
        if self._is_paced:
            raise self._cannot_gather(error) from error
        free_tensors(error)
        self._idle()

    def _finish(self, error: Exception) -> None:
        """Join in the rest of a step that failed here. Raises OutOfStep if that fails again."""
        free_tensors(error)
        try:
            self._complete()
            self._skip(self._root)
        except LostContact:
            raise
        except Exception as again:
            raise self._cannot_gather(again) from again

    def _cannot_gather(self, error: Exception) -> OutOfStep:
        return OutOfStep(f"rank {self._pace.rank} cannot gather the weights that its shard group waits for: {one_line(error)}")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Steps in the block may differ in number from rank to rank. At its end all ranks are done, or all learn who failed."""
        try:
            yield
            while self._pace.agree(DONE):
                self._idle()
        except LostContact:
            raise
        except BaseException:
            with contextlib.suppress(LostContact):
                self._pace.agree(FAILED)
            raise
        finally:
            self._reshard()

    @contextlib.contextmanager
    def calling_head(self) -> Iterator[None]:
        """Modules that are called in the block keep their weights between steps: the head runs a different number of times."""
        before, self._in_head = self._in_head, True
        try:
            yield
        finally:
            self._in_head = before

    def _install(self) -> None:
        undo = self._undo

        @functools.wraps(self.own_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        for module in self._modules:
            if module is not self._root:
                undo.callback(module.register_forward_pre_hook(functools.partial(self._enter), prepend=True).remove)
                undo.callback(module.register_forward_hook(functools.partial(self._leave)).remove)
        undo.callback(self._root.register_forward_pre_hook(self._begin, prepend=True).remove)
        undo.enter_context(unittest.mock.patch.object(self._root, "forward", forward))
        if self._model is not self._root:

            @functools.wraps(self.own_forward)
            def inner(*args: Any, **kwargs: Any) -> Any:
                return self.run(functools.partial(self.own_forward, *args, **kwargs), is_whole=True)

            undo.enter_context(unittest.mock.patch.object(self._model, "forward", inner))

    def _begin(self, module: Any, args: Any) -> None:
        """Before the model itself is called, and before FSDP gathers what belongs to it."""
        if self._is_stepping:
            return
        if not self._is_paced:
            self._pace.agree(RUNS)
        sharding.forget_unfinished(self._root)
        self._past = sharding.ForwardOrder(self._root)
        if module in self._modules:
            self._pace.note_gather(module)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_skipping:
            return None
        if self._is_stepping:
            return self.own_forward(*args, **kwargs)
        is_whole = self._compute is None or self._is_whole
        compute = self._compute or functools.partial(self.own_forward, *args, **kwargs)
        self._is_stepping = self._has_begun = True
        self._entered, self._open = [], []
        try:
            result = compute()
            if is_whole:
                self._note_order()
            self._complete()
            return result
        except LostContact:
            raise
        except Exception as error:
            self._finish(error)
            raise
        finally:
            self._is_stepping = False
            if self._past is not None:
                self._past.restore()

    def _idle(self) -> None:
        """A step for the others' sake."""
        self._is_paced = True
        try:
            self.run(lambda: None)
        finally:
            self._is_paced = False

    def _complete(self) -> None:
        """Call the modules that this step has not come to, so that every rank has joined in gathering each of them.

        After an error in it, another call goes on with the module that it was at.
        """
        with naming_lost_ranks("gathering the weights"):
            while self._open:
                self._skip(self._open[-1])
                self._open.pop()
            while len(self._entered) < len(self._order):
                self._skip(self._order[len(self._entered)])
                self._entered.append(self._order[len(self._entered)])

    def _note_order(self) -> None:
        """The first forward of the whole model shows the order for all others: it is on the same tokens on every rank.

        What it does not call stays sharded: a tower that reads images, while all that is read is text.
        """
        if not self._is_known:
            self._order, self._is_known = list(self._entered), True

    def _skip(self, module: Any) -> None:
        """Call a module for FSDP's hooks alone: weights are gathered, nothing is computed, they are freed."""
        self._is_skipping = True
        try:
            if module is self._root:
                module()
                return
            with unittest.mock.patch.object(module, "forward", lambda *args, **kwargs: None):
                module()
        finally:
            self._is_skipping = False

    def _enter(self, module: Any, args: Any) -> None:
        sharding.drop_received(module)
        self._pace.note_gather(module)
        if self._is_skipping:
            return
        if self._in_head and id(module) not in self._kept:
            self._kept.add(id(module))
            self._keeping.add(module)
        if id(module) not in self._kept or not any(module is one for one in self._entered):
            self._entered.append(module)
        self._open.append(module)

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        if not self._is_skipping and self._open:
            self._open.pop()

    def _reshard(self) -> None:
        sharding.forget_unfinished(self._root)
        for module in self._modules:
            module.reshard()


def free_tensors(error: BaseException) -> None:
    """Where memory is short: let go of what the frames of a failed forward hold, which its traceback keeps alive."""
    seen: list[BaseException] = []
    causes: list[BaseException | None] = [error] if is_out_of_memory(error) else []
    while causes:
        one = causes.pop()
        if one is not None and not any(one is other for other in seen):
            seen.append(one)
            traceback.clear_frames(one.__traceback__)
            causes += [one.__cause__, one.__context__]
