"""Puts trained weights into a network: state dicts, checkpoints and safetensors, as training scripts write them."""

import argparse
import pathlib
import re
import warnings
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
MAX_DEPTH = 3  # of checkpoints in checkpoints
# What they keep beside it and torch does not know: options of the script, paths, numbers and arrays of NumPy 1 and 2.
NUMBER, ARRAY = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    *((pathlib.PurePosixPath, f"pathlib.{name}PosixPath") for name in ("", "Pure", "_local.", "_local.Pure")),
    *((pathlib.PureWindowsPath, f"pathlib.{name}WindowsPath") for name in ("", "Pure", "_local.", "_local.Pure")),
    *((NUMBER, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
    *((ARRAY, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgU"},
]
COUNTER = "num_batches_tracked"  # of a batch normalization, of no use after training
SAVE = "expected what torch.save(model.state_dict(), FILE) writes"
DIVERGED = "the training has failed: take an earlier checkpoint"
MAX_DIFFERENCES = 3  # that a message names


def outputs(model: str) -> str:
    """Return what the labels of a model name."""
    return "keypoints" if MODELS[model].task == "pose-estimation" else "classes"


def network_of(model: str, path: Path, labels: int) -> tuple[torch.nn.Module, str]:
    """Return the network with the weights of a file in it, and what was done to them, "" if nothing.

    labels: the number of classes, or of keypoints.

    Raises ArchiveError if the file holds something else, the weights of another network, or weights that answer NaN.
    """
    content, changes = read_file(path), []
    for _ in range(MAX_DEPTH):
        if not isinstance(content, Mapping) or is_state_dict(content):
            break
        key = next((key for key in CHECKPOINT_KEYS if isinstance(content.get(key), Mapping)), "")
        if key:
            content = content[key]
            changes.append(f'took the weights from "{key}"')
    if not isinstance(content, Mapping) or not is_state_dict(content):
        raise ArchiveError(f"{path} holds {described(content)}: {SAVE}, or a checkpoint that has it as state_dict")
    expected = shapes(model, labels)
    try:
        state, more = fit(content, expected)
    except ValueError as error:
        raise ArchiveError(f"{path} {error}") from error
    if reason := mismatch(state, expected, shapes(model, labels + 1)):
        what = f"{model} with {labels} {outputs(model)}"
        raise ArchiveError(f"{path} does not fit {what}: {reason}")
    if reason := unusable(state):
        raise ArchiveError(f"{path} can't be used: {reason}")
    network = trained_network(model, state, labels)
    if not is_finite(network, model):
        raise ArchiveError(f"{path} can't be used: with these weights {model} answers NaN; {DIVERGED}")
    return network, "; ".join(changes + more)


def trained_network(model: str, state: Mapping[str, torch.Tensor], labels: int) -> torch.nn.Module:
    """Return a network for so many labels, with trained weights in it."""
    # A trained batch normalization counts its batches, and adds eps to the variance. A frozen one does neither.
    counters = {name for name in state.keys() - shapes(model, labels).keys() if name.endswith(COUNTER)}
    variances = {name.replace(COUNTER, "running_var") for name in counters}
    return load_network(
        model, {name: value + 1e-5 if name in variances else value for name, value in state.items()}, labels
    )


def shapes(model: str, labels: int) -> dict[str, torch.Tensor]:
    """Return the state dict of a network, without values."""
    with torch.device("meta"):
        return MODELS[model].build(num_classes=labels).state_dict()


def read_file(path: Path) -> Any:
    """Return what a file of torch.save() or safetensors holds, without running code of it. Raises ArchiveError."""
    try:
        if path.is_dir():
            raise ArchiveError(f"{path} is a folder, expected a file: pass the .pth, .ckpt or .safetensors in it")
        with path.open("rb") as file:
            start = file.read(40)
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # The error says the same.
            if start[8:9] == b"{":  # safetensors: the length of a JSON object, and the object
                return safetensors.torch.load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ArchiveError(f"no weights file {path}") from error
    except OSError as error:
        raise ArchiveError(f"can't read {path}: {error.strerror}") from error
    except ArchiveError:
        raise
    except Exception as error:  # Unpickling a file that is no such thing can raise anything.
        reason = "it is a pointer of Git LFS: run git lfs pull" if start.startswith(b"version https://git-lfs") else ""
        is_cached = Path(torch.hub.get_dir()) in path.parents
        advice = ". It is a downloaded copy: delete it, and run again" if is_cached else ""
        raise ArchiveError(f"can't load {path}: {reason or unloadable(error)}{advice}") from error


def unloadable(error: Exception) -> str:
    """Return why a file can't be loaded, and what to do. Torch's message advises to run the code in the file."""
    text = str(error)
    if "TorchScript" in text:
        return f"it is a TorchScript model; {SAVE}, here of the model that torch.jit.load() returns"
    if found := re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'", text):
        name = found[1] or found[2]
        is_model = re.match(r"torch\.nn\.modules\.(?!loss)|torchvision\.models\.|timm\.models\.", name)
        kind = "a whole model" if is_model else "more than weights, perhaps a whole model"
        return f"it holds {kind} ({name}), which only its code could load; {SAVE}; of a checkpoint, its state_dict"
    if "Unsupported operand" in text:
        return "it was saved with another protocol of pickle: save it with torch.save() and no pickle_protocol"
    return f"it is damaged, or no file of weights; {SAVE}"


def is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(each, torch.Tensor) and not each.is_nested for each in content.values())


def described(content: Any) -> str:
    """Return in a few words what a file holds instead of a state dict."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    others = {name: value for name, value in content.items() if not isinstance(value, torch.Tensor)}
    if len(others) < len(content) / 2:
        return f"{shown(list(others))} among its tensors"
    return f"a dict of {shown(list(content))}"


def shown(names: Sequence[Any]) -> str:
    return ", ".join(str(name)[:60] for name in names[:5]) or "nothing"


def fit(content: Mapping[Any, torch.Tensor], expected: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the state dict of the expected network, where a file has it in another form, and what was done.

    Raises ValueError if the file holds several networks.
    """
    state, changes = {str(name): value for name, value in content.items()}, []
    # Wrappers of a network, such as DataParallel, torch.compile and Lightning's modules, put a prefix before all names.
    names = [name for name in expected if not name.endswith(COUNTER)]
    prefixes = {found.removesuffix(end) for end in (names[0], names[-1]) for found in state if found.endswith(end)}
    counts = {prefix: sum(prefix + name in state for name in names) for prefix in prefixes | {""}}
    best = [prefix for prefix in sorted(counts) if counts[prefix] == max(counts.values())]
    if len(best) > 1 and counts[best[0]]:
        raise ValueError(f"holds {len(best)} networks, {shown(best)}: save the state_dict() of the one to serve")
    if counts[best[0]] and (prefix := best[0]):
        named = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        head = {name: value for name, value in state.items() if name in expected and name not in named}
        others = [name for name in state if not name.startswith(prefix) and name not in head]
        left_out = f" and left out {len(others)} without it, such as {others[0][:60]}" if others else ""
        state = named | head
        changes.append(f'removed the prefix "{prefix}"{left_out}')
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()} - {torch.float32}
    if dtypes:
        state = {name: value.float() if value.dtype in dtypes else value for name, value in state.items()}
        changes.append(f"converted {', '.join(sorted(str(dtype)[6:] for dtype in dtypes))} to float32")
    return state, changes


def mismatch(state: Mapping[str, torch.Tensor], expected: Mapping[str, Any], larger: Mapping[str, Any]) -> str:
    """Return why a state dict does not fit a network, and what to do; "" if it does.

    larger: the state dict of the network with another label: what differs is the head.
    """
    head = {name for name in expected if larger[name].shape != expected[name].shape}
    wrong = [name for name, value in state.items() if name in expected and value.shape != expected[name].shape]
    wrong = [name for name in wrong if not name.endswith(COUNTER)]
    # Frozen batch normalizations have no counters; trained_network() takes both kinds.
    missing = [name for name in expected if name not in state and not name.endswith(COUNTER)]
    unknown = [name for name in state if name not in expected]
    unknown = [name for name in unknown if name.removesuffix(COUNTER) + "running_var" not in expected]
    for layer in sorted({name.rpartition(".")[0] for name in head.intersection(missing)}):
        inner = sorted(other for other in unknown if re.fullmatch(rf"{re.escape(layer)}\.\d+\.\w+", other))
        if inner:
            indices = {other.split(".")[-2] for other in inner}
            advice = f"rename {layer}.{min(indices)}.* to {layer}.*" if len(indices) == 1 else "train with one layer"
            return f'its head "{layer}" is a Sequential ({shown(inner)}), expected one layer: {advice}'
    sizes = differences(wrong, state, expected)
    pairs = [pair for name in wrong for pair in zip(state[name].shape, expected[name].shape, strict=False)]
    numbers = {found for found, number in pairs if found != number}
    if head.issuperset(wrong) and len(numbers) == 1 and not missing and not unknown:
        return f"{sizes}: pass --labels FILE with as many labels as the weights have, {numbers.pop()}"
    reasons = [sizes] if wrong else []
    reasons += [f"{shown(missing)}: missing ({len(missing)} in all)"] if missing else []
    reasons += [f"{shown(unknown)}: of another network ({len(unknown)} in all)"] if unknown else []
    return "; ".join(reasons) + ("; is --model right?" if missing and unknown else "")


def differences(names: Sequence[str], state: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> str:
    """Return the sizes of some tensors, found and expected."""

    def size(tensor: torch.Tensor) -> str:
        return " x ".join(map(str, tensor.shape)) or "a number"

    found = [f"{name} is {size(state[name])}, expected {size(expected[name])}" for name in names[:MAX_DIFFERENCES]]
    return ", ".join(found) + (f" (and {len(names) - len(found)} more)" if len(names) > len(found) else "")


def unusable(state: Mapping[str, torch.Tensor]) -> str:
    """Return what is wrong with the values of a state dict that fits, and what to do; "" if nothing is."""
    for name, value in state.items():
        if name.endswith(COUNTER):
            continue
        if value.is_meta or value.layout != torch.strided or not value.is_floating_point():
            kind = "without values" if value.is_meta else f"{value.dtype}, {value.layout}"
            return f"{name} is {kind}, expected a plain tensor in floating point"
        if not value.isfinite().all():
            return f"{name} has values that are NaN, infinite or too large for float32; {DIVERGED}"
        if name.endswith("running_var") and (value < 0).any():
            return f"{name} has negative variances; {DIVERGED}"
    return ""


def is_finite(network: Any, model: str) -> bool:
    """Whether a network answers noise without NaN; of Keypoint R-CNN, which would take seconds, its backbone."""
    is_clip = MODELS[model].task == "activity-recognition"
    noise = torch.randn((1, 3, 16, 64, 64) if is_clip else (1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        answer = getattr(network, "backbone", network)(noise)
    return all(bool(each.isfinite().all()) for each in (answer.values() if isinstance(answer, Mapping) else [answer]))
