"""Metrics: what Prometheus reads, and the limits of the server that it reads from."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
import urllib.request
from pathlib import Path

from prometheus_client import generate_latest

from gen import ml_service_pb2 as pb
from metrics import MetricsServer, Traffic
from tests.hostile import held, impatient, threads_and_files
from tests.kit import Node, wait_until, write_labels


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def test_prometheus_reads_what_was_served(tmp_path: Path, tiny_onnx: Path) -> None:
    """The names and labels of the metrics do not change: dashboards and alerts depend on them."""
    port = free_port()
    settings = {
        "CLIP_BACKEND": "onnxrt",
        "CLIP_MODEL": tiny_onnx,
        "BIOCLIP_BACKEND": "none",
        "LUMEN_METRICS_PORT": port,
    }
    node = Node(write_labels(tmp_path), **settings).ready()
    node.infer(
        *[pb.InferRequest(task="clip_embed", payload=b"a dog")] * 5, pb.InferRequest(task="nonsense", payload=b"x")
    )
    release = threading.Event()
    call = node.stub.Infer(held(pb.InferRequest(task="clip_embed", payload=b"a"), release), timeout=60)
    assert next(call).result
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
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
    assert second.process.wait(60) == 2
    second.stop()
    assert re.fullmatch(rf"lumen-clip: LUMEN_METRICS_PORT={port}: Address already in use\n", second.log)
    assert node.stop() == 0


def test_two_daemons_in_one_process_count_separately() -> None:
    """The library's default registry is one for the whole process."""
    first, second = Traffic(), Traffic()
    first.open_streams.inc()
    first.count_queued(2)
    first.count_rejected("too many streams", "a peer")
    text = generate_latest(first.registry).decode()
    for line in (
        "lumen_open_streams 1.0",
        "lumen_queue_depth 2.0",
        'lumen_turned_away_total{reason="too many streams"} 1.0',
    ):
        assert line in text.splitlines() and line not in generate_latest(second.registry).decode()
    names = {name for name in re.findall(r"^# TYPE (\w+)", text, re.MULTILINE) if not name.startswith("process_")}
    assert names == {
        "lumen_requests_total",
        "lumen_request_seconds",
        "lumen_batch_items",
        "lumen_queue_depth",
        "lumen_open_streams",
        "lumen_turned_away_total",
    }


def test_slow_clients_occupy_few_threads_and_not_for_long(tmp_path: Path, tiny_onnx: Path) -> None:
    """Without the limits each connection to the metrics port would occupy a thread for as long as its client likes."""
    port = free_port()
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none"}
    settings |= impatient(tmp_path, {"metrics.MetricsServer.CONNECTION_S": 2})
    node = Node(write_labels(tmp_path / "data"), LUMEN_METRICS_PORT=port, **settings).ready()
    try:
        assert node.ask("clip_embed", b"a dog").result
        before = threads_and_files(node)[0]
        slow = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(60)]
        with contextlib.suppress(OSError):  # most are closed at once
            for client in slow:
                client.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert threads_and_files(node)[0] <= before + MetricsServer.CONNECTIONS_MAX + 2
        time.sleep(1)
        with contextlib.suppress(OSError):
            for client in slow:
                client.sendall(b"x: y\r\n")  # a header now and then does not extend the time

        url = f"http://127.0.0.1:{port}/metrics"

        def read() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
                return b"lumen_open_streams" in answer.read()
            return False

        wait_until(read)
        wait_until(lambda: threads_and_files(node)[0] <= before + 2)
        for client in slow:
            client.close()
        assert node.ask("clip_embed", b"a dog").result
    finally:
        assert node.stop() == 0 and "Traceback" not in node.log
