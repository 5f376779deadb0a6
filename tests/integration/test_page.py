"""The web page in a real browser: what a person sees of two cameras, when one is lost, and when the device is gone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, sync_playwright
from playwright.sync_api import Page as Tab

from edge.web import MAX_VIEWERS
from tests.support.fake_server import FakeServer, fake_server
from tests.support.frames import decoded, jpeg
from tests.support.mjpeg_camera import MjpegCamera, mjpeg_camera
from tests.support.pages import BLUE, ORANGE, Page, is_of, serving, shades
from tests.support.programs import needs
from tests.support.scripts import wait_until

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="uses the programs of Linux"),
    needs("chromium"),
]

# root has no sandbox; the others keep Chromium from asking Google's servers.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
FRAMES = {1: shades(BLUE), 2: shades(ORANGE)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server("good") as server:
        yield server


@pytest.fixture
def cameras() -> Iterator[list[MjpegCamera]]:
    with mjpeg_camera(FRAMES[1], fps=10) as first, mjpeg_camera(FRAMES[2], fps=10) as second:
        yield [first, second]


@contextmanager
def opened(browser: Browser, page: Page, **options: Any) -> Iterator[Tab]:
    """Open the page. It must load nothing from elsewhere, and its policy must block nothing of it."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options)
    tab = context.new_page()
    asked: list[str] = []
    messages: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: pytest.fail(str(error)))
    tab.goto(page.url)
    try:
        yield tab
    finally:
        context.close()
    assert asked
    assert [url for url in asked if not url.startswith((f"{page.url}/", f"blob:{page.url}/", "data:"))] == []
    assert [each for each in messages if "Content Security Policy" in each] == []


def shows(image: Locator, frames: list[bytes]) -> bool:
    """Whether an image on the screen shows one of a camera's frames."""
    picture = cv2.resize(decoded(image.screenshot()), (320, 240), interpolation=cv2.INTER_AREA)
    return is_of(picture.astype("uint8"), frames)


def shown(tab: Tab, label: str, camera: int) -> float:
    """Return a figure of a camera, nan if it has none."""
    figure = tab.locator("article").nth(camera - 1).locator("dl div", has_text=label).locator("dd").text_content()
    return float((figure or "").replace(",", "").replace("–", "nan"))


def states(tab: Tab) -> list[str]:
    return tab.locator("article .state").all_text_contents()


def test_two_cameras_are_shown_and_their_figures_change(
    fake: FakeServer, browser: Browser, cameras: list[MjpegCamera], tmp_path: Path
) -> None:
    with serving(fake, tmp_path, *(each.url for each in cameras)) as page, opened(browser, page) as tab:
        wait_until(lambda: states(tab) == ["live", "live"])
        for number, camera in enumerate(cameras, start=1):
            check_camera(tab, number, camera.url)
        assert tab.locator("#servers").text_content() == f"resnet-18 on {fake.url}: responding"
        assert not tab.locator("#gone").is_visible()
        total = sum(each["models"][0]["answered"] for each in page.figures()["cameras"])
        assert shown(tab, "answered", 1) + shown(tab, "answered", 2) <= total


def check_camera(tab: Tab, number: int, name: str) -> None:
    """A camera of 10 frames a second has its own pictures, which change, and right figures."""
    image = tab.locator("article img").nth(number - 1)
    wait_until(lambda: shows(image, FRAMES[number]))
    assert not shows(image, FRAMES[3 - number])
    pictures = set[bytes]()
    wait_until(lambda: len(keep(image, pictures)) > 5)
    assert tab.locator("h2").nth(number - 1).text_content() == f"{number}. {name}"
    alternative = image.get_attribute("alt") or ""
    assert alternative.startswith(f"Camera {number}, {name}, live: ")
    assert " 1.00" in alternative  # the label of the fake server
    before = shown(tab, "answered", number)
    wait_until(lambda: shown(tab, "answered", number) > before + 10)
    wait_until(lambda: 8 < shown(tab, "FPS", number) < 12)
    assert 0 < shown(tab, "p50 ms", number) <= shown(tab, "p99 ms", number)
    assert (tab.locator("path.p99").nth(number - 1).get_attribute("d") or "").count("L") > 1


