"""A dict with a bounded number of entries. Pure."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedDict(dict[K, V]):
    """A dict that drops its oldest entry when it has more than `most`; setting an existing key does not renew it.

    Threads can share one: an entry is added, or dropped, in one step.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        if len(self) > self._most:
            self.pop(next(iter(self)), None)
