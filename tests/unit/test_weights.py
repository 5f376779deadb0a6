"""archive/weights.py: the weights of real training, in the forms in which people have them."""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import create_mar_file
from archive.weights import network_of
from tests.support.networks import RANDOM, random_resnet18

pytestmark = pytest.mark.usefixtures("own_directory")

State = dict[str, torch.Tensor]
CLASSES = 10


@pytest.fixture(scope="module")
def state() -> State:
    return random_resnet18(CLASSES).state_dict()


def renamed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def half(state: State, dtype: torch.dtype) -> State:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def lightning(state: State) -> dict[str, Any]:
    """Return a checkpoint as Lightning writes it: what it trains is in the attribute `net`."""
    options = {"lr": 0.1, "path": Path("runs"), "best": np.float64(0.9), "order": np.arange(3)}
    others = {"criterion.weight": torch.ones(CLASSES)}
    return {"epoch": 3, "state_dict": renamed(state, "net.") | others, "hyper_parameters": options}


def torchvision_script(state: State) -> dict[str, Any]:
    """Return a checkpoint as torchvision's training scripts write it."""
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    return {"model": renamed(state, "module."), "optimizer": optimizer, "args": argparse.Namespace(lr=0.1), "epoch": 90}


ACCEPTED: dict[str, tuple[Callable[[State], Any], str]] = {
    "a state dict": (lambda state: state, ""),
    "DataParallel": (lambda state: renamed(state, "module."), 'removed the prefix "module."'),
    "torch.compile": (lambda state: renamed(state, "_orig_mod."), 'removed the prefix "_orig_mod."'),
    "both": (lambda state: renamed(state, "_orig_mod.module."), 'removed the prefix "_orig_mod.module."'),
    "Lightning": (
        lightning,
        'took the weights from "state_dict"; removed the prefix "net." and left out 1 without it, such as '
        "criterion.weight",
    ),
    "a backbone and a head": (
        lambda state: {name if name.startswith("fc.") else f"backbone.{name}": each for name, each in state.items()},
        'removed the prefix "backbone."',
    ),
    "torchvision": (torchvision_script, 'took the weights from "model"; removed the prefix "module."'),
    "model_state_dict": (
        lambda state: {"model_state_dict": state, "loss": 0.1},
        'took the weights from "model_state_dict"',
    ),
    "nested": (
        lambda state: {"model": {"state_dict": state}},
        'took the weights from "model"; took the weights from "state_dict"',
    ),
    "without counters": (
        lambda state: {name: each for name, each in state.items() if not name.endswith("num_batches_tracked")},
        "",
    ),
    "averaged": (
        lambda state: renamed(state, "module.") | {"n_averaged": torch.tensor(5)},
        'removed the prefix "module." and left out 1 without it, such as n_averaged',
    ),
}


@pytest.mark.parametrize("kind", ACCEPTED)
@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])
def test_weights_of_training_are_accepted(tmp_path: Path, state: State, kind: str, is_legacy: bool) -> None:
    make, changes = ACCEPTED[kind]
    torch.save(make(state), tmp_path / "file.pth", _use_new_zipfile_serialization=not is_legacy)
    network, done = network_of("resnet-18", tmp_path / "file.pth", CLASSES)
    assert done == changes
    assert_same(network, state)


def assert_same(network: torch.nn.Module, state: State) -> None:
    found = network.state_dict()
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(found[name], value.float()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    torch.save(half(state, dtype), tmp_path / "file.pth")
    network, done = network_of("resnet-18", tmp_path / "file.pth", CLASSES)
    assert done == f"converted {str(dtype).removeprefix('torch.')} to float32"
    assert_same(network, half(state, dtype))


def test_safetensors(tmp_path: Path, state: State) -> None:
    safetensors.torch.save_file(renamed(half(state, torch.float16), "model."), tmp_path / "any.name")
    network, done = network_of("resnet-18", tmp_path / "any.name", CLASSES)
    assert done == 'removed the prefix "model."; converted float16 to float32'
    assert_same(network, half(state, torch.float16))


def test_weights_that_were_saved_on_a_gpu(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file names the device of each tensor; this machine has none."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda _: "cuda:1")
        torch.save(state, tmp_path / "file.pth")
    assert b"cuda:1" in (tmp_path / "file.pth").read_bytes()
    network, done = network_of("resnet-18", tmp_path / "file.pth", CLASSES)
    assert done == ""
    assert_same(network, state)


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}


def with_nan(state: State, name: str, value: float) -> State:
    broken = state[name].clone().double()
    broken.view(-1)[-1] = value
    return state | {name: broken}


def cyclic(_: State) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"epoch": 1}
    checkpoint["model"] = checkpoint
    return checkpoint


