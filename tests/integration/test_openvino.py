"""Archives for OpenVINO: int8, clips, bf16, and a processor without bf16. test_handler.py has the answers in fp32."""

import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

import create_mar_file
from archive import conversion
from demo.node import PROJECT, torchserve
from server.runtime import has_bf16
from tests.support.archives import Archives
from tests.support.frames import CLIP, Pixels, as_json, jpeg, write_video
from tests.support.in_process import Model
from tests.support.networks import (
    ACTIVITIES,
    assert_equals_reference,
    random_r3d18,
    random_resnet18,
    reference,
    reference_activity,
)
from tests.support.nodes import post
from tests.support.scripts import run

EFFICIENTNET = ["--model", "efficientnet-lite0", "--runtime", "openvino"]
INT8 = ["--precision", "int8", "--calibrate"]
AGREEMENT = r"int8 has the same first label as fp32 for (\d+\.\d) % of 20 other frames; its probability changes by "
AGREEMENT += r"(0\.\d{3}) \(median\), at most (0\.\d{3})"


@pytest.fixture
def few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration with less: some seconds instead of half a minute."""
    monkeypatch.setattr(conversion, "MAX_CLIPS", 20)


def photos() -> list[Pixels]:
    """Return another clip than the sample clip: a camera that moves over photographs, 720 x 1280 pixels."""
    frames = []
    for photo in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket()):
        enlarged = cv2.resize(photo[:, :, ::-1], (1600, 1000), interpolation=cv2.INTER_CUBIC)
        frames += [np.ascontiguousarray(enlarged[step : step + 720, step : step + 1280]) for step in range(0, 270, 15)]
    return frames


@pytest.mark.slow
@pytest.mark.usefixtures("own_directory", "few_clips")
def test_int8_has_the_labels_of_fp32_on_another_clip(capsys: pytest.CaptureFixture[str], archives: Archives) -> None:
    """It is calibrated with half of the sample clip. Large frames are decoded at a reduced size."""
    assert create_mar_file.main([*EFFICIENTNET, *INT8, str(CLIP)]) == 0
    found = re.search(rf"(?m)^{AGREEMENT}$", capsys.readouterr().out)
    assert found
    share, median, largest = map(float, found.groups())
    assert share >= 95
    assert 0 < median <= largest < 0.2
    exact = Model(archives.build("efficientnet-lite0"))
    quantized = Model(Path("model_store", "efficientnet-lite0.mar"))
    assert quantized.handler.min_edge == 256
    images = [jpeg(frame) for frame in photos()]
    [expected], [answers] = exact.answers([as_json(*images)]), quantized.answers([as_json(*images)])
    pairs = list(zip(expected, answers, strict=True))
    assert sum(next(iter(before)) == next(iter(after)) for before, after in pairs) >= 0.95 * len(images)
    changes = [abs(after.get(label, 0.0) - value) for before, after in pairs for label, value in before.items()]
    assert 0.0005 < np.median(changes) < 0.03, "it is int8, and nearly as exact"


@pytest.mark.slow
@pytest.mark.usefixtures("own_directory", "few_clips")
def test_int8_that_differs_from_fp32_is_written_by_force_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MIN_AGREEMENT", 1.01)
    assert create_mar_file.main([*EFFICIENTNET, *INT8, str(CLIP)]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("create_mar_file.py: int8 has")]
    assert re.search(
        rf"{AGREEMENT}; expected the same label for 95 %: calibrate with more videos of your cameras", line
    )
    assert not Path("model_store").exists()
    assert create_mar_file.main([*EFFICIENTNET, *INT8, str(CLIP), "--force"]) == 0
    assert Path("model_store", "efficientnet-lite0.mar").exists()


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize(
    ("video", "problem"),
    [
        ("missing.mp4", "no such file"),
        ("text.mp4", "is no video that OpenCV can read"),
        ("short.mp4", "too short"),
        ("image.jpg", "too short"),
    ],
)
def test_what_can_not_calibrate_is_one_line(
    capsys: pytest.CaptureFixture[str], clip: list[Pixels], video: str, problem: str
) -> None:
    Path("text.mp4").write_text("no video")
    write_video(Path("short.mp4"), clip[:19], 25)
    Path("image.jpg").write_bytes(jpeg(clip[0]))
    assert create_mar_file.main([*EFFICIENTNET, *INT8, video]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("create_mar_file.py: ")
    assert video in error
    assert problem in error
    assert not Path("model_store").exists()


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_missing_package_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert create_mar_file.main([*EFFICIENTNET, *INT8, str(CLIP)]) == 1
    assert "pip install '<project folder>[server,openvino]'" in capsys.readouterr().err.splitlines()[-1]


def test_archive_holds_the_converted_network(archives: Archives) -> None:
    with zipfile.ZipFile(archives.build("resnet-18", "--runtime", "openvino")) as mar:
        names = set(mar.namelist())
        network = mar.read("resnet-18.xml").decode()
    assert {"resnet-18.xml", "resnet-18.bin"} < names
    assert "resnet-18.pth" not in names
    assert str(PROJECT) not in network


@pytest.mark.slow
def test_clips_are_answered_as_torchvision_would(archives: Archives, clip: list[Pixels]) -> None:
    images = [jpeg(frame) for frame in clip[: 16 * 9 : 9]]
    [answers] = Model(archives.build("r3d-18", "--runtime", "openvino"), 1).answers([as_json(*images)])
    expected = reference_activity(random_r3d18(), [Image.open(io.BytesIO(image)) for image in images])
    for answer in answers:
        assert_equals_reference(answer, expected, ACTIVITIES)


def test_bf16_is_nearly_as_exact(archives: Archives, clip: list[Pixels]) -> None:
    model = Model(archives.build("resnet-18", "--runtime", "openvino", "--precision", "bf16"))
    differences = []
    for frame in clip[::45]:
        [answer] = model.answers([image := jpeg(frame)])
        expected = reference(random_resnet18(1000), Image.open(io.BytesIO(image))).topk(5).values.tolist()
        differences += [abs(after - before) for after, before in zip(answer.values(), expected, strict=True)]
    assert max(differences) < 0.05
    assert max(differences) > 1e-5 or not has_bf16()


def test_a_processor_without_bf16_runs_fp32(archives: Archives, clip: list[Pixels], tmp_path: Path) -> None:
    """oneDNN obeys this variable. Without bf16 it would emulate it, at an eighth of the speed."""
    no_bf16 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    archives.store(tmp_path, archives.build("resnet-18", "--precision", "bf16"))
    image = jpeg(clip[0])
    expected = reference(random_resnet18(1000), Image.open(io.BytesIO(image)))
    config = (PROJECT / "config.properties").read_text() + "\ndefault_workers_per_model=1\n"
    with torchserve(tmp_path, ["resnet-18"], config, no_bf16) as node:
        response = post(node, "resnet-18", image)
    assert response.headers["X-Model-Runtime"] == "pytorch fp32"
    answer = response.json()
    assert_equals_reference(answer, expected)
    # bf16 would be off by more.
    assert list(answer.values()) == pytest.approx(expected.topk(5).values.tolist(), abs=1e-5)
    log = (tmp_path / "logs" / "model_log.log").read_text()
    assert log.count("this processor has no bf16: the network runs in fp32") == 1
    done = run(
        "create_mar_file.py", "--precision", "bf16", "--weights", archives.weights(), cwd=tmp_path, environment=no_bf16
    )
    assert done.returncode == 0
    text = "this processor has no bf16: a worker on one like it runs the network in fp32"
    assert done.stderr == f"create_mar_file.py: {text}\n"


def test_worker_without_openvino_does_not_import_it() -> None:
    """TorchServe's BaseHandler would, and with it PyTorch's compilers."""
    code = "import handler, sys; print('openvino' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_nothing_is_reported_to_intel() -> None:
    """In a process of its own: NNCF reports nothing where there is pytest."""
    code = "import server.runtime, nncf.telemetry.wrapper as nncf, openvino.tools.ovc.telemetry_utils as openvino; "
    code += "print(type(nncf.telemetry).__name__, openvino.tm.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "MagicMock openvino.tools.ovc.telemetry_stub"
