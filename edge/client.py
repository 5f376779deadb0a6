"""The TorchServe session: token, payloads, requests and what became of them."""

import base64
import json
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from requests_futures.sessions import FuturesSession

from edge.cameras import Frame

CONNECT_TIMEOUT_S = 5.0
# A request waits in TorchServe's queue while a worker loads the model, which takes many seconds on a slow machine.
ANSWER_TIMEOUT_S = 60.0
POLL_S = 0.5

Prediction = dict[str, float]


class ServerError(Exception):
    """A server that can't be used, with its address and what to do."""


class Failure(str):
    """Why a frame got no prediction, in one line."""


class NoAnswer(Failure):
    """The server kept us waiting for longer than it may."""


class BearerToken(AuthBase):
    """Sends the inference token; read anew from its source by load().

    The source is `token_file` if given, else the environment variable TORCHSERVE_TOKEN, else the key_file.json that
    TorchServe writes where it is started. Without any of them no token is sent, for a server that wants none.
    """

    def __init__(self, token_file: Path | None) -> None:
        self.source = ""
        self._token_file = token_file
        self._token: str | None = None

    def load(self) -> None:
        """Read the token. Raises ServerError if its file can't be read or if there is no token in it."""
        path = self._token_file or Path("key_file.json")
        if self._token_file is None and (token := os.environ.get("TORCHSERVE_TOKEN", "").strip()):
            self.source = "TORCHSERVE_TOKEN"
        elif self._token_file is None and not path.exists():
            self.source, self._token = "", None
            return
        else:
            self.source = str(path)
            try:
                token = str(json.loads(path.read_text(encoding="utf-8"))["inference"]["key"])
            except OSError as error:
                raise ServerError(f"can't read the token file {path}: {error.strerror}") from error
            except (ValueError, KeyError, TypeError) as error:
                raise ServerError(f"{path} is no key file of TorchServe: expected JSON with inference.key") from error
        # Anything else would end in an error of the HTTP library that shows it.
        if not re.fullmatch("[!-~]+", token):
            raise ServerError(f"what is in {self.source} is no token: expected printable ASCII without spaces")
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class TorchServe:
    """A model on a TorchServe server, asked asynchronously over at most `max_in_flight` kept-alive connections."""

    def __init__(self, url: str, model: str, token_file: Path | None, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.url = url.rstrip("/")
        self._model = model
        self._predictions = f"{self.url}/predictions/{quote(model, safe='')}"
        self._token = BearerToken(token_file)
        self._session = FuturesSession(max_workers=max_in_flight)
        self._session.auth = self._token
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=max_in_flight))

    def __enter__(self) -> "TorchServe":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    def wait_until_ready(self, timeout_s: float, stop: threading.Event) -> None:
        """Wait until the server answers, takes our token and knows the model; return early when `stop` is set.

        Only a server that is not there yet is waited for, up to `timeout_s`. Raises ServerError for all else.
        """
        deadline = time.monotonic() + timeout_s
        announced = False
        while not stop.is_set():
            self._token.load()
            try:
                # OPTIONS describes the model's API: TorchServe checks token and model for it, and runs nothing.
                response = self._session.options(
                    self._predictions, timeout=CONNECT_TIMEOUT_S, allow_redirects=False
                ).result(timeout=3 * CONNECT_TIMEOUT_S)
            except requests.exceptions.SSLError as error:
                raise ServerError(f"no trusted TLS connection to {self.url}: {innermost(error)}") from error
            except (requests.ConnectionError, requests.Timeout, FutureTimeoutError) as error:
                if time.monotonic() >= deadline:
                    raise ServerError(
                        f"no server at {self.url} ({innermost(error)}): start TorchServe, or pass its address as --url"
                    ) from error
            except requests.RequestException as error:
                raise ServerError(f"can't use {self.url}: {error}") from error
            else:
                self._check(response)
                return
            if not announced:
                print(f"waiting up to {timeout_s:g} s for TorchServe at {self.url}", file=sys.stderr)
                announced = True
            stop.wait(POLL_S)

    def _check(self, response: requests.Response) -> None:
        """Raise ServerError if the server refuses our token or does not know the model."""
        kind = error_type(response)
        if kind == "InvalidKeyException" and self._token.source:
            raise ServerError(
                f"{self.url} refuses the token from {self._token.source}: it is not the inference key of this server, "
                f"or it has expired (they live for 60 minutes, unless token_expiration_min is set; a restart of "
                f"TorchServe writes new ones into its key_file.json)"
            )
        if kind == "InvalidKeyException":
            raise ServerError(
                f"{self.url} wants a token: run this in the directory where TorchServe was started, whose "
                f"key_file.json holds it, or pass --token-file FILE, or set TORCHSERVE_TOKEN"
            )
        if kind in ("ModelNotFoundException", "ModelVersionNotFoundException"):
            raise ServerError(
                f"{self.url} has no model {self._model}: start TorchServe with --models {self._model}="
                f"{self._model}.mar, or pass the name of the model it serves as --model"
            )

    def ask(self, frames: Sequence[Frame], as_json: bool) -> "Future[requests.Response]":
        """Send frames without waiting: a single one as it is, or any number of them as one JSON batch."""
        if as_json:
            payload = {str(index): base64.b64encode(frame.jpeg).decode() for index, frame in enumerate(frames)}
            body, content_type = json.dumps(payload).encode(), "application/json"
        else:
            (frame,) = frames
            body, content_type = frame.jpeg, "image/jpeg"
        future: Future[requests.Response] = self._session.post(
            self._predictions,
            data=body,
            headers={"Content-Type": content_type},
            timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S),
            allow_redirects=False,  # A redirected POST would arrive as a GET, without its frames.
        )
        return future


