"""The HTTP(S) endpoint: one path, GET only, a thread for each of a few connections.

Whoever connects may be slow, silent or hostile: at most MAX_CONNECTIONS are served, none longer than
DEADLINE_S, and only one scrape is written at a time. The TLS handshake happens in the connection's thread.
prometheus_client's own server does it in the thread that accepts, so that one silent client holds up all, and
has no limits. This module must never read a map, and never wait for a client when the supervisor stops.
"""

import contextlib
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any

from prometheus_client.exposition import choose_encoder

from mcr.config import TlsFiles
from mcr.errors import McrError
from mcr.metrics.collect import Scrape

if TYPE_CHECKING:
    from mcr.supervisor import Supervisor

MAX_CONNECTIONS = 8
SILENCE_S = 5.0  # between two bytes
DEADLINE_S = 15.0  # of a whole connection
POLL_INTERVAL_S = 0.5
SWITCH_INTERVAL_S = 0.0005  # how long the event loop waits for Python's lock; 5 ms by default

_, CONTENT_TYPE = choose_encoder("")  # of generate_latest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to serve the metrics, and with which certificates; without, it is plain HTTP."""

    address: str
    port: int
    tls: TlsFiles | None = None


def _paths(tls: TlsFiles) -> list[Path]:
    return [path for path in (tls.certificate, tls.key, tls.client_ca) if path is not None]


def _written(tls: TlsFiles) -> tuple[int, ...]:
    """When each of the files was written. Raises OSError."""
    return tuple(path.stat().st_mtime_ns for path in _paths(tls))


def tls_context(tls: TlsFiles) -> ssl.SSLContext:
    """Raises McrError for a file that cannot be used."""
    for path in _paths(tls):
        if not path.is_file():
            raise McrError(f"there is no file {path}", "name a PEM file that the supervisor may read")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _naming(f"the certificate {tls.certificate} with the key {tls.key}"):
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: b"")
    if tls.client_ca is not None:
        with _naming(f"the client authority {tls.client_ca}"):
            context.load_verify_locations(cafile=tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise McrError(
            f"cannot use {what}: {reason}",
            "give PEM files that belong together, the key without a password, readable by the supervisor",
        ) from error


class _Handler(BaseHTTPRequestHandler):
    server: "MetricsServer"
    timeout = SILENCE_S
    server_version = "mcr"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND, "the metrics are at /metrics")
            return
        pieces = self.server.scrape()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(sum(map(len, pieces))))
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s: %s", self.client_address[0], format % args)


@dataclass(slots=True)
class _Connections:
    """The open ones, and since when."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    since: dict[socket.socket, float] = field(default_factory=dict)

    def add(self, connection: socket.socket) -> bool:
        """False if there are too many already."""
        with self.lock:
            if len(self.since) >= MAX_CONNECTIONS:
                return False
            self.since[connection] = time.monotonic()
            return True

    def remove(self, connection: socket.socket) -> None:
        with self.lock:
            self.since.pop(connection, None)

    def cut(self, older_than_s: float) -> None:
        """Ends what is being read from and written to the old ones; their threads then close them."""
        now_s = time.monotonic()
        with self.lock:
            for connection, since_s in self.since.items():
                if now_s - since_s >= older_than_s:
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class MetricsServer(ThreadingMixIn, TCPServer):
    """Serves a scrape. A server of socketserver: serve_forever, shutdown, server_close."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, listen: Listen, scrape: Scrape) -> None:
        self._scrape = scrape
        self._tls = listen.tls
        self._context = tls_context(listen.tls) if listen.tls else None
        self._written = _written(listen.tls) if listen.tls else ()
        self._connections = _Connections()
        self._scraping = threading.Lock()
        self._closed = False
        family, _, _, _, where = socket.getaddrinfo(
            listen.address, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        self.address_family = family
        super().__init__(where[:2] if family == socket.AF_INET else where, _Handler)  # type: ignore[arg-type]

    def scrape(self) -> list[bytes]:
        """The metrics, read now, in pieces. Raises ConnectionAbortedError once the server is closed."""
        with self._scraping:
            if self._closed:
                raise ConnectionAbortedError
            return list(self._scrape.pieces())

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.settimeout(SILENCE_S)
        self._renew_context()
        if self._context is None:
            return connection, address
        try:
            secured = self._context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )  # the first read does the handshake
        except (OSError, ValueError):
            connection.close()
            raise ConnectionAbortedError from None
        return secured, address

    def _renew_context(self) -> None:
        """Takes up certificates that were renewed; keeps the old ones if the new cannot be used."""
        if self._tls is None:
            return
        try:
            if (written := _written(self._tls)) != self._written:
                self._written = written
                self._context = tls_context(self._tls)
                log.info("took up the renewed certificate %s", self._tls.certificate)
        except (McrError, OSError) as error:
            log.error("keeping the certificate that was loaded: %s", error)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._connections.add(request)

    def shutdown_request(self, request: Any) -> None:
        self._connections.remove(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        self._connections.cut(DEADLINE_S)
        if self._scraping.acquire(blocking=False):  # otherwise that scrape has done it
            try:
                self._scrape.prepare()
            finally:
                self._scraping.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was cut, is its own affair; anything else is ours."""
        error = sys.exc_info()[1]
        expected = isinstance(error, OSError)
        log.log(logging.DEBUG if expected else logging.ERROR, "scrape: %s", error, exc_info=not expected)

    def stop(self) -> None:
        """Ends every connection; after it nothing is read any more."""
        self.shutdown()
        self.server_close()
        with self._scraping:
            self._closed = True
        self._connections.cut(0)


@contextlib.contextmanager
def serve(supervisor: "Supervisor", listen: Listen, client_count: Callable[[], int]) -> Iterator[None]:
    """Serves /metrics. Raises McrError if it cannot listen there, or not use the files.

    client_count: of the control socket.
    """
    try:
        server = MetricsServer(listen, Scrape(supervisor, client_count))
    except OSError as error:
        raise McrError(
            f"cannot serve metrics at {listen.address}:{listen.port}: {error.strerror}",
            "choose another --metrics ADDR:PORT, or off",
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(POLL_INTERVAL_S,), name="mcr-metrics")
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        thread.join()
        sys.setswitchinterval(interval_s)
