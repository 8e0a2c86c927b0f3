"""What runs together, in which order, and what waits for what."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

import model
import model_files
import onnx_backend
import streams
from gen import ml_service_pb2 as pb
from tests.kit import LIMIT_S, RED, Turnstile, encoded, one, picture, queued, wait_until


def test_eight_clients_are_one_forward_pass_when_the_thread_is_busy(watched: Any) -> None:
    """Lost otherwise: the throughput of a batch, which is what a shared daemon is for."""
    backend, stub = watched
    photo = encoded(picture(RED))
    with concurrent.futures.ThreadPoolExecutor(16) as clients:
        backend.gate.clear()
        first = clients.submit(one, stub, "clip_image_embed", photo)
        assert backend.busy.wait(LIMIT_S)
        tasks = ["clip_image_embed", "clip_classify"] * 4  # of different tasks, too
        waiting = [clients.submit(one, stub, task, photo) for task in tasks]
        wait_until(lambda: queued(backend.daemon) == 8)  # all eight are decoded
        backend.gate.set()
        assert first.result().result and all(f.result().result for f in waiting)
    assert backend.batches == [("image", 1), ("image", 8)]


def test_one_failing_image_in_a_batch_fails_alone(watched: Any) -> None:
    """Lost otherwise: seven good photographs, and the reason of the eighth; and no client reads our paths."""
    backend, stub = watched
    photos = [encoded(picture(RED, seed=i), "PNG") for i in range(7)] + [
        encoded(Image.new("RGB", (300, 300), "white"), "PNG")
    ]
    with concurrent.futures.ThreadPoolExecutor(16) as clients:
        backend.gate.clear()
        first = clients.submit(one, stub, "clip_image_embed", photos[0])
        assert backend.busy.wait(LIMIT_S)
        waiting = [clients.submit(one, stub, "clip_image_embed", photo) for photo in photos]
        wait_until(lambda: queued(backend.daemon) == 8)
        backend.gate.set()
        *good, bad = [f.result() for f in [first, *waiting]]
    assert backend.batches[1] == ("image", 8) and all(r.result for r in good)
    assert bad.error.code == pb.ERROR_CODE_INTERNAL and "secret" not in bad.error.message and not bad.result_mime
    assert one(stub, "clip_image_embed", photos[0]).result


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("cat {}", [30]), ("a red cat {:02}", [30]), ("a very " + "red " * 30 + "cat {}", [8, 8, 8, 6])],
)
def test_short_texts_run_more_at_once(watched: Any, text: str, sizes: list[int]) -> None:
    """Lost otherwise: a fifth of the searches a second; and a batch of long texts that keeps all others waiting."""
    backend, stub = watched
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
        backend.gate.clear()
        first = clients.submit(one, stub, "clip_image_embed", encoded(picture(RED)))
        assert backend.busy.wait(LIMIT_S)
        requests = [pb.InferRequest(task="clip_embed", payload=text.format(i).encode()) for i in range(30)]
        waiting = clients.submit(lambda: list(stub.Infer(iter(requests), timeout=LIMIT_S)))
        wait_until(lambda: queued(backend.daemon) == 30)
        backend.gate.set()
        assert first.result().result and len({r.result for r in waiting.result()}) == 30
    assert [count for kind, count in backend.batches if kind == "text"] == sizes


def test_text_is_not_stuck_behind_a_bulk_import(watched: Any) -> None:
    """Lost otherwise: search, for as long as somebody imports their holiday."""
    backend, stub = watched
    photo = encoded(picture(RED))
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
        backend.gate.clear()
        bulk = [pb.InferRequest(task="clip_image_embed", payload=photo) for _ in range(30)]
        imported = clients.submit(lambda: list(stub.Infer(iter(bulk), timeout=LIMIT_S)))
        assert backend.busy.wait(LIMIT_S)
        query = clients.submit(one, stub, "clip_embed", b"a dog")
        wait_until(lambda: queued(backend.daemon, " text") == 1)
        backend.gate.set()
        assert query.result().result and all(r.result for r in imported.result())
    assert [kind for kind, _ in backend.batches].index("text") == 1


def test_work_whose_caller_has_left_is_not_run(watched: Any) -> None:
    """Lost otherwise: the time of those who still wait."""
    backend, stub = watched
    backend.gate.clear()
    first = stub.Infer(iter([pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED)))]), timeout=LIMIT_S)
    assert backend.busy.wait(LIMIT_S)
    leaver = stub.Infer(
        iter([pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED)))] * 8), timeout=LIMIT_S
    )
    wait_until(lambda: queued(backend.daemon) == 8)
    leaver.cancel()
    wait_until(lambda: queued(backend.daemon) == 0)
    backend.gate.set()
    assert len(list(first)) == 1
    assert one(stub, "clip_embed", b"a dog").result
    assert [count for kind, count in backend.batches if kind == "image"] == [1]


def test_a_vector_that_is_not_finite_never_leaves(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: an index with a NaN in it, which finds nothing any more."""
    _, stub = watched
    monkeypatch.setattr(
        onnx_backend,
        "run_session",
        lambda session, batch, cut: model_files.unit_rows(np.full((len(batch), 64), np.nan)),
    )
    assert one(stub, "clip_embed", b"a dog").error.code == pb.ERROR_CODE_INTERNAL
    monkeypatch.undo()
    assert one(stub, "clip_embed", b"a dog").result


