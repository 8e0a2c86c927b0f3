"""Whatever a request contains, it is answered and gives back what it held."""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

import errors
import intake
import lumen_clip
import preprocess
import service
import streams
import tasks
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.kit import LIMIT_S, RED, encoded, in_chunks, picture, settings_of, wait_until, write_labels


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path, tiny_immich: Path) -> Iterator[Any]:
    """A daemon with both models inside this process, so that a test can read its budgets, and a stub."""
    settings = settings_of(
        lumen_data_dir=write_labels(tmp_path_factory.mktemp("intake")),
        clip_backend="onnxrt",
        clip_model=str(tiny_onnx),
        bioclip_backend="onnxrt",
        bioclip_model=str(tiny_immich),
        clip_templates=1,
        lumen_tune=0,
    )
    daemon = service.Daemon(settings)
    server, port = service.start_server(daemon, "127.0.0.1", 0)
    models, _ = lumen_clip.load_models(settings, daemon.engine, lambda text: None)
    daemon.serve(models)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        daemon.stub = pb_grpc.InferenceStub(channel)  # type: ignore[attr-defined]
        yield daemon
    server.stop(0).wait()
    daemon.intake.decoders.stop()
    daemon.engine.stop()


def held(daemon: Any) -> dict[str, int]:
    """What requests hold of all that is bounded; empty if nothing."""
    intake, engine = daemon.intake, daemon.engine
    counts = {name: getattr(intake, name).used for name in ("payloads", "prepared", "pixels")}
    counts |= {stage.name: stage.queue.length for stage in engine._stages} | {"decoders": intake.decoders._queue.length}
    counts |= {
        "in progress": engine._expected,
        "counted": daemon.traffic._queue,
        "streams": len(daemon.streams._streams),
    }
    counts["open"] = sum(not stream.over for stream in list(daemon.streams._streams))
    return {name: count for name, count in counts.items() if count}


def settled(daemon: Any) -> None:
    wait_until(lambda: not held(daemon))


@pytest.mark.parametrize(
    ("topk", "count"),
    [("0" * 5000 + "5", 5), ("5" * 5000, 999), ("9" * 100_000, 999), ("0" * 5000, 0)],  # of 999 labels
    ids=["5 after zeros", "5,000 digits", "100,000 digits", "zeros"],
)
def test_a_long_number_is_answered(daemon: Any, topk: str, count: int) -> None:
    """All pictures of everybody, until a restart: `int()` raises beyond 4,300 digits, and the request kept its part
    of the memory for payloads."""
    request = pb.InferRequest(task="clip_classify", payload=encoded(picture(RED)), meta={"topk": topk})
    [response] = daemon.stub.Infer(iter([request]), timeout=LIMIT_S)
    if count:
        assert len(json.loads(response.result)["labels"]) == count
    else:
        assert response.error.code == pb.ERROR_CODE_INVALID_ARGUMENT and len(response.error.message) < 300
    settled(daemon)


@pytest.mark.parametrize("key", ["within", "labels", "labels of labels", "lumen.tensor.shape", "label_set", "topk"])
def test_text_that_is_no_unicode_fails_alone(daemon: Any, key: str) -> None:
    """The whole stream would end, with all its other requests, by one name that JSON allows and UTF-8 does not."""
    photo = encoded(picture(RED))
    value = json.dumps([["\ud800"]] if key == "labels of labels" else ["a", "\ud800"])
    meta = {key.partition(" ")[0]: value, "lumen.input.kind": "tensor" if "tensor" in key else "raw"}
    task = "clip_classify" if key.startswith(("label", "topk")) else "bioclip_classify"
    bad = pb.InferRequest(task=task, correlation_id="bad", payload=photo, meta=meta)
    good = pb.InferRequest(task="clip_image_embed", correlation_id="good", payload=photo)
    responses = list(daemon.stub.Infer(iter([bad, good]), timeout=LIMIT_S))
    assert [response.correlation_id for response in responses] == ["bad", "good"] and responses[1].result
    assert responses[0].error.code == pb.ERROR_CODE_INVALID_ARGUMENT
    assert responses[0].error.message.startswith(f"meta {'lumen.tensor' if 'tensor' in key else key.split()[0]}")


