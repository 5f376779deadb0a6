"""How the process ends: by a signal, or at once."""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn


def handle_signals(stop: threading.Event, interrupted: threading.Event) -> None:
    """Have a signal set both events: the run ends with the frames in flight. A second signal ends it at once."""
    # Windows has no SIGHUP; nohup has it ignored.
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        interrupted.set()
        threading.Thread(target=stop.set).start()  # The interrupted thread may hold the lock of the event.

    for number in numbers:
        signal.signal(number, interrupt)


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """Run the program and end the process at once: sys.exit() would wait for threads that wait for a dead camera."""
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # A name may have any letters.
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    try:
        code = main()
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    for output in (sys.stdout, sys.stderr):
        try:
            output.flush()
        except OSError:
            code = code or 1  # Nobody reads it anymore.
    os._exit(code)
