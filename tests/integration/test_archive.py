"""create_mar_file.py: what is in the archive, and what a user gets when there can be none."""

import argparse
import hashlib
import http.server
import json
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import create_mar_file
from archive.downloads import TIMEOUT_S, download_weights
from archive.errors import DownloadError
from demo.node import PROJECT, free_ports
from server.models import MODELS
from tests.support.archives import Archives
from tests.support.frames import Pixels, jpeg
from tests.support.in_process import Model
from tests.support.networks import random_r3d18
from tests.support.scripts import run

pytestmark = pytest.mark.usefixtures("own_directory")


def test_archive_holds_what_the_answers_depend_on(archives: Archives, weights: Path) -> None:
    archive = archives.build("resnet-18")
    assert [path.name for path in archive.parent.iterdir()] == ["resnet-18.mar"]
    with zipfile.ZipFile(archive) as mar:
        assert {entry.compress_type for entry in mar.infolist()} == {zipfile.ZIP_STORED}
        config = yaml.safe_load(mar.read("model-config.yaml"))
        labels = json.loads(mar.read("index_to_name.json"))
        manifest = json.loads(mar.read("MAR-INF/MANIFEST.json"))["model"]
        with mar.open("resnet-18.pth") as file:
            archived = torch.load(file, weights_only=True)
    assert config == {
        "handler": {
            "network": "resnet-18",
            "top_k": 5,
            "max_frames": 256,
            "max_pixels": 4 * 7680 * 4320,
            "threads": 1,
            "runtime": "pytorch",
            "precision": "fp32",
            "min_edge": 0,
            "preprocessing": {
                "resize": 256,
                "crop": 224,
                "interpolation": "bilinear",
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
            },
        }
    }
    assert len(labels) == 1000
    assert [labels["281"], labels["282"], labels["285"]] == ["tabby", "tiger_cat", "Egyptian_cat"]
    assert not any(" " in label for label in labels.values())
    assert (manifest["modelName"], manifest["modelVersion"]) == ("resnet-18", "1.0")
    expected = torch.load(weights, weights_only=True)
    assert archived.keys() == expected.keys()
    assert all(torch.equal(archived[key], expected[key]) for key in expected)


@pytest.mark.parametrize("model", list(MODELS))
def test_archive_holds_exactly_these_files(archives: Archives, model: str) -> None:
    with zipfile.ZipFile(archives.build(model)) as mar:
        names = {name for name in mar.namelist() if not name.endswith("/")}
    code = {f"server/{path.name}" for path in (PROJECT / "server").glob("*.py")}
    assert len(code) == 6
    settings = {"index_to_name.json", "model-config.yaml", "MAR-INF/MANIFEST.json"}
    assert names == {"handler.py", f"{model}.pth"} | settings | code


