"""Guests who mean harm."""

from __future__ import annotations

import collections
import contextlib
import gzip
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

import chunks
import decode_pool
import intake
import logs
import machine
import preprocess
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.hostile import INFER, RawPeer, held, impatient, outlived
from tests.kit import (
    LIMIT_S,
    RED,
    ROOT,
    SERVICE,
    Node,
    encoded,
    one_model,
    picture,
    resident_mb,
    wait_until,
    write_labels,
)

HEALTH = f"/{SERVICE}/Health"


CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"


MIRROR = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def served(node: Node) -> None:
    """Somebody who has nothing to do with it is told of health, and answered."""
    with grpc.insecure_channel(node.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = pb_grpc.InferenceStub(channel)
        stub.Health(Empty(), timeout=LIMIT_S)
        [answer] = stub.Infer(iter([pb.InferRequest(task="clip_embed", payload=b"a dog")]), timeout=LIMIT_S)
        assert answer.result


@pytest.mark.parametrize("method", [HEALTH, f"/{SERVICE}/GetCapabilities", CHECK, WATCH, MIRROR])
def test_calls_whose_message_never_comes_hold_nothing(harsh: Node, method: str) -> None:
    """Lost otherwise: everybody's answers, to a hundred calls that say nothing; gRPC gives each a thread for ever."""
    with outlived(harsh):
        peer = RawPeer(harsh)
        for number in range(100):
            peer.call(method, 2 * number + 1)
        time.sleep(1)  # each that comes sends the oldest away
        for _ in range(3):
            served(harsh)
        peer.close()


def test_silent_streams_give_way_to_new_ones(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: five minutes of everybody's time, again and again, to a guest who opens all streams."""
    settings = one_model(tiny_onnx, LUMEN_MAX_STREAMS=3) | impatient(tmp_path, {"streams.WANTED_IDLE_S": 5})
    node = Node(write_labels(tmp_path / "data", tiny_onnx), **settings).ready()
    release, busy = threading.Event(), pb.InferRequest(task="clip_embed", payload=b"a dog")
    try:
        silent = [node.stub.Infer(held(busy, release), timeout=LIMIT_S) for _ in range(3)]
        assert all(next(call).result for call in silent)
        with pytest.raises(grpc.RpcError) as error:  # who has just come keeps his place
            node.infer(busy)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        def admitted() -> bool:
            with contextlib.suppress(grpc.RpcError):
                return bool(node.infer(busy)[0].result)
            return False

        wait_until(admitted)
        ended = [call for call in silent if call.done()]
        assert len(ended) == 1 and ended[0].code() is grpc.StatusCode.DEADLINE_EXCEEDED  # one, and no more than needed
        assert "other clients needed its place" in ended[0].details()
        release.set()
    finally:
        assert node.stop() == 0


def test_unknown_names_from_clients_are_not_stored(harsh: Node) -> None:
    """Lost otherwise: 20 MB for each question after the health of a service that does not exist, for ever."""
    health, before = health_pb2_grpc.HealthStub(harsh.channel), resident_mb(harsh)
    with outlived(harsh):
        for number in range(8):
            asked = health_pb2.HealthCheckRequest(service=str(number) * (20 << 20))
            call = health.Watch(asked, timeout=LIMIT_S)
            assert next(call).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            call.cancel()
            with pytest.raises(grpc.RpcError) as error:
                health.Check(asked, timeout=LIMIT_S)
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
        wait_until(lambda: resident_mb(harsh) - before < 60)
        # Those who watch hold no thread, and are counted.
        calls = []
        for _ in range(64):
            calls.append(health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)))
            assert next(calls[-1]).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            next(health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=LIMIT_S))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        served(harsh)
        for call in calls:
            call.cancel()


def test_streams_that_are_opened_and_reset_at_once_do_not_affect_others(harsh: Node) -> None:
    """Lost otherwise: answers for seconds after each of what the world knows as rapid reset."""
    with outlived(harsh):
        peer = RawPeer(harsh)
        peer.call(INFER)
        opened = 0
        with contextlib.suppress(OSError):  # gRPC may well hang up on him
            for number in range(1, 10_000):
                peer.call(INFER, 2 * number + 1)
                peer.socket.sendall(RawPeer.frame(RawPeer.RESET, 0, 2 * number + 1, b"\0\0\0\x08"))
                opened = number
        assert opened > 1000
        peer.close()
        time.sleep(0.5)
        for _ in range(3):
            served(harsh)


