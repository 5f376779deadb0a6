"""edge/auth.py: when the token is replaced. A renewal would open a connection, which fails a unit test."""

from pathlib import Path

import pytest
import requests

from edge.auth import BearerToken
from edge.timing import Timing


def rejected(status: int, token: str) -> requests.Response:
    """Return a response that rejects a token."""
    response = requests.Response()
    response.status_code = status
    request = requests.Request("POST", "http://127.0.0.1/predictions/m", headers={"Authorization": f"Bearer {token}"})
    response.request = request.prepare()
    return response


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key_file.json"
    path.write_text('{"inference": {"key": "old"}, "API": {"key": "api"}}')
    return path


@pytest.fixture
def token(key_file: Path) -> BearerToken:
    token = BearerToken(key_file, "http://127.0.0.1:8081", Timing())
    token.load()
    return token


def test_401_of_a_proxy_renews_no_token_of_torchserve(token: BearerToken) -> None:
    assert not token.refresh(rejected(401, "old"))


def test_expired_token_of_torchserve_is_renewed(token: BearerToken) -> None:
    with pytest.raises(AssertionError, match="a unit test starts no server"):
        token.refresh(rejected(400, "old"))


def test_renewal_that_fails_is_not_repeated_at_once_and_its_cause_is_reported(
    token: BearerToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the management port hangs, other threads wait for the lock and would hang there one after the other."""
    attempts = []

    def time_out(*_: object, **__: object) -> None:
        attempts.append(1)
        raise requests.ConnectTimeout("timed out")

    monkeypatch.setattr(requests.Session, "get", time_out)
    assert not token.refresh(rejected(400, "old"))
    assert token.problem == "TorchServe did not renew the token: timed out"
    assert not token.refresh(rejected(400, "old"))
    assert len(attempts) == 1


def test_rejection_says_why_the_token_was_not_replaced(token: BearerToken, key_file: Path) -> None:
    key_file.write_text("{")
    response = rejected(400, "old")
    assert not token.refresh(response)
    expected = f" ({key_file} is no key file of TorchServe: expected JSON with inference.key)"
    assert str(token.rejection("http://a", response)).endswith(expected)


def test_empty_file_has_no_token_yet(key_file: Path) -> None:
    """TorchServe creates it some 0.1 s before it writes its keys."""
    content = key_file.read_text()
    key_file.write_text("")
    token = BearerToken(key_file, "http://127.0.0.1:8081", Timing())
    token.load()
    request = requests.Request("POST", "http://127.0.0.1/predictions/m", auth=token).prepare()
    assert "Authorization" not in request.headers
    response = requests.Response()
    response.status_code, response.request = 400, request
    assert not token.refresh(response), "and no renewal"
    text = str(token.rejection("http://127.0.0.1", response))
    assert text.startswith("http://127.0.0.1 requires a token: ")
    assert text.endswith(f" ({key_file} is empty: TorchServe has not written its keys)")
    assert token.is_awaited
    key_file.write_text(content)
    assert token.refresh(response)
    assert (token.problem, token.is_awaited) == ("", False)


@pytest.mark.parametrize("status", [400, 401])
def test_file_is_read_again_before_a_renewal(token: BearerToken, key_file: Path, status: int) -> None:
    key_file.write_text('{"inference": {"key": "new"}, "API": {"key": "api"}}')
    assert token.refresh(rejected(status, "old"))
    assert token.refresh(rejected(status, "old")), "replaced by another thread already"
