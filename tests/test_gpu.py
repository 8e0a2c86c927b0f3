"""The daemon on a GPU, with torch's CPU in its place (`torch_device.GPUS`). No card is needed, and none was used."""

from __future__ import annotations

import concurrent.futures
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import backends
import lumen_clip
import model
import service
import torch_device
from engine import Engine
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from model_files import quiet
from tests.kit import COLOURS, LIMIT_S, encoded, load, picture, pixels_of, queued, settings_of, wait_until, write_labels


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a GPU."""
    monkeypatch.setattr(torch_device, "GPUS", ("cpu",))


@pytest.fixture
def served(card: None, tiny: Path, tmp_path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """(daemon, CLIP's `Model`, stub) of a daemon in this process, on a real socket, with batches of up to 256."""
    settings = settings_of(
        lumen_data_dir=write_labels(tmp_path),
        bioclip_backend="none",
        clip_model=tiny,
        clip_templates=1,
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
    return np.concatenate([loaded.backend.encode_images(pixels_of(file)[None]) for file in files])


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
    monkeypatch.setattr(Engine, "wait_for_a_pause", lambda engine: None)

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


def test_a_batch_that_a_card_has_no_memory_for_is_halved_and_no_request_is_lost(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the photographs of an import on a card that another program shares, or its memory for good."""
    daemon, loaded, stub = served
    backend, sizes, alive_at_cleaning = loaded.backend, list[int](), list[int]()
    activations: list[weakref.ref[Any]] = []
    files = photos(96)
    expected = expected_of(loaded, files)
    tower = backend.image_tower

    def with_little_memory(pixels: Any) -> Any:
        sizes.append(len(pixels))
        layer = torch.zeros(len(pixels), 1000)
        activations.append(weakref.ref(layer))
        if len(pixels) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return tower(pixels)

    def cleaned(_: Any) -> None:
        alive_at_cleaning.append(sum(layer() is not None for layer in activations))

    monkeypatch.setattr(backend, "image_tower", with_little_memory)
    monkeypatch.setattr(torch_device.Device, "empty_cache", cleaned)
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        found = np.concatenate(list(clients.map(lambda part: embedded(stub, part), [files[i::4] for i in range(4)])))
    assert np.allclose(found, np.concatenate([expected[i::4] for i in range(4)]), atol=1e-5)
    failed = [size for size in sizes if size > 8]
    assert failed and alive_at_cleaning == [0] * len(failed)  # the cache is emptied when nothing is held any more
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
