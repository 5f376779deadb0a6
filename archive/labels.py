"""The labels of a model, by class index: torchvision's, or those of a file."""

import json
import re
from pathlib import Path
from typing import Any

from archive.errors import ArchiveError
from server.models import MODELS

EXPECTED = 'expected one label a line, or JSON: {"0": "cat", "1": "dog"} or ["cat", "dog"]'
# What a file without labels may hold instead, by what all of its lines are, and by how the first one begins.
OTHER_LINES = {"CSV": r".*(,\S|;|\t).*|.*,\s*\d+", "YAML": r"- .*|\w+:.*"}
OTHER_STARTS = {
    "YAML": r"---|(names|nc|classes|labels|path|train):",
    "Python": r"\w+\s*=\s*[\[{(]",
    "HTML": r"<[?!]|<html",
}
NUMBERED = r"(\d+)[\s,;:.)]+\S"


def trained_labels(model: str) -> list[str]:
    """Return the labels of a model's trained weights, with underscores for spaces; keypoints of pose estimation."""
    meta = MODELS[model].weights.meta
    return [label.replace(" ", "_") for label in meta.get("keypoint_names") or meta["categories"]]


def read_labels(path: Path) -> list[str]:
    """Return the labels in a file: one a line, or TorchServe's index_to_name.json.

    Raises ArchiveError if the file holds something else, or if labels are equal: predictions are keyed by them.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise ArchiveError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    except OSError as error:
        raise ArchiveError(f"can't read the labels in {path}: {error}") from error
    if "\0" in text:
        raise ArchiveError(f"{path} is not UTF-8 (it has zeros): save it as UTF-8")
    if not text:
        raise ArchiveError(f"{path} is empty, {EXPECTED}")
    is_json = text.lstrip()[0] in "{["
    labels, what = (json_labels(path, text), "label") if is_json else (line_labels(path, text), "line")
    seen: set[str] = set()
    for number, label in enumerate(labels, start=1):
        if not label:
            raise ArchiveError(f"{path}, {what} {number} is empty, {EXPECTED}")
        if label in seen:
            raise ArchiveError(
                f"{path}, {what} {number}: the label {label!r} is there already, expected different ones"
            )
        seen.add(label)
    return labels


def line_labels(path: Path, text: str) -> list[str]:
    """Return the lines of a text. Raises ArchiveError if they are clearly something else than labels."""
    lines = [line.strip() for line in text.splitlines()]
    kinds = [kind for kind, line in OTHER_LINES.items() if all(re.fullmatch(line, each) for each in lines)]
    kinds += [kind for kind, start in OTHER_STARTS.items() if re.match(start, lines[0])]
    has_header = re.search("[,;\t]", lines[0]) and not re.match(NUMBERED, lines[0])
    numbers = [int(found[1]) for line in lines[bool(has_header) :] if (found := re.match(NUMBERED, line))]
    if len(lines) > 1 and numbers in ([*range(len(lines) - bool(has_header))], [*range(1, len(lines) + 1)]):
        kinds.append("numbered lines")
    if kinds:
        raise ArchiveError(f"{path} has {kinds[0]} ({lines[0]!r}), {EXPECTED}")
    return lines


def json_labels(path: Path, text: str) -> list[str]:
    """Return the labels of an index_to_name.json. Of a list such as ["n0123", "tabby"] the last item counts."""
    try:
        names: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} is not JSON ({error}), {EXPECTED}") from error
    if isinstance(names, dict) and "object_type_names" in names:  # as TorchServe's object detector has it
        names = names["object_type_names"]
    if isinstance(names, dict):
        missing = [str(index) for index in range(len(names)) if str(index) not in names]
        if missing:
            raise ArchiveError(f'{path} has {len(names)} names and none for "{missing[0]}", {EXPECTED}')
        names = [names[str(index)] for index in range(len(names))]
    labels = [name[-1] if isinstance(name, list) and name else name for name in names]
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise ArchiveError(f"{path}, label {index} is {json.dumps(label)[:40]}, {EXPECTED}")
    return [label.strip() for label in labels]
