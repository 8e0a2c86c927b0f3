"""Crashes, hangs, and a model that fails."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gen import ml_service_pb2 as pb
from tests.hostile import held, outlived
from tests.kit import GREEN, LIMIT_S, RED, ROOT, SERVICE, Node, encoded, picture, wait_until, write_labels

# A daemon whose native code misbehaves on demand: no model of ours does so by itself.
MISBEHAVING = """
import ctypes, os, sys, time
sys.path.insert(0, "@ROOT@")
import numpy as np
import labels, lumen_clip, model_files, preprocess
from onnx_backend import OnnxBackend

decode, encode, fault = preprocess.decode_image, OnnxBackend.encode_images, os.environ.get("FAULT")
tokenize, encode_text, score = OnnxBackend.tokenize, OnnxBackend.encode_text, labels.LabelSet.top
remembered = set()

def decode_or_crash(data, *rest, **more):
    if data.endswith(b"CRASH"):
        ctypes.string_at(0)
    if data.endswith(b"HANG"):
        time.sleep(3600)
    return decode(data, *rest, **more)

def encode_or_worse(backend, pixels):
    means = pixels.reshape(len(pixels), -1, 3).mean(axis=1)
    if backend.self_test_cosine is not None:  # it has started
        if (means.max(axis=1) < 20).any():  # black
            os.abort()
        if (means[:, 0] > 235).any() and (means.max(axis=1) - means.min(axis=1) > 200).any():  # pure red
            time.sleep(1)
        if (means.min(axis=1) > 235).any():  # white
            time.sleep(3600)
        if (means[:, 0] < 20).any() and (means[:, 1] > 200).any():
            raise RuntimeError("the model does not feel like it")
        if (means[:, 0] < 20).any() and (means[:, 2] > 200).any():
            ctypes.PyDLL(None).sleep(3600)  # a driver that holds the GIL as well
        if (means.min(axis=1) > 100).any() and fault:
            rows = encode(backend, pixels)
            wrong = {"NaN": rows * np.nan, "zeros": rows * 0, "short rows": rows[:, :-1], "too few rows": rows[:-1]}
            return wrong[fault] if "rows" in fault else model_files.unit_rows(wrong[fault])
    return encode(backend, pixels)

def tokenize_and_remember(backend, texts):
    tokens = tokenize(backend, texts)
    remembered.update(row.tobytes() for row, text in zip(tokens, texts) if "rain" in text.split())
    return tokens

def encode_text_or_abort(backend, tokens):
    if fault == "text" and any(row.tobytes() in remembered for row in tokens):
        os.abort()
    return encode_text(backend, tokens)

def score_or_abort(labelset, *rest):
    if fault == "scoring":
        os.abort()
    return score(labelset, *rest)

if fault == "supervision":
    lumen_clip.min = lambda *periods: 3600.0  # the main thread waits for an hour at a time
preprocess.decode_image = decode_or_crash
OnnxBackend.tokenize, OnnxBackend.encode_text = tokenize_and_remember, encode_text_or_abort
labels.LabelSet.top = score_or_abort
OnnxBackend.encode_images = OnnxBackend.encode_single = encode_or_worse
sys.exit(lumen_clip.main())
"""


@pytest.fixture
def misbehaving(tmp_path: Path, tiny_onnx: Path) -> Callable[..., Node]:
    """Starts such a daemon, always on the same data folder."""
    (tmp_path / "daemon.py").write_text(MISBEHAVING.replace("@ROOT@", str(ROOT)))
    data = write_labels(tmp_path / "data", tiny_onnx)

    def start(**environment: Any) -> Node:
        settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none", **environment}
        return Node(data, program=(sys.executable, str(tmp_path / "daemon.py")), **settings).ready()

    return start


def sent_in_one_batch(node: Node, *payloads: bytes) -> None:
    """Sends them over one stream, whose end is the daemon's."""
    requests = (pb.InferRequest(task="clip_image_embed", payload=payload, correlation_id="x") for payload in payloads)
    with pytest.raises(grpc.RpcError):
        list(node.stub.Infer(requests, timeout=LIMIT_S))


