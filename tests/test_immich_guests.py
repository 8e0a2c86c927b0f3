"""Guests of the port for immich who mean harm, and load."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import immich
import intake
from gen import ml_service_pb2 as pb
from service import HTTP_CONNECTIONS_MAX
from tests.hostile import impatient, outlived, poisons, threads_and_files
from tests.immich import BOUNDARY, Peer, form, image_form, send, text_form, textual, vector
from tests.kit import (
    BLUE,
    LIMIT_S,
    RED,
    Node,
    encoded,
    one_model,
    picture,
    queued,
    resident_mb,
    wait_until,
    write_labels,
)
from tests.test_metrics import free_port

LIMIT_MB = 2
PATIENCE = {"immich.IDLE_S": 4, "immich.UPLOAD_S": 2, "immich.ROOM_S": 1}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, openai: Path) -> Iterator[Node]:
    """A daemon with little patience and small limits; `node.port` is its port for immich."""
    folder = tmp_path_factory.mktemp("guests")
    settings = one_model(openai, LUMEN_IMMICH_PORT=free_port(), LUMEN_MAX_REQUEST_MB=LIMIT_MB)
    settings |= impatient(folder, PATIENCE)
    node = Node(write_labels(folder / "data", openai), **settings).ready()
    node.port = settings["LUMEN_IMMICH_PORT"]
    node.infer(*[pb.InferRequest(task="clip_embed", payload=b"a dog")])
    served(node)
    yield node
    assert node.stop() == 0 and "Traceback" not in node.log, node.log


def served(node: Node) -> None:
    """Somebody who has nothing to do with it is answered."""
    assert send(node.port, b"", "/ping")[3] == b"pong"
    assert vector(node.port, text_form("a dog")).shape == (64,)
    assert vector(node.port, image_form(encoded(picture(BLUE)))).shape == (64,)


def test_a_thousand_idle_connections_hold_next_to_nothing(node: Node) -> None:
    """Lost otherwise: the memory and the open files of a board, to connections that say nothing."""
    before, (threads, files) = resident_mb(node), threads_and_files(node)
    with outlived(node):
        peers = [Peer(node.port) for _ in range(1000)]
        served(node)
        taken, (now_threads, now_files) = resident_mb(node) - before, threads_and_files(node)
        print(f"\n1,000 idle connections: {taken:.1f} MB, {now_files - files} files, {now_threads - threads} threads")
        assert taken < 25 and now_files - files <= HTTP_CONNECTIONS_MAX + 3 and now_threads <= threads + 2
        assert all(peer.is_closed(LIMIT_S) for peer in peers)
        for peer in peers:
            peer.close()


def test_slow_heads_and_slow_bodies_are_ended(node: Node) -> None:
    """Lost otherwise: the connections and the memory, to clients that send a byte now and then."""
    with outlived(node):
        slow = [Peer(node.port) for _ in range(10)]
        bodies = [Peer(node.port).begin(1 << 20, image_form(b"x" * 1000)[:-60]) for _ in range(10)]
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 6:
                for peer in slow:
                    peer.socket.sendall(b"POST /predict HTTP/1.1\r\n" if time.monotonic() - began < 0.1 else b"x")
                for peer in bodies[:5]:
                    peer.socket.sendall(b"x")
                time.sleep(0.2)
        served(node)
        assert all(peer.is_closed(LIMIT_S) for peer in slow)
        assert bodies[9].answer()[0] == 408
        assert all(peer.is_closed(LIMIT_S) for peer in bodies)


def test_connections_that_are_full_of_uploads_give_way(node: Node) -> None:
    """Lost otherwise: twenty seconds of everybody's time, again and again, to one who begins many uploads."""
    with outlived(node):
        peers = [Peer(node.port).begin(1 << 20, b"--") for _ in range(HTTP_CONNECTIONS_MAX + 20)]
        served(node)
        for peer in peers:
            peer.close()


