"""README.md and docs/: their commands as they stand there, in a folder that has the project where README.md says."""

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from archive.downloads import TRAINED
from demo.node import PROJECT, java_environment
from tests.support.archives import Archives
from tests.support.frames import CATS, Pixels, frames_of, jpeg
from tests.support.networks import RANDOM
from tests.support.programs import ISOLATED, needs
from tests.support.project_copy import copy_project, shorten_clip
from tests.support.scripts import Output, json_lines, outputs, summary

README = (PROJECT / "README.md").read_text(encoding="utf-8")
HERE = "examples/image_classifier/near_real_time_video"

CORES = 3  # as Java sees it
SHORT = 57  # frames of the clip for all that is not a recipe: 2.3 s instead of 15; without a gap at the cut
SHORTEN = f"cp short.mp4 {HERE}/data/sample_video.mp4"
DESCRIBE = (
    'curl --fail --silent http://127.0.0.1:8081/models/resnet-18 -H "Authorization: Bearer $(python -c '
    '\'import json; print(json.load(open("key_file.json"))["management"]["key"])\')"'
)

BAD_REQUESTS = 60
BAD_JSON = f"""
import http.client, json
token = json.load(open("key_file.json"))["inference"]["key"]
headers = {{"Authorization": f"Bearer {{token}}", "Content-Type": "application/json"}}
for number in range({BAD_REQUESTS}):
    connection = http.client.HTTPConnection("127.0.0.1:8080", timeout=60)
    connection.request("POST", "/predictions/resnet-18", " " * number, headers)
    assert connection.getresponse().status == 400
"""
KILL_WORKER = """
import json, os, signal, sys
for worker in json.load(sys.stdin)[0]["workers"]:
    os.kill(int(worker["pid"]), signal.SIGKILL)
"""