SAVE = "expected what torch.save(model.state_dict(), FILE) writes"
HEAD = "fc.weight is 10 x 512, expected 7 x 512, fc.bias is 10, expected 7"
REJECTED: dict[str, tuple[Callable[[State], Any], int, str]] = {
    "a whole model": (
        lambda _: random_resnet18(CLASSES),
        CLASSES,
        f"it holds a whole model (torchvision.models.resnet.ResNet), which only its code could load; {SAVE}",
    ),
    "a whole model in a checkpoint": (lambda _: {"model": random_resnet18(3)}, CLASSES, "it holds a whole model ("),
    "an optimizer": (
        lambda state: {"model": state, "o": torch.optim.SGD([state["fc.weight"]])},
        CLASSES,
        "it holds more than weights, perhaps a whole model (torch.optim.sgd.SGD)",
    ),
    "another head": (
        lambda state: state,
        7,
        f"resnet-18 with 7 classes: {HEAD}: pass --labels FILE with as many labels as the weights have, 10",
    ),
    "another head of Lightning": (
        lightning,
        7,
        f"{HEAD}: pass --labels FILE with as many labels as the weights have, 10",
    ),
    "a head in a Sequential": (
        lambda state: (
            without(state, "fc.weight", "fc.bias") | {"fc.1.weight": state["fc.weight"], "fc.1.bias": state["fc.bias"]}
        ),
        CLASSES,
        'its head "fc" is a Sequential (fc.1.bias, fc.1.weight), expected one layer: rename fc.1.* to fc.*',
    ),
    "a head of two layers": (
        lambda state: (
            without(state, "fc.weight") | {"fc.0.weight": torch.ones(9, 512), "fc.3.weight": torch.ones(CLASSES, 9)}
        ),
        CLASSES,
        "is a Sequential (fc.0.weight, fc.3.weight), expected one layer: train with one layer",
    ),
    "grey frames": (
        lambda state: state | {"conv1.weight": torch.ones(64, 1, 7, 7)},
        CLASSES,
        "conv1.weight is 64 x 1 x 7 x 7, expected 64 x 3 x 7 x 7",
    ),
    "another network": (lambda _: RANDOM["r3d-18"]().state_dict(), CLASSES, "is --model right?"),
    "no head": (
        lambda state: without(state, "fc.weight", "fc.bias"),
        CLASSES,
        "fc.weight, fc.bias: missing (2 in all)",
    ),
    "two networks": (
        lambda state: {"state_dict": renamed(state, "teacher.") | renamed(state, "student.")},
        CLASSES,
        "holds 2 networks, student., teacher.: save the state_dict() of the one to serve",
    ),
    "NaN": (
        lambda state: with_nan(state, "fc.weight", float("nan")),
        CLASSES,
        "fc.weight has values that are NaN, infinite",
    ),
    "infinity": (
        lambda state: with_nan(state, "conv1.weight", float("-inf")),
        CLASSES,
        "conv1.weight has values that are NaN, infinite",
    ),
    "too large for float32": (lambda state: with_nan(state, "fc.bias", 1e300), CLASSES, "too large for float32"),
    "variances": (
        lambda state: with_nan(state, "bn1.running_var", -1.0),
        CLASSES,
        "bn1.running_var has negative variances",
    ),
    "overflow": (
        lambda state: state | {"conv1.weight": state["conv1.weight"] * 1e38},
        CLASSES,
        "with these weights resnet-18 answers NaN",
    ),
    "integers": (
        lambda state: state | {"fc.weight": torch.ones(CLASSES, 512, dtype=torch.int8)},
        CLASSES,
        "fc.weight is torch.int8",
    ),
    "sparse": (
        lambda state: state | {"fc.weight": state["fc.weight"].to_sparse()},
        CLASSES,
        "fc.weight is torch.float32, torch.sparse_coo",
    ),
    "no values": (
        lambda state: state | {"fc.weight": state["fc.weight"].to("meta")},
        CLASSES,
        "fc.weight is without values",
    ),
    "a counter too many": (
        lambda state: state | {"aux.num_batches_tracked": torch.tensor(1)},
        CLASSES,
        "aux.num_batches_tracked: of another network (1 in all)",
    ),
    "a flat checkpoint": (lambda state: state | {"epoch": 3}, CLASSES, f"holds epoch among its tensors: {SAVE}"),
    "another checkpoint": (
        lambda state: {"weights": state, "epoch": 3},
        CLASSES,
        f"holds a dict of weights, epoch: {SAVE}, or a checkpoint that has it as state_dict",
    ),
    "itself": (cyclic, CLASSES, "holds a dict of epoch, model"),
    "nothing": (lambda _: {}, CLASSES, "holds a dict of nothing"),
    "a list": (list, CLASSES, "holds a list"),
    "odd names": (lambda state: state | {"a\nb": torch.ones(1)}, CLASSES, "a b: of another network (1 in all)"),
}


