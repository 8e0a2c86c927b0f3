"""What a daemon that nobody watches keeps of itself: a journal of payloads that crash it, counts of its traffic for a
line a minute and for Prometheus, how far a download is, its memory, and the form of its log.

Knows nothing of gRPC, models or tasks.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import os
import re
import socket
import socketserver
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, Protocol
from wsgiref import simple_server

import machine
from inputs import BadInput

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("lumen.watch")


# --- payloads that crash ----------------------------------------------------------------------------------------


class Journal:
    """Records which payloads are in progress, in a file that survives the process, and rejects those that crash it.

    After a crash in native code, faulthandler's report names the thread, and the file the payloads of each thread. If
    the crashing thread had exactly one payload, that payload is rejected from the next start on. In every other case
    (a batch of several, a thread without a payload, a kill from outside) it is not known what caused the end: each
    payload that may have done so gets one strike. It is rejected after the second strike, and an answer in between
    clears it.
    """

    SLOT = 96  # bytes: thread, kind, digest
    SLOTS = 1024
    KEPT = 1000  # suspects
    STRIKES = 2  # of a payload that is rejected

    def __init__(self) -> None:
        """Records and rejects nothing until `open` is called."""
        self._suspects = Counter[str]()  # digest -> strikes
        self._file: FileIO | None = None
        self._free: list[int] = []  # slots of the file
        self._lock = threading.Lock()

    def open(self, folder: Path) -> None:
        """Reads what the previous process left in `folder`, and records there from now on; once in a process.

        A folder that cannot be used costs a warning: then nothing is recorded.
        """
        self._folder = folder
        try:
            self._open()
        except (OSError, ValueError) as error:
            faulthandler.enable()
            log.warning(
                "no crash journal in %s (%s): a payload that crashes the daemon could do so again", folder, error
            )

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "in-flight"
        path.touch()
        file = path.open("r+b", buffering=0)
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                raise OSError("another daemon uses this folder") from error
        self._suspects.update(self._read_suspects())
        self._learn(file.read())
        file.truncate(0)
        os.pwrite(file.fileno(), bytes(self.SLOT * self.SLOTS), 0)
        self._report = (self._folder / "crash.txt").open("w")
        faulthandler.enable(self._report)
        self._file, self._free = file, list(range(self.SLOTS))

    def close(self) -> None:
        """Empties the file, so that the next start does not take this stop for a crash; for an orderly stop.

        Payloads that are still in progress are not recorded any more. May be called twice, and without `open`.
        """
        with self._lock:
            if self._file is None:
                return
            file, self._file = self._file, None
            self._free.clear()
            try:
                with file:
                    file.truncate(0)
            except OSError as error:
                log.warning("cannot empty the crash journal (%s)", error)

    def _read_suspects(self) -> dict[str, int]:
        """The strikes of earlier crashes; a damaged file counts as none."""
        path = self._folder / "suspects.json"
        try:
            kept = json.loads(path.read_bytes())
            return {str(digest): int(strikes) for digest, strikes in kept.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s); starting without it", path, error)
            return {}

    def _learn(self, slots: bytes) -> None:
        """Gives strikes for what the previous process left in its slots: nothing, if its stop was an orderly one."""
        held = [line.split() for line in slots.decode("ascii", "replace").split("\0") if line.strip()]
        held = [slot for slot in held if len(slot) == 3]
        path = self._folder / "crash.txt"
        report = path.read_text("utf-8", "replace") if path.exists() else ""
        digests, certain = self._suspects_of(held, report)
        for digest in digests:
            self._suspects[digest] += self.STRIKES if certain else 1
        if report:
            log.error("Previous process crashed: %s", " / ".join(report.split("\n\n")[0].split("\n")[:2]))
            log.debug("%s", report)
        if digests:
            self._keep()
            rejected = [digest for digest in digests if self._suspects[digest] >= self.STRIKES]
            text = "Previous process exited while processing %d payloads. Rejecting: %s"
            log.error(text, len(digests), ", ".join(f"sha-256 {digest[:16]}..." for digest in rejected) or "none")

    @staticmethod
    def _suspects_of(held: Sequence[Sequence[str]], report: str) -> tuple[set[str], bool]:
        """Which payloads may have ended the process, and whether that is certain.

        `held`: (thread, kind, digest) of each slot; `report`: faulthandler's, or "" after a kill from outside.
        """
        thread = re.search(r"Current thread 0x0*([0-9a-f]+)", report)
        own = {digest for ident, _, digest in held if thread and ident == thread[1]}
        if own:
            # A bus error is a fault of a mapped file or of the memory, whatever the payload was.
            return own, len(own) == 1 and "Bus error" not in report.partition("\n")[0]
        # The report names no thread of a native library. Such a thread works on a batch.
        native = {digest for _, kind, digest in held if report and not thread and kind == "batch"}
        return native or {digest for *_, digest in held}, False

    def _keep(self) -> None:
        while len(self._suspects) > self.KEPT:
            del self._suspects[next(iter(self._suspects))]
        try:
            machine.replace_file(self._folder / "suspects.json", json.dumps(self._suspects).encode())
        except OSError as error:
            log.warning("cannot keep suspects.json in %s (%s)", self._folder, error)

    def check(self, digest: str) -> None:
        """Raises BadInput for a payload that is rejected."""
        if self._suspects.get(digest, 0) >= self.STRIKES:
            raise BadInput("payload: the daemon crashed over these bytes before, so they are refused")

    def answered(self, digest: str) -> None:
        """Clears the strikes of a payload."""
        if digest in self._suspects:
            with self._lock:
                self._suspects.pop(digest, None)
                self._keep()

    @contextmanager
    def holding(self, digests: Sequence[str], kind: str = "batch") -> Iterator[None]:
        """Records that the calling thread works on these payloads while the body runs.

        `digests`: SHA-256 in hex; "" stands for a payload that is never suspected, such as a text. `kind` is "prepare"
        or "batch".
        """
        digests = [digest for digest in digests if digest]
        with self._lock:
            # All or none: a part of a batch could look like the only payload of a thread.
            slots = [self._free.pop() for _ in digests] if len(digests) <= len(self._free) else []
            for slot, digest in zip(slots, digests, strict=False):
                self._write(slot, f"{threading.get_ident():x} {kind} {digest}")
        try:
            yield
        finally:
            with self._lock:
                if self._file is not None:  # else it was closed meanwhile
                    for slot in slots:
                        self._write(slot, "")
                    self._free += slots

    def _write(self, slot: int, text: str) -> None:
        assert self._file is not None  # whose slots these are
        # Not through mmap: on a full disk that ends the process.
        try:
            os.pwrite(self._file.fileno(), text.encode().ljust(self.SLOT, b"\0"), slot * self.SLOT)
        except OSError as error:
            log.warning("cannot write the crash journal (%s)", error)


# --- traffic ------------------------------------------------------------------------------------------


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, int]]:
        """As Prometheus counts: each with all that are smaller."""
        return list(zip([*map(str, self.bounds), "+Inf"], itertools.accumulate(self.counts), strict=True))


class Ended(Protocol):
    """What is told of a request."""

    correlation_id: str
    task: str  # as the client named it
    size: int  # bytes
    arrived: float  # by time.monotonic()


@dataclass
class Minute:
    """What the next line will say."""

    since: float
    longest_queue: int
    seconds: list[float] = field(default_factory=list)  # of requests that were answered
    errors: int = 0
    given_up: int = 0  # by their clients
    batches: int = 0
    items: int = 0
    turned_away: str = ""  # the last one


class Traffic:
    """Counts what goes through, for a line a minute and for Prometheus. No text of a client's gets in."""

    SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
    ITEMS = (1, 2, 4, 8, 16, 32, 64)

    def __init__(self, tasks: Container[str]) -> None:
        """`tasks`: the names that are counted; a client may send any."""
        self._tasks, self._lock = tasks, threading.Lock()
        self._requests = Counter[tuple[str, str]]()  # (task, outcome)
        self._turned_away = Counter[str]()  # reason
        self._seconds: dict[str, Histogram] = defaultdict(lambda: Histogram(self.SECONDS))
        self._batches: dict[str, Histogram] = defaultdict(lambda: Histogram(self.ITEMS))
        self._queue = self._streams = 0
        self._minute = Minute(time.monotonic(), 0)

    def stream(self, change: int) -> None:
        with self._lock:
            self._streams += change

    def queued(self, change: int) -> None:
        """Requests that are waited for."""
        with self._lock:
            self._queue += change
            self._minute.longest_queue = max(self._minute.longest_queue, self._queue)

    def ran(self, line: str, items: int) -> None:
        with self._lock:
            self._batches[line].add(items)
            self._minute.batches += 1
            self._minute.items += items

    def turned_away(self, reason: str, peer: str) -> None:
        with self._lock:
            self._turned_away[reason] += 1
            self._minute.turned_away = f"{reason}, {peer}"

    def ended(self, job: Ended, outcome: str) -> None:
        seconds, task = time.monotonic() - job.arrived, job.task if job.task in self._tasks else "unknown"
        with self._lock:
            self._requests[task, outcome] += 1
            if outcome == "cancelled":
                self._minute.given_up += 1
            else:
                self._seconds[task].add(seconds)
                self._minute.seconds.append(seconds)
                self._minute.errors += outcome != "ok"
        # %a and a limit: a client writes no lines of ours.
        text = "request %a: %a, %d bytes, %d ms, %s"
        log.debug(text, job.correlation_id[:40], job.task[:40], job.size, 1000 * seconds, outcome)

    def say(self, every: float) -> None:
        """Logs what went through since the last line, if that is long enough ago and anything did."""
        now = time.monotonic()
        with self._lock:
            minute = self._minute
            if now - minute.since < every:
                return
            self._minute = Minute(now, self._queue)
        if count := len(minute.seconds) + minute.given_up:
            p95 = 1000 * sorted(minute.seconds or [0.0])[-(-len(minute.seconds) * 95 // 100) - 1]
            log.info(
                "in %.0f s: %d requests, %d errors, %d given up, batches of %.1f, p95 %.0f ms, longest queue %d",
                *(now - minute.since, count, minute.errors, minute.given_up),
                *(minute.items / max(minute.batches, 1), p95, minute.longest_queue),
            )
        if minute.turned_away:
            log.info("calls turned away since the start: %s; the last: %s", dict(self._turned_away), minute.turned_away)

    def collect(self) -> list[Any]:
        """For a registry of prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily("lumen_requests", "Requests by their end", labels=["task", "outcome"])
        turned_away = CounterMetricFamily("lumen_turned_away", "Calls refused at the door", labels=["reason"])
        seconds = HistogramMetricFamily("lumen_request_seconds", "From a request to its answer", labels=["task"])
        batches = HistogramMetricFamily("lumen_batch_items", "Items run together", labels=["line"])
        with self._lock:
            for key, count in self._requests.items():
                requests.add_metric(key, count)
            for reason, count in self._turned_away.items():
                turned_away.add_metric([reason], count)
            for family, histograms in ((seconds, self._seconds), (batches, self._batches)):
                for label, histogram in histograms.items():
                    family.add_metric([label], histogram.buckets(), histogram.sum)
            queue_depth = GaugeMetricFamily("lumen_queue_depth", "Requests that are waited for", self._queue)
            streams = GaugeMetricFamily("lumen_open_streams", "Open Infer streams", self._streams)
        return [requests, turned_away, seconds, batches, queue_depth, streams]


def serve_metrics(traffic: Traffic, host: str, port: int) -> None:
    """Answers Prometheus on threads of its own. Raises ImportError without prometheus-client, OSError for the port."""
    from prometheus_client import CollectorRegistry, make_wsgi_app

    registry = CollectorRegistry()
    registry.register(traffic)
    server = simple_server.make_server(host, port, make_wsgi_app(registry), ScrapeServer, _Quiet)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    log.info("metrics on %s port %d", host, server.server_port)


# --- downloads --------------------------------------------------------------------------------------------------


@contextmanager
def download(say: Callable[[str], None], what: str, folder: Path, files: Mapping[str, int]) -> Iterator[None]:
    """While the body downloads `files` (of so many bytes, or 0 where that is not known) to `folder`, says every second
    how far it is, but only if it got on."""
    total = 0 if 0 in files.values() else sum(files.values())
    ended = threading.Event()

    def look() -> None:
        before = 0
        while not ended.wait(1):
            there = sum(map(_bytes_on_disk, [folder / name for name in files])) + sum(
                map(_bytes_on_disk, folder.rglob("*.incomplete"))
            )
            if there > before:
                say(f"downloading {what}: {there / 1e6:.0f} {f'of {total / 1e6:.0f} ' if total else ''}MB")
            before = there

    thread = threading.Thread(target=look, name="download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    say(f"downloaded {what}")


def _bytes_on_disk(path: Path) -> int:
    """Of a file that may be full of holes, or gone."""
    try:
        stat = path.stat()
    except OSError:
        return 0
    return min(stat.st_size, stat.st_blocks * 512) if hasattr(stat, "st_blocks") else stat.st_size


class _Quiet(simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""


class ScrapeServer(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    """So many scrapers at a time, each for so long: who speaks slowly, or opens many connections, holds nothing."""

    SCRAPERS_MAX = 8
    SCRAPE_S = 10
    daemon_threads = True

    def __init__(self, address: tuple[str, int], *rest: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.BoundedSemaphore(self.SCRAPERS_MAX)
        super().__init__(address, *rest)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        def hang_up() -> None:
            with suppress(OSError):  # it was done at this moment
                request.shutdown(socket.SHUT_RDWR)

        patience = threading.Timer(self.SCRAPE_S, hang_up)
        patience.daemon = True
        patience.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            patience.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a scraper left", exc_info=True)


# --- the log ----------------------------------------------------------------------------------------------------


def goes_to_the_journal() -> bool:
    """Whether standard error is systemd's journal itself, and no file or pipe on the way to it."""
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


class JournalLines(logging.Formatter):
    """For systemd's journal, which keeps time and process by itself: a line's priority, then what there is to say."""

    PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

    def format(self, record: logging.LogRecord) -> str:
        priority = next(priority for level, priority in self.PRIORITIES if record.levelno >= level)
        text = super().format(record)
        if not record.name.startswith("lumen"):  # a library's
            text = f"{record.name}: {text}"
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())


class Brevity(logging.Filter):
    """Limits each kind of line to `PER_MINUTE` a minute: the log of a board is on an SD card, and any client can cause
    any number of lines. Lines of one of our loggers are of one kind if they have the same template. All lines of a
    library's logger are of one kind, because their texts can differ (Python warnings have no template). Debug lines
    and our own errors are not limited."""

    PER_MINUTE = 20

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}  # -> since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name.startswith("lumen")
        if record.levelno < logging.INFO or (ours and record.levelno >= logging.ERROR):
            return True
        kind, now = (record.name, str(record.msg)[:80] if ours else ""), time.monotonic()
        since, count = self._seen.get(kind, (now, 0))
        if now - since > 60:
            if count > self.PER_MINUTE:
                record.msg = f"{record.msg} (and {count - self.PER_MINUTE} more like it, which are left out)"
            since, count = now, 0
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[kind] = since, count + 1
        if count + 1 == self.PER_MINUTE:
            record.msg = f"{record.msg} (more like it are left out for a minute)"
        return count < self.PER_MINUTE


class JSONLines(logging.Formatter):
    """One object a line, for whoever collects logs by machine."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
