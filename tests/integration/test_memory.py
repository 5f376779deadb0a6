"""handler.py in a process of its own: what large images and refused bodies take of the memory is given back."""

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.support.archives import unpacked_archive
from tests.support.frames import as_json, encoded
from tests.support.fuzz_handler import Subject
from tests.support.hostile import BAD_JSON, as_torchserve_parses, excesses, many_chunks

MEGABYTES = 150


def growth(folder: Path) -> tuple[float, float]:
    """Return by how many megabytes a process grows with the largest images that are taken, and with refused bodies.

    The images are decoded side by side and among small ones, which keep the memory behind them from being given back.
    The collector of reference cycles is off: it would hide what is kept.
    """
    gc.disable()
    subject = Subject(folder)
    few, many = (as_json(*[many_chunks(b"iTXt", 4)] * count) for count in (8, 60))
    png, webp = (encoded(Image.new("RGB", (7680, 4320), "red"), kind) for kind in ("PNG", "WEBP"))

    def answered(bodies: list[Any]) -> float:
        subject.model.answers(bodies)
        assert set(subject.model.statuses()) == {200}
        return psutil.Process().memory_info().rss / 1e6

    def refused() -> float:
        for text, _ in [*BAD_JSON.values(), *excesses().values()]:
            subject.try_body(as_torchserve_parses(text))
        return psutil.Process().memory_info().rss / 1e6

    small = [answered([few, many]) for _ in range(2)][-1]
    large = max(answered([png, few, webp, few] * 2) for _ in range(8))
    first = refused()
    last = [refused() for _ in range(2)][-1]
    return large - small, last - first


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    folder = unpacked_archive(tmp_path)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        of_images, of_refused = process.submit(growth, folder).result(timeout=600)
    assert of_images < MEGABYTES
    assert of_refused < MEGABYTES
