"""Video files for the tests, made by FFmpeg, and servers for them."""

import functools
import http.server
import math
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from edge.cameras import Camera
from edge.errors import SourceError
from edge.frames import Frame

VFR = ("-vf", "select='lt(n,50)+not(mod(n,30))'", "-fps_mode", "vfr")  # 30 frames a second, then one
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-g", "12", "-pix_fmt", "yuv420p")


def ffmpeg(*arguments: str | Path) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *arguments], check=True, timeout=120)


def pattern(rate: float = 25, seconds: float = 4, size: str = "64x48") -> list[str]:
    """Return FFmpeg's arguments of a moving pattern."""
    return ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate={rate}:duration={seconds}"]


def tone(seconds: float) -> list[str]:
    """Return FFmpeg's arguments of a sound."""
    return ["-f", "lavfi", "-i", f"sine=duration={seconds}"]


def changed(path: Path, target: Path, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    """Write a file with changed bytes."""
    target.write_bytes(change(bytearray(path.read_bytes())))
    return target


def zeros(data: bytearray) -> bytearray:
    """Overwrite a fifth of the data, in the middle."""
    first, last = int(0.4 * len(data)), int(0.6 * len(data))
    data[first:last] = bytes(last - first)
    return data


def read(source: str | Path, fps: float | None = math.inf) -> tuple[list[Frame], str | None]:
    """Return the frames of a source, and the error at its end."""
    frames: list[Frame] = []
    try:
        frames.extend(Camera(str(source), fps).frames(threading.Event()))
    except SourceError as error:
        return frames, str(error)
    return frames, None


class FileHandler(http.server.BaseHTTPRequestHandler):
    """Serves the files of a folder; with_ranges: as nginx does, which can seek."""

    def __init__(self, *arguments: Any, folder: Path, with_ranges: bool) -> None:
        self.folder, self.with_ranges = folder, with_ranges
        super().__init__(*arguments)

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/")
        if name.isdecimal():
            self.send_error(int(name))
            return
        if not (self.folder / name).is_file():
            self.send_error(404)
            return
        data = (self.folder / name).read_bytes()
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.with_ranges and "Range" in self.headers:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            data = data[first:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class FileServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # A client that is gone.


@contextmanager
def file_server(folder: Path, with_ranges: bool = True) -> Iterator[str]:
    """Serve a folder until the block ends; yields its address. The file 403 is an error of that status."""
    handler = functools.partial(FileHandler, folder=folder, with_ranges=with_ranges)
    with FileServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
