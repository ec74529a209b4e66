"""Things that someone else keeps alive, in the order in which they came."""

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Alive(Generic[T]):
    """What was added and still lives, oldest first.

    A WeakSet iterates in the order of addresses, which differs from process to process: ranks
    that go through it side by side would meet in different ledgers.
    """

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[int, T] = weakref.WeakValueDictionary()

    def add(self, thing: T) -> None:
        """Add a thing; it stays in its place if it is here."""
        self._held[id(thing)] = thing

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._held.values()))

    def __contains__(self, thing: object) -> bool:
        return self._held.get(id(thing)) is thing

    def __len__(self) -> int:
        return len(self._held)