def test_uploads_that_are_ended_before_they_are_read_are_no_error(node: Node) -> None:
    """Lost otherwise: a readable log, when many uploads arrive at once and the oldest connections are closed."""
    with outlived(node):
        peers = [Peer(node.port) for _ in range(HTTP_CONNECTIONS_MAX)]
        served(node)  # so they are accepted
        node.process.send_signal(signal.SIGSTOP)
        for peer in peers:
            with contextlib.suppress(OSError):  # some were silent for too long already, if the machine is busy
                peer.begin(1 << 20)
        peers += [Peer(node.port).begin(1 << 20) for _ in range(50)]
        node.process.send_signal(signal.SIGCONT)
        served(node)
        for peer in peers:
            peer.close()
    assert "internal error" not in node.log


def test_a_body_that_is_too_large_is_refused_before_it_is_read(node: Node) -> None:
    """Lost otherwise: memory, to a body without an end."""
    noise = np.random.default_rng(0).bytes((LIMIT_MB << 20) + 200_000)
    with outlived(node):
        answer = Peer(node.port).begin(1 << 40).answer()
        assert answer[0] == 413 and b"the most that is allowed" in answer[1]
        assert Peer(node.port).begin(len(noise), noise[:100_000]).answer()[0] == 413
        connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=LIMIT_S)
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        whole = image_form(noise)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may close before all is sent
            pieces = iter([whole[i : i + 65536] for i in range(0, len(whole), 65536)])
            connection.request("POST", "/predict", pieces, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
    assert send(node.port, image_form(bytes(LIMIT_MB << 20)))[0] == 400  # no picture, but not too large


RAW = {
    "rubbish": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
    "no path": b"GET\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
    "two lengths": b"POST /predict HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "length and chunks": b"POST /predict HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a negative length": b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\nabcdef",
    "a bad chunk": b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=a\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    "a huge chunk": b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=a\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nabc",
    "a path": b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_not_http_is_refused(node: Node, name: str) -> None:
    """Lost otherwise: a traceback for the client, or the daemon."""
    with outlived(node):
        peer = Peer(node.port)
        with contextlib.suppress(OSError):
            peer.socket.sendall(RAW[name])
        heard = b""
        peer.socket.settimeout(LIMIT_S)
        with contextlib.suppress(OSError):
            while more := peer.socket.recv(65536):
                heard += more
        assert b"Traceback" not in heard and b"/lib/" not in heard and b".py" not in heard
        assert not heard or re.match(rb"HTTP/1\.[01] (4\d\d|505) ", heard), heard[:200]
        peer.close()
    served(node)


def test_damaged_forms_and_pictures_are_never_an_internal_error(node: Node) -> None:
    """Lost otherwise: the daemon's trust in what it reads. LUMEN_SEED and other seeds find other forms."""
    rng, seen = np.random.default_rng(7), set()
    whole = [text_form("a dog"), image_form(encoded(picture(RED, (60, 40)))), form(("image", b""), ("entries", "{}"))]
    with outlived(node):
        for number in range(300):
            body = bytearray(whole[number % 3])
            for _ in range(int(rng.integers(1, 6))):
                at, size = int(len(body) * rng.random()), int(rng.integers(1, 40))
                match int(rng.integers(3)):
                    case 0:
                        body[at : at + size] = rng.bytes(size)
                    case 1:
                        del body[at : at + size]
                    case 2:
                        body[at:at] = body[at - size : at]
            seen.add(send(node.port, bytes(body) or b"x")[0])
        for name, file in poisons().items():
            if len(file) < LIMIT_MB << 20:
                status, reason, _, _ = send(node.port, image_form(file))
                assert status in (200, 400), (name, reason)
    assert seen <= {200, 400, 422, 501} and {200, 400, 422} <= seen


def test_a_part_with_long_headers_takes_no_time() -> None:
    """Lost otherwise: the loop of all connections, to a search that goes back and forth."""
    boundary = immich.boundary_of(f"multipart/form-data; boundary={BOUNDARY}")
    hostile = form(("a", "b")).replace(b'name="a"', b'; name="' * 100_000)
    many = form(*[(f"f{number}", "") for number in range(20_000)])
    began = time.monotonic()
    assert list(immich.parts(hostile, boundary)) == []
    assert len(list(immich.parts(many, boundary))) == 20_000
    assert list(immich.parts(boundary * 20_000, boundary)) == []
    assert time.monotonic() - began < 5


def test_a_form_that_arrives_byte_by_byte_takes_no_more_time(node: Node) -> None:
    """Lost otherwise: the loop of all connections, to a client that sends small packets of many parts."""
    many = form(*[(f"f{number}", "") for number in range(600)])
    assert 30_000 < len(many) < immich.ENTRIES_WITHIN
    peer = Peer(node.port).begin(len(many) + 1000)
    peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    slowest, began = 0.0, time.monotonic()
    with outlived(node), contextlib.suppress(OSError):
        for number in range(0, len(many), 8):
            peer.socket.sendall(many[number : number + 8])
            if number % 8000 == 0:
                before = time.monotonic()
                send(node.port, b"", "/ping")
                slowest = max(slowest, time.monotonic() - before)
    print(f"\n600 parts in small packets: {time.monotonic() - began:.1f} s, the slowest ping {slowest * 1000:.0f} ms")
    peer.close()
    served(node)


def test_a_client_that_reads_nothing_is_ended(node: Node) -> None:
    """Lost otherwise: memory, to answers that nobody reads."""
    body = text_form("a dog")
    with outlived(node):
        peer = Peer(node.port)
        peer.socket.settimeout(1)
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with contextlib.suppress(OSError):
            for _ in range(5000):
                peer.socket.sendall(request)
        served(node)
        assert peer.is_closed(LIMIT_S)


def test_a_stop_answers_what_is_in_progress(tmp_path: Path, openai: Path) -> None:
    """Lost otherwise: with each update, photographs that immich has to send again."""
    port = free_port()
    node = Node(write_labels(tmp_path, openai), **one_model(openai), LUMEN_IMMICH_PORT=port).ready()
    photo = image_form(encoded(picture(RED, (2000, 1500)), quality=95))
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(send, port, photo) for _ in range(8)]
        wait_until(lambda: any(answer.done() for answer in answers))
        assert node.stop() == 0
        found = [answer.exception() or answer.result()[0] for answer in answers]
    assert found.count(200) >= 2 and all(answer in (200, 503) for answer in found), found


# --- inside this process, around a model that waits ----------------------------------------------------------------


@pytest.fixture
def gated(watched: tuple[Any, Any]) -> tuple[Any, Any, int]:
    """(the model that waits at a gate, a stub of gRPC, the port for immich)"""
    backend, stub = watched
    port = free_port()
    immich.ImmichServer(backend.daemon, "127.0.0.1", port)
    return backend, stub, port


TINY_VISUAL, TINY_TEXT = {"clip": {"visual": {"modelName": "tiny"}}}, textual(model="tiny")


def test_requests_share_batches_with_those_over_grpc_and_texts_go_first(gated: tuple[Any, Any, int]) -> None:
    """Lost otherwise: the search during an import, or the speed of one beside a photo app."""
    backend, stub, port = gated
    photo = encoded(picture(RED, (60, 40)))
    assert vector(port, image_form(photo, TINY_VISUAL)).shape == (64,)
    backend.batches.clear()
    backend.gate.clear()
    backend.busy.clear()
    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(vector, port, image_form(photo, TINY_VISUAL))
        assert backend.busy.wait(LIMIT_S)
        images = [pool.submit(vector, port, image_form(photo, TINY_VISUAL)) for _ in range(3)]
        others = pool.submit(
            lambda: list(stub.Infer(iter([pb.InferRequest(task="clip_image_embed", payload=photo)] * 3)))
        )
        text = pool.submit(vector, port, text_form("a new text", TINY_TEXT))
        wait_until(lambda: queued(backend.daemon, "image") == 6 and queued(backend.daemon, "text") == 1)
        backend.gate.set()
        assert all(image.result().shape == (64,) for image in (first, *images, text))
        assert all(response.result for response in others.result())
    assert backend.batches == [("image", 1), ("text", 1), ("image", 6)]


def test_overload_is_told_and_a_client_that_leaves_takes_its_work_along(
    gated: tuple[Any, Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: silence under load, and a model that works for nobody."""
    monkeypatch.setattr(immich, "REQUESTS_MAX", 3)
    backend, _, port = gated
    backend.gate.clear()
    bodies = [text_form(f"text {number}", TINY_TEXT) for number in range(4)]
    peers = [Peer(port).begin(len(bodies[0]), bodies[0])]
    assert backend.busy.wait(LIMIT_S)  # the first one runs, so that the others wait for the next batch
    peers += [Peer(port).begin(len(body), body) for body in bodies[1:3]]
    wait_until(lambda: queued(backend.daemon) == 2)
    status, reason, headers, _ = send(port, bodies[3])
    assert (status, reason, headers["retry-after"]) == (503, "3 requests are in progress; try later", "5")
    peers[1].close()
    peers[2].close()
    wait_until(lambda: queued(backend.daemon) == 0)
    backend.gate.set()
    assert peers[0].answer()[0] == 200
    wait_until(lambda: send(port, bodies[3])[0] == 200)
    counted = backend.daemon.traffic.requests.labels("clip_embed", "cancelled")._value.get()
    assert counted == 2 and backend.daemon.intake.payloads.used == 0


def test_bodies_share_the_memory_of_all_requests(gated: tuple[Any, Any, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: memory, to many bodies that are allowed one by one. immich is told to come again."""
    monkeypatch.setattr(immich, "ROOM_S", 0.5)
    backend, _, port = gated
    budget = backend.daemon.intake.payloads = intake.Budget(1 << 20)
    peer = Peer(port).begin(1 << 20, bytes(900_000))
    wait_until(lambda: budget.used == 900_000)
    status, reason, headers, _ = send(port, image_form(bytes(300_000), TINY_VISUAL))
    assert (status, reason) == (503, "too many bytes of requests are waiting; try later")
    assert headers["retry-after"] == "5" and budget.used == 900_000
    assert vector(port, text_form("a dog", TINY_TEXT)).shape == (64,)
    peer.close()
    wait_until(lambda: budget.used == 0)
    assert send(port, image_form(bytes(300_000), TINY_VISUAL))[0] == 400 and budget.used == 0


def test_a_model_that_fails_is_an_internal_error_with_a_number(gated: tuple[Any, Any, int]) -> None:
    """Lost otherwise: a path of the daemon's machine, to whoever asks."""
    _, _, port = gated
    white = encoded(picture((255, 255, 255), (60, 40)).point(lambda _: 255), "PNG")
    status, reason, _, body = send(port, image_form(white, TINY_VISUAL))
    assert status == 500 and re.fullmatch(r"internal error \w{8}; the daemon's log says more", reason)
    assert b"/etc/lumen" not in body and json.loads(body)["detail"] == reason


def test_many_clients_are_each_given_their_own_answer(node: Node) -> None:
    """Lost otherwise: somebody else's vector."""
    photos = [encoded(picture(RED, (80, 60), seed)) for seed in range(6)]
    expected = [vector(node.port, image_form(photo)) for photo in photos]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for turn in range(10):
            which = (number + turn) % 6
            if not np.allclose(vector(node.port, image_form(photos[which])), expected[which], atol=1e-5):
                wrong.append(which)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not wrong