@pytest.mark.parametrize(
    "content",
    ["[1" + ",1" * 1_900_000 + "]", "[[]" + ",[]" * 1_200_000 + "]", '["a"' + ",1" * 1_900_000 + "]"],
    ids=["numbers", "lists", "a string first"],
)
@pytest.mark.parametrize("key", ["labels", "within", "lumen.tensor.shape"])
def test_megabytes_of_json_are_refused_unread(key: str, content: str) -> None:
    """All threads would stand still while one reads JSON: eight streams of it made a picture wait for eight seconds."""
    names = {"labels": "clip_classify", "within": "bioclip_classify", "lumen.tensor.shape": "bioclip_image_embed"}
    task = tasks.TASKS[names[key]]
    began = time.thread_time()
    json.loads(content)
    whole = time.thread_time() - began
    request = tasks.Request("", task.name, "", {key: content}, b"x")
    recipe = preprocess.Preprocess()
    tensor_meta = {"lumen.tensor.layout": "NCHW", "lumen.tensor.format": "contiguous", "lumen.tensor.dtype": "fp32"}
    tensor_meta |= {"lumen.tensor.byte_order": "little", "lumen.preprocess.id": recipe.tensor_id}
    tensor_meta |= {"lumen.preprocess.skip": "true"}
    began = time.thread_time()
    with pytest.raises(errors.BadInput, match=key):
        tasks.read_meta(task, request)
        preprocess.pixels_from_tensor(b"x", tensor_meta | {key: content}, recipe)
    assert time.thread_time() - began < whole / 2


def waits_for(budget: intake.Budget, count: int) -> bool:
    return len(budget._waiting) == count


def test_a_large_part_of_a_budget_is_not_overtaken_for_ever() -> None:
    """A large picture would wait for as long as an import of small ones runs."""
    budget = intake.Budget(100)
    budget.take(40, lambda: False)
    order: list[str] = []

    def take(name: str, size: int) -> None:
        budget.take(size, lambda: False)
        order.append(name)

    large = threading.Thread(target=take, args=("large", 80))
    large.start()
    wait_until(lambda: len(budget._waiting) == 1)
    small = [threading.Thread(target=take, args=(f"small {i}", 5)) for i in range(4)]
    for number, thread in enumerate(small):
        thread.start()
        wait_until(functools.partial(waits_for, budget, number + 2))
    assert order == []  # though there was room for the small ones
    budget.give(40)
    for thread in (large, *small):
        thread.join(60)
    assert order[0] == "large" and len(order) == 5


def test_a_client_that_left_does_not_hold_up_those_behind_it() -> None:
    """Everybody would wait for room that nobody wants any more."""
    budget, left = intake.Budget(100), threading.Event()
    budget.take(50, lambda: False)
    outcomes: list[str] = []

    def leave() -> None:
        with pytest.raises(errors.Overload):
            budget.take(80, left.is_set)
        outcomes.append("left")

    first = threading.Thread(target=leave)
    first.start()
    wait_until(lambda: len(budget._waiting) == 1)

    def stay() -> None:
        budget.take(50, lambda: False)
        outcomes.append("served")

    second = threading.Thread(target=stay)
    second.start()
    wait_until(lambda: len(budget._waiting) == 2)
    left.set()
    first.join(60)
    second.join(60)
    assert sorted(outcomes) == ["left", "served"]


def test_long_texts_wait_in_the_fair_order(daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen streams of 64 KB of line breaks would clean their texts at the same time, and everybody else's pictures
    would wait for seconds."""
    pool = daemon.intake.decoders
    queued: list[int] = []
    submit = pool.submit

    def record(flow: Any, answer: Any, work: Any) -> None:
        queued.append(1)
        submit(flow, answer, work)

    monkeypatch.setattr(pool, "submit", record)
    texts = [b"a dog", b"a\n" * 32_000]
    requests = [pb.InferRequest(task="clip_embed", payload=text) for text in texts]
    assert all(response.result for response in daemon.stub.Infer(iter(requests), timeout=LIMIT_S))
    assert queued == [1]  # the long one
    settled(daemon)


class Upload:
    """A stream that sends a large request in chunks, one at each `next`."""

    def __init__(self, stub: Any, payload: bytes, size: int) -> None:
        self._go = threading.Semaphore(0)
        self._chunks = in_chunks(payload, -(-len(payload) // size), task="clip_image_embed")
        self.call = stub.Infer(self._messages(), timeout=120)

    def _messages(self) -> Iterator[pb.InferRequest]:
        for chunk in self._chunks:
            assert self._go.acquire(timeout=120)
            yield chunk

    def send(self, count: int = 1000) -> None:
        self._go.release(count)


def test_uploads_that_have_begun_do_not_wait_for_each_other(watched: Any) -> None:
    """Seven people who upload large pictures at the same time would each hold a part of the memory and wait for the
    rest, until the first one is refused after half a minute."""
    backend, stub = watched
    payloads = backend.daemon.intake.payloads = intake.Budget(4 << 20)
    photo = encoded(picture(RED)) + bytes(1 << 20)  # of which the decoder reads the beginning
    uploads = [Upload(stub, photo, 64 << 10) for _ in range(7)]
    for upload in uploads:
        upload.send(1)  # the first chunk of each
    wait_until(lambda: waits_for(payloads, 4))  # for three of seven there is room
    for upload in uploads:
        upload.send()
    assert all(next(upload.call).result for upload in uploads)
    wait_until(lambda: payloads.used == 0)


def test_an_upload_that_never_ends_gives_way_to_others(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client that sends a byte now and then would keep everybody's pictures out for days."""
    backend, stub = watched
    daemon = backend.daemon
    payloads = daemon.intake.payloads = intake.Budget(2 << 20)
    monkeypatch.setattr(streams, "UPLOAD_S", 0.2)
    monkeypatch.setattr(streams, "WANTED_BYTES_S", 0.2)
    hostile = Upload(stub, bytes(3 << 19), 16 << 10)
    hostile.send(2)
    wait_until(lambda: payloads.used > 1 << 20)
    daemon.check()
    time.sleep(0.3)
    daemon.check()
    assert len(daemon.streams._streams) == 1  # nobody wants its memory
    request = pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED)) + bytes(1 << 20))
    with futures.ThreadPoolExecutor(1) as person:
        single = person.submit(lambda: list(stub.Infer(iter([request]), timeout=120)))
        wait_until(lambda: payloads.waited() > 0.3)
        daemon.check()
        assert single.result()[0].result
    with pytest.raises(grpc.RpcError) as error:
        next(hostile.call)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "incomplete" in error.value.details()
    hostile.send()


