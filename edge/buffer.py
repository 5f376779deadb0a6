"""The bounded buffer between two threads of the pipeline."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

WAKE_UP_S = 0.5  # How long a thread waits before it looks again; a notification ends the wait sooner.


class Buffer(Generic[Item]):
    """A first-in, first-out buffer of at most `size` items that either side can close.

    The producer closes it after its last item, and the consumer's loop ends once that item is taken. A consumer that
    gives up closes it too, and the producer learns of it from put().
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[Item] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: Item) -> bool:
        """Add an item, waiting for room; return False, without adding it, if the buffer is closed."""
        with self._changed:
            while len(self._items) >= self._size and not self._closed:
                self._changed.wait(WAKE_UP_S)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def close(self) -> None:
        """Take no more items; those in the buffer can still be taken out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        """Take items out, waiting for them, until the buffer is closed and empty."""
        while True:
            with self._changed:
                while not self._items and not self._closed:
                    self._changed.wait(WAKE_UP_S)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
