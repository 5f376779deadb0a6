"""The inference token of TorchServe: every request carries it, and it may have to be renewed."""

import json
import logging
import os
import re
import threading
import time
from pathlib import Path

import requests
from requests.auth import AuthBase

from edge.errors import ServerError
from edge.responses import root_cause
from edge.timing import Timing

log = logging.getLogger(__name__)


class BearerToken(AuthBase):
    """Adds the token to requests, and replaces it when the server rejects it.

    It comes from `token_file` if given, else from the environment variable TORCHSERVE_TOKEN, else from the
    key_file.json that TorchServe writes where it is started. Without any of them no token is sent.

    is_awaited: the file is empty. TorchServe, while it starts, creates it some 0.1 s before it writes its keys.
    """

    def __init__(self, token_file: Path | None, management_url: str | None, timing: Timing) -> None:
        self.source = self.problem = ""
        self.is_awaited = False
        self._token_file = token_file
        self._management_url = management_url
        self._timing = timing
        self._token = self._api_key = ""
        self._next_renewal_at = 0.0
        self._lock = threading.Lock()

    def load(self) -> None:
        """Read the token; an empty file has none yet. Raises ServerError if a file can't be read or holds no token."""
        path, api_key = self._token_file or Path("key_file.json"), ""
        if self._token_file is None and (token := os.environ.get("TORCHSERVE_TOKEN", "").strip()):
            self.source = "TORCHSERVE_TOKEN"
        elif self._token_file is None and not path.exists():
            return
        else:
            try:
                text = path.read_text(encoding="utf-8")
                self.is_awaited = not text.strip()
                if self.is_awaited:
                    self.problem = f"{path} is empty: TorchServe has not written its keys"
                    return
                keys = json.loads(text)
                token = str(keys["inference"]["key"])
                api_key = str(keys.get("API", {}).get("key", ""))
            except OSError as error:
                raise ServerError(f"can't read the token file {path}: {error.strerror}") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ServerError(f"{path} is no key file of TorchServe: expected JSON with inference.key") from error
            self.source = str(path)
        # With other characters the HTTP library raises an error that shows the token.
        if not re.fullmatch("[!-~]*", api_key) or not re.fullmatch("[!-~]+", token):
            raise ServerError(f"{self.source} holds no token: expected printable ASCII without spaces")
        self._token, self._api_key = token, api_key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def refresh(self, response: requests.Response) -> bool:
        """Replace the token that a response rejects; return whether there is another one now.

        The file is read again first: a restart of TorchServe writes a new token. If it holds the same one, that one has
        expired, and TorchServe is asked at `management_url`, with the API key of the file, to write a new one. A 401 is
        from a proxy: a new token of TorchServe would not help, and would make that of all other clients invalid.
        `problem` says why a replacement failed.
        """
        rejected = response.request.headers.get("Authorization")
        with self._lock:
            if not self._is_new(rejected):  # else another thread has replaced it
                self.problem = ""
                try:
                    self.load()
                    is_done = self.problem or self._is_new(rejected)
                    if not is_done and response.status_code != requests.codes.unauthorized:
                        self._renew(rejected)
                except ServerError as error:
                    self.problem = str(error)
                except requests.RequestException as error:
                    self.problem = f"TorchServe did not renew the token: {root_cause(error)}"
            return self._is_new(rejected)

    def _is_new(self, rejected: str | None) -> bool:
        return bool(self._token) and f"Bearer {self._token}" != rejected

    def _renew(self, rejected: str | None) -> None:
        """Have TorchServe write a new inference token into its key file. The old one becomes invalid at once."""
        if not self._api_key or not self._management_url or time.monotonic() < self._next_renewal_at:
            return
        headers = {"Authorization": f"Bearer {self._api_key}"}
        url, timeout_s = f"{self._management_url}/token?type=inference", self._timing.connect_s
        with requests.Session() as session:
            session.trust_env = False  # no proxy, and no password of ~/.netrc instead of the API key
            try:
                session.get(url, headers=headers, timeout=timeout_s, allow_redirects=False).raise_for_status()
            finally:  # If it does not respond, the other threads that wait for the lock do not ask it again.
                self._next_renewal_at = time.monotonic() + self._timing.max_backoff_s
        self.load()
        if not self._is_new(rejected):
            self._management_url = None  # Each renewal makes the token of all other clients invalid.
            log.warning("TorchServe has a new token, but %s does not: is it a copy?", self.source)

    def rejection(self, url: str, response: requests.Response) -> ServerError:
        """Return the error that explains a response which rejects the token, or requires one."""
        problem = f"{url} rejects the token from {self.source}" if self.source else f"{url} requires a token"
        if response.status_code == requests.codes.unauthorized:
            advice = "set TORCHSERVE_TOKEN to a token of the proxy, without the word Bearer"
        elif self.is_awaited:
            advice = "see its logs, or pass another file as --token-file FILE"
        elif self.source:
            advice = "it belongs to another server, or has expired (TorchServe's inference keys live for 60 minutes, "
            advice += "unless token_expiration_min is set; a restart writes new ones into its key_file.json)"
        else:
            advice = "run this in the directory where TorchServe was started, whose key_file.json holds it, or pass "
            advice += "--token-file FILE, or set TORCHSERVE_TOKEN"
        return ServerError(f"{problem}: {advice}" + (f" ({self.problem})" if self.problem else ""))
