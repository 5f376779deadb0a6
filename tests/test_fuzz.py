"""handler.py in this process, against thousands of bodies by hypothesis and by atheris."""

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.node import PROJECT
from tests.fuzz_handler import Subject, seeds
from tests.scripts import archive


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Subject]:
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("subject")
    archive("--weights", weights, cwd=folder)
    yield Subject(folder / "model_store" / "resnet-18.mar")
    torch.set_num_threads(threads)


@st.composite
def changed_files(draw: st.DrawFn) -> bytes:
    """A file of some format, a few of its bytes changed, cut off or doubled."""
    file = bytearray(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, len(file) - 1))
        file[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    start, end = sorted([draw(st.integers(0, len(file))), draw(st.integers(0, len(file)))])
    match draw(st.sampled_from(["whole", "cut", "end", "doubled"])):
        case "cut":
            del file[end:]
        case "end":
            del file[:start]
        case "doubled":
            file[start:start] = file[start:end]
    return bytes(file)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
FRAMES = st.binary() | changed_files()
BATCHES = st.dictionaries(st.text(), JSON_VALUES | FRAMES.map(lambda file: base64.b64encode(file).decode()))


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=FRAMES.map(bytearray) | JSON_VALUES | BATCHES)
def test_any_body_costs_only_itself(subject: Subject, body: Any) -> None:
    subject.try_body(body)


def test_fuzzing_reaches_the_decoders(subject: Subject) -> None:
    """What the seeds themselves get: else the fuzzers would stay at the door."""
    found = [subject.try_body(bytearray(file)) for file in seeds()]
    assert found.count("answered") == 6
    assert len([reason for reason in found if reason.startswith("not an image")]) == 5


@pytest.mark.skipif(sys.platform != "linux" or sys.version_info < (3, 11), reason="atheris has no wheel for it")
def test_atheris_finds_no_body_that_hurts(tmp_path: Path, weights: Path) -> None:
    archive("--weights", weights, cwd=tmp_path)
    mar = tmp_path / "model_store" / "resnet-18.mar"
    command = [sys.executable, "-m", "tests.fuzz_handler", str(mar), "-runs=5000", "-max_len=4096", "-seed=5"]
    command += [f"-artifact_prefix={tmp_path}/", "-rss_limit_mb=4000"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 5000 runs" in done.stderr