def test_callers_labels_are_encoded_once(watched: Any) -> None:
    """Lost otherwise: a forward pass a label for each photograph of an album."""
    backend, stub = watched
    own = json.dumps([f"thing {i}" for i in range(20)])
    for _ in range(3):
        assert one(stub, "clip_classify", encoded(picture(RED)), labels=own).result
    assert sum(count for kind, count in backend.batches if kind == "text") == 20


def test_a_search_that_comes_again_costs_nothing(watched: Any) -> None:
    """Lost otherwise: a forward pass for each letter that a user types again."""
    backend, stub = watched
    first = one(stub, "clip_embed", b"a red bicycle")
    assert one(stub, "clip_embed", b"  A red BICYCLE ").result == first.result  # the same tokens
    assert [kind for kind, _ in backend.batches].count("text") == 1
    assert one(stub, "clip_embed", b"a red bicycle, again").result != first.result
    assert [kind for kind, _ in backend.batches].count("text") == 2


def test_texts_are_forgotten_by_age(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: a daemon that grows for ever, or one that answers wrongly once its memory is full."""
    backend, stub = watched
    monkeypatch.setattr(model, "TEXTS_KEPT", 4)
    own = json.dumps([f"thing {i}" for i in range(6)])
    before = one(stub, "clip_classify", encoded(picture(RED)), labels=own)
    assert before.result and one(stub, "clip_classify", encoded(picture(RED)), labels=own).result == before.result
    one(stub, "clip_embed", b"a dog")
    done = len(backend.batches)
    assert one(stub, "clip_embed", b"a dog").result and len(backend.batches) == done
    for i in range(4):
        one(stub, "clip_embed", f"cat {i}".encode())
    done = len(backend.batches)
    assert one(stub, "clip_embed", b"a dog").result and len(backend.batches) == done + 1


def test_a_stream_that_does_nothing_is_ended(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: 64 forgotten streams are a daemon that serves nobody."""
    backend, stub = watched
    release = threading.Event()

    def held(message: pb.InferRequest) -> Iterator[pb.InferRequest]:
        yield message
        release.wait(LIMIT_S)

    silent = stub.Infer(held(pb.InferRequest(task="clip_embed", payload=b"a dog")), timeout=LIMIT_S)
    assert next(silent).result
    unfinished = stub.Infer(held(pb.InferRequest(task="clip_embed", payload=b"a dog", total=2)), timeout=LIMIT_S)
    wait_until(lambda: backend.daemon.intake.payloads.used > 0)  # its first chunk is there
    monkeypatch.setattr(streams, "STREAM_IDLE_S", 0.2)
    monkeypatch.setattr(streams, "CHUNK_IDLE_S", 0.2)

    def ended() -> bool:
        backend.daemon.check()
        return bool(silent.done() and unfinished.done())

    wait_until(ended)
    for call, said in ((silent, "no request"), (unfinished, "no chunk")):
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED and said in error.value.details()
    release.set()


def test_a_client_that_never_reads_loses_its_stream(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: a thread for ever; pings are still answered, so keepalive is no help."""
    backend, stub = watched
    monkeypatch.setattr(streams, "READER_IDLE_S", 0.3)
    call = stub.Infer(iter([pb.InferRequest(task="clip_embed", payload=b"a dog")] * 5000), timeout=LIMIT_S)
    wait_until(lambda: bool(backend.daemon.streams._streams))
    [stream] = backend.daemon.streams._streams
    wait_until(lambda: stream._yielding_since is not None and time.monotonic() - stream._yielding_since > 0.4)
    backend.daemon.check()
    wait_until(lambda: not backend.daemon.streams._streams)
    assert one(stub, "clip_embed", b"a dog").result
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() is grpc.StatusCode.CANCELLED


def test_a_stream_that_is_open_already_gets_the_window_of_a_larger_batch(watched: Any) -> None:
    """Lost otherwise: most of a GPU, for an import that began while the first start was still tuning."""
    backend, stub = watched
    backend.gate = turnstile = Turnstile()
    photo, over = encoded(picture(RED, (64, 64))), threading.Event()
    requests = iter(lambda: None if over.is_set() else pb.InferRequest(task="clip_image_embed", payload=photo), None)
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        responses = reader.submit(lambda: sum(not r.result for r in stub.Infer(requests, timeout=LIMIT_S)))
        wait_until(lambda: backend.daemon.engine._expected == streams.WINDOW)
        backend.daemon.serving().clip.image.batch_size = 64
        until, pause = time.monotonic() + LIMIT_S, 0.1
        while backend.daemon.engine._expected <= 2 * streams.WINDOW:
            assert time.monotonic() < until
            turnstile.release()  # the first picture is answered at some time: the stream goes on, and learns of it
            time.sleep(pause)
            pause *= 2  # until it is long enough for the stream to receive so many requests
        over.set()
        turnstile.set()
        assert responses.result() == 0
