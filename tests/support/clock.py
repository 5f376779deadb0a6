"""A clock that only the test advances."""


class Clock:
    """Stands in for time.monotonic()."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