def test_fields_beside_the_payload_are_bounded_too(harsh: Node) -> None:
    """Lost otherwise: gigabytes, to chunks of one byte with a long meta, or to empty ones without end."""
    before = resident_mb(harsh)
    long = {"a": "y" * (8 << 20)}
    many = {str(number): "" for number in range(300)}
    shapes: list[tuple[dict[str, Any], str]] = [
        ({"meta": long, "total": 60_000}, "meta: 8388"),
        ({"meta": long}, "meta: 8388"),
        ({"meta": many}, "meta: 300 entries; allowed: 256"),
        ({"correlation_id": "i" * (1 << 20)}, "correlation_id: over 1000 characters"),
        ({"payload_mime": "m" * (8 << 20)}, "meta: 8388"),
    ]
    with outlived(harsh):
        for fields, said in shapes:
            message = pb.InferRequest(**{"task": "clip_embed", "payload": b"x", "correlation_id": "x", **fields})
            responses = list(harsh.stub.Infer(iter([message] * 3), timeout=LIMIT_S))
            assert len(responses) == 3 and all(r.error.message.startswith(said) for r in responses), responses[0]
            assert all(len(r.correlation_id) <= 1000 for r in responses)
        ids, each = 60, 800
        empty = (
            pb.InferRequest(task="clip_embed", correlation_id=str(number % ids), total=65_000, seq=number // ids)
            for number in range(ids * each)
        )
        unfinished = list(harsh.stub.Infer(empty, timeout=LIMIT_S))
        assert len(unfinished) == ids and all("before the last chunk" in r.error.message for r in unfinished)
    wait_until(lambda: resident_mb(harsh) - before < 60)
    # What an empty chunk takes is counted, so that no number of them is free.
    assembler = chunks.Assembler(1 << 20)
    for number in range(1000):
        assembler.add(pb.InferRequest(total=60_000, seq=number), b"")
    assert assembler.held() >= 1000 * chunks.CHUNK_COST


def test_a_message_that_was_answered_is_not_kept_for_its_stream(harsh: Node) -> None:
    """Lost otherwise: a photograph's size, twice, for each of the clients that leave their stream open."""
    before, release = resident_mb(harsh), threading.Event()
    noise = np.random.default_rng(0).bytes(30 << 20)
    with outlived(harsh):
        request = pb.InferRequest(task="clip_image_embed", payload=noise)
        calls = [harsh.stub.Infer(held(request, release), timeout=LIMIT_S) for _ in range(8)]
        for call in calls:
            assert next(call).error.message.startswith("payload: not an image")
        wait_until(lambda: resident_mb(harsh) - before < 80)
        release.set()
        assert all(list(call) == [] for call in calls)


def test_compressed_messages_are_refused_without_decompression(harsh: Node) -> None:
    """Lost otherwise: 64 MB of memory for 60 kB of network."""
    before = resident_mb(harsh)
    with outlived(harsh):
        peer = RawPeer(harsh)
        peer.call(INFER, grpc_encoding="gzip")
        packed = gzip.compress(bytes(60 << 20))
        assert peer.send(b"\1" + len(packed).to_bytes(4, "big") + packed) > 60_000
        while (RawPeer.RESET, 1) not in peer.seen:
            assert peer.listen()
        assert resident_mb(harsh) - before < 20
        peer.close()


def test_large_pictures_are_decoded_one_at_a_time(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: as much memory for each core as the largest picture takes."""
    backend, stub = watched
    backend.daemon.intake.pixels = intake.Budget(1_000_000)
    backend.daemon.intake.decoders.stop()
    backend.daemon.intake.decoders = decode_pool.DecodePool(2)
    to_rgb, inside, together = preprocess._to_rgb, threading.Semaphore(0), collections.Counter[int]()

    def slowly(image: Image.Image) -> Image.Image:
        inside.release()
        if image.width == 600:
            time.sleep(0.3)  # time for another one, if it may
        else:
            wait_until(lambda: together[500] == 2 or inside._value == 2)
        together[image.width] = max(together[image.width], inside._value)
        inside.acquire()
        return to_rgb(image)

    monkeypatch.setattr(preprocess, "_to_rgb", slowly)
    for size in ((600, 1000), (500, 1000)):  # two of the first have no room at once
        photo = encoded(picture(RED, size), "PNG")
        requests = [pb.InferRequest(task="clip_image_embed", payload=photo)] * 4
        assert all(r.result for r in stub.Infer(iter(requests), timeout=LIMIT_S))
    assert together == {600: 1, 500: 2}


def test_a_large_picture_costs_little_more_than_its_pixels(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: a gigabyte, to a file of a few kilobytes."""
    node = Node(write_labels(tmp_path, tiny_onnx), **one_model(tiny_onnx)).ready()
    try:
        served(node)
        before, most, over = resident_mb(node), [0.0], threading.Event()

        def look() -> None:
            while not over.wait(0.01):
                most.append(resident_mb(node))

        looking = threading.Thread(target=look)
        looking.start()
        bomb = encoded(Image.new("RGBA", (6000, 5000), (1, 2, 3, 9)), "PNG", compress_level=1)
        assert len(bomb) < 2_000_000
        assert node.ask("clip_image_embed", bomb).result
        over.set()
        looking.join()
        print(f"\n30 megapixels with alpha in {len(bomb) >> 10} kB: {max(most) - before:.0f} MB at most")
        assert max(most) - before < 1.4 * 30 * 8  # the picture and what it becomes, at 4 bytes a pixel each
    finally:
        assert node.stop() == 0


# A machine on which little more than the daemon has room.
SMALL_MACHINE = """
import sys
sys.path.insert(0, "@ROOT@")
import lumen_clip, machine
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
ready = []
def memory():
    ready.append(resident())
    return ready[0] + (200 << 20) - resident(), 1 << 30
machine.memory = memory
sys.exit(lumen_clip.main())
"""


def test_messages_that_never_end_hold_little_memory(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: the board, to a guest: gRPC keeps 64 MB of each message before anybody sees a byte of it."""
    (tmp_path / "daemon.py").write_text(SMALL_MACHINE.replace("@ROOT@", str(ROOT)))
    program = (sys.executable, str(tmp_path / "daemon.py"))
    node = Node(write_labels(tmp_path / "data", tiny_onnx), program=program, **one_model(tiny_onnx)).ready()
    try:
        release = threading.Event()  # gRPC's threads, which are made when they are needed, are none of ours
        calls = [node.stub.Infer(held(pb.InferRequest(task="clip_embed", payload=b"a"), release)) for _ in range(24)]
        assert all(next(call).result for call in calls)
        release.set()
        assert all(list(call) == [] for call in calls)
        before, most = resident_mb(node), 0.0
        with outlived(node, r"memory is short \(-?\d+ MB left\): ended \d+ streams"):
            peers = [RawPeer(node) for _ in range(20)]
            for peer in peers:
                peer.call(INFER)
                peer.send(b"\0" + (60 << 20).to_bytes(4, "big"))
            for _ in range(30):  # a megabyte of each in turn: 600 MB, were they kept
                time.sleep(0.3)  # half as fast as a network of 1 Gbit/s brings them
                for peer in peers:
                    if (RawPeer.HEADERS, 1) not in peer.seen:  # the end of the stream
                        peer.send(bytes(1 << 20), seconds=2)
                most = max(most, resident_mb(node) - before)
            served(node)
            for peer in peers:
                peer.close()
        print(f"\n600 MB of messages that never end: {most:.0f} MB at most")
        assert most < 350
    finally:
        assert node.stop() == 0


def test_memory_is_what_the_tightest_limit_leaves(tmp_path: Path) -> None:
    """Lost otherwise: a container whose limit is ignored, or idle streams that are ended because a label set is mapped.

    Pages of mapped files count as used in a control group, but the kernel can drop them at any time.
    """
    meminfo, inner = tmp_path / "meminfo", tmp_path / "unit"
    meminfo.write_text("MemTotal:  4000000 kB\nMemFree: 10 kB\nMemAvailable:  3000000 kB\nHugePages_Total: 0\n")
    inner.mkdir()
    assert machine.memory([inner], meminfo) == (3_000_000 << 10, 4_000_000 << 10)
    for name, text in (("memory.max", "1000000"), ("memory.current", "900000"), ("memory.stat", "inactive_file 50000")):
        (inner / name).write_text(text + "\n")
    assert machine.memory([inner], meminfo) == (150_000, 1_000_000)
    (inner / "memory.stat").write_text("anon 300000\ninactive_file 50000\nactive_file 500000\n")
    assert machine.memory([inner], meminfo) == (650_000, 1_000_000)
    (inner / "memory.max").write_text("max\n")
    assert machine.memory([inner], meminfo) == (3_000_000 << 10, 4_000_000 << 10)
    assert machine.memory([], tmp_path / "absent")[0] > 1 << 60  # nothing is known: nothing is done


def test_connections_leave_files_for_everything_else(tmp_path: Path) -> None:
    """Lost otherwise: the cache that cannot be written and the model that cannot be loaded, to a thousand sockets."""
    script = "import resource, sys, machine; soft, hard = map(int, sys.argv[1:]); "
    script += "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)); "
    script += "print(machine.files_for(4096, 48), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    for soft, hard, expected in (
        (1024, 8192, "4096 4144"),
        (80, 80, "32 80"),
        (20, 20, "8 20"),
        (5000, 8192, "4096 5000"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", script, str(soft), str(hard)], cwd=ROOT, capture_output=True, text=True
        )
        assert run.stdout.strip() == expected, run.stderr


def test_the_log_is_not_filled_by_unknown_clients(harsh: Node) -> None:
    """Lost otherwise: a board's SD card, or the lines of the night before, to a thousand odd messages."""
    raw = harsh.channel.stream_stream(INFER, lambda data: data, lambda data: data)
    seen = len(harsh.log)
    for _ in range(100):
        with pytest.raises(grpc.RpcError):
            list(raw(iter([b"\xff" * 100]), timeout=LIMIT_S))
        with pytest.raises(grpc.RpcError):
            harsh.infer()  # a stream without a request
    for said in ("a message is not an InferRequest", "the stream carried no request"):
        lines = [line for line in harsh.log[seen:].splitlines() if said in line]
        assert 1 <= len(lines) <= logs.RepeatLimiter.PER_MINUTE
    assert "similar lines are suppressed for a minute" in harsh.log[seen:]


# A daemon of which every call fails in a way that nobody thought of.
BROKEN = """
import sys
sys.path.insert(0, "@ROOT@")
import lumen_clip, security, service

def breaks(method):
    def broken(servicer, request, context):
        if context is None:  # main() itself asks
            return method(servicer, request, context)
        raise RuntimeError("/etc/secret is not what I thought")
    return broken

for name in ("Infer", "GetCapabilities", "StreamCapabilities", "Health"):
    setattr(service.Daemon, name, breaks(getattr(service.Daemon, name)))
security.health.HealthServicer.Check = breaks(security.health.HealthServicer.Check)
sys.exit(lumen_clip.main())
"""


def test_the_text_of_an_exception_never_reaches_a_client(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: a path, a name or a secret, to whoever finds the fault that lets it out."""
    (tmp_path / "daemon.py").write_text(BROKEN.replace("@ROOT@", str(ROOT)))
    program = (sys.executable, str(tmp_path / "daemon.py"))
    node = Node(write_labels(tmp_path / "data", tiny_onnx), program=program, **one_model(tiny_onnx)).ready()
    check = health_pb2_grpc.HealthStub(node.channel).Check
    calls: tuple[Callable[[], Any], ...] = (
        lambda: node.infer(pb.InferRequest(task="clip_embed", payload=b"x")),
        lambda: node.stub.GetCapabilities(Empty(), timeout=LIMIT_S),
        lambda: list(node.stub.StreamCapabilities(Empty(), timeout=LIMIT_S)),
        lambda: node.stub.Health(Empty(), timeout=LIMIT_S),
        lambda: check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as error:
            call()
        said = re.fullmatch(r"internal error (\w{8}); the daemon's log says more", error.value.details())
        assert error.value.code() is grpc.StatusCode.INTERNAL and said, error.value.details()
        node.wait_for(f"internal error {said[1]}\nTraceback")
    assert node.log.count("RuntimeError: /etc/secret is not what I thought") == len(calls)
    assert node.stop() == 0
