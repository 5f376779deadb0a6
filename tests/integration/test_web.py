"""request.py --http, by HTTP: pictures of the right camera, and viewers that stall, are slow, too many or hostile."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from demo.node import PROJECT, free_ports
from edge.web import MAX_CONNECTIONS, MAX_VIEWERS, TIMEOUT_S, serve_page
from tests.support.fake_server import FakeServer, fake_server
from tests.support.frames import decoded, jpeg
from tests.support.mjpeg_camera import MjpegCamera, mjpeg_camera
from tests.support.pages import BLUE, ORANGE, Page, Viewer, is_of, serving, shades
from tests.support.programs import needs
from tests.support.scripts import run, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a single process")


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server("good") as server:
        yield server


@pytest.fixture(scope="module")
def colors() -> tuple[list[bytes], list[bytes]]:
    return shades(BLUE), shades(ORANGE)


@pytest.fixture
def camera(colors: tuple[list[bytes], list[bytes]]) -> Iterator[MjpegCamera]:
    with mjpeg_camera(colors[0], fps=25) as running_camera:
        yield running_camera


def test_each_camera_has_its_own_pictures(
    fake: FakeServer, colors: tuple[list[bytes], list[bytes]], tmp_path: Path
) -> None:
    """Nothing is lost in the outputs, and a stream shows many different frames, of one camera only."""
    with (
        mjpeg_camera(colors[0], fps=10) as first,
        mjpeg_camera(colors[1], fps=10) as second,
        serving(fake, tmp_path, first.url, second.url) as page,
    ):
        assert f"the web page is at {page.url}/\n" in page.edge.stderr()
        for number, frames in enumerate(colors, start=1):
            single = page.get(f"/cameras/{number}.jpg")
            assert single.headers["Content-Type"] == "image/jpeg"
            assert is_of(decoded(single.content), frames)
            with Viewer(page, number) as viewer:
                assert viewer.status() == 200
                pictures = [viewer.picture() for _ in range(15)]
            assert all(is_of(decoded(picture), frames) for picture in pictures)
            assert len(set(pictures)) > 10
        names = [each["name"] for each in page.figures()["cameras"]]
        assert names == [first.url, second.url]
        metrics = page.get("/metrics").text
        assert f'camera_frames_captured_total{{camera="{first.url}",model="resnet-18"}}' in metrics
        found = page.edge.end()
    assert all(row["failed"] == row["expired"] == "0" for row in found.values())


def test_stalled_and_slow_viewers_delay_nobody(fake: FakeServer, camera: MjpegCamera, tmp_path: Path) -> None:
    with serving(fake, tmp_path, camera.url) as page, ExitStack() as viewers:
        stalled, slow = (viewers.enter_context(Viewer(page)) for _ in range(2))
        assert stalled.status() == slow.status() == 200
        begin, received, slow_received = time.monotonic(), 0, 0
        with Viewer(page) as viewer:
            viewer.status()
            while page.connections() > 2:  # until the stalled one is closed
                viewer.picture()
                received += 1
                if received % 20 == 0:
                    slow.picture()
                    slow_received += 1
                assert time.monotonic() - begin < 60
        assert time.monotonic() - begin > TIMEOUT_S  # not without its time
        assert received > 2 * (time.monotonic() - begin)
        slow.picture()
        assert slow_received > 0
        latencies = [line["latency_ms"] for line in page.edge.results() if line["outcome"] == "answered"]
        assert sorted(latencies)[len(latencies) // 2] < 3000
        page.edge.end()


def test_stalled_viewers_of_small_pictures_are_closed(fake: FakeServer, tmp_path: Path) -> None:
    """Their pictures would fit into the kernel's buffers for a minute."""
    tiny = jpeg(np.zeros((32, 32, 3), np.uint8))
    with mjpeg_camera([tiny], fps=10) as camera, serving(fake, tmp_path, camera.url) as page, ExitStack() as viewers:
        for _ in range(MAX_VIEWERS):
            assert viewers.enter_context(Viewer(page)).status() == 200
        begin = time.monotonic()
        wait_until(lambda: page.get("/cameras/1.jpg").status_code == 200)
        assert time.monotonic() - begin < 4 * TIMEOUT_S


def test_ninth_viewer_gets_503_and_a_place_when_one_leaves(
    fake: FakeServer, camera: MjpegCamera, tmp_path: Path
) -> None:
    with serving(fake, tmp_path, camera.url) as page, ExitStack() as viewers:
        for _ in range(MAX_VIEWERS - 1):
            assert viewers.enter_context(Viewer(page)).status() == 200
        with Viewer(page) as last:
            assert last.status() == 200
            for path in ("/cameras/1.mjpg", "/cameras/1.jpg"):
                ninth = page.get(path)
                assert (ninth.status_code, ninth.headers["Retry-After"]) == (503, "1")
            assert page.get("/stats.json").status_code == page.get("/").status_code == 200
        wait_until(lambda: page.get("/cameras/1.jpg").status_code == 200)


