"""create_mar_file.py: what is in the archive, and what a user gets when there can be none."""

import hashlib
import http.server
import json
import os
import pickle
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
from deploy.node import free_ports
from tests.conftest import random_resnet18
from tests.scripts import archive, run


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_archive_holds_what_the_answers_depend_on(tmp_path: Path, weights: Path) -> None:
    archive("--weights", weights, cwd=tmp_path)
    store = tmp_path / "model_store"
    assert [path.name for path in store.iterdir()] == ["resnet-18.mar"]
    with zipfile.ZipFile(store / "resnet-18.mar") as mar:
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
            "threads": 1,
            "precision": "fp32",
            "compile": False,
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


def test_client_batching_archive_tells_torchserve_not_to_wait(tmp_path: Path) -> None:
    archive("--model", "efficientnet-lite0", "--client-batching", cwd=tmp_path)
    with zipfile.ZipFile(tmp_path / "model_store" / "efficientnet-lite0.mar") as mar:
        config = yaml.safe_load(mar.read("model-config.yaml"))
    assert (config["batchSize"], config["maxBatchDelay"]) == (1, 1)
    assert config["handler"]["network"] == "efficientnet-lite0"


def test_precision_and_compilation_are_choices_of_the_archive(tmp_path: Path, weights: Path) -> None:
    archive("--weights", weights, "--precision", "bf16", "--compile", cwd=tmp_path)
    with zipfile.ZipFile(tmp_path / "model_store" / "resnet-18.mar") as mar:
        config = yaml.safe_load(mar.read("model-config.yaml"))
        with mar.open("resnet-18.pth") as file:
            archived = torch.load(file, weights_only=True)
    assert (config["handler"]["precision"], config["handler"]["compile"]) == ("bf16", True)
    assert config["startupTimeout"] == 600
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
        # Whoever is reading the old file still has it whole: nothing was written into it.
        assert being_read.read() == b"the archive of yesterday"
    assert zipfile.is_zipfile(store / "resnet-18.mar")
    assert (others / "precious").exists()


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
        ("tensor", "expected a state dict"),
        ("another network", "does not fit resnet-18 with 1000 classes"),
        ("another head", "pass --labels FILE"),
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


def test_unwritable_model_store_is_one_line(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_store").write_text("a file where the folder should be")
    assert create_mar_file.main(["--weights", str(weights)]) == 1
    error = capsys.readouterr().err
    assert "model_store" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("network", ["refused", "silent"])
def test_unreachable_download_says_within_seconds_what_to_do(tmp_path: Path, network: str) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if network == "silent":
            server.listen()  # The system accepts connections, and nobody ever answers.
        port = server.getsockname()[1]
        proxy = f"http://127.0.0.1:{port}"
        environment = {
            "TORCH_HOME": str(tmp_path / "torch"),
            "https_proxy": proxy,
            "HTTPS_PROXY": proxy,
            "no_proxy": "",
        }
        start = time.monotonic()
        done = run("create_mar_file.py", cwd=tmp_path, environment=environment, timeout_s=60)
        assert time.monotonic() - start < 30
    assert done.returncode == 3
    error = done.stderr.splitlines()[-1]
    assert create_mar_file.RESNET18.url in error
    assert str(tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth") in error
    assert "--weights FILE" in error
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
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_checked_and_cached(tmp_path: Path, file_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = b"stands for 45 MB of weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    for published in (name, "net-00000000.pth"):
        (tmp_path / "www" / published).write_bytes(content)

    cached = create_mar_file.download_weights(f"{file_server}/{name}")
    assert cached == tmp_path / "torch" / "hub" / "checkpoints" / name
    assert cached.read_bytes() == content

    (tmp_path / "www" / name).unlink()
    assert create_mar_file.download_weights(f"{file_server}/{name}") == cached

    with pytest.raises(create_mar_file.DownloadError, match="invalid hash"):
        create_mar_file.download_weights(f"{file_server}/net-00000000.pth")
    with pytest.raises(create_mar_file.DownloadError, match="404"):
        create_mar_file.download_weights(f"{file_server}/net-11111111.pth")
    assert list(cached.parent.iterdir()) == [cached]
