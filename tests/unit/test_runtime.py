"""What a network runs on, how large a frame is decoded, and how int8 is compared with fp32."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from archive.conversion import Agreement, clips_of, parts_of
from archive.errors import ArchiveError
from server import runtime
from server.images import open_image, to_rgb
from server.runtime import device_of, has_bf16, usable_precision
from tests.support.frames import CLIP

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (640, 480)),
        ((1280, 720), (640, 360)),
        ((720, 1280), (360, 640)),
        ((1920, 1080), (480, 270)),
        ((3840, 2160), (480, 270)),
        ((513, 512), (257, 256)),
        ((511, 511), (511, 511)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpeg_is_decoded_smaller_but_large_enough(
    size: tuple[int, int], expected: tuple[int, int], mode: str
) -> None:
    image = Image.fromarray(skimage.data.astronaut()).convert(mode)
    image.resize(size).save(file := io.BytesIO(), "JPEG", quality=95)
    small = to_rgb(open_image(file.getvalue()), 256)
    assert (small.mode, small.size) == ("RGB", expected)
    assert to_rgb(open_image(file.getvalue()), 0).size == size
    difference = np.asarray(image.convert("RGB").resize(expected), float) - np.asarray(small, float)
    assert np.abs(difference).mean() < 8


def test_other_formats_are_decoded_in_their_size() -> None:
    Image.fromarray(skimage.data.astronaut()).resize((1280, 720)).save(file := io.BytesIO(), "PNG")
    assert to_rgb(open_image(file.getvalue()), 256).size == (1280, 720)


def test_reduced_jpeg_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(skimage.data.astronaut()).resize((1280, 720)).save(file := io.BytesIO(), "JPEG", exif=exif)
    assert to_rgb(open_image(file.getvalue()), 256).size == (360, 640)


@pytest.mark.parametrize("flags", ["fpu avx2 avx512f", "fpu avx2 avx512f avx512_bf16"])
def test_a_release_of_pytorch_that_can_not_tell_asks_the_system(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(runtime, "Path", lambda _: tmp_path / "cpuinfo")
    assert has_bf16() == ("bf16" in flags)


def test_bf16_is_replaced_on_a_processor_without_it_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "has_bf16", lambda: False)
    gpu = torch.device("cuda:0")
    precisions = ["fp32", "bf16", "int8"]
    assert [usable_precision(each, gpu) for each in precisions] == precisions
    assert caplog.messages == []
    assert [usable_precision(each, CPU) for each in precisions] == ["fp32", "fp32", "int8"]
    assert caplog.messages == ["this processor has no bf16: the network runs in fp32, which is faster"]


def test_openvino_does_not_use_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert device_of(None, "openvino") == device_of(0, "pytorch") == CPU, "without a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(1, "pytorch") == torch.device("cuda:1")
    assert device_of(None, "openvino") == CPU
    assert caplog.messages == []
    assert device_of(1, "openvino") == CPU
    [message] = caplog.messages
    assert "number_of_gpu=0" in message


@pytest.mark.parametrize("count", [1, 2, 3, 5, 15, 40, 200])
def test_half_of_each_video_calibrates(count: int) -> None:
    """Frames beside each other look alike: parts of a video are compared, not every second frame."""
    parts = parts_of(count)
    assert len(parts) == count
    assert parts == sorted(parts)
    assert count // 3 <= sum(part % 2 for part in parts) <= count // 2
    assert set(parts) == set(range({1: 1, 2: 2, 3: 2, 5: 4}.get(count, 10)))


def test_video_that_states_more_frames_than_it_has_calibrates(tmp_path: Path) -> None:
    """A cut file, and many intact ones: the sound goes on, or the format states no number."""
    (video := tmp_path / "cut.mp4").write_bytes(CLIP.read_bytes()[:300_000])
    frames = SimpleNamespace(clip_frames=1, frame_rate=0.0)
    assert 50 < len(list(clips_of(video, frames, 200))) < 200
    video.write_bytes(CLIP.read_bytes()[:20_000])  # not a single frame
    with pytest.raises(ArchiveError, match="none of its 375 frames can be decoded"):
        list(clips_of(video, frames, 20))


def test_agreement_is_good_from_95_percent_on() -> None:
    assert Agreement([0.01] * 20, 19, "frames").is_good
    assert not Agreement([0.01] * 20, 18, "frames").is_good
    assert str(Agreement([0.01, 0.02, 0.2], 2, "clips")) == (
        "int8 has the same first label as fp32 for 66.7 % of 3 other clips; "
        "its probability changes by 0.020 (median), at most 0.200"
    )
