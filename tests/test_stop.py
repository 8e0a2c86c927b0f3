"""How the daemon stops: in order, at once when it is told twice, and never as if it had crashed."""

from __future__ import annotations

import collections
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import lumen_clip
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.kit import LIMIT_S, ROOT, Node, encoded, one_model, picture, wait_until, write_labels

# A daemon whose model never finishes a white picture.
STUCK = """
import sys, time
sys.path.insert(0, "@ROOT@")
import discovery, lumen_clip, onnx_backend

lumen_clip.DRAIN_S = int("@DRAIN@")

encode = onnx_backend.OnnxBackend.encode_images

def encode_or_hang(backend, pixels):
    if backend.self_test_cosine is not None and pixels.mean() > 235:  # it has started
        time.sleep(3600)
    return encode(backend, pixels)

onnx_backend.OnnxBackend.encode_images = onnx_backend.OnnxBackend.encode_single = encode_or_hang
if "@LOADING@":
    lumen_clip.load_models = lambda *arguments: time.sleep(3600)
    discovery.Advertiser.close = lambda advertiser: time.sleep(3600)  # a network that accepts no goodbye
sys.exit(lumen_clip.main())
"""
# A daemon whose main thread waits for an hour at a time.
SLEEPY = """
import sys
sys.path.insert(0, "@ROOT@")
import lumen_clip
lumen_clip.min = lambda *periods: 3600.0
sys.exit(lumen_clip.main())
"""
WHITE = encoded(picture((255, 255, 255)), "PNG")


@pytest.fixture
def stuck(tmp_path: Path, tiny_onnx: Path) -> Callable[..., Node]:
    data = write_labels(tmp_path / "data", tiny_onnx)

    def start(loading: str = "", drain: int = 20) -> Node:
        script = STUCK.replace("@ROOT@", str(ROOT)).replace("@LOADING@", loading).replace("@DRAIN@", str(drain))
        (tmp_path / "daemon.py").write_text(script)
        node = Node(data, program=(sys.executable, str(tmp_path / "daemon.py")), **one_model(tiny_onnx))
        return node.bound() if loading else node.ready()

    return start


def in_flight(node: Node) -> bytes:
    return (Path(node.data) / "in-flight").read_bytes().strip(b"\0")


def hanging(node: Node) -> Any:
    """A call whose picture the model has."""
    request = pb.InferRequest(task="clip_image_embed", payload=WHITE)
    call = node.stub.Infer(iter([request]), timeout=LIMIT_S)
    wait_until(lambda: b" batch " in in_flight(node))
    return call


def test_every_call_during_a_stop_is_answered_or_unavailable(tmp_path: Path) -> None:
    """An app that is told CANCELLED takes its own request for withdrawn, and does not try again."""
    outcomes = collections.Counter[str]()
    for _ in range(3):
        answered = outcomes["OK"]
        node = Node(tmp_path, ("--demo",)).ready()
        stopped = threading.Event()

        def client(number: int, address: str = node.address, stopped: threading.Event = stopped) -> None:
            requests = [pb.InferRequest(task="clip_embed", payload=b"a dog")] * (1 + number % 3)
            with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", number % 4)]) as channel:
                stub = pb_grpc.InferenceStub(channel)
                while not stopped.is_set():
                    try:
                        responses = list(stub.Infer(iter(requests), timeout=LIMIT_S))
                        outcomes["OK"] += len(responses) == len(requests) and all(r.result for r in responses)
                        outcomes["incomplete"] += len(responses) != len(requests)
                    except grpc.RpcError as error:
                        outcomes[error.code().name] += 1

        clients = [threading.Thread(target=client, args=(number,)) for number in range(12)]
        for thread in clients:
            thread.start()
        wait_until(lambda: outcomes["OK"] > answered + 60)  # noqa: B023
        assert node.stop() == 0
        stopped.set()
        for thread in clients:
            thread.join()
    print(outcomes)
    assert outcomes["UNAVAILABLE"] > 0
    assert +outcomes - collections.Counter(OK=10**9, UNAVAILABLE=10**9) == {}


