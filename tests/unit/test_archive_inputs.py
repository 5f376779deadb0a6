"""create_mar_file.py: wrong input is refused in one line, before anything is written."""

import os
import pickle
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import create_mar_file
from demo.node import PROJECT
from tests.support.networks import random_resnet18

pytestmark = pytest.mark.usefixtures("own_directory")


@pytest.fixture
def old_archive(tmp_path: Path) -> Iterator[Path]:
    """An archive that is there already; it must be left as it was."""
    path = tmp_path / "model_store" / "resnet-18.mar"
    path.parent.mkdir()
    path.write_bytes(b"the archive of yesterday")
    yield path
    assert path.stat().st_size == len(b"the archive of yesterday")
    assert path.read_bytes() == b"the archive of yesterday"
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_written_before_the_inputs_are_checked(tmp_path: Path) -> None:
    assert create_mar_file.main(["--weights", "missing.pth"]) == 1
    assert list(tmp_path.iterdir()) == []


class Malicious:
    """Unpickled with code allowed, it would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


def write_bad_weights(kind: str, path: Path) -> None:
    if kind == "garbage":
        path.write_bytes(b"\x00\x01 no weights at all")
    elif kind == "truncated":
        torch.save(random_resnet18(1000).state_dict(), path)
        path.write_bytes(path.read_bytes()[:1_000_000])
    elif kind == "code":
        path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    elif kind == "module":
        torch.save(random_resnet18(1000), path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "another network":
        torch.save(torch.nn.Linear(3, 4).state_dict(), path)
    elif kind == "another head":
        torch.save(random_resnet18(7).state_dict(), path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no weights file"),
        ("garbage", "can't load"),
        ("truncated", "can't load"),
        ("code", "can't load"),
        ("module", "can't load"),
        ("tensor", "holds a Tensor: expected what torch.save(model.state_dict(), FILE) writes"),
        ("another network", "does not fit resnet-18 with 1000 classes"),
        ("another head", "pass --labels FILE with as many labels as the weights have, 7"),
    ],
)
@pytest.mark.usefixtures("old_archive")
def test_bad_weights_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    write_bad_weights(kind, tmp_path / "weights.pth")
    assert create_mar_file.main(["--weights", "weights.pth"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "weights.pth" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\ndog\ncat\n", "line 3: the label 'cat' is there already"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("\n", "is empty"),
        (None, "can't read the labels"),
        ("cat\ndog\n", "does not fit resnet-18 with 2 classes"),
    ],
)
@pytest.mark.usefixtures("old_archive")
def test_bad_labels_are_refused(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "labels.txt").write_text(text)
    assert create_mar_file.main(["--weights", str(weights), "--labels", "labels.txt"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_labels_without_weights_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        create_mar_file.main(["--labels", "labels.txt"])
    assert "--labels goes with --weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--min-score 0.5", "--min-score goes with pose estimation: resnet-18 finds no persons"),
        ("--min-score 0 --model r3d-18", "--min-score goes with pose estimation: r3d-18 finds no persons"),
        ("--min-score 1.1 --model keypointrcnn-resnet50-fpn", "expected a number from 0 to 1, got '1.1'"),
        ("--min-score -0.1 --model keypointrcnn-resnet50-fpn", "expected a number from 0 to 1, got '-0.1'"),
        ("--min-score nan --model keypointrcnn-resnet50-fpn", "expected a number from 0 to 1, got 'nan'"),
        ("--min-score most --model keypointrcnn-resnet50-fpn", "expected a number from 0 to 1, got 'most'"),
        ("--precision bf16 --model keypointrcnn-resnet50-fpn", "it is not exact for pixels"),
        ("--runtime openvino --model keypointrcnn-resnet50-fpn", "it can't convert its network"),
        ("--precision int8", "goes with --runtime openvino and --calibrate VIDEO"),
        ("--precision int8 --runtime openvino", "goes with --runtime openvino and --calibrate VIDEO"),
        ("--precision int8 --calibrate a.mp4", "goes with --runtime openvino and --calibrate VIDEO"),
        ("--runtime openvino --calibrate a.mp4", "--calibrate goes with --precision int8"),
        ("--runtime openvino --force", "--force goes with --precision int8"),
        ("--calibrate rtsp://10.0.0.7/live", "expected a video file, got an address"),
        ("--model pose", "invalid choice: 'pose'"),
        ("--max-frames 0", "--max-frames of resnet-18: expected a number from 1 to 256, got 0"),
        ("--max-frames 257", "--max-frames of resnet-18: expected a number from 1 to 256, got 257"),
        ("--max-frames 17 --model keypointrcnn-resnet50-fpn", "expected a number from 1 to 16, got 17"),
        ("--max-frames 15 --model r3d-18", "--max-frames of r3d-18: expected a number from 16 to 256, got 15"),
        ("--max-frames many", "invalid int value: 'many'"),
    ],
)
def test_flags_that_do_not_fit_the_model_are_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        create_mar_file.main(flags.split())
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("model", "labels"), [("keypointrcnn-resnet50-fpn", 17), ("r3d-18", 400)])
def test_weights_of_another_model_are_refused(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], model: str, labels: int
) -> None:
    assert create_mar_file.main(["--model", model, "--weights", str(weights)]) == 1
    error = capsys.readouterr().err
    kind = "keypoints" if model.startswith("keypoint") else "classes"
    assert f"does not fit {model} with {labels} {kind}" in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_unwritable_model_store_is_one_line(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_store").write_text("a file where the folder should be")
    assert create_mar_file.main(["--weights", str(weights)]) == 1
    error = capsys.readouterr().err
    assert "model_store" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("package", ["torch", "yaml", "torchvision.models"])
def test_edge_device_without_the_packages_of_a_server_is_one_line(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.delitem(sys.modules, "server.models")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"create_mar_file.py: .*{package}.*: install the packages of a server, pip "):
        runpy.run_path(str(PROJECT / "create_mar_file.py"), run_name="__main__")