def read_answers(future: "Future[requests.Response]", count: int, as_json: bool) -> list[Prediction | Failure]:
    """Wait for the answer to `count` frames; return what became of each, in the order sent.

    Never raises for what the network or the server does: that is the frames' failure.
    """
    try:
        response = future.result(timeout=2 * ANSWER_TIMEOUT_S)
    except requests.Timeout:
        return [NoAnswer(f"no answer within {ANSWER_TIMEOUT_S:g} s")] * count
    except FutureTimeoutError:
        return [NoAnswer(f"no whole answer within {2 * ANSWER_TIMEOUT_S:g} s")] * count
    except requests.RequestException as error:
        return [Failure(f"no answer: {innermost(error)}")] * count
    if response.status_code != requests.codes.ok:
        return [Failure(f"{response.status_code} {error_text(response)}")] * count
    try:
        body = response.json()
    except requests.JSONDecodeError:
        return [Failure("the answer is not JSON")] * count
    answers = body if as_json else [body]
    if not isinstance(answers, list) or len(answers) != count:
        return [Failure(f"the answer does not fit: expected {count} predictions")] * count
    return [read_prediction(answer) for answer in answers]


def read_prediction(answer: Any) -> Prediction | Failure:
    """Return one frame's answer if it is a dict label -> probability, else why it is none."""
    if isinstance(answer, dict) and answer and all(isinstance(value, float | int) for value in answer.values()):
        return answer
    if isinstance(answer, dict) and isinstance(answer.get("error"), str):
        return Failure(answer["error"])
    return Failure("the answer does not fit: expected a dict label -> probability")


def error_body(response: requests.Response) -> dict[str, Any]:
    """Return the JSON object of an error answer, {} if there is none."""
    try:
        body = response.json()
    except requests.JSONDecodeError:
        return {}
    return body if isinstance(body, dict) else {}


def error_type(response: requests.Response) -> str:
    """Return TorchServe's own name of an error, such as InvalidKeyException."""
    return str(error_body(response).get("type", ""))


def error_text(response: requests.Response) -> str:
    """Return what an error answer says, in one line that a terminal can show."""
    body = error_body(response)
    text = str(body.get("error") or body.get("message") or response.reason)
    return "".join(character for character in " ".join(text.split()) if character.isprintable())[:300]


def innermost(error: BaseException) -> str:
    """Return the cause at the bottom of an error: requests wraps urllib3, which wraps the operating system."""
    while True:
        reason = getattr(error, "reason", None) or error.__cause__ or error.__context__
        if not isinstance(reason, BaseException):
            return f"{error}" or type(error).__name__
        error = reason
