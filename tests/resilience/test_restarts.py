"""request.py when a real TorchServe is stopped, started again, or no longer accepts its token.

The tests share one server and run in this order: the last two stop it.
"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.node import NODE_PORTS, PROJECT, Node, free_ports, torchserve
from tests.support.archives import Archives
from tests.support.nodes import requests_answered, rotate_token
from tests.support.scripts import MODEL, json_lines, running, summary

TOKEN_S = 8.0


@dataclass(frozen=True)
class Address:
    """A server, without the key file that a node has."""

    url: str


class ShortTokens:
    """A TorchServe whose tokens live for TOKEN_S seconds. It can be stopped, and started again in the same place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node: Node
        self._ports = free_ports(NODE_PORTS)
        self._running = ExitStack()
        self.start()

    def start(self) -> None:
        config = (PROJECT / "config.properties").read_text()
        config += f"\ntoken_expiration_min={TOKEN_S / 60}\ndefault_workers_per_model=1\n"
        self.node = self._running.enter_context(torchserve(self.folder, [MODEL], config, ports=self._ports))

    def stop(self) -> None:
        self._running.close()

    def renewals(self) -> int:
        return requests_answered(self.node, "GET /token?type=inference")


@pytest.fixture(scope="module")
def short_tokens(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Iterator[ShortTokens]:
    folder = tmp_path_factory.mktemp("short_tokens")
    archives.store(folder, archives.build(MODEL, is_tiny=True))
    server = ShortTokens(folder)
    yield server
    server.stop()


def test_stream_outlives_its_tokens(short_tokens: ShortTokens, long_clip: Path, tmp_path: Path) -> None:
    """Each is renewed with the API key when it is rejected, and no sooner; no frame is lost."""
    node = short_tokens.node
    first, before, begin = node.token(), short_tokens.renewals(), time.monotonic()
    command = ["--input", str(long_clip), "--loop", "--management-url", node.management_url]
    with running(node, tmp_path, *command) as request:
        request.wait_until(lambda: short_tokens.renewals() >= before + 2)
        answered = request.lines()
        request.wait_until(lambda: request.lines() > answered)
        (row,) = request.end().values()
    seconds = time.monotonic() - begin
    assert row["failed"] == "0", request.stderr()
    assert {line["error"] for line in json_lines(request.output)} <= {None, "the run ended"}
    assert short_tokens.renewals() - before <= seconds / TOKEN_S + 1
    assert node.token() != first
    assert first not in request.stderr()


def test_rejected_token_without_a_key_file_ends_the_run_of_a_file(
    short_tokens: ShortTokens, long_clip: Path, tmp_path: Path
) -> None:
    node = short_tokens.node
    rotate_token(node)
    flags = ["--model", MODEL, "--input", str(long_clip), "--loop", "--server-wait", "3"]
    environment = {"TORCHSERVE_TOKEN": node.token()}
    with running(Address(node.url), tmp_path, *flags, environment=environment) as request:
        request.wait_until(lambda: request.lines() > 10)
        rotate_token(node)
        assert request.process.wait(timeout=120) == 4, request.stderr()
    assert "is not responding (400 Token Authorization failed" in request.stderr()
    (row,) = summary(request.stderr()).values()
    assert 0 < int(row["failed"]) <= 2 * 16, "the requests that were in flight"


def test_copy_of_a_key_file_is_renewed_once_and_reported(
    short_tokens: ShortTokens, long_clip: Path, tmp_path: Path
) -> None:
    """Each renewal makes the token of all other clients invalid."""
    node = short_tokens.node
    rotate_token(node)
    key_file = tmp_path / "copy.json"
    key_file.write_text((node.folder / "key_file.json").read_text())
    flags = ["--input", str(long_clip), "--loop", "--token-file", str(key_file), "--server-wait", "4"]
    with running(node, tmp_path, *flags, "--management-url", node.management_url) as request:
        request.wait_until(lambda: request.lines() > 10)
        before = short_tokens.renewals()
        rotate_token(node)
        assert request.process.wait(timeout=120) == 4, request.stderr()
    assert f"TorchServe has a new token, but {key_file} does not: is it a copy?" in request.stderr()
    assert short_tokens.renewals() - before == 2, "the test's own, and one of request.py"
    assert json.loads(key_file.read_text())["API"]["key"] not in request.stderr()


def test_file_loses_nothing_when_the_server_restarts(
    short_tokens: ShortTokens, long_clip: Path, tmp_path: Path
) -> None:
    url = short_tokens.node.url
    flags = ["--input", str(long_clip), "--management-url", short_tokens.node.management_url, "--server-wait", "300"]
    with running(short_tokens.node, tmp_path, *flags) as request:
        request.wait_until(lambda: request.lines() > 20)
        short_tokens.stop()
        request.wait_until(lambda: f"{url} is not responding (" in request.stderr())
        short_tokens.start()
        assert request.process.wait(timeout=120) == 0, request.stderr()
    lines = json_lines(request.output)
    assert len(lines) == 100
    assert {line["outcome"] for line in lines} == {"answered"}
    assert f"{url} is responding again after " in request.stderr()


def test_file_waits_for_a_dead_server_only_so_long(short_tokens: ShortTokens, long_clip: Path, tmp_path: Path) -> None:
    """The last test of this server: it is not started again."""
    flags = ["--input", str(long_clip), "--loop", "--server-wait", "4"]
    flags += ["--management-url", short_tokens.node.management_url]
    with running(short_tokens.node, tmp_path, *flags) as request:
        request.wait_until(lambda: request.lines() > 20)
        short_tokens.stop()
        assert request.process.wait(timeout=120) == 4, request.stderr()
    last = request.stderr().splitlines()[-1]
    assert last.startswith(f"request.py: {short_tokens.node.url} did not respond for 4 s (")
    (row,) = summary(request.stderr()).values()
    lines = json_lines(request.output)
    assert len(lines) == int(row["captured"])
    assert int(row["failed"]) > 0
    assert {line["error"] for line in lines if line["outcome"] == "dropped"} <= {"the run ended"}
