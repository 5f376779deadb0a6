"""edge/responses.py: the results in a response, what is retried, and what an error says."""

import errno
import http.client
import json
import ssl
from collections.abc import Callable
from typing import Any

import pytest
import requests
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from edge.cameras import Camera
from edge.errors import ServerError
from edge.frames import Frame, Prediction, Result
from edge.responses import (
    BATCH_HEADER,
    MAX_ERROR_CHARACTERS,
    TOO_LARGE,
    connection_error,
    is_auth_error,
    is_transient,
    one_line,
    parse_response,
    reason,
    root_cause,
)

CAMERA = Camera("0")
FRAMES = [Frame(CAMERA, number, captured_at, b"jpeg") for number, captured_at in ((7, 99.0), (8, 99.5), (9, 99.75))]
CAT: Prediction = {"cat": 0.75, "dog": 0.25}
DOG: Prediction = {"dog": 1, "cat": 0}
NO_PREDICTION = "unexpected response: expected label -> probability"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)


def response(
    body: Any, status: int = 200, headers: dict[str, str] | None = None, phrase: str | None = "Phrase"
) -> requests.Response:
    """Return a response, as it arrives: bytes as they are, all else as JSON."""
    made = requests.Response()
    made.status_code = status
    made.reason = phrase  # type: ignore[assignment]
    made._content = body if isinstance(body, bytes) else json.dumps(body).encode()
    made.headers.update(headers or {})
    return made


def parse_one(body: Any, status: int = 200, **options: Any) -> Result:
    (result,) = parse_response(response(body, status, **options), FRAMES[:1], is_batch=False)
    return result


def test_a_response_to_a_single_frame_is_its_prediction() -> None:
    assert parse_one(CAT) == Result(FRAMES[0], "answered", CAT, latency_s=1.0)


def test_a_response_to_a_json_batch_has_the_predictions_in_the_order_sent() -> None:
    results = parse_response(response([CAT, DOG, CAT], headers={BATCH_HEADER: "3"}), FRAMES, is_batch=True)
    assert results == [
        Result(FRAMES[0], "answered", CAT, latency_s=1.0, batch_size=3),
        Result(FRAMES[1], "answered", DOG, latency_s=0.5, batch_size=3),
        Result(FRAMES[2], "answered", CAT, latency_s=0.25, batch_size=3),
    ]


def test_a_json_batch_of_one_frame_is_a_list() -> None:
    assert parse_response(response([CAT]), FRAMES[:1], is_batch=True)[0].predictions == CAT
    (result,) = parse_response(response(CAT), FRAMES[:1], is_batch=True)
    assert result == Result.failed(FRAMES[0], "unexpected response: expected 1 predictions")


def test_a_frame_with_an_error_fails_alone() -> None:
    body = [CAT, {"error": "not an image:\n\x1b[31mtruncated\x07"}, {"error": None}]
    results = parse_response(response(body), FRAMES, is_batch=True)
    assert [result.outcome for result in results] == ["answered", "failed", "failed"]
    assert [result.error for result in results] == [None, "not an image: [31mtruncated", NO_PREDICTION]
    assert [result.frame for result in results] == FRAMES
    assert all(result.latency_s is None and result.predictions is None for result in results[1:])
    assert parse_one({"error": "not an image"}).error == "not an image"


def test_a_label_may_be_called_error() -> None:
    assert parse_one({"error": 0.5}) == Result(FRAMES[0], "answered", {"error": 0.5}, latency_s=1.0)


@pytest.mark.parametrize(
    "body",
    [[], [CAT, CAT], [CAT] * 4, CAT, {"0": CAT, "1": CAT, "2": CAT}, "cat", 3, True],
    ids=["none", "two", "four", "a prediction", "a dict of three", "text", "number", "bool"],
)
def test_a_response_with_a_wrong_number_of_predictions_fails_all_frames(body: Any) -> None:
    results = parse_response(response(body), FRAMES, is_batch=True)
    assert results == [Result.failed(frame, "unexpected response: expected 3 predictions") for frame in FRAMES]


@pytest.mark.parametrize(
    "body",
    [
        b'{"cat": NaN}',
        b'{"cat": 0.5, "dog": NaN}',
        b'{"cat": Infinity}',
        b'{"cat": -Infinity}',
        b'{"cat": 1e999}',
        b'{"cat": -1e999}',
        b'{"cat": 1' + 400 * b"0" + b"}",
        b'{"cat": -1' + 400 * b"0" + b"}",
        b'{"cat": null}',
        b'{"cat": "0.5"}',
        b'{"cat": {"tabby": 0.5}}',
        b'{"cat": [0.5]}',
        b"{}",
        b"[]",
        b'"cat"',
        b"0.5",
        b"true",
        b'[{"cat": 0.5}]',
    ],
)
def test_a_response_that_is_no_prediction_fails(body: bytes) -> None:
    assert parse_one(body) == Result.failed(FRAMES[0], NO_PREDICTION)
    batch = parse_response(response(b'[{"cat": 1}, ' + body + b', {"cat": 0}]'), FRAMES, is_batch=True)
    assert [result.error for result in batch] == [None, NO_PREDICTION, None]


