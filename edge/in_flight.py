"""The requests on their way to the server: how many there may be, and that each of their frames gets one result."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge.answers import failed
from edge.cameras import Frame
from edge.stats import Result

POLL_S = 0.5


@dataclass
class Request:
    """Frames on their way, and who takes their results. The times are those of time.monotonic(), in seconds."""

    frames: Sequence[Frame]
    deliver: Callable[[Result], None]
    retry_until: float
    overdue_at: float
    is_settled: bool = False


class InFlight:
    """The requests whose results are not all delivered yet; any thread may call its methods."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._requests: dict[int, Request] = {}
        self._changed = threading.Condition()

    def add(self, requests: Sequence[Request], instead_of: int | None = None) -> dict[int, Request]:
        """Add requests; return them by their numbers.

        With `instead_of` they take the place of another one; nothing is added if that one is settled already.
        """
        with self._changed:
            if instead_of is not None:
                replaced = self._requests.get(instead_of)
                if replaced is None or replaced.is_settled:
                    return {}
                del self._requests[instead_of]
            numbered = {next(self._numbers): request for request in requests}
            self._requests.update(numbered)
            return numbered

    def wait_below(self, most: int) -> bool:
        """Return whether fewer than `most` are out, after a change or POLL_S seconds at the latest."""
        with self._changed:
            if len(self._requests) >= most:
                self._changed.wait(POLL_S)
            return len(self._requests) < most

    def settle(self, number: int, results: Sequence[Result]) -> None:
        """Deliver a request's results, if there are any, once: it may be given up and answered at the same time."""
        with self._changed:
            request = self._requests.get(number)
            if not results or request is None or request.is_settled:
                return
            request.is_settled = True
        for result in results:
            request.deliver(result)
        with self._changed:
            del self._requests[number]
            self._changed.notify_all()

    def give_up(self, error: str, overdue_only: bool = False) -> bool:
        """Fail all requests, or those that are overdue; return whether there were any."""
        with self._changed:
            late = {
                number: request
                for number, request in self._requests.items()
                if not overdue_only or request.overdue_at < time.monotonic()
            }
        for number, request in late.items():
            self.settle(number, failed(request.frames, error))
        return bool(late)
