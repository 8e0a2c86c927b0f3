"""Metrics for Prometheus: the counters and histograms of one daemon, and the HTTP server that exposes them.

Each daemon has a registry of its own, so that two daemons in one process share no counts. The values of labels are
names that the daemon knows, never a client's text.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    MetricsHandler,
    ProcessCollector,
    disable_created_metrics,
)

from errors import SettingError

log = logging.getLogger("lumen.metrics")

REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_ITEMS = (1, 2, 4, 8, 16, 32, 64)

# Otherwise each series has a second one with the time of its creation. A setting of the library, not a count of ours.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """What one daemon counts. Any thread may count."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lumen_requests", "Requests by outcome", ["task", "outcome"], registry=registry)
        self.rejected = Counter("lumen_turned_away", "Rejected calls by reason", ["reason"], registry=registry)
        self.request_seconds = Histogram(
            "lumen_request_seconds",
            "Time from a request's arrival to its response",
            ["task"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.batch_items = Histogram(
            "lumen_batch_items", "Items in a batch", ["line"], buckets=BATCH_ITEMS, registry=registry
        )
        self.queue_depth = Gauge("lumen_queue_depth", "Requests that wait for their response", registry=registry)
        self.open_streams = Gauge("lumen_open_streams", "Open Infer streams", registry=registry)
        ProcessCollector(registry=registry)  # start time, memory, core seconds and open files; nothing on macOS


class MetricsServer(ThreadingHTTPServer):
    """Serves the metrics of a registry over HTTP, on a thread for each connection.

    The number of connections is limited, and so is the time that each may take. A client that is slow, or that opens
    many connections, cannot occupy more threads.
    """

    CONNECTIONS_MAX = 8
    CONNECTION_S = 10

    allow_reuse_port = False  # some versions of Python set it, and two daemons could then bind the same port

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._deadlines: dict[Any, float] = {}  # of the open connections, by time.monotonic()
        super().__init__((host, port), MetricsHandler.factory(registry))

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._deadlines) < self.CONNECTIONS_MAX:
            self._deadlines[request] = time.monotonic() + self.CONNECTION_S
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines.pop(request, None)

    def service_actions(self) -> None:
        """Closes the connections that take too long. `serve_forever` calls this twice a second."""
        now = time.monotonic()
        for request, deadline in self._deadlines.copy().items():
            if now > deadline:
                with suppress(OSError):  # closed meanwhile
                    request.shutdown(socket.SHUT_RDWR)  # ends the wait of the connection's thread
                self._deadlines.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a client of the metrics closed its connection", exc_info=True)


def serve(metrics: Metrics, host: str, port: int) -> None:
    """Starts the server on a thread of its own. Raises SettingError if the port cannot be bound."""
    try:
        server = MetricsServer(host, port, metrics.registry)
    except OSError as error:
        raise SettingError(f"LUMEN_METRICS_PORT={port}: {error.strerror or error}") from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    log.info("metrics on %s port %d", host, server.server_port)
