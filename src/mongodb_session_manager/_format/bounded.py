"""`Bounded`: a dict with a maximum size."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Bounded(dict[K, V]):
    """A dict that removes the entry that was set least recently when it has more than `most` entries."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        if key in self:
            self.pop(key, None)
        super().__setitem__(key, value)
        if len(self) > self._most:
            self.pop(next(iter(self)), None)  # another thread might have removed it
