"""The daemon on a GPU, with torch's CPU in its place (`torch_device.GPUS`). No card is needed, and none was used."""

from __future__ import annotations

import concurrent.futures
import json
import re
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.empty_pb2 import Empty

import backends
import label_cache
import labels
import lumen_clip
import model
import service
import torch_backend
import torch_device
from engine import Engine, Stage
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from model_files import quiet
from tests.hostile import impatient
from tests.kit import (
    COLOURS,
    LIMIT_S,
    Node,
    encoded,
    load,
    picture,
    pixels_of,
    queued,
    settings_of,
    submitted,
    wait_until,
    write_labels,
)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a GPU."""
    monkeypatch.setattr(torch_device, "GPUS", ("cpu",))


class Slow(torch_device.Stream):
    """A stream whose device takes its time, so that batches end in another order than they began in."""

    random = np.random.default_rng(3)
    marks = waits = 0

    def record(self) -> None:
        Slow.marks += 1

    def wait(self) -> None:
        Slow.waits += 1
        time.sleep(self.random.uniform(0, 0.02))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    monkeypatch.setattr(torch_device, "Stream", Slow)
    monkeypatch.setattr(Slow, "marks", 0)
    monkeypatch.setattr(Slow, "waits", 0)
    return Slow


@pytest.fixture
def served(request: pytest.FixtureRequest, card: None, tiny: Path, tmp_path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """(daemon, CLIP's `Model`, stub) of a daemon in this process, on a real socket, with batches of up to 256.

    The parameter is CLIP_PRECISION.
    """
    names = tmp_path / "names.json"
    names.write_text(json.dumps(list(COLOURS)))
    settings = settings_of(
        lumen_data_dir=tmp_path,
        clip_labels=names,
        bioclip_backend="none",
        clip_model=tiny,
        clip_templates=1,
        clip_precision=getattr(request, "param", "fp32"),
        clip_max_batch_size=256,
        lumen_tune=0,
        lumen_jpeg_draft=0,
    )
    daemon = service.Daemon(settings)
    models, _ = lumen_clip.load_models(settings, daemon.engine, quiet)
    server, port = service.start_server(daemon, "127.0.0.1", 0)
    daemon.serve(models)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield daemon, models.clip, pb_grpc.InferenceStub(channel)
    server.stop(0).wait()
    daemon.intake.decoders.stop()
    daemon.engine.stop()


def photos(count: int) -> list[bytes]:
    colours = list(COLOURS.values())
    return [encoded(picture(colours[i % len(colours)], (64, 64), i), "PNG") for i in range(count)]


def embedded(stub: Any, files: list[bytes]) -> Any:
    """float32 `[n, dim]`, by one stream."""
    meta = {"lumen.output.kind": "tensor"}
    requests = [pb.InferRequest(task="clip_image_embed", payload=file, meta=meta) for file in files]
    responses = list(stub.Infer(iter(requests), timeout=LIMIT_S))
    assert not [response.error.message for response in responses if response.error.message]
    return np.stack([np.frombuffer(response.result, "<f4") for response in responses])


def expected_of(loaded: Any, files: list[bytes]) -> Any:
    """The same, each picture alone."""
    return np.concatenate([loaded.backend.encode_images(np.array(pixels_of(file))[None]) for file in files])


def agreement(backend: Any, exact: Any) -> float:
    """The worst cosine of two backends for pictures and texts that are none of the self-test's."""
    pixels = np.stack([pixels_of(file) for file in photos(6)])
    tokens = exact.tokenize(["a dog", "a landscape with two red houses and a river", "Vulpes vulpes"])
    images = backend.encode_images(pixels) * exact.encode_images(pixels)
    return float(np.concatenate([images, backend.encode_text(tokens) * exact.encode_text(tokens)]).sum(axis=1).min())


def with_large_activations(tiny: Path, folder: Path) -> Path:
    """The same model, but numbers in the image tower exceed the largest of float16."""
    shutil.copytree(tiny, folder)
    weights = torch.load(folder / "open_clip_pytorch_model.bin")
    for name in weights:
        if name.startswith("visual.") and "mlp.c_fc" in name:
            weights[name] *= 1e6  # GELU of it is nearly ReLU, which is linear in a factor
        elif name.startswith("visual.") and "mlp.c_proj.weight" in name:
            weights[name] /= 1e6
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.mark.parametrize("served", ["auto"], indirect=True)
def test_a_gpu_runs_in_half_precision_and_says_so(served: Any, tiny: Path) -> None:
    """Lost otherwise: half of the speed and of the memory of a card that nobody set anything for, or an operator who
    does not know what runs; and an index, if vectors of both precisions did not belong together."""
    _, loaded, stub = served
    exact = load(tiny, "torch", precision="fp32")
    capability = stub.GetCapabilities(Empty())
    assert list(capability.precisions) == ["fp16"] and 0.999 < float(capability.extra["clip_self_test"]) < 1
    assert loaded.backend.model.visual.conv1.weight.dtype == torch.float16
    assert capability.extra["clip_space"] == exact.space
    assert 0.9999 < agreement(loaded.backend, exact) < 1
    files = photos(20)
    assert (embedded(stub, files) * expected_of(loaded, files)).sum(axis=1).min() > 0.9999


def test_auto_is_fp32_on_a_cpu(tiny: Path) -> None:
    """Lost otherwise: the speed of a CPU, which converts half precision back and forth."""
    backend = load(tiny, "torch")
    assert (backend.precision, backend.self_test_cosine) == ("fp32", None)


def test_a_model_that_float16_is_too_small_for_runs_in_bfloat16_or_fp32(
    card: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost otherwise: right answers, or the start, with a model whose numbers are larger than those of float16; or the
    hours of a large label set, at each start."""
    folder = with_large_activations(tiny, tmp_path / "large")
    exact = load(folder, "torch", precision="fp32")
    backend = load(folder, "torch")
    assert backend.precision == "bf16" and backend.self_test_cosine > 0.999
    assert "fp16 is not used: self-test: ValueError: the model returned a vector that is not finite" in caplog.text
    assert 0.999 < agreement(backend, exact) < 1 and backend.space == exact.space
    names, encoded_texts = [f"thing number {i} of {i * i}" for i in range(64)], list[str]()

    def encode(texts: list[str]) -> Any:
        encoded_texts.extend(texts)
        return backend.encode_text(backend.tokenize(texts))

    recipe = labels.names_recipe(1)
    key = label_cache.CacheKey.of(names, recipe, "model", backend.dim)
    label_cache.cached_vectors(tmp_path / "cache", names, recipe, encode, key)
    encoded_texts.clear()
    label_cache.cached_vectors(tmp_path / "cache", names, recipe, encode, key)
    assert len(encoded_texts) == label_cache.PROBE_LABELS  # a later start does not compute them again
    monkeypatch.setattr(torch_backend, "HALF_FLOOR", 0.9999999)
    backend = load(folder, "torch")
    assert (backend.precision, backend.self_test_cosine) == ("fp32", None)
    assert re.search(r"bf16 is not used: self-test: cosine 0\.99\d+ to fp32; allowed: 0\.9999999 and more", caplog.text)
    assert agreement(backend, exact) > 0.999999


def test_a_gpu_is_tuned_up_to_256_images_and_a_cpu_is_not(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: most of a card, which needs more than the eight images that a core is best at; or the limit that
    an operator set, because the card is shared."""
    tried: list[int] = []

    def measured(_: Any, size: int) -> float:
        tried.append(size)
        return 0.01 + 0.0001 * size  # the larger, the faster

    monkeypatch.setattr(backends, "seconds_of_a_batch", measured)
    monkeypatch.setattr(Engine, "wait_for_a_pause", lambda engine, *_: None)

    def tuned(limit: int, folder: str, **environment: Any) -> tuple[int, int, int]:
        """The best sizes for images and texts, and the most that was tried."""
        tried.clear()
        settings = settings_of(clip_model=tiny, bioclip_backend="none", **environment)
        assert settings.clip.max_batch_size == limit
        backend = load(tiny, "torch")
        loaded = model.Model(backend, "clip", Engine(), settings.clip.max_batch_size or settings.batch_size)
        loaded.adapt(tmp_path / folder, Engine(), settings.clip.max_batch_size)
        wait_until(lambda: loaded.tuning is not None and loaded.text.batch_size >= loaded.image.batch_size)
        return loaded.image.batch_size, loaded.text.batch_size, max(tried)

    assert tuned(0, "cpu") == (8, 8, 8)
    monkeypatch.setattr(torch_device, "GPUS", ("cpu",))
    assert tuned(0, "gpu") == (256, 256, 256)
    assert tuned(16, "limited", batch_size=16) == (16, 16, 16)
    assert tuned(8, "as on a core", batch_size=8) == (8, 8, 8)
    assert tuned(64, "one model", batch_size=16, clip_max_batch_size=64) == (64, 64, 64)


def test_a_size_without_memory_is_left_out_of_the_tuning(
    card: None, tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost otherwise: the tuning of a small card, which would end with the first size that does not fit."""

    def measured(_: Any, size: int) -> float:
        if size > 32:
            raise MemoryError("CUDA out of memory")
        return 0.01 + 0.0001 * size

    backend = load(tiny, "torch")
    monkeypatch.setattr(backends, "seconds_of_a_batch", measured)
    assert backends._try_out(backend, 256, lambda: None).batch_size == 32
    assert "batches of 64 images fail (MemoryError: CUDA out of memory)" in caplog.text
    monkeypatch.setattr(backends, "seconds_of_a_batch", lambda backend, size: measured(backend, 64))
    with pytest.raises(MemoryError):  # not even one image fits
        backends._try_out(backend, 256, lambda: None)


def test_a_gpu_is_measured_by_the_time_that_passes(
    slow: type[Slow], card: None, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the right batch size, because a thread that waits for a card uses no core meanwhile."""
    backend = load(tiny, "torch")
    monkeypatch.setattr(Slow, "wait", lambda stream: time.sleep(0.3))
    assert backends.seconds_of_a_batch(backend, 1) >= 0.3


def test_a_batch_that_a_card_has_no_memory_for_is_halved_and_no_request_is_lost(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the photographs of an import on a card that another program shares, or its memory for good."""
    daemon, loaded, stub = served
    backend, sizes, alive_at_cleaning = loaded.backend, list[int](), list[int]()
    dropped: list[weakref.ref[Any]] = []  # activations of batches that failed
    gathered = threading.Event()
    files = photos(96)
    expected = expected_of(loaded, files)
    tower = backend.image_tower

    def with_little_memory(pixels: Any) -> Any:
        assert gathered.wait(LIMIT_S)
        sizes.append(len(pixels))
        layer = torch.zeros(len(pixels), 1000)
        if len(pixels) > 8:
            dropped.append(weakref.ref(layer))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return tower(pixels)

    def cleaned(_: Any) -> None:
        alive_at_cleaning.append(sum(layer() is not None for layer in dropped[-1:]))

    monkeypatch.setattr(backend, "image_tower", with_little_memory)
    monkeypatch.setattr(torch_device.Device, "empty_cache", cleaned)
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        answers = clients.map(lambda part: embedded(stub, part), [files[i::4] for i in range(4)])
        wait_until(lambda: queued(daemon, " image") > 64)
        gathered.set()
        found = np.concatenate(list(answers))
    assert np.allclose(found, np.concatenate([expected[i::4] for i in range(4)]), atol=1e-5)
    failed = [size for size in sizes if size > 8]
    assert max(failed) > 32 and alive_at_cleaning == [0] * len(
        failed
    )  # the cache is emptied when nothing is held any more
    assert loaded.image.size_limit() <= 8 and loaded.image.batch_size == 256  # remembered, for a while
    sizes.clear()
    assert np.allclose(embedded(stub, files), expected, atol=1e-5)
    assert max(sizes) <= 8 and not daemon.engine.failures["clip image"]


def test_a_stream_has_two_batches_of_a_gpu_in_progress(served: Any) -> None:
    """Lost otherwise: half of a card for one client with an import, because its stream is read no further."""
    daemon, loaded, stub = served
    at_once = 2 * 256 * loaded.backend.workers
    gate, began = threading.Event(), threading.Event()
    tower = loaded.backend.image_tower

    def held(pixels: Any) -> Any:
        began.set()
        assert gate.wait(LIMIT_S)
        return tower(pixels)

    loaded.backend.image_tower = held
    file = photos(1)[0]
    requests = [pb.InferRequest(task="clip_image_embed", payload=file) for _ in range(at_once + 100)]
    with concurrent.futures.ThreadPoolExecutor(1) as client:
        answers = client.submit(lambda: list(stub.Infer(iter(requests), timeout=LIMIT_S)))
        assert began.wait(LIMIT_S)
        [stream] = daemon.streams._streams
        wait_until(lambda: len(stream._in_progress) == at_once)
        assert queued(daemon, " image") <= at_once
        gate.set()
        assert len(answers.result()) == at_once + 100


def test_answers_are_right_and_in_order_with_two_batches_in_flight(slow: type[Slow], served: Any) -> None:
    """Lost otherwise: every answer that a client gets is that of another picture, as soon as two batches overlap."""
    _, loaded, stub = served
    backend, files, most = loaded.backend, photos(160), 0
    words = [f"a text about {i} things" for i in range(80)]
    expected = expected_of(loaded, files)
    expected_words = np.concatenate([backend.encode_text(backend.tokenize([word])) for word in words])
    slow.marks = slow.waits = 0
    encode_images, encode_text, batches = backend.encode_images, backend.encode_text, list[int]()

    def counted(encode: Any) -> Any:
        def run(batch: Any) -> Any:
            nonlocal most
            batches.append(len(batch))
            most = max(most, loaded.image.threads - loaded.image.pool.free)
            return encode(batch)

        return run

    backend.encode_images = backend.encode_single = counted(encode_images)
    backend.encode_text = counted(encode_text)

    def words_of(part: slice) -> Any:
        meta = {"lumen.output.kind": "tensor"}
        requests = [pb.InferRequest(task="clip_embed", payload=word.encode(), meta=meta) for word in words[part]]
        answers = list(stub.Infer(iter(requests), timeout=LIMIT_S))
        return np.stack([np.frombuffer(answer.result, "<f4") for answer in answers])

    parts = [slice(at, at + 20) for at in range(0, 160, 20)]
    with concurrent.futures.ThreadPoolExecutor(12) as clients:
        pictures = [clients.submit(embedded, stub, files[part]) for part in parts]
        texts = [clients.submit(words_of, part) for part in parts[:4]]
        found = np.concatenate([answer.result() for answer in pictures])
        found_words = np.concatenate([answer.result() for answer in texts])
    assert np.allclose(found, expected, atol=1e-5) and np.allclose(found_words, expected_words, atol=1e-5)
    assert most == 2 and len(batches) == slow.marks == slow.waits  # one wait for each batch
    assert {thread.name for thread in threading.enumerate()} >= {"clip image-0", "clip image-1"}


def test_neither_texts_nor_scores_wait_for_the_images_of_a_gpu(served: Any) -> None:
    """Lost otherwise: searches during an import, and the card, which would wait for the scores of the last batch."""
    daemon, loaded, stub = served
    tower, gate, inside = loaded.backend.image_tower, threading.Event(), threading.Semaphore(0)
    stage = daemon._models.scoring["classes"]
    score, scoring, scored = stage.run, threading.Event(), threading.Event()

    def held(pixels: Any) -> Any:
        inside.release()
        assert gate.wait(LIMIT_S)
        return tower(pixels)

    def held_scores(items: Any) -> Any:
        scoring.set()
        assert scored.wait(LIMIT_S)
        return score(items)

    stage.run = held_scores
    first, second, third, fourth = photos(4)
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        classified = clients.submit(stub.Infer, iter([pb.InferRequest(task="clip_classify", payload=first)]))
        assert scoring.wait(LIMIT_S)
        assert embedded(stub, [second]).shape == (1, 64)  # while the thread for scores is busy
        scored.set()
        [answer] = classified.result()
        assert answer.result
        loaded.backend.image_tower = held
        images = []
        for number, file in enumerate((third, fourth)):
            images.append(clients.submit(embedded, stub, [file]))
            assert inside.acquire(timeout=LIMIT_S) and loaded.image.pool.free == 1 - number
        response = next(stub.Infer(iter([pb.InferRequest(task="clip_embed", payload=b"a dog")]), timeout=LIMIT_S))
        assert response.result and not any(image.done() for image in images)
        gate.set()
        assert all(image.result().shape == (1, 64) for image in images)


@pytest.mark.parametrize("urgent", [False, True])
def test_a_cuda_stream_uses_torch_as_it_is_declared(urgent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: every start on a card, by a misspelt argument that no CPU ever sees."""
    calls, names = mock.Mock(), ("Stream", "Event", "stream")
    for name in names:  # they refuse arguments that the real ones do not take
        made = mock.create_autospec(getattr(torch.cuda, name))
        calls.attach_mock(made, name)
        monkeypatch.setattr(torch.cuda, name, made)
    stream = torch_device.CudaStream(torch.device("cuda:1"), urgent)
    assert stream.entered() is calls.stream.return_value
    stream.record()
    stream.wait()
    own = calls.Stream.return_value
    assert calls.mock_calls == [
        mock.call.Stream(torch.device("cuda:1"), priority=-1 if urgent else 0),
        mock.call.Event(blocking=True),
        mock.call.stream(own),
        mock.call.Event().record(own),
        mock.call.Event().synchronize(),
    ]


def test_an_engine_ends_the_threads_of_a_gpu() -> None:
    """Lost otherwise: a daemon that does not stop, or a hang of a card that nobody notices."""
    made, release, began = Engine(workers=1), threading.Event(), threading.Event()

    def hang(items: list[Any]) -> list[Any]:
        began.set()
        assert release.wait(LIMIT_S)
        return items

    stage = made.add(Stage("image", hang, 4, Stage.BULK, threads=2))
    made.start()
    assert made.is_alive() and made.busy_since is None
    job = submitted(made, stage)
    assert began.wait(LIMIT_S) and made.busy_since is not None
    release.set()
    assert job.answer.result(LIMIT_S)
    made.stop()
    assert not any(thread.is_alive() for thread in made._threads) and not made.is_alive()


@pytest.mark.parametrize("rows", ["on the card", "on the CPU"])
def test_a_gpu_gives_the_answers_of_a_cpu(rows: str, tiny: Path, torch_node: Node, tmp_path: Path) -> None:
    """Lost otherwise: the right answers of the tasks, which nobody compares on a card."""
    constants = {"torch_device.GPUS": ["cpu"], "torch_device.ROWS_SHARE": 10 if rows == "on the card" else 1 << 60}
    settings = {"CLIP_MODEL": tiny, "BIOCLIP_MODEL": tiny, "CLIP_PRECISION": "fp32", "BIOCLIP_PRECISION": "fp32"}
    card = Node(
        write_labels(tmp_path / "data"), **settings, LUMEN_JPEG_DRAFT=0, **impatient(tmp_path, constants)
    ).ready()
    try:
        extra = card.stub.GetCapabilities(Empty()).extra
        assert extra["clip_lanes"] == extra["bioclip_lanes"] == "2"
        for file in photos(4):
            for task, meta in (
                ("clip_classify", {"topk": "20"}),
                ("smart_classify", {}),
                ("bioclip_classify", {"topk": "50"}),
                ("bioclip_classify", {"topk": "3", "rank": "family"}),
                ("bioclip_classify", {"topk": "9", "rank": "auto", "within": '["Animalia"]'}),
                ("bioclip_image_embed", {}),
            ):
                here, there = (node.result(task, file, **meta) for node in (card, torch_node))
                if "vector" in here:
                    assert np.allclose(here["vector"], there["vector"], atol=1e-5)
                    continue
                scores = [{row["label"]: row["score"] for row in answer["labels"]} for answer in (here, there)]
                assert scores[0] == pytest.approx(scores[1], abs=1e-4) and scores[0], task
    finally:
        assert card.stop() == 0, card.log