def keep(image: Locator, pictures: set[bytes]) -> set[bytes]:
    """Add what an image shows now."""
    pictures.add(image.screenshot())
    return pictures


def test_lost_camera_and_server_are_shown_and_their_return(
    fake: FakeServer, browser: Browser, cameras: list[MjpegCamera], tmp_path: Path
) -> None:
    urls = [each.url for each in cameras]
    with serving(fake, tmp_path, *urls, server_wait_s=3) as page, opened(browser, page) as tab:
        wait_until(lambda: states(tab) == ["live", "live"])
        cameras[1].mode = "cut"
        wait_until(lambda: states(tab)[0] == "live" and states(tab)[1].startswith("lost since "))
        wait_until(lambda: tab.locator("#news").text_content() == f"Camera 2 is {states(tab)[1]}.")
        assert tab.locator("article").nth(1).locator("img").is_visible()
        cameras[1].mode = "streaming"
        wait_until(lambda: states(tab) == ["live", "live"])

        fake.behaviour = "503"
        servers = tab.locator("#servers")
        wait_until(lambda: "not responding for " in (servers.text_content() or ""))
        assert "503" in (servers.text_content() or "")
        wait_until(lambda: any(cause.endswith(" dropped: buffer full") for cause in causes(tab)))
        wait_until(lambda: states(tab) == ["slow", "slow"])
        # The camera is still to be seen.
        pictures = set[bytes]()
        image = tab.locator("article img").first
        wait_until(lambda: len(keep(image, pictures)) > 3)
        fake.behaviour = "good"
        wait_until(lambda: (servers.text_content() or "").endswith(": responding"))
        wait_until(lambda: states(tab) == ["live", "live"])


def test_frozen_and_black_cameras_are_shown(fake: FakeServer, browser: Browser, tmp_path: Path) -> None:
    """A black one has noise: its frames are not the same."""
    images = [np.full((240, 320, 3), level, np.uint8) for level in (4, 7)]
    with (
        mjpeg_camera(FRAMES[1][:1], fps=10) as frozen,
        mjpeg_camera([jpeg(each) for each in images], fps=10) as black,
        serving(fake, tmp_path, frozen.url, black.url) as page,
        opened(browser, page) as tab,
    ):
        wait_until(lambda: states(tab) == ["frozen", "black"])
        problems = ["all its frames are the same", "its frames are black"]
        assert tab.locator("article .note").all_text_contents() == problems
        frozen.frames = FRAMES[1]
        wait_until(lambda: states(tab) == ["live", "black"])


def test_page_says_why_it_has_no_picture(
    fake: FakeServer, browser: Browser, cameras: list[MjpegCamera], tmp_path: Path
) -> None:
    cameras[1].mode = "cut"
    with serving(fake, tmp_path, cameras[0].url, is_waiting=False) as page, opened(browser, page) as tab:
        note = tab.locator(".note")
        wait_until(lambda: states(tab) == ["live"] and note.text_content() == "")
        viewers = [requests.get(f"{page.url}/cameras/1.mjpg", stream=True, timeout=20) for _ in range(MAX_VIEWERS)]
        wait_until(lambda: "8 others are watching" in (note.text_content() or ""))
        assert "has-old-image" in (tab.locator("article").get_attribute("class") or "")
        for viewer in viewers:
            viewer.close()
        wait_until(lambda: note.text_content() == "")
    (tmp_path / "lost").mkdir()
    with (
        serving(fake, tmp_path / "lost", cameras[1].url, is_waiting=False) as page,
        opened(browser, page) as tab,
    ):
        wait_until(lambda: states(tab) == ["not there"])
        wait_until(lambda: "can't open" in (tab.locator(".note").text_content() or ""))


def causes(tab: Tab) -> list[str]:
    return tab.locator(".causes li").all_text_contents()


