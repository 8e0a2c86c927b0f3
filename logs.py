"""The daemon's log: its formats, and the limit on repeated lines."""

from __future__ import annotations

import json
import logging
import os
import time
from datetime import UTC, datetime

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
