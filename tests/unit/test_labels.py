"""archive/labels.py: the labels that users have, and what is clearly something else."""

import json
from pathlib import Path

import pytest

from archive.errors import ArchiveError
from archive.labels import read_labels

LINES = {
    "one a line": "cat\ndog\n",
    "of Windows": "\ufeffcat\r\ndog\r\n\r\n",
    "commas": "tench, Tinca tinca\ngoldfish, Carassius auratus\ngreat white shark, white shark, man-eater\n",
    "synsets": "n01440764 tench\nn01443537 goldfish\n",
    "digits": "0\n1\n2\n3\n",
    "sizes": "0.5 mm\n1.0 mm\n2.0 mm\n",
    "coins": "1 euro\n2 euro\n5 euro\n",
    "numbers in them": "3D printer\nroute 66\nM1\n",
    "numbered names": "Zone 1\nZone 2\nZone 3\n",
    "folders of birds": "001.Black_footed_Albatross\n002.Laysan_Albatross\n",
    "colons": "defect:scratch\ndefect:dent\nno: helmet\n",
    "times": "12:30\n13:30\n",
    "dashes": "- none -\nt-shirt\nx-ray\n",
    "brackets": "[unknown]\ncat (domestic)\n{other}\n",
    "angles": "<unk>\n__background__\n",
    "hashes": "#selfie\nC#\n",
    "umlauts": "Käse\n猫\n🐶\n",
    "one": "cat\n",
}


@pytest.mark.parametrize("kind", LINES)
def test_labels_are_lines(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(LINES[kind].encode())
    assert read_labels(path) == LINES[kind].replace("\ufeff", "").replace("\r", "").rstrip("\n").split("\n")


JSON = {
    "dict": {"0": "cat", "1": "dog"},
    "dict in another order": {"1": "dog", "0": "cat"},
    "list": ["cat", "dog"],
    "pairs": {"0": ["n0123", "cat"], "1": ["n0124", "dog"]},
    "list of pairs": [["n0123", "cat"], ["n0124", "dog"]],
    "an object detector's": {"object_type_names": ["cat", "dog"]},
}


@pytest.mark.parametrize("kind", JSON)
def test_labels_are_an_index_to_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "any name"
    for text in (json.dumps(JSON[kind]), "\ufeff\n " + json.dumps(JSON[kind], indent=2) + "\n"):
        path.write_text(text, encoding="utf-8")
        assert read_labels(path) == ["cat", "dog"]


def test_the_two_cranes_of_imagenet_differ(tmp_path: Path) -> None:
    path = tmp_path / "index_to_name.json"
    path.write_text(json.dumps({"0": ["n02012849", "crane"], "1": ["n03126707", "crane"], "2": ["n1", "cat"]}))
    assert read_labels(path) == ["crane (n02012849)", "crane (n03126707)", "cat"]


OTHERS = {
    "CSV": ("0,cat\n1,dog\n", "CSV ('0,cat')"),
    "CSV of names": ("cat,0\ndog,1\n", "CSV ('cat,0')"),
    "CSV with spaces": ("cat, 0\ndog, 1\n", "CSV ('cat, 0')"),
    "CSV with a header": ("id, name\n0, cat\n1, dog\n", "numbered lines ('id, name')"),
    "CSV on one line": ("cat,dog,bird\n", "CSV ('cat,dog,bird')"),
    "semicolons": ("cat;Katze\ndog;Hund\n", "CSV ('cat;Katze')"),
    "tabs": ("0\tcat\n1\tdog\n", "CSV ('0\\tcat')"),
    "numbers": ("0 cat\n1 dog\n", "numbered lines ('0 cat')"),
    "numbers from 1": ("1. cat\n2. dog\n", "numbered lines ('1. cat')"),
    "numbers and colons": ("0: cat\n1: dog\n", "YAML ('0: cat')"),
    "numbers in brackets": ("(0) cat\n(1) dog\n", "numbered lines ('(0) cat')"),
    "numbers at the end": ("/a/airfield 0\n/a/alley 1\n", "numbered lines ('/a/airfield 0')"),
    "YAML": ("- cat\n- dog\n", "YAML ('- cat')"),
    "YAML of YOLO": ("names:\n  0: cat\n  1: dog\nnc: 2\n", "YAML ('names:')"),
    "YAML with comments": ("# classes\nnames: [cat, dog]\n", "comments ('# classes')"),
    "a Python dict": ("{0: 'cat', 1: 'dog'}\n", "is not JSON (Expecting property name enclosed in double quotes"),
    "a Python list": ("['cat', 'dog']\n", "is not JSON (Expecting value"),
    "Python": ("CLASSES = ['cat',\n'dog']\n", "code (\"CLASSES = ['cat',\")"),
    "quotes": ('"cat"\n"dog"\n', "quoted lines ('\"cat\"')"),
    "a table": ("| 0 | cat |\n| 1 | dog |\n", "a table ('| 0 | cat |')"),
    "HTML": ("<!DOCTYPE html>\n<title>404</title>\n", "HTML ('<!DOCTYPE html>')"),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS ('version"),
    "broken JSON": ('{"0": "cat",', "is not JSON (Expecting property name"),
    "names to numbers": ('{"cat": 0, "dog": 1}', "has numbers by names, expected one label a line, or JSON: "),
    "a missing number": ('{"1": "cat", "2": "dog"}', 'has 2 names and none for "0" (they begin at 0), expected'),
    "a number twice": ('{"0": "cat", "0": "dog"}', "the key '0' is there twice"),
    "numbers as names": ("[1, 2]", "label 0 is 1, expected"),
    "objects": ('[{"name": "cat"}]', 'label 0 is {"name": "cat"}, expected'),
    "no names": ('{"object_type_names": null}', "has no names, expected"),
    "an empty list": ("[]", "has no names, expected"),
    "equal names": ('["cat", "cat"]', "label 2: the label 'cat' is there already, expected different ones"),
    "an empty name": ('["cat", " "]', "label 2 is empty, expected"),
    "depth": ("[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_rejected_by_kind(tmp_path: Path, kind: str) -> None:
    text, message = OTHERS[kind]
    path = tmp_path / "labels.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ArchiveError) as error:
        read_labels(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "expected" in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"])
def test_other_encodings_say_what_to_do(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("Käse\nWürste\n".encode(encoding))
    with pytest.raises(ArchiveError, match=r"labels.txt is not UTF-8 \(.*\): save it as UTF-8"):
        read_labels(path)