REFUSED = "payload: rejected, because the daemon crashed while processing these bytes before"


def test_a_picture_that_crashes_the_decoder_does_so_once(misbehaving: Callable[..., Node]) -> None:
    """Lost otherwise: the night's import, restarted again and again at the same photograph."""
    poison, good = encoded(picture(RED)) + b"CRASH", encoded(picture(GREEN))
    node = misbehaving()
    sent_in_one_batch(node, good, poison, good)
    assert node.ended() == -signal.SIGSEGV

    node = misbehaving()
    [told] = [line for line in node.log.splitlines() if "rejected from now on: " in line]
    assert f"sha-256 {hashlib.sha256(poison).hexdigest()[:16]}" in told and "processing of 1 payloads" in told
    assert "the previous process crashed: Fatal Python error: Segmentation fault" in node.log
    assert node.ask("clip_image_embed", poison).error.message == REFUSED
    assert node.ask("clip_image_embed", good).result  # which was at hand as well
    assert node.stop() == 0
    node = misbehaving()
    assert "revious process" not in node.log and node.ask("clip_image_embed", poison).error.message == REFUSED
    assert node.stop() == 0


def test_pictures_of_a_batch_that_crashed_get_a_second_chance(misbehaving: Callable[..., Node]) -> None:
    """Lost otherwise: good photographs that were refused for ever because they ran beside a bad one."""
    poison, good = encoded(picture((0, 0, 0)), "PNG"), encoded(picture(GREEN))

    def crash(*payloads: bytes) -> None:
        node = misbehaving(LUMEN_TUNE="0")
        sent_in_one_batch(node, *payloads)
        assert node.ended() == -signal.SIGABRT

    crash(poison)  # alone, so there is no doubt
    node = misbehaving()
    assert node.ask("clip_image_embed", poison).error.message == REFUSED
    assert node.ask("clip_image_embed", good).result
    assert node.stop() == 0
    journal = Path(node.data) / "suspects.json"
    (suspect,) = json.loads(journal.read_text())
    assert suspect == hashlib.sha256(poison).hexdigest()

    # As in a batch of two.
    journal.write_text(json.dumps({suspect: 1, hashlib.sha256(good).hexdigest(): 1}))
    node = misbehaving()
    assert node.ask("clip_image_embed", good).result
    assert list(json.loads(journal.read_text())) == [suspect]
    assert node.stop() == 0


def test_a_kill_makes_no_picture_suspect(misbehaving: Callable[..., Node]) -> None:
    """Lost otherwise: every photograph in work whenever the power fails."""
    slow = encoded(picture((255, 255, 255)), "PNG")
    node = misbehaving()
    call = node.stub.Infer(iter([pb.InferRequest(task="clip_image_embed", payload=slow)]))
    digest = hashlib.sha256(slow).hexdigest().encode()
    wait_until(lambda: b"batch " + digest in (Path(node.data) / "in-flight").read_bytes())
    node.process.kill()
    node.ended()
    call.cancel()
    node = misbehaving()
    assert "the previous process ended during the processing of 1 payloads; rejected from now on: none" in node.log
    suspects = Path(node.data) / "suspects.json"
    assert json.loads(suspects.read_text()) == {digest.decode(): 1}  # a second time without an answer would tell
    assert node.ask("clip_image_embed", encoded(picture(RED))).result
    assert node.stop() == 0