def test_one_stream_cannot_reserve_all_memory(daemon: Any) -> None:
    """Four requests that are begun and never finished would be all that the daemon takes."""
    parts = [in_chunks(bytes(60 << 20), 2, task="clip_image_embed", correlation_id=str(i))[0] for i in range(4)]
    responses = {r.correlation_id: r.error.message for r in daemon.stub.Infer(iter(parts), timeout=120)}
    assert all("before the last chunk" in responses[key] for key in "01")
    assert all("more than 134217728 bytes of unfinished requests" in responses[key] for key in "23")
    settled(daemon)


def test_a_client_with_all_places_does_not_shut_others_out(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An app that opens a stream for each picture would leave no place for anybody else's single picture."""
    backend, stub = watched
    monkeypatch.setattr(backend.daemon.streams, "_most", 3)
    request = pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED)))
    backend.gate.clear()
    calls = [stub.Infer(iter([request]), timeout=60) for _ in range(3)]
    wait_until(lambda: backend.daemon.engine._expected == 3)
    with grpc.insecure_channel(backend.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        other = pb_grpc.InferenceStub(channel)
        single = other.Infer(iter([request]), timeout=60)
        wait_until(lambda: backend.daemon.engine._expected == 4)
        for full in (stub, other):  # each has a stream now
            with pytest.raises(grpc.RpcError) as error:
                list(full.Infer(iter([request]), timeout=60))
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        backend.gate.set()
        assert all(next(call).result for call in (single, *calls))


KEYS = [
    *(*tasks.TOPK_KEYS, "labels", "label_set", "min_score", "label_format", "rank", "within", "prompt_template"),
    *("lumen.output.kind", "lumen.input.kind", "lumen.preprocess.id", "lumen.preprocess.skip"),
    *(f"lumen.tensor.{key}" for key in ("dtype", "shape", "layout", "format", "byte_order")),
]
VALUES = [
    *("", " ", "0", "-1", "1.5", "NaN", "1e309", "\0", "true", "tensor", "raw", "json", "auto", "order", "lineage"),
    *("[", "{", "{}", "[]", "null", '"a"', "[1]", "[null]", "[{}]", '["a"]', '["a", ""]', "Animalia", "Aves,Plantae"),
    *("0" * 5000 + "7", "9" * 5000, "[" * 50_000, '["' + "a" * 50_000 + '"]', "a," * 20_000, "\U0001f98a" * 5000),
    *(json.dumps(["x"] * 20_000), json.dumps(["\ud800"]), json.dumps([f"label {i}" for i in range(40)])),
    *("[1,3,224,224]", f"[{'9' * 5000}]", "a {} b", "{}{}", "{}" + "x" * 2000, "fp32", "NCHW", "contiguous"),
    *("little", "bioclip2_224_image_v1", "É\u202e\ufeff", "١٢٣", "²", "1_000", "+5", "0x10"),
]


def random_request(number: int, source: random.Random) -> pb.InferRequest:
    photo = encoded(picture(RED, (40, 30)))
    payloads = [
        b"",
        b"a dog",
        b"\xff\xfe",
        b" ",
        b"x" * 70_000,
        photo,
        photo[:300],
        b"GIF89a",
        bytes(224 * 224 * 3 * 4),
    ]
    task = source.choice([*tasks.TASKS, *tasks.TASKS, "", "x" * 5000, "clip_classify\0"])
    fits = task in tasks.TASKS and source.random() < 0.7
    payload = source.choice(payloads)
    if fits:
        payload = photo if tasks.TASKS[task].takes == "image" else b"a dog"
    keys = source.sample(KEYS, source.choice([0, 1, 1, 2, 3, 6]))
    if source.random() < 0.1:
        keys += [source.choice(VALUES)]
    meta = {key: source.choice(VALUES) for key in keys}
    mime = source.choice(["", "", "", "image/jpeg", "text/plain", "application/octet-stream", "image/" + "x" * 5000])
    return pb.InferRequest(task=task, correlation_id=str(number), payload=payload, meta=meta, payload_mime=mime)


def test_fuzz_requests_through_a_stream(daemon: Any) -> None:
    """Every request is answered and everything that it held is free again, or one client stops the daemon for all.

    Prints its seed; LUMEN_SEED takes another.
    """
    seed = int(os.environ.get("LUMEN_SEED", "21"))
    print(f"\nLUMEN_SEED={seed}")
    source, outcomes = random.Random(seed), {"answered": 0, "refused": 0}
    for _ in range(30):
        requests = [random_request(number, source) for number in range(40)]
        responses = list(daemon.stub.Infer(iter(requests), timeout=LIMIT_S))
        assert [r.correlation_id for r in responses] == [r.correlation_id for r in requests]
        for request, response in zip(requests, responses, strict=True):
            code, told = response.error.code, response.error.message
            assert response.is_final and (response.result or code == pb.ERROR_CODE_INVALID_ARGUMENT), (request, told)
            assert len(told) < 2000
            outcomes["refused" if told else "answered"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 100
    settled(daemon)


def test_fuzz_streams_that_are_cut_off(daemon: Any) -> None:
    """Clients that leave at any moment would take the memory for payloads with them, a little each time."""
    source = random.Random(7)
    for _ in range(60):
        requests = [random_request(number, source) for number in range(20)]
        call = daemon.stub.Infer(iter(requests), timeout=source.choice([0.01, 0.05, 60]))
        time.sleep(source.random() * 0.05)
        call.cancel()
    settled(daemon)


def test_an_error_of_our_own_is_answered_and_gives_back(daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the daemon's own code would cost one request and, with it, memory that nobody gives back."""

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError

    photo = pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED)))
    text = pb.InferRequest(task="clip_embed", payload=b"a dog")
    for module, name in (("find_task", photo), ("read_meta", photo), ("prepare", photo), ("prepare", text)):
        with monkeypatch.context() as patch:
            patch.setattr(f"intake.{module}", fail)
            [response] = daemon.stub.Infer(iter([name]), timeout=LIMIT_S)
            assert response.error.code == pb.ERROR_CODE_INTERNAL and "internal error" in response.error.message
        settled(daemon)
    assert all(r.result for r in daemon.stub.Infer(iter([photo, text]), timeout=LIMIT_S))


