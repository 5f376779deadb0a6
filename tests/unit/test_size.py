"""The server's code stays small enough to be read in one sitting."""

import pytest

from demo.node import PROJECT


@pytest.mark.parametrize(("files", "most"), [("handler.py", 200), ("server/*.py", 480), ("create_mar_file.py", 264)])
def test_code_is_short(files: str, most: int) -> None:
    assert 0 < sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PROJECT.glob(files)) <= most
