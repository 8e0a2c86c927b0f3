"""Logs and metrics."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import urllib.request
from pathlib import Path

from gen import ml_service_pb2 as pb
from tests.hostile import held, impatient
from tests.kit import LIMIT_S, RED, Node, encoded, label_files, picture, wait_until


def test_the_log_says_what_went_through_and_no_client_writes_its_lines(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: the one trace of a night's trouble; or trust in it, to a client that sends line breaks."""
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none"}
    settings |= impatient(tmp_path, {"lumen_clip.TRAFFIC_LOG_S": 4})
    node = Node(
        label_files(tmp_path / "data", tiny_onnx), ("--log-level", "debug", "--log-format", "json"), **settings
    ).ready()
    forged = 'x\n{"level": "CRITICAL", "message": "pwned"}\r\u2028'
    requests = [pb.InferRequest(task="clip_embed", payload=b"a dog", correlation_id="a") for _ in range(8)]
    requests += [pb.InferRequest(task=forged, payload=b"x", correlation_id=forged)]
    requests += [pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED)), correlation_id="é" * 500)]
    assert len(node.infer(*requests)) == 10
    pattern = (
        r"in \d+ s: (\d+) requests, (\d+) errors, 0 given up, batches of ([\d.]+), p95 \d+ ms, longest queue (\d+)"
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


def test_prometheus_counts_what_went_through(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: the graph on which one sees that something has changed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "CLIP_BACKEND": "onnxrt",
        "CLIP_MODEL": tiny_onnx,
        "BIOCLIP_BACKEND": "none",
        "LUMEN_METRICS_PORT": port,
    }
    node = Node(label_files(tmp_path, tiny_onnx), **settings).ready()
    node.infer(
        *[pb.InferRequest(task="clip_embed", payload=b"a dog")] * 5, pb.InferRequest(task="nonsense", payload=b"x")
    )
    release = threading.Event()
    call = node.stub.Infer(held(pb.InferRequest(task="clip_embed", payload=b"a"), release), timeout=LIMIT_S)
    assert next(call).result
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S) as answer:
        metrics = answer.read().decode()
    release.set()
    for line in (
        'lumen_requests_total{outcome="ok",task="clip_embed"} 6.0',
        'lumen_requests_total{outcome="invalid_argument",task="unknown"} 1.0',
        'lumen_request_seconds_count{task="clip_embed"} 6.0',
        "lumen_open_streams 1.0",
        "lumen_queue_depth 0.0",
    ):
        assert line in metrics.splitlines(), metrics
    assert 'lumen_batch_items_bucket{le="+Inf",line="clip text"}' in metrics and "nonsense" not in metrics
    second = Node(tmp_path, **settings)
    assert second.ended() == 2
    second.stop()
    assert re.fullmatch(rf"lumen-clip: LUMEN_METRICS_PORT={port}: Address already in use\n", second.log)
    assert node.stop() == 0
