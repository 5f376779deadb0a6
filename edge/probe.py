"""Why OpenCV can't read a source: FFmpeg states that on standard output, and only if asked for.

This file is also the program of a process that opens the source once more, whose standard output can be read.
"""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import cv2
import requests

PIPES = "MKV and TS can be piped, most MP4 can't"
# Errors of intact files: the start of a cut in H.264, and an HTTP server that does not state the length.
HARMLESS = re.compile("^mmco: |18446744073709551615")
DAMAGE = re.compile("Packet corrupt|undecodable NALU")  # though only warnings
POLL_S = 0.1
Task = Literal["open", "read"]

# FFmpeg's levels of messages.
ERROR, WARNING, DEBUG = 16, 24, 48
START_S = 20.0  # for a new process, on a busy machine
CODECS = {"av01": "AV1", "AV01": "AV1", "hev1": "H.265", "hvc1": "H.265", "vvc1": "H.266", "vp09": "VP9"}
ENCODE = "in a password write @ as %40, # as %23, / as %2F, : as %3A and % as %25"
# What FFmpeg reports about a stream -> what is said instead: its own words may contain a part of the password.
STREAM_PROBLEMS = {
    "401 ": f"401 Unauthorized: check user and password; {ENCODE}",
    "403 ": "403 Forbidden: check what this user may see",
    "404 ": "404 Not Found: check the path of the address",
    "Connection refused": "connection refused: check the port, and that the camera is on",
    "Failed to resolve hostname": "unknown host: check the name in the address",
    "No route to host": "no route to this host: check the address and the network",
    "Network is unreachable": "the network is unreachable: check the address and the network",
    "Connection timed out": "no response: check the address, and that the camera is on",
    "Invalid data found": "what it sends is no video: check the path of the address",
}


def messages(
    source: str, task: Task, level: int, timeout_s: float, stop: threading.Event | None = None
) -> list[tuple[int, str]] | None:
    """Open a source, or read it to its end; return what FFmpeg reports, with levels. None if that takes too long.

    It ends early if `stop` is set. Standard input has the source, so that no password is in the list of processes.
    """
    environment = os.environ | {"OPENCV_FFMPEG_DEBUG": "1", "OPENCV_FFMPEG_LOGLEVEL": str(level)}
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    text: bytes | None = f"{source}\0{task}\0{1000 * timeout_s:.0f}".encode()
    deadline = time.monotonic() + timeout_s + START_S
    try:
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    except OSError:
        return None  # The machine has no memory left, or too many processes.
    with process:
        while True:
            try:
                output, _ = process.communicate(text, timeout=POLL_S)
                break
            except subprocess.TimeoutExpired:
                text = None  # It was sent.
                if time.monotonic() > deadline or (stop and stop.is_set()):
                    process.kill()
                    return None
    found = re.findall(r"^\[OPENCV:FFMPEG:(\d+)\] *(.+)", output.decode(errors="replace"), re.MULTILINE)
    return [(int(each), report) for each, report in found]


def main() -> None:
    source, task, timeout_ms = sys.stdin.read().split("\0")
    timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, int(timeout_ms), cv2.CAP_PROP_READ_TIMEOUT_MSEC, int(timeout_ms)]
    capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, timeouts)
    failures = 0
    while task == "read" and failures < 1000:
        failures = 0 if capture.grab() else failures + 1


def file_problem(path: Path, timeout_s: float = 10.0) -> str:
    """Return why a file can't be opened."""
    with path.open("rb") as file:
        head = file.read(12)
    if not head:
        return "it is empty"
    text = join(messages(str(path.absolute()), "open", DEBUG, timeout_s) or [])
    codec = re.search(r"Video: (\w+)[^\n]*unknown codec", text)
    if codec and codec[1] != "none":
        return f"this OpenCV has no decoder for its codec, {codec[1].upper()}"
    if "All info found" in text and not codec:
        return "it has no video track"
    if head[4:8] == b"ftyp":
        return "it has no index (moov), since its recording was not completed or a part of it is missing"
    return "its format is unknown"


def no_frames_problem(codec: str, kind: str) -> str:
    """Return why a source that was opened has no frames; `codec` is its four letters."""
    hint = f"; {PIPES}" if kind == "pipe" else ""
    name = CODECS.get(codec, codec) or "unknown"
    return f"can be opened, but delivers no frames: OpenCV can't decode them (codec {name}){hint}"


def reports_damage(source: str, stop: threading.Event, timeout_s: float, is_short: bool) -> bool:
    """Read a file once more; return whether FFmpeg reports that data is missing or damaged.

    is_short: what to return if that takes too long.
    """
    reports = messages(source, "read", WARNING, timeout_s, stop)
    if reports is None:
        return is_short and not stop.is_set()
    return any((level <= ERROR and not HARMLESS.search(report)) or DAMAGE.search(report) for level, report in reports)


def join(reports: list[tuple[int, str]]) -> str:
    return "\n".join(report for _, report in reports)


def stream_problem(source: str, timeout_s: float, stop: threading.Event | None = None) -> str:
    """Open a network stream once more; return why that fails, without any part of its address."""
    reports = messages(source, "open", WARNING, timeout_s, stop)
    if reports is None:
        return f"no response within {timeout_s:g} s"
    text = join(reports) or http_status(source, timeout_s)
    status = re.search(r"(?:HTTP error|failed:) ([45]\d\d [A-Za-z ]+)", text)
    fallback = status[1].strip() if status else "check address and password, and that the stream is running"
    problem = next((problem for report, problem in STREAM_PROBLEMS.items() if report in text), fallback)
    userinfo, _, _ = source.split("://", 1)[1].rpartition("@")
    is_parsed_wrong = ":" in userinfo and re.search(r"[@#/?]|:.*:|%(?![0-9a-fA-F]{2})", userinfo)
    return f"{problem}; {ENCODE}" if is_parsed_wrong and ENCODE not in problem else problem


def http_status(source: str, timeout_s: float) -> str:
    """Return the status of a URL as FFmpeg reports it. It does not report 401, or a response that is no video."""
    if not source.lower().startswith("http"):
        return ""
    try:
        with requests.get(source, stream=True, timeout=timeout_s) as response:
            return "Invalid data found" if response.ok else f"HTTP error {response.status_code} {response.reason}"
    except (requests.RequestException, ValueError):
        return ""


if __name__ == "__main__":
    main()
