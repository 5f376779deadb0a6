"""Opening sources with OpenCV: what kind a source is, its name without passwords, and what OpenCV knows about it."""

import os
import re
import select
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import cv2
import requests

from edge.errors import SourceError
from edge.probe import PIPES, file_problem, stream_problem
from edge.timing import Timing

# OpenCV reads these variables. FFmpeg can be used by several threads: otherwise OpenCV opens one source at a time, and
# a camera that does not respond delays the others. A video may have minutes of audio between two frames: otherwise
# OpenCV gives up after 4,096 packets. Errors are reported as SourceError, and not by OpenCV and FFmpeg as well.
os.environ.setdefault("OPENCV_FFMPEG_IS_THREAD_SAFE", "1")
os.environ.setdefault("OPENCV_FFMPEG_READ_ATTEMPTS", str(2**31 - 1))
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Passwords in the query or path of a URL, where many cameras take them: ?user=admin&pwd=... A value is masked if its
# whole key, or a part of it between - or _, is such a word, or ends in one that is unmistakable. ?side=left is shown.
SECRET = re.compile(
    r"(?<=[?&;/#])((?:[^=/?&;]*(?:[-_]|(?=passwd|password|pwd|secret|token)))?(?:(?:access|api|auth|login|session|user)*"
    r"(?:auth|cred|jwt|key|login|otp|pas|pass|pin|psw|pw|pwd|secret|session|sid|sig|token|use|user|usr)"
    r"(?:code|entials?|id|name|nature|orization|phrase|s|wd|word)?)(?:[-_][^=/?&;]*)?=)[^&]*",
    re.IGNORECASE,
)
HOST = re.compile(r"(?:(?:[\w-]+\.)+[\w-]+|localhost|\[[0-9a-f:.]+\])(?::\d{1,5})?(?=[/?#]|$)", re.IGNORECASE)
IMAGE_CODECS = ("MJPG", "MPNG", "webp", "")  # "": BMP has no letters
STANDARD_INPUT = ("/dev/stdin", "/dev/fd/")
IP_ADDRESS = re.compile(r"@(?=(?:\d+(?:\.\d+){3}|\[[0-9a-f:.]+\])(?::\d{1,5})?(?:[/?#]|$))", re.IGNORECASE)
PLAYLISTS = (".m3u8", ".mpd")
DEFAULT_FPS = 25.0  # of a source that states no frame rate, or an implausible one
MAX_FPS = 1000.0

Kind = Literal["file", "pipe", "device", "stream"]


def kind_of(source: str) -> Kind:
    """Return the kind of a source. A stream may turn out to have an end, see has_end()."""
    if "://" in source:
        return "stream"
    try:
        mode = Path(source).stat().st_mode
    except (OSError, ValueError):
        mode = 0
    if stat.S_ISFIFO(mode) or (source.startswith(STANDARD_INPUT) and not stat.S_ISREG(mode)):
        return "pipe"
    if source.isdecimal() or (source.startswith("/dev/") and not stat.S_ISREG(mode)):
        return "device"
    return "file"


def redact(source: str) -> str:
    """Return the name of a source as it may be shown: without user and password."""
    if "://" not in source:
        return source
    scheme, rest = source.split("://", 1)
    if addresses := list(IP_ADDRESS.finditer(rest)):
        rest = rest[addresses[-1].end() :]
    elif not HOST.match(rest):
        # A password may hold another @, or a slash, and the path an @: the host is after the first @ where it may be.
        rests = [rest[at.end() :] for at in re.finditer("@", rest)] or [rest]
        rest = next((each for each in rests if HOST.match(each)), rests[-1])
    return scheme + "://" + SECRET.sub(r"\1***", rest)


def check_path(source: str) -> None:
    """Raise SourceError unless the source is the path of a file or pipe."""
    path = Path(source)
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{source} is a name that is not UTF-8: rename the file") from error
    if not path.exists():
        # The part before an @ may be a password, in an address without its scheme.
        raise SourceError(
            f"no such file: {source.rpartition('@')[2]} (an address begins with rtsp://, http:// or https://)"
        )
    if path.is_dir():
        raise SourceError(f"{source} is a folder, expected a video file")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise SourceError(f"{source} can't be read: permission denied")


class UnopenedStream(SourceError):
    """A network stream can't be opened; edge/probe.py says why."""


def open_source(source: str, kind: Kind, timing: Timing, threads: int = 1) -> cv2.VideoCapture:
    """Open a source that is no pipe. Raises SourceError if that fails.

    threads: of the decoder of a stream, see open_stream().
    """
    if kind == "stream":
        return open_stream(source, max(timing.camera_open_s, 2 * timing.stall_s), timing.stall_s, threads)
    return open_file(source) if kind == "file" else open_device(source)


def open_once(source: str, kind: Kind, timing: Timing, stop: threading.Event | None = None) -> cv2.VideoCapture:
    """Open a source that is no pipe, and is not tried again. Raises SourceError, with the cause, if that fails."""
    try:
        return open_source(source, kind, timing)
    except UnopenedStream as error:
        raise SourceError(f"{error}: {stream_problem(source, timing.camera_open_s, stop)}") from error


