"""A cache of the most recently used values, limited by their size in memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class InMemory(Protocol):
    """A value with a size in memory, such as a tensor."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        ...


T = TypeVar("T", bound=InMemory)


@dataclass
class LRUCache(Generic[T]):
    """The most recently used values by digest, up to `capacity` bytes."""

    capacity: int
    size: int = 0
    """Bytes of the values in it."""
    items: OrderedDict[str, T] = field(default_factory=OrderedDict)

    def get(self, key: str) -> T | None:
        """Return the value of a key, or None, and mark it as the latest used."""
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key: str, value: T) -> None:
        """Store the value of a new key, then remove the least recently used values beyond the capacity."""
        self.items[key] = value
        self.size += value.nbytes
        while self.size > self.capacity:
            self.size -= self.items.popitem(last=False)[1].nbytes
