"""An IP camera for the tests: MJPEG over HTTP on 127.0.0.1."""

import http.server
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from demo.node import free_ports

Mode = Literal["streaming", "cut", "stalled", "mute", "garbage"]


class MjpegCamera(http.server.ThreadingHTTPServer):
    """Streams JPEG frames, over and over, `fps` a second, to every client.

    mode: "streaming"; "cut": streams end, and no new ones begin; "stalled": streams stay open without frames;
        "mute": connections are accepted, and nothing is sent; "garbage": frames are cut off, or are no JPEG at all.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, frames: Sequence[bytes], fps: float, port: int) -> None:
        super().__init__(("127.0.0.1", port), MjpegHandler)
        self.frames = frames
        self.fps = fps
        self.mode: Mode = "streaming"
        self.url = f"http://127.0.0.1:{port}/live"
        self.asked = 0  # requests for a stream so far
        self.streams = 0  # streams begun so far
        self.closing = threading.Event()

    def handle_error(self, *_: Any) -> None:
        pass  # A client that is gone.


class MjpegHandler(http.server.BaseHTTPRequestHandler):
    server: MjpegCamera

    def do_GET(self) -> None:
        camera = self.server
        camera.asked += 1
        if camera.mode == "cut":
            return
        while camera.mode == "mute":
            if camera.closing.wait(0.05):
                return
        camera.streams += 1
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        number = 0
        while camera.mode in ("streaming", "stalled", "garbage") and not camera.closing.wait(1 / camera.fps):
            if camera.mode == "stalled":
                continue
            frame = camera.frames[number % len(camera.frames)]
            number += 1
            if camera.mode == "garbage":
                frame = [frame[: len(frame) // 3], os.urandom(5000), b"", b"busy"][number % 4]
            self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n")
            self.wfile.write(b"Content-Length: %d\r\n\r\n%b\r\n" % (len(frame), frame))

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def mjpeg_camera(frames: Sequence[bytes], fps: float = 25.0, port: int | None = None) -> Iterator[MjpegCamera]:
    """Run a camera until the block ends."""
    with MjpegCamera(frames, fps, port or free_ports(1)[0]) as camera:
        thread = threading.Thread(target=camera.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield camera
        finally:
            camera.closing.set()
            camera.shutdown()
            thread.join()
