"""The archives that the tests serve: each variant is built once, for all processes of a run."""

import hashlib
import json
import os
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

import create_mar_file
from archive.labels import trained_labels
from archive.weights import trained_network
from tests.support.networks import RANDOM, random_resnet18

BUILD_TIMEOUT_S = 300.0
# With frames of this size a network does a fraction of the arithmetic, for example ResNet-18 1/49. By model.
TINY: dict[str, dict[str, Any]] = {
    "resnet-18": {"resize": 32, "crop": 32},
    "efficientnet-lite0": {"resize": 32, "crop": 32},
    "keypointrcnn-resnet50-fpn": {"min_size": 128, "max_size": 192},
    "r3d-18": {"resize": [32, 43], "crop": [28, 28]},
}


@dataclass(frozen=True)
class Archives:
    """Archives of create_mar_file.py. folder: where they are kept; processes that share it share them."""

    folder: Path

    def weights(self, model: str = "resnet-18") -> Path:
        """Return the file with the random state dict of a model."""
        path = self.folder / f"{model}.pth"
        with FileLock(self.folder / "weights.lock", timeout=BUILD_TIMEOUT_S):
            if not path.exists():
                torch.save(RANDOM[model]().state_dict(), path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
        return path

    def build(self, model: str, *flags: str | Path, is_tiny: bool = False) -> Path:
        """Return the archive of a model, built with these flags, and with random weights unless they name others.

        is_tiny: the network sees small frames, which makes it fast.
        """
        if model in RANDOM and "--weights" not in flags:
            flags = ("--weights", self.weights(model), *flags)
        variant = hashlib.sha256("\0".join(map(str, [model, *flags, is_tiny])).encode()).hexdigest()[:16]
        archive = self.folder / variant / f"{model}.mar"
        whole = self.build(model, *flags) if is_tiny else None
        with FileLock(self.folder / f"{variant}.lock", timeout=BUILD_TIMEOUT_S):
            if not archive.exists():
                with tempfile.TemporaryDirectory(dir=self.folder) as staging:
                    built = Path(staging, "model_store", archive.name)
                    if whole is None:
                        create_archive(Path(staging), "--model", model, *flags)
                    else:
                        built.parent.mkdir()
                        shrink(model, whole, built)
                    built.parent.rename(archive.parent)
        return archive

    def store(self, folder: Path, *archives: Path) -> None:
        """Put archives into folder/model_store."""
        (folder / "model_store").mkdir(parents=True, exist_ok=True)
        for archive in archives:
            target = folder / "model_store" / archive.name
            target.unlink(missing_ok=True)
            try:
                os.link(archive, target)
            except OSError:  # Another file system.
                shutil.copy(archive, target)


def create_archive(folder: Path, *arguments: str | Path) -> None:
    """Run create_mar_file.py in a folder, in this process: to import torch anew would take seconds each time."""
    here, handler = Path.cwd(), signal.getsignal(signal.SIGTERM)
    os.chdir(folder)
    try:
        assert create_mar_file.main(list(map(str, arguments))) == 0
    finally:
        os.chdir(here)
        signal.signal(signal.SIGTERM, handler)


def shrink(model: str, source: Path, target: Path) -> None:
    """Write an archive again, with small frames for its network."""

    def shrunk(content: bytes) -> bytes:
        config = yaml.safe_load(content)
        config["handler"]["preprocessing"] |= TINY[model]
        return yaml.safe_dump(config).encode()

    rewrite(source, target, "model-config.yaml", shrunk)


def rewrite(source: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Write an archive again, with one of its files changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename == name else content)


def unpacked_archive(folder: Path, *flags: str, network: torch.nn.Module | None = None, is_tiny: bool = False) -> Path:
    """Write the files of an archive, without torch-model-archiver; return the folder.

    network: the trained network, a random ResNet-18 unless `flags` name another model.
    """
    args = create_mar_file.parse_args(list(flags))
    labels = trained_labels(args.model)
    config: dict[str, Any] = create_mar_file.model_config(args)
    config["handler"]["preprocessing"] |= TINY[args.model] if is_tiny else {}
    state = (network or random_resnet18(len(labels))).state_dict()
    torch.save(trained_network(args.model, state, len(labels)).state_dict(), folder / "network.pth")
    (folder / "index_to_name.json").write_text(json.dumps(dict(enumerate(labels))), encoding="utf-8")
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "MAR-INF").mkdir()
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": {"serializedFile": "network.pth"}}))
    return folder