@pytest.mark.parametrize(
    ("fault", "task", "payload"),
    [
        ("text", "clip_embed", b"a red bicycle in the rain"),
        ("scoring", "clip_classify", encoded(picture(GREEN))),
    ],
)
def test_a_crash_over_a_text_or_a_label_set_makes_no_payload_suspect(
    misbehaving: Callable[..., Node], fault: str, task: str, payload: bytes
) -> None:
    """Lost otherwise: a search that works no more, or a good photograph, after a crash that had another reason."""
    node = misbehaving(FAULT=fault)
    with pytest.raises(grpc.RpcError):
        node.ask(task, payload)
    assert node.ended() == -signal.SIGABRT
    node = misbehaving()
    assert (
        "the previous process crashed: Fatal Python error: Aborted" in node.log
        and "rejected from now on" not in node.log
    )
    assert node.ask(task, payload).result and not (Path(node.data) / "suspects.json").exists()
    assert node.stop() == 0


# Each part runs in a process of its own, on one folder: `held(ident, kind)` is in progress on a thread of its own.
JOURNAL = """
import contextlib, ctypes, os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, "@ROOT@")
import errors
import preprocess
from journal import Journal

journal = Journal()
journal.open(Path(sys.argv[1]))

def held(*digests, kind="batch", then=lambda: time.sleep(60)):
    def work():
        with journal.holding(digests, kind):
            recorded.release()
            then()
    recorded = threading.Semaphore(0)
    threading.Thread(target=work, daemon=True).start()
    assert recorded.acquire(timeout=60)

def rejected(*digests):
    found = []
    for digest in digests:
        try:
            journal.check(digest)
        except errors.BadInput:
            found.append(digest)
    print(" ".join(found))

def raise_here(number):
    return lambda: signal.pthread_kill(threading.get_ident(), number)

def in_a_library(function):
    library, thread = ctypes.CDLL(None), ctypes.c_ulong()
    library.pthread_create(ctypes.byref(thread), None, getattr(library, function), None)
    time.sleep(60)
"""