@pytest.mark.parametrize("value", ["0", "1", "-3", "0.25", "1e-999", "1e308", "-1e308", "1" + 300 * "0", "true"])
def test_any_number_that_a_float_can_hold_is_accepted(value: str) -> None:
    """Python counts bool as a number, and prints true as 1.00."""
    result = parse_one(b'{"cat": %s}' % value.encode())
    assert result.outcome == "answered"
    assert result.predictions == {"cat": json.loads(value)}
    assert f"{result.predictions['cat']:.2f}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>busy</html>",
        b'{"cat": 0.5',
        b'{"cat": 0.5}}',
        b"\xff\xfe\x00",
        b"\x00" * 50,
        100_000 * b"[",
        100_000 * b'{"a":',
        b'{"cat": ' + 5000 * b"9" + b"}",  # more digits than Python converts
    ],
    ids=["empty", "HTML", "cut off", "too long", "no text", "zeros", "deep list", "deep dict", "5000 digits"],
)
@pytest.mark.parametrize("is_batch", [False, True])
def test_a_response_that_is_not_json_fails_all_frames(body: bytes, is_batch: bool) -> None:
    frames = FRAMES if is_batch else FRAMES[:1]
    results = parse_response(response(body), frames, is_batch)
    assert results == [Result.failed(frame, "unexpected response: expected predictions as JSON") for frame in frames]


@pytest.mark.parametrize("content_type", ["application/json; charset=no-such-charset", "text/html; charset=utf-16"])
def test_the_charset_that_a_server_states_ends_nothing(content_type: str) -> None:
    made = response(CAT, headers={"Content-Type": content_type})
    made.encoding = content_type.rpartition("=")[2]
    (result,) = parse_response(made, FRAMES[:1], is_batch=False)
    assert (result.outcome, result.error) in (
        ("answered", None),
        ("failed", "unexpected response: expected predictions as JSON"),
    )


@pytest.mark.parametrize(
    ("header", "batch_size"),
    [
        ("1", 1),
        ("4", 4),
        ("128", 128),
        ("999999999", 999_999_999),
        ("0", None),
        ("04", None),
        ("-4", None),
        ("+4", None),
        ("4.0", None),
        ("4, 4", None),
        (" 4", None),
        ("4\n", None),
        ("1_0", None),
        ("٤", None),
        ("four", None),
        ("", None),
        ("1000000000", None),
        (5000 * "9", None),
    ],
)
def test_batch_size_of_the_forward_pass(header: str, batch_size: int | None) -> None:
    result = parse_one(CAT, headers={BATCH_HEADER.lower(): header})
    assert (result.outcome, result.batch_size) == ("answered", batch_size)


def test_the_batch_size_is_unknown_without_the_header_and_for_a_frame_that_failed() -> None:
    assert parse_one(CAT).batch_size is None
    assert parse_one({"error": "x"}, headers={BATCH_HEADER: "4"}).batch_size is None


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, {"code": 400, "type": "BadRequest", "message": "a\r\n  b\tc\n"}, "400 a b c"),
        (400, {"message": "\x1b[2J\x1b]0;title\x07clean\x00 \x9b31m\u202etext\u200b"}, "400 [2J]0;titleclean 31mtext"),
        (400, {"message": "caf\u00e9 \u732b"}, "400 caf\u00e9 \u732b"),
        (400, {"message": "\ud800x"}, "400 x"),
        (400, {"message": 1000 * "long "}, "400 " + (1000 * "long ")[:MAX_ERROR_CHARACTERS].rstrip()),
        (400, {"error": "of the handler", "message": "of TorchServe"}, "400 of the handler"),
        (400, {"message": {"text": "x"}}, "400 {'text': 'x'}"),
        (400, {"message": ""}, "400 Phrase"),
        (400, {"message": None}, "400 Phrase"),
        (400, ["message"], "400 Phrase"),
        (400, b"<html>\n<body>nginx</body></html>", "400 Phrase"),
        (401, b"", "401 Phrase"),
        (413, b"<html>too large</html>", TOO_LARGE),
        (413, {"message": "x"}, TOO_LARGE),
        (302, b"", "302 Phrase"),
        (204, b"", "204 Phrase"),
        (206, CAT, "206 Phrase"),
        (503, {"code": 503, "message": "Model resnet-18 has no worker"}, "503 Model resnet-18 has no worker"),
        (507, CAT, "507 Phrase"),
    ],
)
@pytest.mark.parametrize("is_batch", [False, True])
def test_an_error_response_fails_all_frames_with_its_status_in_one_line(
    status: int, body: Any, error: str, is_batch: bool
) -> None:
    frames = FRAMES if is_batch else FRAMES[:1]
    results = parse_response(response(body, status), frames, is_batch)
    assert results == [Result.failed(frame, error) for frame in frames]


