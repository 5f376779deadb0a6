"""request.py when a real TorchServe is stopped, started again, or does not take its token any more."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import requests

from deploy.node import PROJECT, Node, free_ports, torchserve
from tests.conftest import wait_until
from tests.scripts import archive, books, json_lines, run

MODEL = "efficientnet-lite0"


@pytest.fixture(scope="module")
def archive_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restarted")
    archive("--model", MODEL, cwd=folder)
    return folder


def long_clip(path: Path, clip: list[npt.NDArray[np.uint8]], frames: int) -> Path:
    """Write frames of the clip as a video of 25 fps, small ones."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (320, 240))
    for number in range(frames):
        writer.write(cv2.resize(clip[number % len(clip)], (320, 240)))
    writer.release()
    return path


def test_tokens_that_live_three_seconds(archive_folder: Path, tmp_path: Path) -> None:
    """The sample clip takes 15 s, so some five tokens, each renewed with the API key."""
    config = (PROJECT / "config.properties").read_text() + "\ntoken_expiration_min=0.05\n"
    with torchserve(archive_folder, [MODEL], config) as node:
        first = node.token()
        done = run(
            "request.py", "--model", MODEL, "--url", node.url, "--management-url", node.management_url, "--quiet",
            "--jsonl", tmp_path / "out.jsonl", cwd=archive_folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert node.token() != first
        renewals = node.log().count('"GET /token?type=inference')
    lines = json_lines(tmp_path / "out.jsonl")
    assert len(lines) == 375
    assert {line["outcome"] for line in lines} == {"answered"}
    assert 3 <= renewals <= 15
    assert first not in done.stderr


def rotate(node: Node) -> None:
    """Have TorchServe write a new inference token into its key file."""
    headers = {"Authorization": f"Bearer {node.token('API')}"}
    url = f"{node.management_url}/token?type=inference"
    assert requests.get(url, headers=headers, timeout=10).status_code == 200


def test_refused_token_without_a_file_ends_a_file_s_run(archive_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    done: list[Any] = []
    with torchserve(archive_folder, [MODEL]) as node:

        def stream() -> None:
            command: list[str | Path] = ["--model", MODEL, "--url", node.url, "--quiet", "--jsonl", output]
            environment = {"TORCHSERVE_TOKEN": node.token()}
            done.append(run("request.py", *command, "--server-wait", "3", cwd=tmp_path, environment=environment))

        thread = threading.Thread(target=stream)
        thread.start()
        wait_until(lambda: output.exists() and len(output.read_text().splitlines()) > 50)
        rotate(node)
        thread.join(60)
    assert done[0].returncode == 4
    assert "gives no answers (400 Token Authorization failed" in done[0].stderr
    (book,) = books(done[0].stderr).values()
    assert 0 < int(book["failed"]) <= 32


def test_copy_of_a_key_file_is_renewed_once_and_told(archive_folder: Path, tmp_path: Path) -> None:
    """Each renewal would shut out all others who have the token."""
    with torchserve(archive_folder, [MODEL]) as node:
        key_file = tmp_path / "copy.json"
        key_file.write_text((node.folder / "key_file.json").read_text())
        rotate(node)
        before = node.log().count('"GET /token?type=inference')
        done = run(
            "request.py", "--model", MODEL, "--url", node.url, "--management-url", node.management_url,
            "--token-file", key_file, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 4
        assert f"TorchServe has a new token, but {key_file} does not: is it a copy?" in done.stderr
        assert node.log().count('"GET /token?type=inference') - before == 1
        assert json.loads(key_file.read_text())["API"]["key"] not in done.stderr


def test_file_loses_nothing_when_the_server_restarts(
    archive_folder: Path, tmp_path: Path, clip: list[npt.NDArray[np.uint8]]
) -> None:
    video = long_clip(tmp_path / "clip.mp4", clip, 250)
    ports = free_ports(6)
    output = tmp_path / "out.jsonl"
    done: list[Any] = []

    def stream(url: str) -> None:
        command: list[str | Path] = ["--model", MODEL, "--url", url, "--input", video, "--quiet", "--jsonl", output]
        done.append(run("request.py", *command, "--server-wait", "200", cwd=archive_folder, timeout_s=400))

    with torchserve(archive_folder, [MODEL], ports=ports) as node:
        thread = threading.Thread(target=stream, args=[node.url])
        thread.start()
        wait_until(lambda: output.exists() and len(output.read_text().splitlines()) > 50)
    time.sleep(3)  # a while without a server, so that it is told
    with torchserve(archive_folder, [MODEL], ports=ports):
        thread.join(300)
        assert not thread.is_alive()
    lines = json_lines(output)
    assert len(lines) == 250
    assert [line for line in lines if line["outcome"] != "answered"] == []
    assert done[0].returncode == 0, done[0].stderr
    assert f"{node.url} gives no answers (" in done[0].stderr
    assert f"{node.url} answers again after " in done[0].stderr


def test_file_waits_for_a_dead_server_only_so_long(archive_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    done: list[Any] = []

    def stream(url: str) -> None:
        command: list[str | Path] = ["--model", MODEL, "--url", url, "--quiet", "--jsonl", output, "--server-wait", "4"]
        done.append(run("request.py", *command, cwd=archive_folder))

    with torchserve(archive_folder, [MODEL]) as node:
        thread = threading.Thread(target=stream, args=[node.url])
        thread.start()
        wait_until(lambda: output.exists() and len(output.read_text().splitlines()) > 50)
    thread.join(100)
    assert done[0].returncode == 4
    last = done[0].stderr.splitlines()[-1]
    assert last.startswith(f"request.py: {node.url} gave no answer for 4 s (")
    (book,) = books(done[0].stderr).values()
    lines = json_lines(output)
    assert len(lines) == int(book["captured"])
    assert int(book["failed"]) > 0
    assert {line["error"] for line in lines if line["outcome"] == "dropped"} <= {"the run ended"}