def test_viewer_of_a_lost_camera_is_noticed_when_it_leaves(
    fake: FakeServer, camera: MjpegCamera, tmp_path: Path
) -> None:
    with serving(fake, tmp_path, camera.url) as page:
        with Viewer(page) as viewer:
            viewer.picture()
            camera.mode = "cut"
            wait_until(lambda: page.figures()["cameras"][0]["state"] == "lost")
            assert viewer.picture() == viewer.picture()  # the last one, again and again
        wait_until(lambda: page.connections() == 0)
        assert page.get("/cameras/1.jpg").status_code == 200
        camera.mode = "streaming"
        wait_until(lambda: page.figures()["cameras"][0]["state"] == "live")


@pytest.mark.parametrize("request_text", [b"GET / HTTP/1.1\r\nHost: local", b"", b"GET", b"\x16\x03\x01\x02\x00\x01"])
def test_incomplete_request_ends_however_slowly_it_grows(
    fake: FakeServer, camera: MjpegCamera, tmp_path: Path, request_text: bytes
) -> None:
    with (
        serving(fake, tmp_path, camera.url) as page,
        socket.create_connection(("127.0.0.1", page.port), timeout=30) as client,
    ):
        client.sendall(request_text)
        begin = time.monotonic()
        client.settimeout(0.5)
        while True:
            assert time.monotonic() - begin < 10 * TIMEOUT_S
            try:
                if not client.recv(1000):
                    break
            except TimeoutError:
                client.sendall(b"x")
            except ConnectionError:
                break
        assert "Traceback" not in page.edge.stderr()
        assert page.get("/").status_code == 200


def test_slow_request_has_the_whole_time_for_its_image(fake: FakeServer, tmp_path: Path) -> None:
    noise = jpeg(np.random.default_rng(1).integers(0, 256, (720, 960, 3), np.uint8))
    with (
        mjpeg_camera([noise], fps=5) as large,
        serving(fake, tmp_path, large.url) as page,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(("127.0.0.1", page.port))
        client.sendall(b"GET /cameras/1.jpg HTTP/1.1\r\n")
        time.sleep(TIMEOUT_S - 0.8)
        client.sendall(b"Host: localhost\r\n\r\n")
        time.sleep(1.5)
        with client.makefile("rb") as file:
            response = file.read()
        head, _, body = response.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}\r\n".encode() in head
        assert len(body) > 300_000  # more than the kernel keeps


def test_large_body_gets_a_response_and_large_headers_get_none(
    fake: FakeServer, camera: MjpegCamera, tmp_path: Path
) -> None:
    with serving(fake, tmp_path, camera.url) as page:
        for data in (b"x" * 20_000_000, iter([b"x" * 1_000_000] * 5)):  # the second one in chunks
            assert requests.post(page.url, data=data, timeout=20).status_code == 405
        before = page.edge.process.memory_info().rss
        headers = b"".join(b"a%d: %s\r\n" % (number, b"x" * 65_000) for number in range(90)) + b"\r\n"
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", page.port), timeout=20) as client, suppress(ConnectionError):
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + headers)
                assert client.recv(1000) == b""
        assert page.edge.process.memory_info().rss < before + 20e6
        assert "Traceback" not in page.edge.stderr()


def test_flood_of_connections_is_limited_and_over_when_it_ends(
    fake: FakeServer, camera: MjpegCamera, tmp_path: Path
) -> None:
    with serving(fake, tmp_path, camera.url) as page:
        threads = page.edge.process.num_threads()
        clients = [socket.create_connection(("127.0.0.1", page.port), timeout=30) for _ in range(3 * MAX_CONNECTIONS)]
        wait_until(lambda: page.edge.process.num_threads() > threads + MAX_CONNECTIONS - 5)
        assert page.edge.process.num_threads() <= threads + MAX_CONNECTIONS + 1
        before = page.edge.lines()
        wait_until(lambda: page.edge.lines() > before + 20)

        def is_back() -> bool:
            try:
                return page.get("/").status_code == 200
            except requests.ConnectionError:
                return False

        wait_until(is_back)  # although none of them has left
        for client in clients:
            client.close()
        assert "Traceback" not in page.edge.stderr()