@pytest.fixture
def run_with_journal(tmp_path: Path) -> Callable[..., str]:
    """Runs statements in a process of its own with a crash journal, always on the same folder; -> what it prints."""

    def run(statements: str, status: int = 0) -> str:
        program = JOURNAL.replace("@ROOT@", str(ROOT)) + statements
        command = [sys.executable, "-c", program, str(tmp_path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        assert ended.returncode == status, ended.stderr
        return ended.stdout.strip()

    return run


@pytest.mark.parametrize(
    ("crash", "number"),
    [
        ("held('good')\nos.abort()", signal.SIGABRT),  # as glibc and systemd do, on another thread
        ("held('good')\nos.kill(os.getpid(), signal.SIGBUS)", signal.SIGBUS),
        ("held('good', then=raise_here(signal.SIGBUS))\ntime.sleep(60)", signal.SIGBUS),  # a truncated model file
        ("held('good', kind='prepare')\nctypes.string_at(0)", signal.SIGSEGV),
        ("held('good', 'other', then=raise_here(signal.SIGSEGV))\ntime.sleep(60)", signal.SIGSEGV),  # a batch of two
        ("held('good')\nin_a_library('abort')", signal.SIGABRT),  # a runtime's own thread
        ("held('good')\nos.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL),
    ],
)
def test_a_payload_that_was_merely_in_progress_is_rejected_after_the_second_crash(
    run_with_journal: Callable[..., str], crash: str, number: int
) -> None:
    """Lost otherwise: a good photograph, refused for ever because something else crashed while it was in progress."""
    run_with_journal(crash, -number)
    assert run_with_journal("rejected('good', 'other')\njournal.answered('good')\njournal.answered('other')") == ""
    run_with_journal(crash, -number)
    assert run_with_journal("rejected('good')") == ""  # the answer in between has cleared it
    run_with_journal(crash, -number)
    assert run_with_journal("rejected('good')") == "good"
    assert run_with_journal("rejected('good')") == "good"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE])
def test_only_the_payload_of_the_crashing_thread_is_rejected_at_once(
    run_with_journal: Callable[..., str], number: int
) -> None:
    """Lost otherwise: one more crash over the same photograph, or strikes for those that other threads had."""
    crash = f"held('good', 'more')\nheld('fine', kind='prepare')\nheld('bad', '', then=raise_here({int(number)}))"
    run_with_journal(f"{crash}\ntime.sleep(60)", -number)
    assert run_with_journal("print(*journal._suspects)\nrejected('good', 'more', 'fine', 'bad')") == "bad\nbad"


def test_an_orderly_stop_is_no_crash_whatever_was_in_progress(run_with_journal: Callable[..., str]) -> None:
    """Lost otherwise: photographs that collect strikes by restarts of a busy server."""
    run_with_journal(
        "held('good', then=lambda: time.sleep(0.2))\n"
        "held('slow')\n"
        "journal.close()\n"
        "assert not (Path(sys.argv[1]) / 'in-flight').read_bytes()\n"
        "held('late')\n"
        "time.sleep(0.5)\n"  # by now the first one has ended
        "journal.close()\n"
        "assert not (Path(sys.argv[1]) / 'in-flight').read_bytes()\n"
        "Journal().close()\n"  # was never opened
        "os._exit(0)"
    )
    assert run_with_journal("print(*journal._suspects)") == ""
    # A journal that is refused because another daemon uses the folder leaves that daemon's file alone.
    assert run_with_journal(
        "held('good')\n"
        "second = Journal()\n"
        "second.open(Path(sys.argv[1]))\n"
        "second.close()\n"
        "print('good' in (Path(sys.argv[1]) / 'in-flight').read_text())"
    )


def test_a_damaged_list_of_suspects_costs_the_list_only(run_with_journal: Callable[..., str], tmp_path: Path) -> None:
    """Lost otherwise: the crash journal, and with it every restart after a crash, because a disk lost one file."""
    for content in (b"", b"{", b"[1]", b'{"bad": "x"}', b"\xff"):
        (tmp_path / "suspects.json").write_bytes(content)
        run_with_journal("held('bad', then=raise_here(signal.SIGSEGV))\ntime.sleep(60)", -signal.SIGSEGV)
        assert run_with_journal("rejected('bad')") == "bad"


def test_a_second_daemon_on_a_data_folder_is_told_and_serves(torch_node: Node, tiny_onnx: Path) -> None:
    """Lost otherwise: the first one's journal, overwritten by the second."""
    before = (Path(torch_node.data) / "in-flight").stat().st_ino
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none"}
    node = Node(Path(torch_node.data), **settings).ready()
    assert node.log.count("another daemon uses this folder") == 1 and node.ask("clip_embed", b"a dog").result
    assert node.stop() == 0 and (Path(torch_node.data) / "in-flight").stat().st_ino == before


def test_a_hung_model_ends_the_process_so_that_it_is_started_again(
    misbehaving: Callable[..., Node], tmp_path: Path
) -> None:
    """Lost otherwise: a board that answers nothing until somebody pulls the plug; NPU drivers do hang.

    Who waits is told at once that the daemon goes, rather than left to a deadline: so he can ask another.
    """
    white = encoded(picture((255, 255, 255)), "PNG")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        beats: list[float] = []

        def supervise() -> None:
            with contextlib.suppress(OSError):
                while said := supervisor.recv(4096):
                    beats.extend([time.monotonic()] * (said == b"WATCHDOG=1"))

        threading.Thread(target=supervise, daemon=True).start()
        node = misbehaving(LUMEN_HANG_S="2", NOTIFY_SOCKET=tmp_path / "notify", WATCHDOG_USEC="600000")
        wait_until(lambda: len(beats) > 2)
        call = node.stub.Infer(iter([pb.InferRequest(task="clip_image_embed", payload=white)]))
        watch = health_pb2_grpc.HealthStub(node.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert node.ended() == 1
        assert (
            node.log.count("a batch or a task's step has been running for over 2 s (LUMEN_HANG_S); the process ends")
            == 1
        )
    node = misbehaving()
    assert node.ask("clip_image_embed", encoded(picture(GREEN))).result and node.stop() == 0


def test_a_decoder_that_hangs_ends_the_process_so_that_it_is_started_again(misbehaving: Callable[..., Node]) -> None:
    """Lost otherwise: all pictures, as soon as each decode thread has met one that it never finishes, with Health
    SERVING."""
    node = misbehaving(LUMEN_HANG_S="2")
    hang = pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED)) + b"HANG")
    call = node.stub.Infer(iter([hang]), timeout=LIMIT_S)
    wait_until(lambda: b" prepare " in (Path(node.data) / "in-flight").read_bytes())
    call.cancel()  # the client does not wait, but the thread is gone all the same
    assert node.ended() == 1
    assert (
        node.log.count("the preparation of a request has been running for over 2 s (LUMEN_HANG_S); the process ends")
        == 1
    )