def test_device_that_is_gone_is_shown_and_its_return(
    fake: FakeServer, browser: Browser, cameras: list[MjpegCamera], tmp_path: Path
) -> None:
    def is_gone(tab: Tab) -> bool:
        return "request.py has not responded since " in (tab.locator("#gone").text_content() or "")

    with serving(fake, tmp_path, cameras[0].url) as page, opened(browser, page) as tab:
        wait_until(lambda: states(tab) == ["live"])
        answered = shown(tab, "answered", 1)
        assert not is_gone(tab)
        page.edge.process.suspend()  # It hangs.
        wait_until(lambda: is_gone(tab))
        page.edge.process.resume()
        wait_until(lambda: not is_gone(tab) and shown(tab, "answered", 1) > answered)
        page.edge.process.kill()
        page.edge.process.wait()
        wait_until(lambda: is_gone(tab))
        assert tab.locator("#gone").is_visible()
        assert shown(tab, "answered", 1) > answered  # the last figures
        # It starts again, with another camera: nothing of the first one is left.
        (tmp_path / "again").mkdir()
        with serving(fake, tmp_path / "again", cameras[1].url, port=page.port):
            wait_until(lambda: not is_gone(tab) and states(tab) == ["live"])
            assert tab.locator("h2").text_content() == f"1. {cameras[1].url}"
            assert not shows(tab.locator("article img"), FRAMES[1])
            wait_until(lambda: shows(tab.locator("article img"), FRAMES[2]))


@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(320, 640, "light"), (390, 844, "dark"), (1280, 900, "light"), (3840, 2160, "dark")]
)
def test_page_has_no_barriers_on_any_screen(
    fake: FakeServer,
    browser: Browser,
    cameras: list[MjpegCamera],
    tmp_path: Path,
    width: int,
    height: int,
    scheme: str,
) -> None:
    """axe finds nothing: contrast, alternative texts, names, structure. Nothing is wider than the screen."""
    options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme, "bypass_csp": True}
    urls = [each.url for each in cameras]
    with serving(fake, tmp_path, *urls) as page, opened(browser, page, **options) as tab:
        wait_until(lambda: states(tab) == ["live", "live"])
        check(tab)
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.getAttribute('href')") == "cameras/1.mjpg"
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        cameras[1].mode = "cut"
        fake.behaviour = "503"
        wait_until(lambda: states(tab)[1].startswith("lost") and "not resp" in tab.locator("#servers").inner_text())
        check(tab)
        page.edge.process.kill()
        page.edge.process.wait()
        wait_until(lambda: tab.locator("#gone").is_visible())
        check(tab)


def check(tab: Tab) -> None:
    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
    width, screen = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= screen


def test_policy_blocks_what_comes_from_elsewhere(
    fake: FakeServer, browser: Browser, cameras: list[MjpegCamera], tmp_path: Path
) -> None:
    """Even if a fault of the page let a name or a label become part of it."""
    with serving(fake, tmp_path, cameras[0].url) as page:
        tab = browser.new_page()
        tab.goto(page.url)
        wait_until(lambda: states(tab) == ["live"])
        elsewhere = cameras[1]
        tab.locator("h1").evaluate(
            "(title, url) => { title.innerHTML = `<img src='${url}/img'><iframe src='${url}/frame'></iframe>`"
            " + `<link rel=stylesheet href='${url}/css'><img src=x onerror='document.title = 1'>`; }",
            elsewhere.url,
        )
        script = "url => { const s = document.createElement('script'); s.src = url; document.body.append(s); }"
        tab.locator("h1").evaluate("(title, url) => (" + script + ")(url)", f"{elsewhere.url}/script")
        failed = tab.evaluate("url => fetch(url).then(() => false, () => true)", f"{elsewhere.url}/fetch")
        tab.wait_for_timeout(500)  # for what must not happen
        assert failed
        assert tab.title().startswith("Cameras of ")
        assert elsewhere.asked == 0
        tab.close()