def commands(section: str, page: str = "README.md") -> list[str]:
    """Return the lines of a section's bash blocks."""
    found, heading, fence = [], "", None
    for line in (PROJECT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
        elif fence is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif fence == "bash" and heading == section and line:
            found.append(line)
    return found


def shown() -> dict[str, float]:
    """Return the first prediction that README.md shows."""
    (prediction,) = re.findall(r"(?ms)^```\nWith [^\n]*\n(.*?)```", README)
    return dict(json.loads(prediction))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the project in it, and a shorter clip beside it."""
    copy_project(tmp_path / HERE)
    shorten_clip(tmp_path / "short.mp4", SHORT)
    return tmp_path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Iterator[dict[str, str]]:
    """The environment of a user who activated the venv and has the weights of all models in torch's cache.

    The weights are random, as the real ones cannot be had everywhere.
    """
    cache = tmp_path_factory.mktemp("torch")
    (cache / "hub" / "checkpoints").mkdir(parents=True)
    for model in RANDOM:
        name = TRAINED[model].url.rpartition("/")[2]
        (cache / "hub" / "checkpoints" / name).symlink_to(archives.weights(model))
    with tempfile.TemporaryDirectory(prefix="ts-") as scratch:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        yield {
            **os.environ,
            **java_environment(),
            "JAVA_TOOL_OPTIONS": f"-XX:ActiveProcessorCount={CORES}",
            "PATH": path,
            "TORCH_HOME": str(cache),
            "TMPDIR": scratch,
            "TEMP": scratch,
        }


def type_in(steps: Mapping[str, str], folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Type commands, each of which must succeed; return by their names what each printed on standard output."""
    lines = [f"{{ {line}\n}} > '{name}.out' 2> '{name}.err'" for name, line in steps.items()]
    script = "\n".join(["set -e", "ip link set lo up", *lines])
    done = subprocess.run([*ISOLATED, "bash", "-c", script], cwd=folder, env=environment, timeout=450, check=False)
    printed = {name: folder / f"{name}.out" for name in steps if (folder / f"{name}.out").exists()}
    if done.returncode:
        name, path = list(printed.items())[-1]
        pytest.fail(f"{steps[name]}\n{path.with_suffix('.err').read_text()}")
    return {name: path.read_text() for name, path in printed.items()}


@pytest.mark.slow
@needs("unshare", "ip", "curl")
def test_recipes_as_written(workplace: Path, environment: dict[str, str], clip: list[Pixels]) -> None:
    """Both in real time, and all that the README does beside them."""
    (workplace / "frame.jpg").write_bytes(jpeg(clip[0]))
    build, start, stream, stop = commands("TorchServe batches")
    configure, build_2, start_2, stream_2, stream_10, stop_2, unset = commands("The client batches")
    (curl,) = commands("The HTTP interface", "docs/developing.md")
    (renew,) = commands("Keys", "docs/security.md")
    (check,) = commands("Before you stream: --check", "docs/cameras-and-outputs.md")
    (write,) = commands("Predictions on the terminal", "docs/cameras-and-outputs.md")
    keys = "cat key_file.json"
    first = {"build": build, "start": start, "stream": stream, "describe": DESCRIBE, "curl": curl}
    first |= {"old keys": keys, "renew": renew, "new keys": keys, "curl again": curl, "listeners": "ss -ltnH"}
    second = {"configure": configure, "build 2": build_2, "start 2": start_2, "stream 2": stream_2}
    second |= {"describe 2": DESCRIBE, "keys 2": keys, "listeners 2": "ss -ltnH"}
    short = {"shorten": SHORTEN, "check": check, "write": write, "stream 10": stream_10}
    last = {"stop 2": stop_2, "unset": unset, "left": 'echo "${TS_CONFIG_FILE-nothing}"'}
    printed = type_in(first | {"stop": stop} | second | short | last, workplace, environment)
    assert printed["left"] == "nothing\n"

    description, answer = json.loads(printed["describe"])[0], json.loads(printed["curl"])
    found = outputs(printed["stream"])
    assert_shows_the_clip(found, batch_size=4)
    assert_counts_add_up(workplace / "stream.err")
    assert all(len(answer) == 5 for output in found for answer in output.answers)
    assert (description["batchSize"], description["maxBatchDelay"]) == (4, 5)
    assert len(description["workers"]) == CORES, "one for each core"
    assert len(answer) == 5
    old, new = (json.loads(printed[step])["inference"]["key"] for step in ("old keys", "new keys"))
    assert old != new
    assert json.loads(printed["curl again"]) == answer

    # The archive's own settings hold, though the first recipe was run in the same folder.
    batches, description = outputs(printed["stream 2"]), json.loads(printed["describe 2"])[0]
    assert_shows_the_clip(batches, batch_size=4)
    assert_counts_add_up(workplace / "stream 2.err")
    assert all(len(output.answers[0]) == 4 for output in batches)
    assert (description["batchSize"], description["maxBatchDelay"]) == (1, 1)
    assert len(description["workers"]) == CORES
    tens = outputs(printed["stream 10"])
    assert_shows_the_clip(tens, batch_size=10, frames=SHORT)
    assert [len(output.answers[0]) for output in tens] == [10] * 3
    assert [line.split()[0] for line in printed["check"].splitlines()] == ["ok"] * 6
    assert len(json_lines(workplace / "results.jsonl")) == len(frames_of(workplace / "labelled.mp4")) == SHORT

    for started, listeners in (("start", "listeners"), ("start 2", "listeners 2")):
        assert "Allowed Urls: [none]" in printed[started]
        listening = {line.split()[3].rpartition(":")[0] for line in printed[listeners].splitlines()}
        assert listening <= {"127.0.0.1", "[::ffff:127.0.0.1]"}
        assert len(printed[listeners].splitlines()) == 5
    key_steps = ("old keys", "new keys", "keys 2")
    secrets = {key["key"] for step in key_steps for key in json.loads(printed[step]).values()}
    assert len(secrets) == 3 + 1 + 3
    shown_on_purpose = {workplace / f"{step}.out" for step in key_steps} | {workplace / "key_file.json"}
    files = [path for path in workplace.rglob("*") if path.is_file() and path not in shown_on_purpose]
    names = {path.name for path in files}
    assert names >= {"ts_log.log", "model_log.log", "access_log.log", "resnet-18.mar", "start.err"}
    assert any(path.suffix == ".cfg" for path in files), "TorchServe writes snapshots"
    assert [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)] == []


@needs("unshare", "ip")
def test_efficientnet_prints_what_the_readme_shows(workplace: Path, environment: dict[str, str]) -> None:
    build, start, stream, *stop = commands("The weights can't be downloaded", "docs/troubleshooting.md")
    steps = {"shorten": SHORTEN, "build": build, "start": start, "stream": stream, "stop": "; ".join(stop)}
    found = outputs(type_in(steps, workplace, environment)["stream"])
    assert_shows_the_clip(found, batch_size=4, frames=SHORT)
    assert all(next(iter(answer)) in CATS for output in found for answer in output.answers)
    assert shown() == pytest.approx(found[0].answers[0], abs=1e-3)