@pytest.mark.parametrize("fault", ["", "supervision"])
def test_liveness_falls_when_inference_hangs(misbehaving: Callable[..., Node], fault: str) -> None:
    """Lost otherwise: a pod that answers nothing and is not restarted, also if the thread that supervises hangs too."""
    node = misbehaving(LUMEN_HANG_S="2", FAULT=fault)
    asked = health_pb2_grpc.HealthStub(node.channel)

    def state(name: str) -> int:
        status: int = asked.Check(health_pb2.HealthCheckRequest(service=name), timeout=LIMIT_S).status
        return status

    states = health_pb2.HealthCheckResponse
    assert state("liveness") == state("") == states.SERVING
    white = encoded(picture((255, 255, 255)), "PNG")
    call = node.stub.Infer(iter([pb.InferRequest(task="clip_image_embed", payload=white)]))
    wait_until(lambda: state("liveness") == states.NOT_SERVING)
    if fault:
        time.sleep(1)
        assert state("liveness") == states.NOT_SERVING and state("") == states.SERVING and call.is_active()
        node.process.kill()
    assert node.ended() == (-signal.SIGKILL if fault else 1)


def test_a_process_that_was_stopped_goes_on(misbehaving: Callable[..., Node]) -> None:
    """Lost otherwise: a healthy daemon, each time that its machine sleeps or somebody pauses its container."""
    node = misbehaving(LUMEN_HANG_S="4")
    release = threading.Event()
    try:
        idle = node.stub.Infer(held(pb.InferRequest(task="clip_embed", payload=b"a dog"), release), timeout=LIMIT_S)
        assert next(idle).result
        slow = pb.InferRequest(task="clip_image_embed", payload=encoded(picture((255, 0, 0)), "PNG"))
        with concurrent.futures.ThreadPoolExecutor(1) as client:
            answers = client.submit(lambda: list(node.stub.Infer(iter([slow] * 20), timeout=LIMIT_S)))
            for _ in range(2):
                wait_until(lambda: b" batch " in (Path(node.data) / "in-flight").read_bytes())
                node.process.send_signal(signal.SIGSTOP)
                time.sleep(6)
                node.process.send_signal(signal.SIGCONT)
                time.sleep(1)
            assert len(answers.result()) == 20 and all(answer.result for answer in answers.result())
        release.set()
        assert list(idle) == []
    finally:
        assert node.stop() == 0, node.log


