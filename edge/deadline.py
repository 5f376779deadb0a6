"""A deadline for a whole response. The timeout of a socket alone starts again with every byte that arrives."""

import http.client
import io
import math
import socket
import time
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection


class DeadlineAdapter(HTTPAdapter):
    """Makes connections whose read timeout is the time in which a response must be complete, headers included."""

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        pool.ConnectionCls = DeadlineHTTPSConnection if pool.scheme == "https" else DeadlineHTTPConnection
        return pool


class DeadlineReader(io.RawIOBase):
    """Reads from a socket, at most `max_bytes`, until its timeout, counted from now, is over."""

    def __init__(self, sock: socket.socket, max_bytes: float = math.inf) -> None:
        self._sock, self._file, self._bytes_left = sock, sock.makefile("rb", buffering=0), max_bytes
        self._deadline = time.monotonic() + (sock.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the response timed out")
        if self._bytes_left <= 0:
            raise ConnectionAbortedError("too many bytes")
        self._sock.settimeout(left_s)
        count = self._file.readinto(buffer)
        self._bytes_left -= count or 0
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class DeadlineResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(DeadlineReader(sock))


class DeadlineHTTPConnection(HTTPConnection):
    response_class = DeadlineResponse


class DeadlineHTTPSConnection(HTTPSConnection):
    response_class = DeadlineResponse
