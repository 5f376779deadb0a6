"""How long request.py waits for what, and why."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """All waiting times, in seconds. Tests pass shorter ones."""

    poll_s: float = 0.1  # between two looks at the stop event: too short to be noticed after Ctrl-C
    batch_wait_s: float = 1.0  # of the first frame of an incomplete batch: a camera of 4 frames/s still fills one
    drain_s: float = 5.0  # for responses after Ctrl-C: a server of 3 frames/s completes the 16 frames in flight
    stop_s: float = 10.0  # for threads after the last result: a camera may hang in its driver forever

    connect_s: float = 5.0  # to connect or to send: the network stack repeats a lost packet after 1 s and after 3 s
    # To respond. A slow server needs time for all frames in flight: with a fixed time it would get requests again
    # before it reaches them.
    response_s: float = 2.0
    first_response_s: float = 30.0  # to the test image: TorchServe may load the model first, and pose takes a core 13 s
    slow_s: float = 0.25  # A model whose fastest response took longer gets more time for each frame.
    response_per_frame_s: float = 1 / 3  # A server that is slower than 3 frames/s counts as one that hangs.
    max_response_per_frame_s: float = 60.0  # of a slow model
    min_response_s: float = 5.0  # TorchServe pauses for seconds while it restarts a worker
    first_backoff_s: float = 0.1  # about one forward pass: after that a busy server has a free worker
    max_backoff_s: float = 1.0  # so that a server that is back is found within a second
    report_after_s: float = 2.0  # shorter failures are not worth a line
    check_s: float = 2.0  # --check shows the state now: it does not wait for a server that is starting

    camera_open_s: float = 10.0  # FFmpeg watches a stream for up to 5 s to learn its frame rate
    stall_s: float = 5.0  # A live camera sends more than one frame in 5 s: --stall-timeout
    max_stall_s: float = 60.0  # however slow the camera is
    playlist_stall_s: float = 30.0  # HLS and DASH deliver segments of up to 10 s
    max_lag_s: float = 0.25  # Live frames that waited longer, while newer ones were there, are dropped.
    max_lag_time_s: float = 5.0  # Then a decoder that is slower than its camera gets more threads.
    report_s: float = 60.0  # More than two losses in this time are reported by one line.
    frozen_s: float = 10.0  # of equal or black frames: a sensor's noise differs from frame to frame
    probe_s: float = 60.0  # to read a file once more, at full speed
    first_reconnect_s: float = 0.5  # A camera that dropped a connection accepts the next one.
    max_reconnect_s: float = 3.0  # so that a camera that is back is found within 3 s

    def response_timeout_s(self, frames_in_flight: int, frame_s: float = 0.0) -> float:
        """Return how long a response may take while so many frames are with a server that may take frame_s for each."""
        return max(self.min_response_s, self.response_s + frames_in_flight * max(self.response_per_frame_s, frame_s))


def backoff_s(first_s: float, max_s: float, attempt: int) -> float:
    """Return an exponential back-off with jitter, so that clients don't return all at once; attempts count from 0."""
    return min(max_s, first_s * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1)