@pytest.mark.parametrize("kind", REJECTED)
@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])
def test_other_files_are_rejected_by_kind(
    tmp_path: Path, state: State, capsys: pytest.CaptureFixture[str], kind: str, is_legacy: bool
) -> None:
    make, classes, message = REJECTED[kind]
    is_zip = not is_legacy or kind == "sparse"  # Torch saves no sparse tensors in its old format.
    torch.save(make(state), tmp_path / "file.pth", _use_new_zipfile_serialization=is_zip)
    assert_rejected(capsys, tmp_path, classes, message)
    if kind == "grey frames":
        (tmp_path / "labels.txt").write_text("a\nb\nc\n")
        assert create_mar_file.main(["--weights", "file.pth", "--labels", "labels.txt"]) == 1
        assert "--labels FILE with" not in capsys.readouterr().err, "the head is not all that differs"


def assert_rejected(capsys: pytest.CaptureFixture[str], folder: Path, classes: int, message: str) -> None:
    (folder / "labels.txt").write_text("".join(f"label {chr(97 + number)}\n" for number in range(classes)))
    with warnings.catch_warnings(record=True) as shown:
        assert create_mar_file.main(["--weights", "file.pth", "--labels", "labels.txt"]) == 1
    assert [str(each.message) for each in shown] == []
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert error.startswith("create_mar_file.py: ")
    assert "file.pth" in error
    assert len(error) < 600
    assert ("--labels FILE with" in error) == ("--labels FILE with" in message)
    assert not (folder / "model_store").exists()


def test_files_of_other_programs_are_rejected_by_kind(
    tmp_path: Path, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.pth"
    file.mkdir()
    assert_rejected(capsys, tmp_path, 10, "is a folder, expected a file: pass the .pth, .ckpt or .safetensors in it")
    file.rmdir()
    torch.save(state, file, pickle_protocol=4)
    assert_rejected(capsys, tmp_path, 10, "save it with torch.save() and no pickle_protocol")
    safetensors.torch.save_file(state, file)
    file.write_bytes(file.read_bytes()[:9000])
    assert_rejected(capsys, tmp_path, 10, "it is damaged, or no file of weights; expected what")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46830571\n")
    assert_rejected(capsys, tmp_path, 10, "it is a pointer of Git LFS: run git lfs pull")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated.
        torch.jit.save(torch.jit.script(random_resnet18(CLASSES)), file)
    assert_rejected(capsys, tmp_path, 10, f"it is a TorchScript model; {SAVE}, here of the model that torch.jit.load()")