def open_streams() -> int:
    """How many streams are in memory, whoever holds them."""
    gc.collect()
    return sum(type(thing) is streams.Stream for thing in gc.get_objects())


def test_cancelled_pictures_keep_nothing(watched: Any) -> None:
    """Pixels of clients that had left would stay in the queue outside every budget, and after 344 cancelled calls a
    connection would refuse all others."""
    backend, stub = watched
    daemon, photo = backend.daemon, encoded(picture(RED))
    request = pb.InferRequest(task="clip_image_embed", payload=photo)
    backend.gate.clear()
    with futures.ThreadPoolExecutor(1) as person:
        first = person.submit(lambda: list(stub.Infer(iter([request]), timeout=LIMIT_S)))
        assert backend.busy.wait(LIMIT_S)  # the model is busy for as long as the test wants
        running = held(daemon)
        for _ in range(60):
            calls = [stub.Infer(iter([request] * 4), timeout=LIMIT_S) for _ in range(10)]
            wait_until(lambda: daemon.engine._expected > 20)
            for call in calls:
                call.cancel()
            wait_until(lambda: held(daemon) == running)
        wait_until(lambda: open_streams() == 1)
        text = stub.Infer(iter([pb.InferRequest(task="x")]), timeout=LIMIT_S)  # the connection still takes calls
        assert [response.error.code for response in text] == [pb.ERROR_CODE_INVALID_ARGUMENT]
        backend.gate.set()
        assert first.result()[0].result
    assert [count for kind, count in backend.batches if kind == "image"] == [1]
    settled(daemon)
