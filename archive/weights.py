"""Puts trained weights into a network: state dicts, checkpoints and safetensors, as training scripts write them."""

import argparse
import pathlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from archive.errors import ArchiveError
from server.models import MODELS, load_network

# Under these names training scripts keep the state dict in a checkpoint, torchvision's and Lightning's among them.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
# What they keep beside it and torch does not know: the options of the script, paths, and numbers of NumPy 1 and 2.
NUMBER = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
    (NUMBER, "numpy.core.multiarray.scalar"),
    (NUMBER, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqfd"},
]
COUNTER = "num_batches_tracked"  # of a batch normalization, of no use after training
MAX_DIFFERENCES = 3  # that a message names
SAVE = "expected what torch.save(model.state_dict(), FILE) writes"
DIVERGED = "the training has failed: take an earlier checkpoint"


def outputs(model: str) -> str:
    """Return what the labels of a model name."""
    return "keypoints" if MODELS[model].task == "pose-estimation" else "classes"


def network_of(model: str, path: Path, labels: int) -> tuple[torch.nn.Module, str]:
    """Return the network with the weights of a file in it, and what was done to them, "" if nothing.

    labels: the number of classes, or of keypoints.

    Raises ArchiveError if the file holds something else, the weights of another network, or weights that answer NaN.
    """
    content, changes = read_file(path), []
    while isinstance(content, Mapping) and not is_state_dict(content):
        key = next((key for key in CHECKPOINT_KEYS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            found = ", ".join(str(name) for name in list(content)[:5]) or "nothing"
            raise ArchiveError(f"{path} holds a dict of {found}: {SAVE}, or a checkpoint that has it as state_dict")
        content = content[key]
        changes.append(f'took the weights from "{key}"')
    if not isinstance(content, Mapping):
        raise ArchiveError(f"{path} holds a {type(content).__name__}: {SAVE}")
    state = {str(name): value for name, value in content.items()}
    expected = MODELS[model].build(num_classes=labels).state_dict()
    changes += fit(state, expected)
    if reason := mismatch(state, expected, labels):
        raise ArchiveError(f"{path} does not fit {model} with {labels} {outputs(model)}: {reason}")
    if reason := unusable(state):
        raise ArchiveError(f"{path} can't be used: {reason}")
    network = load_network(model, state, labels)
    if not is_finite(network, model):
        raise ArchiveError(f"{path} can't be used: {model} answers NaN for a black frame; {DIVERGED}")
    return network, "; ".join(changes)


def read_file(path: Path) -> Any:
    """Return what a file of torch.save() or safetensors holds, without running code of it. Raises ArchiveError."""
    if path.is_dir():
        raise ArchiveError(f"{path} is a folder, expected a file: the .pth, .ckpt or .safetensors in it")
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # after the length of this JSON object
        if is_safetensors:
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ArchiveError(f"no weights file {path}") from error
    except Exception as error:  # Unpickling a file that is no such thing can raise anything.
        raise ArchiveError(f"can't load {path}: {unloadable(error)}") from error


def unloadable(error: Exception) -> str:
    """Return why a file can't be loaded, and what to do. Torch's message advises to run the code in the file."""
    text = str(error)
    if "TorchScript" in text:
        return f"it is a TorchScript model; {SAVE}, here of the model torch.jit.load() returns"
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        kind = "a whole model" if re.match(r"torch\.nn\.|torchvision\.|timm\.", found[1]) else "more than weights"
        return f"it holds {kind} ({found[1]}), which only running code could load; {SAVE}"
    return f"it is damaged, or no file of weights ({type(error).__name__}); {SAVE}. A cached copy: delete it, run again"


def is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, torch.Tensor) for value in content.values())


def fit(state: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Change a state dict in place into one of the expected network, where its form differs; return what was done."""
    changes = []
    # Wrappers of a network, such as DataParallel, torch.compile and Lightning's modules, put a prefix before all names.
    first = next(iter(expected))
    prefix = min((name.removesuffix(first) for name in state if name.endswith(first)), key=len, default="")
    if prefix.endswith("."):
        named = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        others = f" and left out {len(state)} tensors without it" if state else ""
        state.clear()
        state.update(named)
        changes.append(f'removed the prefix "{prefix}"{others}')
    other = {name: value for name, value in state.items() if value.is_floating_point() and value.dtype != torch.float32}
    if other:
        dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in other.values()})
        state.update({name: value.float() for name, value in other.items()})
        changes.append(f"converted {', '.join(dtypes)} to float32")
    return changes


def mismatch(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], labels: int) -> str:
    """Return why a state dict does not fit a network of so many labels, and what to do; "" if it does."""
    wrong = [name for name in state if name in expected and state[name].shape != expected[name].shape]
    # Frozen batch normalizations have no counters; load_network() takes both kinds.
    missing = [name for name in expected if name not in state and not name.endswith(COUNTER)]
    unknown = [name for name in state if name not in expected and not name.endswith(COUNTER)]
    for name in missing:
        layer, _, kind = name.rpartition(".")
        if inner := [other for other in unknown if re.fullmatch(rf"{re.escape(layer)}\.\d+\.{kind}", other)]:
            advice = (
                f"rename {inner[0]} to {name} if that layer is the only one with weights, else train with one layer"
            )
            return f'its head "{layer}" is a Sequential ({inner[0]}), expected one layer: {advice}'
    if wrong and not missing and not unknown:
        pairs = [pair for name in wrong for pair in zip(state[name].shape, expected[name].shape, strict=False)]
        sizes = {pair for pair in pairs if pair[0] != pair[1]}
        if len(sizes) == 1 and (size := sizes.pop())[1] == labels:  # Nothing else differs: the head has another size.
            return f"{differences(wrong, state, expected)}: for this head pass --labels FILE with {size[0]} labels"
    reasons = [differences(wrong, state, expected)] if wrong else []
    reasons += [f"{len(missing)} tensors are missing, such as {missing[0]}"] if missing else []
    reasons += [f"{len(unknown)} tensors are of another network, such as {unknown[0]}"] if unknown else []
    return "; ".join(reasons)


def differences(names: Sequence[str], state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """Return the sizes of some tensors, found and expected."""

    def size(tensor: torch.Tensor) -> str:
        return " x ".join(map(str, tensor.shape)) or "a number"

    shown = [f"{name} is {size(state[name])}, expected {size(expected[name])}" for name in names[:MAX_DIFFERENCES]]
    more = f" (and {len(names) - len(shown)} more)" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def unusable(state: Mapping[str, torch.Tensor]) -> str:
    """Return what is wrong with the values of a state dict that fits, and what to do; "" if nothing is."""
    for name, value in state.items():
        if name.endswith(COUNTER):
            continue
        if not value.is_floating_point() or value.is_meta or value.layout != torch.strided:
            return f"{name} is {value.dtype}, {value.layout}, {value.device}; expected values in floating point"
        if not value.isfinite().all():
            return f"{name} has values that are NaN or infinite; {DIVERGED}"
    return ""


def is_finite(network: torch.nn.Module, model: str) -> bool:
    """Whether a network has no NaN in its answer for a black frame, or clip. Keypoint R-CNN would take seconds."""
    shapes = {"image-classification": (1, 3, 64, 64), "activity-recognition": (1, 3, 16, 64, 64)}
    shape = shapes.get(MODELS[model].task)
    with torch.inference_mode():
        return shape is None or bool(network(torch.zeros(shape)).isfinite().all())
