"""What one daemon counts, for Prometheus and for a summary line in the log; and the HTTP server for Prometheus."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, MetricsHandler, ProcessCollector
from prometheus_client.metrics import disable_created_metrics

from errors import SettingError

log = logging.getLogger("lumen.metrics")

REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_ITEMS = (1, 2, 4, 8, 16, 32, 64)

# Otherwise each series has a second one with the time of its creation. A setting of the library, not a count of ours.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass
class Summary:
    """The traffic since `since`."""

    since: float  # by time.monotonic()
    longest_queue: int
    seconds: list[float] = field(default_factory=list)  # of requests that were answered
    errors: int = 0
    cancelled: int = 0
    batches: int = 0
    items: int = 0
    last_rejected: str = ""


class Traffic:
    """The counts. Any thread may count.

    Each daemon has a registry of its own, so that two daemons in one process share no counts. The values of labels are
    names that the daemon knows, never a client's text.
    """

    def __init__(self, tasks: Container[str] = ()) -> None:
        """`tasks`: the names of tasks that are counted each. All others are counted as "unknown"."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lumen_requests", "Requests by outcome", ["task", "outcome"], registry=registry)
        self.rejected = Counter("lumen_turned_away", "Rejected calls by reason", ["reason"], registry=registry)
        request_seconds = Histogram(
            "lumen_request_seconds",
            "Time from a request's arrival to its response",
            ["task"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        items = Histogram("lumen_batch_items", "Items in a batch", ["line"], buckets=BATCH_ITEMS, registry=registry)
        # `labels` is slow, and there are few sets of labels.
        self._requests_of, self._seconds_of = cache(self.requests.labels), cache(request_seconds.labels)
        self._items_of = cache(items.labels)
        queue_depth = Gauge("lumen_queue_depth", "Requests that wait for their response", registry=registry)
        queue_depth.set_function(lambda: self._queue)
        self.open_streams = Gauge("lumen_open_streams", "Open Infer streams", registry=registry)
        ProcessCollector(registry=registry)  # start time, memory, core seconds and open files; nothing on macOS
        self._tasks, self._lock = tasks, threading.Lock()
        self._queue = 0
        self._rejected = defaultdict[str, int](int)  # by reason
        self._summary = Summary(time.monotonic(), 0)

    def count_queued(self, change: int) -> None:
        """Counts the requests that wait for their response."""
        with self._lock:
            self._queue += change
            self._summary.longest_queue = max(self._summary.longest_queue, self._queue)

    def count_batch(self, line: str, items: int) -> None:
        self._items_of(line).observe(items)
        with self._lock:
            self._summary.batches += 1
            self._summary.items += items

    def count_rejected(self, reason: str, peer: str) -> None:
        """Counts a call that was rejected as a whole."""
        self.rejected.labels(reason).inc()
        with self._lock:
            self._rejected[reason] += 1
            self._summary.last_rejected = f"{reason}, {peer}"

    def count_request(self, task: str, seconds: float, outcome: str) -> None:
        """Counts a request that was answered, or whose client cancelled it. `task`: as the client named it."""
        task = task if task in self._tasks else "unknown"
        self._requests_of(task, outcome).inc()
        with self._lock:
            if outcome == "cancelled":
                self._summary.cancelled += 1
            else:
                self._seconds_of(task).observe(seconds)
                self._summary.seconds.append(seconds)
                self._summary.errors += outcome != "ok"

    def log_summary(self, interval: float) -> None:
        """Logs the traffic since the last summary, if that was at least `interval` seconds ago and there was any."""
        now = time.monotonic()
        with self._lock:
            past = self._summary
            if now - past.since < interval:
                return
            self._summary = Summary(now, self._queue)
        if requests := len(past.seconds) + past.cancelled:
            p95_ms = 1000 * sorted(past.seconds or [0.0])[-(-len(past.seconds) * 95 // 100) - 1]
            batch = past.items / max(past.batches, 1)
            text = "in %.0f s: %d requests, %d errors, %d cancelled, batches of %.1f, p95 %.0f ms, longest queue %d"
            log.info(text, now - past.since, requests, past.errors, past.cancelled, batch, p95_ms, past.longest_queue)
        if past.last_rejected:
            log.info("rejected calls since the start: %s; last: %s", dict(self._rejected), past.last_rejected)


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


def serve(traffic: Traffic, host: str, port: int) -> None:
    """Starts the server on a thread of its own. Raises SettingError if the port cannot be bound."""
    try:
        server = MetricsServer(host, port, traffic.registry)
    except OSError as error:
        raise SettingError(f"LUMEN_METRICS_PORT={port}: {error.strerror or error}") from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    log.info("metrics on %s port %d", host, server.server_port)