def test_the_error_of_a_request_that_is_too_large_names_the_flags() -> None:
    assert TOO_LARGE.startswith("413 ")
    assert "--batch_size" in TOO_LARGE
    assert "--resize" in TOO_LARGE


@given(st.text())
def test_text_of_a_server_becomes_one_line_that_can_be_printed(text: str) -> None:
    line = one_line(text)
    assert line == "" or line.isprintable()
    assert len(line) <= MAX_ERROR_CHARACTERS
    assert len(line.splitlines()) <= 1
    assert line.split() == one_line(line).split()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("error"), inner),
)


@given(st.binary() | JSON, st.sampled_from([200, 204, 302, 400, 401, 413, 500, 503]), st.booleans())
def test_whatever_the_response_is_every_frame_gets_one_result(body: Any, status: int, is_batch: bool) -> None:
    frames = FRAMES if is_batch else FRAMES[:1]
    results = parse_response(response(body, status), frames, is_batch)
    assert [result.frame for result in results] == frames
    for result in results:
        assert (result.outcome == "answered") == (result.error is None) == bool(result.predictions)
        assert result.outcome in ("answered", "failed")
        json.dumps(result.predictions, allow_nan=False)
        assert result.error is None or len(result.error.splitlines()) <= 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (200, False),
        (302, False),
        (400, False),
        (401, False),
        (404, False),
        (413, False),
        (429, True),
        (500, True),
        (501, False),
        (502, True),
        (503, True),
        (504, True),
        (507, True),
    ],
)
def test_statuses_that_are_retried(status: int, expected: bool) -> None:
    assert is_transient(response(b"", status), None) is expected


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, b"", True),
        (400, {"code": 400, "type": "InvalidKeyException", "message": "x"}, True),
        (403, {"type": "InvalidKeyException"}, True),
        (200, {"type": "InvalidKeyException"}, False),
        (400, {"type": "BadRequestException"}, False),
        (400, {"type": ["InvalidKeyException"]}, False),
        (400, b"InvalidKeyException", False),
        (403, b"", False),
    ],
)
def test_responses_that_reject_the_token(status: int, body: Any, expected: bool) -> None:
    assert is_auth_error(response(body, status)) is expected


def tls_error(kind: type[ssl.SSLError], code: int, text: str) -> ssl.SSLError:
    error = kind(code, text)
    error.reason = text.split()[0]
    return error


CONNECT = "urllib3.util.connection.create_connection"
HANDSHAKE = "urllib3.connection.HTTPSConnection.connect"
RESPONSE = "urllib3.connection.HTTPConnection.getresponse"
CERTIFICATE = "CERTIFICATE_VERIFY_FAILED self-signed certificate (_ssl.c:1000)"
NO_TLS = "WRONG_VERSION_NUMBER wrong version number (_ssl.c:1000)"
CLOSED = "UNEXPECTED_EOF_WHILE_READING EOF occurred in violation of protocol (_ssl.c:1000)"


def raised_by_requests(
    monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, url: str = "https://server:8080/predictions/x"
) -> requests.RequestException:
    """Return what requests makes of an error that occurs at some place in urllib3; there is no connection."""

    def fail(*_: object, **__: object) -> None:
        raise error

    if place == RESPONSE:
        monkeypatch.setattr("urllib3.connection.HTTPConnection.request", lambda *_, **__: None)
        url = url.replace("https:", "http:")
    monkeypatch.setattr(place, fail)
    with pytest.raises(requests.RequestException) as caught:
        requests.post(url, b"jpeg", timeout=(1, 1))
    return caught.value


ERRORS_OF_CONNECTIONS: list[Any] = [
    # where, what, whether it is transient, its root cause
    (CONNECT, lambda: ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), True, "Connection refused"),
    (CONNECT, lambda: OSError(errno.EHOSTUNREACH, "No route to host"), True, "No route to host"),
    (CONNECT, lambda: TimeoutError("timed out"), True, "timed out"),
    (RESPONSE, lambda: TimeoutError("timed out"), True, "timed out"),
    (RESPONSE, lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True, "reset by peer"),
    (RESPONSE, lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"), True, "Broken pipe"),
    (RESPONSE, lambda: http.client.RemoteDisconnected("closed without response"), True, "closed without response"),
    (RESPONSE, lambda: http.client.BadStatusLine("garbage"), True, "garbage"),
    (HANDSHAKE, lambda: tls_error(ssl.SSLCertVerificationError, 1, CERTIFICATE), False, "self-signed certificate"),
    (HANDSHAKE, lambda: tls_error(ssl.SSLError, 1, NO_TLS), False, "wrong version number"),
    (HANDSHAKE, lambda: tls_error(ssl.SSLEOFError, 8, CLOSED), True, "EOF occurred in violation of protocol"),
    (HANDSHAKE, lambda: tls_error(ssl.SSLZeroReturnError, 6, "TLS closed"), True, "TLS closed"),
]