def test_a_signal_that_another_thread_receives_stops_at_once(tmp_path: Path) -> None:
    """A stop would take up to five seconds: the kernel may hand a signal to any thread, and Python acts on it only
    when the main thread wakes."""
    program = tmp_path / "daemon.py"
    program.write_text(SLEEPY.replace("@ROOT@", str(ROOT)))
    node = Node(tmp_path / "data", ("--demo",), (sys.executable, str(program))).ready()
    threads = [int(task.name) for task in Path(f"/proc/{node.process.pid}/task").iterdir()]
    other = max(threads)  # not the main thread, whose number is the process's
    assert ctypes.CDLL(None).syscall(234, node.process.pid, other, signal.SIGTERM) == 0  # tgkill
    node.wait_for("stopping: ")
    assert node.ended() == 0


def test_a_stop_is_not_taken_for_a_crash(stuck: Callable[..., Node]) -> None:
    """A good photograph would be suspected at each restart, and refused after the second, because the daemon was told
    to stop while a client that had left was still being served."""
    node = stuck(drain=2)
    call = hanging(node)
    call.cancel()
    assert node.stop() == 0 and in_flight(node) == b""
    node = stuck()
    assert "revious process" not in node.log and not (Path(node.data) / "suspects.json").exists()
    assert node.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_drain_at_once(stuck: Callable[..., Node], number: signal.Signals) -> None:
    """Ctrl-C would have to be followed by 20 seconds of waiting, or by kill -9."""
    node = stuck(drain=3600)
    call = hanging(node)
    node.process.send_signal(number)
    node.wait_for("stopping: ")
    time.sleep(0.5)
    assert node.process.poll() is None  # it waits for the request in progress
    node.process.send_signal(number)
    assert node.ended() == 0
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert in_flight(node) == b"" and "Traceback" not in node.log


def test_a_second_signal_ends_a_load_at_once(stuck: Callable[..., Node]) -> None:
    """A start that hangs could only be ended by kill -9."""
    node = stuck("loading")
    node.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert node.process.poll() is None

    def ends() -> bool:
        node.process.send_signal(signal.SIGINT)  # again, because the kernel may make one of two that are pending
        time.sleep(0.2)
        return node.process.poll() is not None

    wait_until(ends)
    assert node.ended() == 0 and "Traceback" not in node.log


# Gives the program that follows a controlling terminal, as a shell does.
IN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(os.open(sys.argv[1], os.O_RDWR), termios.TIOCSCTTY, 0)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_terminal_that_closes_stops_the_daemon(tmp_path: Path) -> None:
    """A daemon that nobody sees any more would keep the port, because SIGHUP also has the label sets read again."""
    ours, theirs = os.openpty()
    program = (sys.executable, "-c", IN_TERMINAL, os.ttyname(theirs), *Node.PROGRAM)
    node = Node(tmp_path, ("--demo",), program).ready()
    os.close(theirs)
    node.reload()
    node.wait_for("reading the label sets again")
    assert node.ask("clip_embed", b"a dog").result
    os.close(ours)
    assert node.ended() == 0 and node.log.splitlines()[-1].endswith("stopped")


def test_a_daemon_that_outlived_its_terminal_reloads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that was started with `& disown` would be stopped by the first reload after the terminal has closed."""
    monkeypatch.setattr(lumen_clip.Terminal, "_is_open", staticmethod(lambda: True))
    terminal = lumen_clip.Terminal()
    assert not terminal.has_closed()
    monkeypatch.setattr(lumen_clip.Terminal, "_is_open", staticmethod(lambda: False))
    assert terminal.has_closed()  # the signal comes at the same moment
    terminal.look()
    assert terminal.has_closed()
    terminal.look()
    assert not terminal.has_closed()


def test_sighup_before_the_models_are_there_does_no_harm(stuck: Callable[..., Node]) -> None:
    """A reload while the board starts would end the start."""
    node = stuck("loading")
    node.reload()
    time.sleep(0.5)
    assert node.process.poll() is None
    node.process.kill()
    assert node.ended() == -signal.SIGKILL and "Traceback" not in node.log


def test_a_daemon_that_loads_is_alive_but_not_ready(stuck: Callable[..., Node]) -> None:
    """Lost otherwise: a first start, whose download a cluster would end again and again."""
    node = stuck("loading")
    health = health_pb2_grpc.HealthStub(node.channel)
    states = health_pb2.HealthCheckResponse
    for name, state in ("", states.NOT_SERVING), ("liveness", states.SERVING):
        assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=LIMIT_S).status == state
    node.process.kill()
    assert node.ended() == -signal.SIGKILL