def test_archive_has_no_bytecode(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running the handler, for example in tests, creates server/__pycache__."""
    shutil.copytree(PROJECT / "server", tmp_path / "project" / "server")
    shutil.copy(PROJECT / "handler.py", tmp_path / "project")
    (tmp_path / "project" / "server" / "__pycache__").mkdir(exist_ok=True)
    (tmp_path / "project" / "server" / "__pycache__" / "tasks.cpython-39.pyc").write_bytes(b"old")
    monkeypatch.setattr(create_mar_file, "HERE", tmp_path / "project")
    assert create_mar_file.main(["--weights", str(weights)]) == 0
    with zipfile.ZipFile(tmp_path / "model_store" / "resnet-18.mar") as mar:
        assert "server/tasks.py" in mar.namelist()
        assert [name for name in mar.namelist() if "pyc" in name] == []


def test_pose_archive_has_min_score_the_sizes_of_training_and_time(archives: Archives) -> None:
    with zipfile.ZipFile(archives.build("keypointrcnn-resnet50-fpn")) as mar:
        config = yaml.safe_load(mar.read("model-config.yaml"))
        keypoints = json.loads(mar.read("index_to_name.json"))
    assert config == {
        "responseTimeout": 600,
        "handler": {
            "network": "keypointrcnn-resnet50-fpn",
            "threads": 1,
            "runtime": "pytorch",
            "precision": "fp32",
            "min_edge": 0,
            "min_score": 0.7,
            "max_frames": 16,
            "max_pixels": 4 * 7680 * 4320,
            "preprocessing": {"min_size": 800, "max_size": 1333},
        },
    }
    assert len(keypoints) == 17
    assert [keypoints["0"], keypoints["16"]] == ["nose", "right_ankle"]


def test_activity_archive_has_the_preprocessing_of_videos(archives: Archives) -> None:
    with zipfile.ZipFile(archives.build("r3d-18")) as mar:
        config = yaml.safe_load(mar.read("model-config.yaml"))
        labels = json.loads(mar.read("index_to_name.json"))
    assert config == {
        "handler": {
            "network": "r3d-18",
            "top_k": 5,
            "max_frames": 256,
            "max_pixels": 4 * 7680 * 4320,
            "threads": 1,
            "runtime": "pytorch",
            "precision": "fp32",
            "min_edge": 0,
            "preprocessing": {
                "resize": [128, 171],
                "crop": [112, 112],
                "interpolation": "bilinear",
                "mean": [0.43216, 0.394666, 0.37645],
                "std": [0.22803, 0.22145, 0.216989],
            },
        }
    }
    assert len(labels) == 400
    assert not any(" " in label for label in labels.values())


def test_activities_of_ones_own(tmp_path: Path, archives: Archives, clip: list[Pixels]) -> None:
    torch.save(random_r3d18(3).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("walking\nrunning\nstanding still\n")
    archive = archives.build("r3d-18", "--weights", tmp_path / "weights.pth", "--labels", tmp_path / "labels.txt")
    [answer] = Model(archive, batch_size=1).answers([jpeg(clip[0])])
    assert answer.keys() == {"walking", "running", "standing still"}
    assert sum(answer.values()) == pytest.approx(1)


def test_client_batching_archive_has_torchserve_not_wait(archives: Archives) -> None:
    with zipfile.ZipFile(archives.build("efficientnet-lite0", "--client-batching")) as mar:
        config = yaml.safe_load(mar.read("model-config.yaml"))
    assert (config["batchSize"], config["maxBatchDelay"]) == (1, 1)
    assert config["handler"]["network"] == "efficientnet-lite0"


def test_precision_is_a_choice_of_the_archive(archives: Archives) -> None:
    with zipfile.ZipFile(archives.build("resnet-18", "--precision", "bf16")) as mar:
        config = yaml.safe_load(mar.read("model-config.yaml"))
        with mar.open("resnet-18.pth") as file:
            archived = torch.load(file, weights_only=True)
    assert config["handler"]["precision"] == "bf16"
    assert archived["conv1.weight"].dtype == torch.float32, "nothing is lost that another choice would need"


def test_new_archive_takes_the_place_of_the_old_one_at_once(tmp_path: Path, weights: Path) -> None:
    store, others = tmp_path / "model_store", tmp_path / "tmp" / "resnet-18"
    for folder in (store, others):
        folder.mkdir(parents=True)
    (store / "resnet-18.mar").write_bytes(b"the archive of yesterday")
    (others / "precious").write_text("the archiver deletes a folder of this name")
    with (store / "resnet-18.mar").open("rb") as being_read:
        done = run("create_mar_file.py", "--weights", weights, cwd=tmp_path, environment={"TMPDIR": str(others.parent)})
        assert done.returncode == 0, done.stderr
        # A process that reads the old file still has all of it: nothing was written into it.
        assert being_read.read() == b"the archive of yesterday"
    assert zipfile.is_zipfile(store / "resnet-18.mar")
    assert (others / "precious").exists()


@pytest.mark.parametrize(
    ("network", "model", "file"),
    [
        ("refused", "resnet-18", "resnet18-f37072fd.pth"),
        ("silent", "resnet-18", "resnet18-f37072fd.pth"),
        ("refused", "keypointrcnn-resnet50-fpn", "keypointrcnn_resnet50_fpn_coco-fc266e95.pth"),
        ("refused", "r3d-18", "r3d_18-b3b3357e.pth"),
    ],
)
def test_unreachable_download_says_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    network: str,
    model: str,
    file: str,
) -> None:
    """A silent network is given up after TIMEOUT_S, long before the test's own timeout."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if network == "silent":
            server.listen()  # The system accepts connections, and no response ever comes.
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name, value in (("TORCH_HOME", str(tmp_path / "torch")), ("https_proxy", proxy), ("no_proxy", "")):
            monkeypatch.setenv(name, value)
            monkeypatch.setenv(name.upper(), value)
        monkeypatch.setattr("urllib.request._opener", None)  # It keeps the proxy of the first download.
        begin = time.monotonic()
        assert create_mar_file.main(["--model", model]) == 3
        if network == "silent":
            assert time.monotonic() - begin >= TIMEOUT_S
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"can't download https://download.pytorch.org/models/{file} (" in error
    assert f"Copy that file to {tmp_path / 'torch' / 'hub' / 'checkpoints' / file}, or pass --weights FILE" in error
    assert "--model efficientnet-lite0" in error
    assert not (tmp_path / "model_store").exists()


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    """Serve tmp_path/www over HTTP; the value is its address."""
    root = tmp_path / "www"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(root))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_ports(1)[0]), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_checked_and_cached(tmp_path: Path, file_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("urllib.request._opener", None)
    content = b"stands for 45 MB of weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    for published in (name, "net-00000000.pth"):
        (tmp_path / "www" / published).write_bytes(content)

    cached = download_weights(f"{file_server}/{name}")
    assert cached == tmp_path / "torch" / "hub" / "checkpoints" / name
    assert cached.read_bytes() == content

    (tmp_path / "www" / name).unlink()
    assert download_weights(f"{file_server}/{name}") == cached

    with pytest.raises(DownloadError, match="invalid hash"):
        download_weights(f"{file_server}/net-00000000.pth")
    with pytest.raises(DownloadError, match="404"):
        download_weights(f"{file_server}/net-11111111.pth")
    assert list(cached.parent.iterdir()) == [cached]


@pytest.mark.usefixtures("own_directory")
def test_what_was_done_to_weights_is_one_line(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"module.{name}": value.half() for name, value in torch.load(weights).items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, "checkpoint.pth")
    assert create_mar_file.main(["--weights", "checkpoint.pth"]) == 0
    changes, written = capsys.readouterr().out.splitlines()
    assert changes.startswith(
        'checkpoint.pth: took the weights from "model"; removed the prefix "module."; converted float16'
    )
    assert written == f"{Path('model_store', 'resnet-18.mar')}: resnet-18, 1000 classes, pytorch fp32, for frames"
