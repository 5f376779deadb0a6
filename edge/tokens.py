"""TorchServe's token authorization: the token that every request carries, and how it is replaced."""

import json
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import requests
from requests.auth import AuthBase

from edge.answers import error_text, refuses_token
from edge.retries import Health, ServerError, innermost

MOST_TOKENS = 5  # that a single request tries
POLL_S = 0.5
RENEWAL_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


class BearerToken(AuthBase):
    """Sends the inference token, and replaces it when the server refuses it.

    The token's source is `token_file` if given, else the environment variable TORCHSERVE_TOKEN, else the key_file.json
    that TorchServe writes where it is started. Without any of them no token is sent, for a server that wants none.

    A refused token is read again from its file: a restart of TorchServe wrote a new one. If that is no other, it has
    expired, and a new one is asked for at `management_url` with the API key, if the file holds that key.
    """

    def __init__(
        self, token_file: Path | None, management_url: str | None, stop: threading.Event, health: Health
    ) -> None:
        self.patience_s = 0.0  # how long a refused request waits for another token to turn up in the file
        self.source = ""
        self._token_file = token_file
        self._management_url = management_url
        self._stop = stop
        self._health = health
        self._token: str | None = None
        self._api_key = ""
        self._lock = threading.Lock()

    def load(self) -> None:
        """Read the token. Raises ServerError if its file can't be read or if there is no token in it."""
        path = self._token_file or Path("key_file.json")
        api_key = ""
        if self._token_file is None and (token := os.environ.get("TORCHSERVE_TOKEN", "").strip()):
            self.source = "TORCHSERVE_TOKEN"
        elif self._token_file is None and not path.exists():
            return
        else:
            self.source = str(path)
            try:
                keys = json.loads(path.read_text(encoding="utf-8"))
                token = str(keys["inference"]["key"])
                api_key = str(keys.get("API", {}).get("key", ""))
            except OSError as error:
                raise ServerError(f"can't read the token file {path}: {error.strerror}") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ServerError(f"{path} is no key file of TorchServe: expected JSON with inference.key") from error
        # Anything else would end in an error of the HTTP library that shows it.
        if not re.fullmatch("[!-~]*", api_key) or not re.fullmatch("[!-~]+", token):
            raise ServerError(f"what is in {self.source} is no token: expected printable ASCII without spaces")
        self._token, self._api_key = token, api_key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        request.register_hook("response", self._ask_again)  # type: ignore[no-untyped-call]
        return request

    def _ask_again(self, response: requests.Response, **options: Any) -> requests.Response:
        """Send a refused request again, at once if there is another token: a response hook of requests.

        With the same token too, while there is patience: a proxy may be told of it later than we are.
        """
        deadline = time.monotonic() + self.patience_s
        replaced = 0
        while refuses_token(response):
            if replaced < MOST_TOKENS and self._replace(response.request.headers.get("Authorization")):
                replaced += 1
            else:
                self._health.bad(f"{response.status_code} {error_text(response)}")
                if time.monotonic() >= deadline or self._stop.wait(POLL_S):
                    break
            response.close()
            request = response.request.copy()
            if self._token:
                request.headers["Authorization"] = f"Bearer {self._token}"
            response = response.connection.send(request, **options)
            response.request = request
        return response

    def _replace(self, refused: str | None) -> bool:
        """Get another token than the refused one; return whether there is one now."""
        with self._lock:
            if f"Bearer {self._token}" != refused and self._token:
                return True  # Another request's answer has brought it already.
            try:
                self.load()
                if f"Bearer {self._token}" == refused and self._api_key and self._management_url:
                    self._renew(self._management_url)
                    self.load()
                    if f"Bearer {self._token}" == refused:
                        # Once is enough: each renewal shuts out whoever else has the token.
                        self._management_url = None
                        log.warning("TorchServe has a new token, but %s does not: is it a copy?", self.source)
            except (ServerError, requests.RequestException) as error:
                # The file may be half written. If it is not, that is said when the patience is over.
                self._health.bad(f"token refused, and no other to be had: {innermost(error)}")
            return bool(self._token) and f"Bearer {self._token}" != refused

    def _renew(self, management_url: str) -> None:
        """Have TorchServe write a new inference token into its key file; the old one dies at once."""
        with requests.Session() as session:
            session.trust_env = False  # Neither a proxy nor a password of ~/.netrc has anything to do with this.
            session.get(
                f"{management_url}/token",
                params={"type": "inference"},
                headers={"Authorization": f"Bearer {self._api_key}"},
                timeout=RENEWAL_TIMEOUT_S,
                allow_redirects=False,
            ).raise_for_status()