def test_a_process_that_is_frozen_whole_stops_its_watchdog(misbehaving: Callable[..., Node], tmp_path: Path) -> None:
    """Lost otherwise: a board whose driver holds the GIL; no line of Python can help then, only systemd."""
    blue = encoded(picture((0, 30, 230)), "PNG")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        beats: list[float] = []

        def supervise() -> None:
            with contextlib.suppress(OSError):
                while said := supervisor.recv(4096):
                    beats.extend([time.monotonic()] * (said == b"WATCHDOG=1"))

        threading.Thread(target=supervise, daemon=True).start()
        node = misbehaving(NOTIFY_SOCKET=tmp_path / "notify", WATCHDOG_USEC="1000000")
        wait_until(lambda: len(beats) > 2)
        call = node.stub.Infer(iter([pb.InferRequest(task="clip_image_embed", payload=blue)]), timeout=LIMIT_S)
        wait_until(lambda: time.monotonic() - beats[-1] > 3)  # here systemd loses its patience
        node.process.send_signal(signal.SIGABRT)
        assert node.ended() == -signal.SIGABRT
        call.cancel()
    node = misbehaving()
    assert "the previous process crashed: Fatal Python error: Aborted" in node.log
    assert "the processing of 1 payloads; rejected from now on: none" in node.log  # the signal came from outside
    assert node.ask("clip_image_embed", encoded(picture(RED))).result
    call = node.stub.Infer(iter([pb.InferRequest(task="clip_image_embed", payload=blue)]), timeout=LIMIT_S)
    digest = hashlib.sha256(blue).hexdigest().encode()
    wait_until(lambda: b"batch " + digest in (Path(node.data) / "in-flight").read_bytes())
    node.process.send_signal(signal.SIGABRT)
    assert node.ended() == -signal.SIGABRT
    call.cancel()
    node = misbehaving()
    assert node.ask("clip_image_embed", blue).error.message == REFUSED
    assert node.ask("clip_image_embed", encoded(picture(RED))).result and node.stop() == 0


@pytest.mark.parametrize("fault", ["short rows", "too few rows", "zeros", "NaN"])
def test_what_is_no_vector_is_never_sent_as_one(misbehaving: Callable[..., Node], fault: str) -> None:
    """Lost otherwise: an index with rows that poison every search."""
    node = misbehaving(FAULT=fault)
    with outlived(node, r"internal error \w{8}$"):
        response = node.ask("clip_image_embed", encoded(picture((140, 140, 140)), "PNG"))
        assert response.error.code == pb.ERROR_CODE_INTERNAL and not response.result and not response.result_mime
        number = re.fullmatch(r"internal error (\w{8}); the daemon's log says more", response.error.message)
        assert number  # and nothing of the shape, the model or a path
    assert f"internal error {number[1]}" in node.log  # by which the operator finds the story
    reason = "vectors of shape" if "rows" in fault else "a vector that is not finite or has no length"
    assert reason in node.log
    assert node.stop() == 0


def test_a_model_that_only_fails_is_started_again(misbehaving: Callable[..., Node]) -> None:
    """Lost otherwise: an NPU that went away, and a daemon that says SERVING to the end of days."""
    node = misbehaving()
    bad, good = encoded(picture((0, 230, 30)), "PNG"), encoded(picture(RED))
    with outlived(node, r"internal error \w{8}$"):  # one failure is that request's alone
        assert node.ask("clip_image_embed", bad).error.code == pb.ERROR_CODE_INTERNAL
    for payload in (bad, bad, good, bad, bad):  # a success in between shows that the model is well
        response = node.ask("clip_image_embed", payload)
        assert bool(response.result) == (payload is good)
        assert payload is good or re.fullmatch(
            r"internal error \w+; the daemon's log says more", response.error.message
        )
    node.ask("clip_image_embed", bad)
    assert node.ended() == 1 and "clip image: 3 batches failed in a row; the process ends" in node.log


def test_a_model_that_only_fails_is_noticed_beside_one_that_works(misbehaving: Callable[..., Node]) -> None:
    """Lost otherwise: all pictures of one model, with Health SERVING, because searches are still answered."""
    node = misbehaving()
    bad = encoded(picture((0, 230, 30)), "PNG")
    for number in range(3):
        assert node.ask("clip_embed", f"a dog {number}".encode()).result
        assert node.ask("clip_image_embed", bad).error.code == pb.ERROR_CODE_INTERNAL
    assert node.ended() == 1 and "clip image: 3 batches failed in a row; the process ends" in node.log
