"""The table of faults: each ends in a right answer, nothing held, and a line of the log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_reflection.v1alpha import reflection
from PIL import Image

import label_cache
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.hostile import INFER, RawPeer, held, impatient, mutants, outlived, poisons, threads_and_files
from tests.kit import (
    IMAGENET,
    LIMIT_S,
    RED,
    ROOT,
    Node,
    encoded,
    one_model,
    picture,
    resident_mb,
    wait_until,
    write_labels,
)


def test_a_slow_sender_loses_its_stream(harsh: Node) -> None:
    """Lost otherwise: a thread for each camera that went out of reach in the middle of an upload.

    A byte a second is no silence: a phone at the end of the garden sends like that, and keeps its place.
    """
    release = threading.Event()
    with outlived(harsh, "a stream ended: DEADLINE_EXCEEDED, no chunk for 2 s"):
        call = harsh.stub.Infer(
            held(pb.InferRequest(task="clip_embed", payload=b"a", total=3), release), timeout=LIMIT_S
        )
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        release.set()


FROZEN_CLIENT = """
import sys, time
import grpc
from gen import ml_service_pb2 as pb, ml_service_pb2_grpc as pb_grpc
def requests():
    yield from [pb.InferRequest(task="clip_embed", payload=b"a dog")] * 3
    time.sleep(600)
for number, _ in enumerate(pb_grpc.InferenceStub(grpc.insecure_channel(sys.argv[1])).Infer(requests()), 1):
    if number == 3:
        print("answered", flush=True)
"""


def test_a_frozen_peer_is_disconnected(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: a place for each phone that left the house; its kernel acknowledges, so TCP sees nothing."""
    constants = {"service.KEEPALIVE_S": 4, "service.KEEPALIVE_PATIENCE_S": 4}  # of 30 and 10
    settings = one_model(tiny_onnx) | impatient(tmp_path, constants)
    node = Node(write_labels(tmp_path / "data", tiny_onnx), ("--log-level", "debug"), **settings).ready()
    with outlived(node, "a stream is over after 3 answers"):
        client = subprocess.Popen([sys.executable, "-c", FROZEN_CLIENT, node.address], cwd=ROOT, stdout=subprocess.PIPE)
        assert client.stdout and client.stdout.readline() == b"answered\n"
        client.send_signal(signal.SIGSTOP)
        files = threads_and_files(node)[1]
        wait_until(lambda: threads_and_files(node)[1] < files)
        client.kill()
        client.wait()
        client.stdout.close()
    assert node.stop() == 0


@pytest.mark.parametrize("by", ["gRPC", "a socket"])
def test_a_peer_that_never_reads_is_disconnected(harsh: Node, by: str) -> None:
    """Lost otherwise: a thread for ever. gRPC answers pings all the while; a socket whose window is full does not."""
    ended, seen = "a stream ended: the client does not read its responses", len(harsh.log)
    with outlived(harsh, ended):
        if by == "gRPC":
            call = harsh.stub.Infer(
                iter([pb.InferRequest(task="clip_embed", payload=b"a dog")] * 20_000), timeout=LIMIT_S
            )
            next(call)
        else:
            huge = b"\0\4\x7f\xff\xff\xff"  # of each stream's window: so it is TCP's that fills
            peer = RawPeer(harsh, huge, 4096)
            peer.socket.sendall(RawPeer.frame(RawPeer.WINDOW, 0, 0, b"\x7f\x00\x00\x00"))
            peer.call(INFER)
            dot = encoded(Image.new("RGB", (1, 1)), "PNG")
            message = pb.InferRequest(task="clip_classify", payload=dot, meta={"topk": "1000"}).SerializeToString()
            for _ in range(400):  # 16 MB of answers
                peer.socket.sendall(RawPeer.frame(0, 0, 1, b"\0" + len(message).to_bytes(4, "big") + message))
        wait_until(lambda: ended in harsh.log[seen:])
        if by == "gRPC":
            with pytest.raises(grpc.RpcError) as error:
                list(call)
            assert error.value.code() is grpc.StatusCode.CANCELLED
        else:
            peer.close()