@pytest.mark.slow
@needs("unshare", "ip")
def test_three_models_on_one_camera(workplace: Path, environment: dict[str, str]) -> None:
    *build, start, stream, stop = commands("Several tasks on one camera")
    steps = {"shorten": SHORTEN, "build": "; ".join(build), "start": start, "stream": stream, "stop": stop}
    one_core = {"JAVA_TOOL_OPTIONS": "-XX:ActiveProcessorCount=1"}  # Keypoint R-CNN takes 2 GB in each worker.
    printed = type_in(steps, workplace, environment | one_core)
    rows = summary((workplace / "stream.err").read_text())
    assert [row["model"] for row in rows.values()] == ["resnet-18", "keypointrcnn-resnet50-fpn", "r3d-18"]
    counts = {row["model"]: (int(row["captured"]), int(row["answered"])) for row in rows.values()}
    assert [captured for captured, _ in counts.values()] == [SHORT, SHORT, pytest.approx(SHORT * 15 / 25, abs=2)]
    assert all(answered > 0 for _, answered in counts.values())
    assert counts["keypointrcnn-resnet50-fpn"][1] < counts["resnet-18"][1], "a slow model does not delay the others"
    assert set(re.findall(r"(?m)^([\w-]+)\nWith Batch Size 4", printed["stream"])) == set(counts)
    assert len(frames_of(workplace / "tasks.mp4")) == SHORT


@pytest.mark.slow
@needs("unshare", "ip", "curl")
def test_server_that_runs_for_weeks(workplace: Path, environment: dict[str, str]) -> None:
    """Its logs stay small and complete, and a worker returns though all temporary files of the system are deleted."""
    build, start, stream, stop = commands("TorchServe batches")
    (export,) = re.findall(r"(?m)^mkdir -p ts-tmp && export TEMP=.* TMPDIR=\S+", README)
    system = workplace / "tmp"
    system.mkdir()
    environment |= {"TMPDIR": str(system), "TEMP": str(system), "JAVA_TOOL_OPTIONS": "-XX:ActiveProcessorCount=1"}
    del environment["TS_ACCESS_LOG"]
    # Logs of 10 KB instead of 10 MB.
    config = workplace / HERE / "log4j2.xml"
    config.write_text(config.read_text().replace('"10 MB"', '"10 KB"'))
    (workplace / "bad_json.py").write_text(BAD_JSON)
    (workplace / "kill_worker.py").write_text(KILL_WORKER)
    sizes = "wc -c start.out logs/*.log"
    steps = {"shorten": SHORTEN, "build": build, "export": export, "start": start, "stream": stream, "sizes": sizes}
    steps |= {"stream again": stream, "sizes again": sizes, "bad JSON": "python bad_json.py"}
    steps |= {"clean": f"find {system} -mindepth 1 -delete", "kill": f"{DESCRIBE} | python kill_worker.py"}
    steps |= {"stream at last": stream, "stop": stop}
    printed = type_in(steps, workplace, environment)

    # A request that succeeds leaves no line; an access log is only written if somebody wants it.
    assert printed["sizes"] == printed["sizes again"]
    assert "0 logs/access_log.log" in printed["sizes"]
    # Errors are kept, in files of limited size, of which none overwrites another.
    logs = sorted((workplace / "logs").glob("model_log.*"))
    assert 4 < len(logs) <= 6
    assert all(path.stat().st_size <= 11_000 for path in logs)
    text = "".join(
        (gzip.decompress(each) if each[:1] == b"\x1f" else each).decode() for each in map(Path.read_bytes, logs)
    )
    found = sorted({int(number) for number in re.findall(r"JSONDecodeError: .* \(char (\d+)\)", text)})
    assert found == [*range(BAD_REQUESTS - len(found), BAD_REQUESTS)], "the last ones, without a gap"
    assert 10 < len(found) < BAD_REQUESTS
    assert "JSONDecodeError" in printed["start"], "the terminal shows errors too"
    # The worker died, and came back without any of the system's temporary files.
    assert list(system.iterdir()) == []
    assert "Auto recovery succeeded" in (workplace / "logs" / "ts_log.log").read_text()
    assert_counts_add_up(workplace / "stream at last.err", SHORT)
    assert printed["stop"] == "TorchServe has stopped.\n"


def assert_shows_the_clip(found: list[Output], batch_size: int, frames: int = 375) -> None:
    last = [frames] if frames % 20 else []
    assert [output.number for output in found] == [*range(20, frames + 1, 20), *last]
    assert {output.batch_size for output in found} == {batch_size}


def assert_counts_add_up(errors: Path, frames: int = 375) -> None:
    """Every frame was answered, and the rate is that of a file of 25 fps: the first at once, the last after 14.96 s."""
    (row,) = summary(errors.read_text()).values()
    assert (row["captured"], row["answered"]) == (str(frames), str(frames))
    assert 0 < float(row["FPS"]) <= 25.1
