"""The archives that the tests serve: each variant is built once, for all processes of a run."""

import hashlib
import json
import os
import shutil
import signal
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from filelock import FileLock

import create_mar_file
from tests.support.networks import random_resnet18

BUILD_TIMEOUT_S = 300.0
# With frames of this size a network does about 1/49 of the arithmetic. For tests in which predictions don't matter.
TINY = 32


@dataclass(frozen=True)
class Archives:
    """Archives of create_mar_file.py. folder: where they are kept; processes that share it share them."""

    folder: Path

    def weights(self) -> Path:
        """Return the file with the state dict of random_resnet18(1000)."""
        path = self.folder / "resnet18.pth"
        with FileLock(self.folder / "weights.lock", timeout=BUILD_TIMEOUT_S):
            if not path.exists():
                torch.save(random_resnet18(1000).state_dict(), path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
        return path

    def build(self, model: str, *flags: str | Path, crop: int | None = None) -> Path:
        """Return the archive of a model, built with these flags: resnet-18 with random weights unless they say else.

        crop: pixels of both edges of what the network sees, instead of 224.
        """
        if model == "resnet-18" and "--weights" not in flags:
            flags = ("--weights", self.weights(), *flags)
        variant = hashlib.sha256("\0".join(map(str, [model, *flags, crop])).encode()).hexdigest()[:16]
        archive = self.folder / variant / f"{model}.mar"
        whole = None if crop is None else self.build(model, *flags)
        with FileLock(self.folder / f"{variant}.lock", timeout=BUILD_TIMEOUT_S):
            if not archive.exists():
                with tempfile.TemporaryDirectory(dir=self.folder) as staging:
                    built = Path(staging, "model_store", archive.name)
                    if whole is None or crop is None:
                        create_archive(Path(staging), "--model", model, *flags)
                    else:
                        built.parent.mkdir()
                        crop_to(crop, whole, built)
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


def crop_to(pixels: int, source: Path, target: Path) -> None:
    """Write an archive again with other preprocessing: frames are resized and cropped to so many pixels."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename == "model-config.yaml":
                config = yaml.safe_load(content)
                config["handler"]["preprocessing"] |= {"resize": pixels, "crop": pixels}
                content = yaml.safe_dump(config).encode()
            new.writestr(entry.filename, content)


def unpacked_archive(folder: Path, *flags: str) -> Path:
    """Write what an archive of a random ResNet-18 holds, without torch-model-archiver; return the folder."""
    config = create_mar_file.model_config(create_mar_file.parse_args(list(flags)))
    labels = create_mar_file.imagenet_labels()
    torch.save(random_resnet18(len(labels)).state_dict(), folder / "resnet-18.pth")
    (folder / "index_to_name.json").write_text(json.dumps(dict(enumerate(labels))), encoding="utf-8")
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "MAR-INF").mkdir()
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": {"serializedFile": "resnet-18.pth"}}))
    return folder
