"""handler.py in this process, with a model of each task, against thousands of bodies by hypothesis."""

import base64
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fuzz_handler import Subject, seeds


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


@settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=FRAMES.map(bytearray) | JSON_VALUES | BATCHES)
def test_any_body_costs_only_itself(subject: Subject, body: Any) -> None:
    subject.try_body(body)


def test_fuzzing_reaches_the_decoders(subject: Subject) -> None:
    """What the seeds themselves get: else the fuzzers would stay at the door."""
    found = [subject.try_body(bytearray(file)) for file in seeds()]
    assert found.count("answered") == 6
    assert len([reason for reason in found if reason.startswith("not an image")]) == 5