@pytest.mark.measure
def test_the_65th_stream_is_refused_among_a_thousand_connections(harsh: Node, measuring: bool) -> None:
    """Lost otherwise: everybody's answers, by one guest with a script; or a board's memory."""
    before = resident_mb(harsh)
    with outlived(harsh, "rejected calls since the start: .*last: too many streams"):
        peers = [RawPeer(harsh) for _ in range(1000)]
        release = threading.Event()
        message = pb.InferRequest(task="clip_embed", payload=b"a")
        calls = [harsh.stub.Infer(held(message, release), timeout=LIMIT_S) for _ in range(64)]
        assert all(next(call).result for call in calls)
        waits = []
        for _ in range(200):
            started = time.perf_counter()
            harsh.stub.Health(Empty(), timeout=LIMIT_S)
            waits.append(time.perf_counter() - started)
        started = time.perf_counter()
        with pytest.raises(grpc.RpcError) as error:
            harsh.infer(message)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        refused, grown = time.perf_counter() - started, resident_mb(harsh) - before
        print(
            f"\nHealth p99 {1000 * float(np.percentile(waits, 99)):.1f} ms; refused in {1000 * refused:.1f} ms; ",
            end="",
        )
        print(f"1,000 connections and 64 streams: {grown:.0f} MB")
        assert grown < 100
        assert not measuring or (refused < 2 and np.median(waits) < 0.02)
        release.set()
        for peer in peers:
            peer.socket.close()


def test_bytes_that_are_no_message_end_that_stream_alone(harsh: Node) -> None:
    """Lost otherwise: the daemon, to a port scanner."""
    with outlived(harsh, "a stream ended: INVALID_ARGUMENT, a message is not an InferRequest"):
        raw = harsh.channel.stream_stream("/home_native.v1.Inference/Infer", lambda data: data, lambda data: data)
        good = pb.InferRequest(task="clip_embed", payload=b"a").SerializeToString()
        answers: Any = raw(iter([good, b"\xff" * 100]), timeout=LIMIT_S)
        assert pb.InferResponse.FromString(next(answers)).result  # what came before them is answered
        with pytest.raises(grpc.RpcError) as error:
            next(answers)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "not an InferRequest" in error.value.details()


