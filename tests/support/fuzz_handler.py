"""handler.py must live with any body: what has to hold, and atheris, which looks for bodies where it does not.

python -m tests.support.fuzz_handler ARCHIVE [atheris' options]
"""

import base64
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from server.tasks import PoseEstimation
from tests.support.in_process import HTTP, Model

# Pillow's decoders are fast to fuzz with small images.
IMAGE = Image.linear_gradient("L").resize((48, 40)).convert("RGB")


def seeds() -> list[bytes]:
    """Return a small file of each format that the handler takes, and of some that it doesn't."""
    options: dict[str, dict[str, Any]] = {
        "JPEG": {}, "PNG": {}, "WEBP": {}, "BMP": {}, "GIF": {"save_all": True, "append_images": [IMAGE.rotate(90)]},
        "TIFF": {}, "PPM": {}, "ICO": {}, "PDF": {}, "EPS": {},
    }  # fmt: skip
    files = []
    for kind, keywords in options.items():
        with io.BytesIO() as file:
            IMAGE.save(file, kind, **keywords)
            files.append(file.getvalue())
    with io.BytesIO() as file:
        IMAGE.save(
            file, "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
        )
        files.append(file.getvalue())
    return files


class Subject:
    """A handler in this process, with good requests before and behind each hostile one.

    Its network is a small one, for speed: what is tried here is all that surrounds the network.
    """

    def __init__(self, source: Path) -> None:
        self.model = Model(source)
        self.statuses: list[int] = []  # of the latest requests: good, hostile, good
        task = self.model.handler.task
        self.model.handler.model = find_two if isinstance(task, PoseEstimation) else by_colour(len(task.labels))
        self._good = seeds()[0]
        self._batch = {"0": base64.b64encode(self._good).decode()}
        [answer] = self.model.answers([self._good])
        self._length = len(answer)
        self._expected = near(answer)

    def try_body(self, body: Any, headers: Mapping[str, Any] = HTTP) -> str:
        """Have a body answered between two good ones; raises AssertionError unless it hurts only itself.

        Returns "answered" or the reason why it was not.
        """
        before, answer, after = self.model.answers([self._good, body, self._batch], headers)
        self.statuses = statuses = self.model.statuses()
        assert before == after[0] == self._expected, "others suffer"
        assert (statuses[0], statuses[2]) == (200, 200)
        json.dumps([before, answer, after])
        if statuses[1] == 200:
            answers = answer if isinstance(body, dict) else [answer]
            assert len(answers) == (len(body) if isinstance(body, dict) else 1)
            of_others = "a frame of its clip can't be read"  # It itself can.
            assert any("error" not in each or each["error"].startswith(of_others) for each in answers)
            for each in answers:
                if "error" in each:
                    assert each.keys() == {"error"}
                    assert_harmless(each["error"])
                else:
                    assert len(each) == self._length
            return "answered"
        assert statuses[1] in (400, 413)
        assert answer.isascii()
        assert len(answer.splitlines()) == 1
        reason = json.loads(answer)
        assert reason.keys() == {"error"}
        assert_harmless(reason["error"])
        return str(reason["error"])


def by_colour(classes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a classifier of frames, (n, 3, height, width), and of clips, which have a dimension more."""
    torch.manual_seed(18)
    head = torch.randn(3, classes)
    return lambda pixels: pixels.float().flatten(2).mean(2) @ head


def find_two(frames: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Find two persons in each frame, at pixels that depend on its colours."""
    return [
        {
            "scores": torch.tensor([0.9, 0.8]),
            "boxes": frame.mean().expand(2, 4),
            "keypoints": frame.mean((1, 2)).expand(2, 17, 3),
            "keypoints_scores": torch.ones(2, 17),
        }
        for frame in (each / 255 for each in frames)
    ]


def near(answer: Any) -> Any:
    """Return what is equal to an answer, and of probabilities to those that are as good as equal."""
    return pytest.approx(answer, abs=1e-4) if isinstance(answer, dict) else answer


def assert_harmless(reason: str) -> None:
    """A reason says what is wrong with the body, and reveals nothing of the server."""
    assert reason
    assert len(reason) < 300
    reason = reason.replace("application/json", "")
    of_the_server = re.sub(r"""b'[^']*'|b"[^"]*\"""", "", reason)  # Pillow may quote bytes of the body.
    for leak in (" at 0x", "Traceback", "site-packages", ".py", "\n", "/"):
        assert leak not in of_the_server, reason


def main() -> None:
    import atheris

    subject = Subject(Path(sys.argv.pop(1)))
    files = seeds()

    def one_input(data: bytes) -> None:
        """Make a body of atheris' bytes: the first says what kind, the others are the file, or changes of one."""
        if not data:
            return
        kind, rest = data[0] % 4, data[1:]
        if kind == 0:
            subject.try_body(bytearray(rest))
        elif kind == 1 and len(rest) > 3:
            file = bytearray(files[rest[0] % len(files)])
            for place, value in zip(rest[1::2], rest[2::2], strict=False):
                file[place % len(file)] = value
            subject.try_body(file)
        elif kind == 2:
            subject.try_body({"0": base64.b64encode(rest).decode(), "1": rest.decode("latin-1")})
        else:
            try:
                body = json.loads(rest)
            except (ValueError, RecursionError):
                body = bytearray(rest)
            subject.try_body(body)

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