def test_memory_stays_flat_with_500_viewers_that_come_and_go(
    fake: FakeServer, camera: MjpegCamera, tmp_path: Path
) -> None:
    with serving(fake, tmp_path, camera.url) as page:

        def visit(times: int) -> tuple[float, int, int]:
            for number in range(times):
                with Viewer(page) as viewer:
                    assert viewer.status() == 200
                    viewer.picture()
                if number % 10 == 0:
                    page.figures()
            wait_until(lambda: page.connections() == 0)
            process = page.edge.process
            return process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()

        visit(50)
        before, after = visit(50), visit(500)
        assert after[0] < before[0] + 15
        assert after[1] <= before[1] + 5
        assert after[2] <= before[2] + 2


def test_run_ends_while_viewers_watch_and_stall(fake: FakeServer, camera: MjpegCamera, tmp_path: Path) -> None:
    with serving(fake, tmp_path, camera.url) as page, ExitStack() as viewers:
        watching, stalled = (viewers.enter_context(Viewer(page)) for _ in range(2))
        half = viewers.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=30))
        half.sendall(b"GET /stats")
        assert stalled.status() == 200
        watching.picture()
        page.edge.end(signal.SIGTERM)
        watching.file.read()  # to the end
        with pytest.raises(requests.ConnectionError):
            page.get("/")


def test_end_does_not_wait_for_an_incomplete_request() -> None:
    address = ("127.0.0.1", free_ports(1)[0])
    with ExitStack() as clients:
        with serve_page(address, {}, []):
            half = clients.enter_context(socket.create_connection(address, timeout=30))
            half.sendall(b"GET /stats")
            assert requests.get(f"http://127.0.0.1:{address[1]}/", timeout=20).status_code == 200
            begin = time.monotonic()
        assert time.monotonic() - begin < TIMEOUT_S / 2
        assert half.recv(1) == b""


@pytest.mark.parametrize("address_of", ["{}", "127.0.0.1:{}", "no.such.host.invalid:{}", "a..b:{}"])
def test_port_that_cannot_be_used(tmp_path: Path, address_of: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = address_of.format(taken.getsockname()[1])
        done = run("request.py", "--http", where, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(rf"request\.py: can't serve the web page on \S*{where}: .+\n", done.stderr)


def nginx_config(port: int, folder: Path, page: Page) -> str:
    """Return the lines of docs/security.md, with other addresses and paths, as a whole configuration."""
    text = (PROJECT / "docs" / "security.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"(?ms)^```nginx\n(.*?)^```", text)
    for old, new in (
        ("443 ssl", f"127.0.0.1:{port}"),
        ("127.0.0.1:9108", f"127.0.0.1:{page.port}"),
        ("/etc/nginx/page.users", str(folder / "page.users")),
    ):
        assert old in lines
        lines = lines.replace(old, new)
    lines = re.sub(r"(?m)^ *ssl_.*\n", "", lines)
    temporary = "".join(f"{kind}_temp_path temp;\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return f"pid nginx.pid;\nuser root;\nevents {{}}\nhttp {{\naccess_log off;\n{temporary}{lines}}}\n"


@needs("nginx", "openssl")
def test_nginx_of_the_documentation_asks_for_a_password(fake: FakeServer, camera: MjpegCamera, tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/opt/homebrew/bin")
    assert nginx
    with serving(fake, tmp_path, camera.url) as page:
        (port,) = free_ports(1)
        password = subprocess.run(
            ["openssl", "passwd", "-apr1", "secret"], capture_output=True, text=True, check=True, timeout=20
        ).stdout
        (tmp_path / "page.users").write_text(f"guard:{password}")
        (tmp_path / "nginx.conf").write_text(nginx_config(port, tmp_path, page))
        command = [nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "error.log"]
        with subprocess.Popen([*command, "-g", "daemon off;"]) as process:
            try:

                def get(path: str, **options: Any) -> requests.Response:
                    return requests.get(f"http://127.0.0.1:{port}/gate/{path}", timeout=20, **options)

                def is_up() -> bool:
                    assert process.poll() is None, (tmp_path / "error.log").read_text()
                    with socket.socket() as probe:
                        return probe.connect_ex(("127.0.0.1", port)) == 0

                wait_until(is_up)
                assert {get(path).status_code for path in ("", "stats.json", "cameras/1.jpg", "metrics")} == {401}
                login = ("guard", "secret")
                assert "Cameras" in get("", auth=login).text
                assert get("stats.json", auth=login).json()["cameras"][0]["name"] == camera.url
                with get("cameras/1.mjpg", auth=login, stream=True) as stream:
                    assert stream.raw.read(100_000).count(b"Content-Length") > 3
            finally:
                process.terminate()
                process.wait(timeout=20)
