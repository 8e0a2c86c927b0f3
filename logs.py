"""The daemon's log: its formats, the limit on repeated lines, and the summary of each minute's traffic."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from datetime import UTC, datetime

from metrics import Metrics

log = logging.getLogger("lumen.logs")

OURS = "lumen"  # the names of our loggers begin with it, those of libraries do not


def stderr_is_journal() -> bool:
    """Returns whether standard error is connected to systemd's journal directly, not through a file or a pipe."""
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


class JournalFormatter(logging.Formatter):
    """Lines for systemd's journal: the priority, then the message. The journal itself adds the time and the process."""

    PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

    def format(self, record: logging.LogRecord) -> str:
        priority = next(priority for level, priority in self.PRIORITIES if record.levelno >= level)
        text = super().format(record)
        if not record.name.startswith(OURS):
            text = f"{record.name}: {text}"
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())


class JSONFormatter(logging.Formatter):
    """One JSON object per line, for log collectors."""

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


class RepeatLimiter(logging.Filter):
    """Limits lines of the same kind to `PER_MINUTE` a minute. A board keeps its log on an SD card, and any client can
    cause any number of lines.

    Lines of our loggers are of the same kind if they have the same template. All lines of a library's logger are of the
    same kind, because their texts can differ (Python warnings have no template). Debug lines and our own errors are not
    limited.
    """

    PER_MINUTE = 20
    KINDS_MAX = 1000

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[tuple[str, str], tuple[float, int]] = {}  # start of the kind's minute, lines since then

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name.startswith(OURS)
        if record.levelno < logging.INFO or (ours and record.levelno >= logging.ERROR):
            return True
        kind, now = (record.name, str(record.msg)[:80] if ours else ""), time.monotonic()
        since, count = self._counts.get(kind, (now, 0))
        if now - since > 60:
            if count > self.PER_MINUTE:
                record.msg = f"{record.msg} ({count - self.PER_MINUTE} similar lines were suppressed)"
            since, count = now, 0
        if len(self._counts) > self.KINDS_MAX:
            self._counts.clear()
        self._counts[kind] = since, count + 1
        if count + 1 == self.PER_MINUTE:
            record.msg = f"{record.msg} (similar lines are suppressed for a minute)"
        return count < self.PER_MINUTE


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

    def log(self, now: float) -> None:
        requests = len(self.seconds) + self.cancelled
        if not requests:
            return
        p95 = sorted(self.seconds or [0.0])[-(-len(self.seconds) * 95 // 100) - 1]
        batch = self.items / max(self.batches, 1)
        text = "in %.0f s: %d requests, %d errors, %d cancelled, batches of %.1f, p95 %.0f ms, longest queue %d"
        log.info(text, now - self.since, requests, self.errors, self.cancelled, batch, 1000 * p95, self.longest_queue)


class Traffic:
    """Counts requests, batches and rejected calls, for `metrics` and for a summary line in the log.

    No text of a client gets into the metrics or, unescaped, into the log. Any thread may count.
    """

    def __init__(self, tasks: Container[str] = ()) -> None:
        """`tasks`: the names of tasks that are counted each. All others are counted as "unknown"."""
        self.metrics = Metrics()
        self._tasks, self._lock = tasks, threading.Lock()
        self._queue = 0
        self._rejected = Counter[str]()  # by reason
        self._summary = Summary(time.monotonic(), 0)
        self.metrics.queue_depth.set_function(lambda: self._queue)

    def count_queued(self, change: int) -> None:
        """Counts the requests that wait for their response."""
        with self._lock:
            self._queue += change
            self._summary.longest_queue = max(self._summary.longest_queue, self._queue)

    def count_batch(self, line: str, items: int) -> None:
        self.metrics.batch_items.labels(line).observe(items)
        with self._lock:
            self._summary.batches += 1
            self._summary.items += items

    def count_rejected(self, reason: str, peer: str) -> None:
        """Counts a call that was rejected as a whole."""
        self.metrics.rejected.labels(reason).inc()
        with self._lock:
            self._rejected[reason] += 1
            self._summary.last_rejected = f"{reason}, {peer}"

    def count_request(self, task: str, seconds: float, outcome: str) -> None:
        """Counts a request that was answered, or whose client cancelled it. `task`: as the client named it."""
        task = task if task in self._tasks else "unknown"
        self.metrics.requests.labels(task, outcome).inc()
        with self._lock:
            if outcome == "cancelled":
                self._summary.cancelled += 1
            else:
                self.metrics.request_seconds.labels(task).observe(seconds)
                self._summary.seconds.append(seconds)
                self._summary.errors += outcome != "ok"

    def log_summary(self, interval: float) -> None:
        """Logs the traffic since the last summary, if that was at least `interval` seconds ago and there was any."""
        now = time.monotonic()
        with self._lock:
            summary = self._summary
            if now - summary.since < interval:
                return
            self._summary = Summary(now, self._queue)
        summary.log(now)
        if summary.last_rejected:
            log.info("rejected calls since the start: %s; last: %s", dict(self._rejected), summary.last_rejected)