@pytest.mark.parametrize(("place", "make", "transient", "cause"), ERRORS_OF_CONNECTIONS)
def test_errors_of_connections_are_retried_unless_tls_can_never_work(
    monkeypatch: pytest.MonkeyPatch, place: str, make: Callable[[], Exception], transient: bool, cause: str
) -> None:
    innermost = make()
    error = raised_by_requests(monkeypatch, place, innermost)
    assert error is not innermost
    assert is_transient(None, error) is transient
    assert cause in root_cause(error)
    assert root_cause(error) == one_line(str(innermost))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (requests.ConnectionError("x"), True),
        (requests.ConnectTimeout("x"), True),
        (requests.ReadTimeout("x"), True),
        (requests.Timeout("the response timed out after 10 s"), True),
        (requests.exceptions.ChunkedEncodingError("x"), True),
        (requests.ConnectionError(urllib3.exceptions.IncompleteRead(3, 4)), True),
        (requests.exceptions.ProxyError("x"), True),
        (requests.exceptions.SSLError(ssl.SSLCertVerificationError(1, CERTIFICATE)), False),
        (requests.exceptions.SSLError(ssl.SSLEOFError(8, CLOSED)), True),
        (requests.exceptions.InvalidURL("x"), False),
        (requests.exceptions.MissingSchema("x"), False),
        (requests.exceptions.InvalidHeader("x"), False),
        (requests.exceptions.InvalidProxyURL("x"), False),
        (requests.TooManyRedirects("x"), False),
        (requests.HTTPError("x"), False),
        (requests.RequestException("x"), False),
        (ServerError("can't read the token file"), False),
        (None, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_that_are_retried(error: Exception | None, expected: bool) -> None:
    assert is_transient(None, error) is expected


def test_root_cause_is_the_innermost_of_nested_errors() -> None:
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    chained: BaseException = requests.ConnectionError("outer")
    chained.__cause__ = refused
    in_context: BaseException = requests.ConnectionError("outer")
    in_context.__context__ = refused
    as_argument = requests.ConnectionError(urllib3.exceptions.ProtocolError("Connection aborted.", refused))
    as_reason = requests.ConnectionError(urllib3.exceptions.MaxRetryError(None, "/", refused))  # type: ignore[arg-type]
    for error in (refused, chained, in_context, as_argument, as_reason):
        assert root_cause(error) == str(refused)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one\n  two\x1b[31m"), "one two[31m"),
        (ValueError(), "ValueError"),
        (requests.ConnectionError(TimeoutError()), "TimeoutError"),
        (ValueError(1000 * "x"), MAX_ERROR_CHARACTERS * "x"),
    ],
)
def test_root_cause_is_one_line_and_never_empty(error: Exception, expected: str) -> None:
    assert root_cause(error) == expected


def test_reason_of_a_failed_attempt() -> None:
    assert reason(response({"message": "no\nworker"}, 503)) == "503 no worker"
    assert reason(response(b"", 504, phrase="Gateway Time-out")) == "504 Gateway Time-out"
    assert reason(response(b"", 502, phrase="")) == "502", "HTTP/2 has no phrases"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            requests.ConnectionError("refused"),
            "no server at https://a (refused): start TorchServe, or pass its address as --url",
        ),
        (
            requests.ReadTimeout("Read timed out"),
            "the server at https://a does not respond (Read timed out): if the workers of the model can't start, "
            "TorchServe's logs/model_log.log has the cause",
        ),
        (requests.Timeout("slow"), "no server at https://a (slow): start TorchServe, or pass its address as --url"),
        (
            requests.exceptions.SSLError(ssl.SSLCertVerificationError(1, "self-signed")),
            "no trusted TLS connection to https://a: self-signed (REQUESTS_CA_BUNDLE names what to trust)",
        ),
        (requests.exceptions.InvalidURL("no host"), "can't use https://a: no host"),
    ],
)
def test_connection_errors_say_what_to_do(error: requests.RequestException, expected: str) -> None:
    found = connection_error("https://a", error)
    assert isinstance(found, ServerError)
    assert found.exit_code == 4
    assert str(found) == expected
