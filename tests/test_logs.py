"""The log: the summary of each minute, its formats, and the limit on repeated lines."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path

import pytest

import logs
from gen import ml_service_pb2 as pb
from tests.hostile import impatient
from tests.kit import RED, Node, encoded, picture, wait_until, write_labels


def test_the_log_reports_the_traffic_and_no_client_writes_its_lines(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: the one trace of a night's trouble; or trust in it, to a client that sends line breaks."""
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none"}
    settings |= impatient(tmp_path, {"lumen_clip.TRAFFIC_LOG_S": 4})
    node = Node(
        write_labels(tmp_path / "data", tiny_onnx), ("--log-level", "debug", "--log-format", "json"), **settings
    ).ready()
    forged = 'x\n{"level": "CRITICAL", "message": "pwned"}\r\u2028'
    requests = [pb.InferRequest(task="clip_embed", payload=b"a dog", correlation_id="a") for _ in range(8)]
    requests += [pb.InferRequest(task=forged, payload=b"x", correlation_id=forged)]
    requests += [pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED)), correlation_id="é" * 500)]
    assert len(node.infer(*requests)) == 10
    pattern = (
        r"in \d+ s: (\d+) requests, (\d+) errors, 0 cancelled, batches of ([\d.]+), p95 \d+ ms, longest queue (\d+)"
    )
    wait_until(lambda: sum(int(count) for count, *_ in re.findall(pattern, node.log)) == 10)
    lines = re.findall(pattern, node.log)
    assert sum(int(errors) for _, errors, *_ in lines) == 1
    assert all(float(size) >= 1 and 1 <= int(longest) <= 10 for _, _, size, longest in lines)
    time.sleep(6)  # nothing goes through, so nothing is said
    assert node.stop() == 0
    entries = [json.loads(line) for line in node.log.splitlines()]
    assert all(set(entry) >= {"time", "level", "logger", "message"} for entry in entries)
    assert "CRITICAL" not in {entry["level"] for entry in entries}
    assert len([e for e in entries if re.match(r"in \d+ s: ", e["message"])]) == len(lines)
    told = [entry["message"] for entry in entries if entry["message"].startswith("request ")]
    assert len(told) == 10 and all(len(line) < 700 for line in told)
    assert sum(re.fullmatch(r"request 'a': 'clip_embed', 5 bytes, \d+ ms, ok", line) is not None for line in told) == 8
    assert sum(", invalid_argument" in line for line in told) == 1


def record(logger: str, level: int, text: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord(logger, level, "", 0, text, arguments, None)


def test_client_lines_are_limited_and_errors_are_not() -> None:
    """Without the limit any client could fill the SD card of a board. After a minute the log says how many lines of the
    same kind were suppressed."""
    limiter = logs.RepeatLimiter()
    records = [record("lumen.x", level, "line %d", 1) for level in (logging.INFO, logging.ERROR) for _ in range(50)]
    kept = [made.levelno for made in records if limiter.filter(made)]
    assert [kept.count(level) for level in (logging.INFO, logging.ERROR)] == [limiter.PER_MINUTE, 50]
    limiter._counts = {kind: (since - 61, count) for kind, (since, count) in limiter._counts.items()}
    late = record("lumen.x", logging.INFO, "line %d", 1)
    assert limiter.filter(late) and late.getMessage() == "line 1 (30 similar lines were suppressed)"


def test_lines_of_libraries_are_limited_even_if_no_two_are_equal() -> None:
    """Without the limit one file with broken EXIF could push all other lines out of the log."""
    limiter = logs.RepeatLimiter()
    library = [record("py.warnings", logging.WARNING, f"entry {i}") for i in range(500)]
    assert sum(map(limiter.filter, library)) == limiter.PER_MINUTE
    ours = [record("lumen.x", logging.WARNING, f"template {i}") for i in range(50)]
    assert all(map(limiter.filter, ours))


@pytest.mark.parametrize(
    ("logger", "level", "line"),
    [
        ("lumen.labels", logging.INFO, "<6>all is well\n<6>so far"),
        ("zeroconf", logging.CRITICAL, "<2>zeroconf: all is well\n<2>so far"),
    ],
)
def test_each_line_for_the_journal_has_its_priority(logger: str, level: int, line: str) -> None:
    """Without it `journalctl -p warning` finds nothing."""
    assert logs.JournalFormatter().format(record(logger, level, "all is %s\nso far", "well")) == line