def open_file(source: str) -> cv2.VideoCapture:
    """Open a file. Raises SourceError if that fails."""
    check_path(source)
    # FFmpeg takes a relative path with a colon for a URL.
    capture = cv2.VideoCapture(str(Path(source).absolute()), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise SourceError(f"{source} is no video that OpenCV can read: {file_problem(Path(source))}")
    return capture


def open_device(source: str) -> cv2.VideoCapture:
    """Open a device by its number or path. Raises SourceError if that fails."""
    try:
        capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    except (cv2.error, OverflowError):
        capture = None
    if capture is None or not capture.isOpened():
        raise SourceError(f"no camera {source}: check that it is plugged in and that no other program uses it")
    return capture


def open_stream(source: str, open_s: float, read_s: float, threads: int) -> cv2.VideoCapture:
    """Open a network stream. Raises SourceError if that fails, or UnopenedStream.

    open_s, read_s: the longest time to open it, and to wait for a frame.
    threads: of FFmpeg's decoder. Each of them holds back one frame of H.264 or H.265.
    """
    options = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, round(1000 * open_s), cv2.CAP_PROP_READ_TIMEOUT_MSEC]
    options += [round(1000 * read_s), cv2.CAP_PROP_N_THREADS, threads]
    begin = time.monotonic()
    capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, options)
    if capture.isOpened():
        return capture
    if time.monotonic() - begin >= open_s:
        raise SourceError(f"can't open {redact(source)}: no response within {open_s:g} s")
    raise UnopenedStream(f"can't open {redact(source)}")


@contextmanager
def opened_pipe(source: str, stop: threading.Event, poll_s: float) -> Iterator[cv2.VideoCapture | None]:
    """Open a FIFO or /dev/stdin, once there is data in it; None if `stop` is set before.

    It is opened only once: what was read from it can't be read again. Raises SourceError if it is no video.
    """
    check_path(source)
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise SourceError(f"{source} can't be read: {error.strerror}") from error
    try:
        while not stop.is_set() and not select.select([fd], [], [], poll_s)[0]:
            pass
        if stop.is_set():
            yield None
            return
        os.set_blocking(fd, True)
        capture = cv2.VideoCapture(f"pipe:{fd}", cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise SourceError(f"what comes from {source} is no video that OpenCV can read; {PIPES}")
        yield capture
    finally:
        os.close(fd)


def read_still_image(source: str) -> Any:
    """Return the image in a file of one image, upright as its EXIF orientation says, (height, width, 3) uint8 BGR.

    None if the file is anything else. FFmpeg would read it too, without its orientation.
    """
    check_path(source)
    path = str(Path(source).absolute())
    if not cv2.haveImageReader(path) or cv2.imcount(path) != 1:
        return None
    # A video of JPEG images begins as an image does.
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    return None if capture.grab() and capture.grab() else cv2.imread(path)


def is_playlist(source: str) -> bool:
    """Whether a URL is HLS or DASH, which deliver some seconds of video at once."""
    return "://" in source and re.split("[?#]", source.lower())[0].endswith(PLAYLISTS)


def fourcc(capture: cv2.VideoCapture) -> str:
    """Return the codec of a video as its four letters."""
    return (int(capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF).to_bytes(4, "little").decode("latin-1").strip("\0 ")


def is_image(source: str, capture: cv2.VideoCapture) -> bool:
    """Whether a URL delivers images, as many cameras do at the address of their snapshot."""
    return source.lower().startswith("http") and fourcc(capture) in IMAGE_CODECS


def held_frames(source: str, capture: cv2.VideoCapture, threads: int) -> int | None:
    """Return how many frames FFmpeg holds back until later ones arrive; None for a source without time stamps.

    Each thread of the decoder holds one, and the parser of RTSP one: a frame is complete when the next one begins.
    JPEG over HTTP has no time stamps: FFmpeg counts 25 frames a second.
    """
    if "://" not in source or is_image(source, capture):
        return None
    is_parsed = source.lower().startswith("rtsp") and fourcc(capture).lower() in ("h264", "hevc")
    return threads - 1 + is_parsed


def frame_rate(capture: cv2.VideoCapture) -> float | None:
    """Return the frames a second that a source states; None if it states none, or an implausible number."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 0 < fps <= MAX_FPS else None


def frame_count(capture: cv2.VideoCapture) -> int:
    """Return the number of frames that a file states, 0 if it states none. It may be wrong."""
    return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def has_end(source: str, capture: cv2.VideoCapture, timeout_s: float) -> bool:
    """Whether a stream that was opened is a recording, which has an end, and not a camera.

    A recording states its duration, from which OpenCV has the number of frames. Some state none, for example a .ts
    file on an HTTP server that can't seek: then the response has a length. A camera's response has none.
    """
    count = frame_count(capture)
    if count > 1 or (count == 1 and not is_image(source, capture)):
        return True
    if not source.lower().startswith("http") or is_playlist(source) or fourcc(capture) in IMAGE_CODECS:
        return False
    try:
        with requests.get(source, stream=True, timeout=timeout_s) as response:
            return response.ok and "Content-Length" in response.headers
    except (requests.RequestException, ValueError):
        return False