ANY_BYTES = [INFER, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"]
ANY_BYTES += [f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"]


@pytest.mark.parametrize("method", ANY_BYTES)
def test_a_call_that_cannot_be_parsed_leaves_nothing_with_grpc(harsh: Node, method: str) -> None:
    """Lost otherwise: memory, a little for each; and after 384 of them everybody's requests on that connection."""
    raw = harsh.channel.stream_stream(method, lambda data: data, lambda data: data)
    with outlived(harsh):
        for _ in range(450):  # more than the streams that a connection may have
            with pytest.raises(grpc.RpcError) as error:
                list(raw(iter([b"\xff" * 100]), timeout=LIMIT_S))
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, error.value
        assert harsh.ask("clip_embed", b"a dog").result


def test_wrong_chunk_sizes_cost_no_memory(harsh: Node) -> None:
    """Lost otherwise: the board's memory, to a number that a client made up."""
    before = resident_mb(harsh)
    lies: list[dict[str, Any]] = [
        {"total": 2**63, "seq": 0},
        {"total": 2**64 - 1, "seq": 2**64 - 2},
        {"total": 3, "seq": 3},
        {"total": 2, "offset": 2**63},
        {"task": "\0"},
        {"task": "x" * 100_000},
        {"meta": {"topk": "9" * 10_000}},
        {"meta": {"labels": "[" * 100_000}},
    ]
    with outlived(harsh, "request .*, invalid_argument", times=2 * len(lies) - 3):
        for number, lie in enumerate(lies):
            fields = {"task": "clip_classify", "correlation_id": f"{number}", "payload": b"x", **lie}
            twice = [pb.InferRequest(**fields), pb.InferRequest(**fields)]
            responses = list(harsh.stub.Infer(iter(twice), timeout=LIMIT_S))
            assert responses and all(r.error.code == pb.ERROR_CODE_INVALID_ARGUMENT for r in responses), lie
            assert all(len(r.error.message) < 1000 for r in responses)
    assert resident_mb(harsh) - before < 20


MUTANTS = int(os.environ.get("LUMEN_MUTANTS", "900"))


def test_hostile_pictures_cost_no_other_client_an_answer(harsh: Node) -> None:
    """Lost otherwise: a family's import, to one damaged file among forty thousand. Prints its seed."""
    seed = int(os.environ.get("LUMEN_SEED", "11"))
    print(f"\nLUMEN_SEED={seed}")
    good = encoded(picture(RED, (96, 72)))
    expected = harsh.result("clip_image_embed", good)["vector"]
    before, seen, outcomes = resident_mb(harsh), len(harsh.log), {"answered": 0, "refused": 0}
    corpus = list(poisons().items()) + [(f"mutant {i}", data) for i, data in enumerate(mutants(MUTANTS, seed))]
    with outlived(harsh):
        for start in range(0, len(corpus), 60):
            part = corpus[start : start + 60]
            requests = []
            for name, data in part:
                requests.append(pb.InferRequest(task="clip_image_embed", correlation_id=name, payload=data))
                requests.append(pb.InferRequest(task="clip_image_embed", correlation_id="good", payload=good))
            responses = harsh.infer(*requests)
            assert [r.correlation_id for r in responses] == [r.correlation_id for r in requests]
            for response in responses:
                if response.correlation_id == "good":
                    assert json.loads(response.result)["vector"] == pytest.approx(expected, abs=1e-5)
                    continue
                told = response.error.message
                assert response.result or response.error.code == pb.ERROR_CODE_INVALID_ARGUMENT, response
                assert not told or told.startswith("payload: "), response
                outcomes["refused" if told else "answered"] += 1
    print(f"{outcomes}, {resident_mb(harsh) - before:.0f} MB more")
    wait_until(lambda: harsh.log.count(", invalid_argument", seen) >= outcomes["refused"])
    assert harsh.log.count(", invalid_argument", seen) == outcomes["refused"]  # a line for each
    assert min(outcomes.values()) > 50 and resident_mb(harsh) - before < 250


@pytest.mark.parametrize("moment", ["queued", "running", "replying", "at its deadline"])
def test_a_client_that_leaves_takes_its_work_along(harsh: Node, moment: str) -> None:
    """Lost otherwise: an hour of work for a phone that has gone; or the places of those who left."""
    photo = encoded(picture(RED, (4000, 3000)), "PNG")  # a while to decode

    def decoding() -> bool:
        return b" prepare " in (Path(harsh.data) / "in-flight").read_bytes()

    with outlived(harsh):
        begun = len(harsh.log)
        asked = [pb.InferRequest(task="clip_image_embed", payload=photo)] * (2 if moment == "running" else 200)
        for seconds in (2, 8, 32) if moment == "at its deadline" else (60,):
            call = harsh.stub.Infer(iter(asked), timeout=seconds)
            wait_until(lambda: decoding() or not call.is_active())  # noqa: B023
            if call.is_active():  # else a busy machine had not begun within the deadline
                break
        if moment == "replying":
            call.cancel()
            asked = [pb.InferRequest(task="clip_embed", payload=b"a dog")] * 2000
            call = harsh.stub.Infer(iter(asked), timeout=LIMIT_S)
            assert next(call).result  # and 1,999 more are on their way
        if moment == "at its deadline":
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # nobody says goodbye then
        call.cancel()
        if moment != "replying":  # whose requests may all have their answers
            wait_until(lambda: re.search(r"request .*, cancelled", harsh.log[begun:]) is not None)
    done = len(re.findall(r"request .*, ok", harsh.log[begun:]))
    assert moment == "running" or done < len(asked) / 2


def test_two_thousand_streams_leave_nothing_behind(harsh: Node) -> None:
    """Lost otherwise: a restart every month."""

    def ask(count: int) -> None:
        for number in range(count):
            assert harsh.ask("clip_embed", f"a dog {number % 50}".encode()).result

    ask(500)
    before = resident_mb(harsh)
    with outlived(harsh):
        ask(1500)
    print(f"\n{resident_mb(harsh) - before:.1f} MB more after 1,500 further streams")
    assert resident_mb(harsh) - before < 3


def test_without_file_descriptors_old_clients_are_served_and_new_ones_later(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: the photo app, whenever a scanner passes by.

    No line of the log names it: whoever is inside notices nothing, and who stands outside may be anybody.
    """
    limited = ("sh", "-c", 'ulimit -n 80; exec "$@"', "sh", *Node.PROGRAM)
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none"}
    node = Node(write_labels(tmp_path, tiny_onnx), (), limited, **settings).ready()
    try:
        with outlived(node):
            peers = []
            with contextlib.suppress(OSError):
                for _ in range(200):
                    peers.append(RawPeer(node))
            assert node.ask("clip_embed", b"a dog").result  # on the connection that was there before
            for peer in peers:
                peer.socket.close()
            with grpc.insecure_channel(node.address) as channel:
                pb_grpc.InferenceStub(channel).Health(Empty(), timeout=LIMIT_S, wait_for_ready=True)
    finally:
        assert node.stop() == 0


def test_a_clock_that_jumps_costs_no_answer(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: every request in work when a board without a clock hears of the time."""
    script = (
        f"import signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport lumen_clip\n"
        "real, ahead = time.time, [0]\ntime.time = lambda: real() + ahead[0]\n"
        "signal.signal(signal.SIGUSR1, lambda *_: ahead.append(ahead.pop() + 3600))\n"
        "signal.signal(signal.SIGUSR2, lambda *_: ahead.append(ahead.pop() - 7200))\n"
        "sys.exit(lumen_clip.main())\n"
    )
    (tmp_path / "daemon.py").write_text(script)
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none", "LUMEN_HANG_S": 4}
    node = Node(
        write_labels(tmp_path, tiny_onnx), program=(sys.executable, str(tmp_path / "daemon.py")), **settings
    ).ready()
    try:
        release = threading.Event()
        with outlived(node):
            call = node.stub.Infer(held(pb.InferRequest(task="clip_embed", payload=b"a dog"), release), timeout=LIMIT_S)
            assert next(call).result
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                node.process.send_signal(number)
                time.sleep(2.5)  # the daemon looks around meanwhile
                assert node.ask("clip_embed", b"a cat").result
            release.set()
            assert list(call) == []
    finally:
        assert node.stop() == 0


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir()
    return (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]).returncode == 0
    )


@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_a_disk_that_takes_nothing_costs_warnings(tmp_path: Path, tiny_onnx: Path, disk: str) -> None:
    """Lost otherwise: the service, because a cache could not be kept."""
    data = tmp_path / "data"
    if not mounted(data, "size=200k"):
        pytest.skip("needs root, to mount a small disk")
    try:
        write_labels(data)
        if disk == "full":
            with contextlib.suppress(OSError), (data / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        else:
            subprocess.run(["mount", "-o", "remount,ro", data], check=True)
        settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none", "LUMEN_TUNE": "1"}
        node = Node(data, **settings).ready()
        with outlived(node):
            pass
        node.wait_for("cannot keep the tuning")
        for said in ("cannot keep the text vectors", "cannot keep the tuning", "no crash journal"):
            assert node.log.count(said) == 1, node.log
        assert "Traceback" not in node.log
        assert len(node.result("clip_classify", encoded(picture(RED)))["labels"]) == 5
        assert node.stop() == 0
    finally:
        subprocess.run(["umount", data], check=True)


CACHES = {
    "cut in half": "is damaged (",
    "of another type": "is damaged (",
    "of another model": "was made for another model, label file or recipe",
    "of another label file": "was made for another model, label file or recipe",
    "of other weights": "belong to another model or recipe (cosine",
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_that_is_not_right_is_made_anew(harsh: Node, tmp_path: Path, tiny_onnx: Path, cache: str) -> None:
    """Lost otherwise: the start, by a tired disk; or every answer, by vectors that belong to something else."""
    kept = next(Path(harsh.data).rglob(label_cache.FILE))  # harsh has the same model and labels
    right = label_cache.load(kept)
    assert right and right.meta
    data = write_labels(tmp_path)
    path = data / kept.relative_to(harsh.data)
    path.parent.mkdir(parents=True)
    raw = kept.read_bytes()
    key = label_cache.CacheKey(**{name: right.meta[name] for name in label_cache.CacheKey.__dataclass_fields__})
    expected = [row["label"] for row in harsh.result("clip_classify", encoded(picture(RED)), topk="1000")["labels"]]
    if cache == "cut in half":
        path.write_bytes(raw[: len(raw) // 2])
    elif cache == "of another type":
        with zipfile.ZipFile(path, "w") as archive:
            label_cache._add(archive, "vecs", right.vecs.astype(np.float64))
            label_cache._add(archive, "meta", np.frombuffer(json.dumps(key.meta()).encode(), np.uint8))
    elif cache == "of another label file":
        path.write_bytes(raw)
        (data / "clip" / "imagenet_class_names.json").write_text(json.dumps(IMAGENET | {"7": "something new"}))
        expected = ["something new" if label == IMAGENET["7"] else label for label in expected]
    else:
        model = "another" if cache == "of another model" else key.model_id
        label_cache.save(path.parent, dataclasses.replace(key, model_id=model), [np.roll(right.vecs, 1, axis=1)])
    node = Node(data, **one_model(tiny_onnx)).ready()
    with outlived(node):
        found = [row["label"] for row in node.result("clip_classify", encoded(picture(RED)), topk="1000")["labels"]]
        assert sorted(found) == sorted(expected)
        assert cache == "of another label file" or found == expected
    assert node.log.count(CACHES[cache]) == 1 and node.log.count("computing the text vectors of 1000 labels") == 1
    assert node.stop() == 0 and "Traceback" not in node.log
    rebuilt = label_cache.load(path)
    assert rebuilt and rebuilt.meta
    assert cache == "of another label file" or np.allclose(rebuilt.vecs, right.vecs, atol=1e-6)
    assert not list(path.parent.glob(".*"))  # nothing lies about


@pytest.mark.parametrize("moment", ["idle", "twice", "loading"])
def test_told_to_stop_it_stops(tmp_path: Path, tiny_onnx: Path, moment: str) -> None:
    """Lost otherwise: 90 seconds at each shutdown of the board. (Under load: the test above.)"""
    script = f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport backends, lumen_clip\n"
    script += "lumen_clip.DRAIN_S = 3600\n"  # there is nothing to wait for
    if moment == "loading":
        script += "backends.create_backend = lambda options, say: time.sleep(600)\n"
    (tmp_path / "daemon.py").write_text(script + "sys.exit(lumen_clip.main())\n")
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none"}
    node = Node(
        write_labels(tmp_path, tiny_onnx), program=(sys.executable, str(tmp_path / "daemon.py")), **settings
    ).bound()
    if moment != "loading":
        node.wait_for("ready: ")
    release = threading.Event()
    if moment != "loading":  # an idle stream is no reason to stay
        call = node.stub.Infer(held(pb.InferRequest(task="clip_embed", payload=b"a dog"), release), timeout=LIMIT_S)
        assert next(call).result
    node.process.terminate()
    if moment == "twice":
        node.process.terminate()
    assert node.ended() == 0 and "Traceback" not in node.log
    release.set()


# A daemon that gives the hub two seconds in the place of thirty.
HASTY = """
import sys
sys.path.insert(0, "@ROOT@")
import huggingface_hub, lumen_clip
ask = huggingface_hub.HfApi.repo_info
huggingface_hub.HfApi.repo_info = lambda *arguments, timeout, **more: ask(*arguments, timeout=min(timeout, 2), **more)
sys.exit(lumen_clip.main())
"""


def test_a_hub_that_never_answers_ends_the_start_with_one_line(tmp_path: Path) -> None:
    """Lost otherwise: a start that hangs behind a firewall which drops packets."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(64)  # takes connections and says nothing
        endpoint = f"http://127.0.0.1:{hole.getsockname()[1]}"
        settings = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "HF_ENDPOINT": endpoint}
        (tmp_path / "daemon.py").write_text(HASTY.replace("@ROOT@", str(ROOT)))
        node = Node(tmp_path / "data", program=(sys.executable, str(tmp_path / "daemon.py")), **settings)
        assert node.ended() == 1
        node.stop()
    assert len([line for line in node.log.splitlines() if line.startswith("lumen-clip: CLIP_MODEL=")]) == 1
    assert "Traceback" not in node.log
