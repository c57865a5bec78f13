"""Whose turn it is to be prepared, so that nobody waits for a long text of another.

One long text and one short job are prepared at a time, a step each: between two segments of the long one, one short job
is prepared whole. So a short job waits for one segment and for the short ones before it, and a long text gets on
however many short jobs come. Two documents at most are in the making.
"""

from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Turn(Protocol):
    """What is prepared."""

    long: bool  # whether it takes many steps


T = TypeVar("T", bound=Turn)


@dataclass
class Turns(Generic[T]):
    """The jobs that are being prepared. The caller holds the lock of ``waiting``, from which they are taken."""

    waiting: MutableSequence[T]
    _open: dict[bool, T] = field(default_factory=dict)  # by whether it is long
    _owed: bool = False  # a step to the long one, for a short one that was prepared whole

    def __iter__(self) -> Iterator[T]:
        return iter(self._open.values())

    def __len__(self) -> int:
        return len(self._open)

    def next(self, may_begin: Callable[[T], bool]) -> T | None:
        """The job whose step is the next one; of the waiting ones, the first short and the first long one begin if they
        ``may_begin``."""
        for long in (True, False):
            first = next((job for job in self.waiting if job.long == long), None)
            if long not in self._open and first is not None and may_begin(first):
                self.waiting.remove(first)
                self._open[long] = first
        if True in self._open and (self._owed or False not in self._open):
            self._owed = False
            return self._open[True]
        return self._open.get(False)

    def end(self, job: T) -> None:
        """``job`` is prepared, or given up."""
        del self._open[job.long]
        self._owed = not job.long
