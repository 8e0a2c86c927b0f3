"""Speed, and models of true size."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty
from PIL import Image

import backends
import bench_load
import bench_simulation
import engine
import machine
import onnx_backend
import service
import torch_backend
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from settings import ModelOptions
from tests.kit import (
    COLOURS,
    LIMIT_S,
    RED,
    ROOT,
    Node,
    encoded,
    load,
    one,
    picture,
    pixels_of,
    reference_vectors,
    resident_mb,
    settings_of,
    submitted,
    wait_until,
    write_labels,
)

# --- speed ---------------------------------------------------------------------------------------------------------


def test_the_last_block_computes_the_one_token_that_is_read(tiny: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: the time of most of a block, of twelve, for tokens that nobody looks at."""
    import onnx

    options = ModelOptions("CLIP", "torch", str(tiny), tmp_path)
    backend = torch_backend.TorchBackend(options)
    shapes: list[Any] = []
    for block in backend.model.visual.transformer.resblocks:
        block.mlp.register_forward_hook(lambda _module, _given, made: shapes.append(tuple(made.shape[:2])))
    backend.encode_images(np.stack([pixels_of(encoded(picture(RED)))]))
    assert shapes[-1] == (1, 1) and all(tokens > 1 for _, tokens in shapes[:-1])
    # In the export, nothing that hangs on weights alone is left to be computed for each picture.
    graph = onnx.load(tiny_onnx / "visual" / "model.onnx").graph
    weights = {tensor.name for tensor in graph.initializer}
    assert not [node.op_type for node in graph.node if set(node.input) <= weights]


def test_a_picture_has_one_vector_however_it_is_run(tiny: Path, tiny_onnx: Path, tiny_immich: Path) -> None:
    """Lost otherwise: vectors that depend on how many pictures came along, or on how a machine was tuned."""
    pixels = np.stack([pixels_of(encoded(picture(c))) for c in [*COLOURS.values(), *COLOURS.values()]][:7])
    torch = torch_backend.TorchBackend(ModelOptions("CLIP", "torch", str(tiny), tiny))
    for backend in (load(tiny_onnx), load(tiny_immich), torch):
        with concurrent.futures.ThreadPoolExecutor(backend.workers) as workers:  # at once
            found = list(workers.map(backend.encode_images, [pixels] * backend.workers))
        found.append(np.concatenate([backend.encode_single(row[None]) for row in pixels]))
        backend.prepare_single()
        assert backend.single_image_cores == machine.usable_cores()
        found.append(np.concatenate([backend.encode_single(row[None]) for row in pixels]))
        alone = np.concatenate([backend.encode_images(row[None]) for row in pixels])
        assert all(vectors.shape == (7, backend.dim) and np.allclose(vectors, alone, atol=1e-5) for vectors in found)


@pytest.mark.skipif(machine.usable_cores() < 2, reason="needs two cores")
def test_a_board_with_little_memory_keeps_one_session(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost otherwise: the memory of a small board, for a single picture that would be faster."""
    backend = load(tiny_onnx)
    size = (tiny_onnx / "visual" / "model.onnx").stat().st_size
    monkeypatch.setattr(onnx_backend, "memory", lambda: (11 * size, 0))
    with caplog.at_level("INFO", "lumen"):
        backend.prepare_single()
    assert backend.single_image_cores == 1 and "a single picture runs on one core: " in caplog.text
    monkeypatch.setattr(onnx_backend, "memory", lambda: (13 * size, 0))
    backend.prepare_single()
    assert backend.single_image_cores == machine.usable_cores()


@pytest.mark.skipif(machine.usable_cores() < 2, reason="needs two cores")
@pytest.mark.parametrize("watched", ["workers"], indirect=True)
def test_a_text_does_not_wait_for_the_pictures_of_an_import(watched: Any) -> None:
    """Lost otherwise: a search that stutters whenever a phone uploads; and the core that waits for the others."""
    backend, stub = watched
    workers = machine.usable_cores()
    photos = [encoded(picture(RED, seed=i), "PNG") for i in range(40)]
    photos[20] = encoded(Image.new("RGB", (300, 300), "white"), "PNG")
    backend.text_gate = threading.Event()  # open, whatever pictures do
    backend.text_gate.set()
    backend.gate.clear()
    bulk = (pb.InferRequest(task="clip_image_embed", payload=photo) for photo in photos)
    with concurrent.futures.ThreadPoolExecutor(1) as clients:
        imported = clients.submit(lambda: list(stub.Infer(bulk, timeout=LIMIT_S)))
        wait_until(lambda: [kind for kind, _ in backend.batches].count("image") == workers)  # each core has its own
        for i in range(3):
            assert one(stub, "clip_embed", f"dog {i}".encode()).result
        time.sleep(0.3)
        assert [kind for kind, _ in backend.batches].count("image") == workers  # and no more than that
        assert backend.daemon.engine.busy_since is not None
        backend.gate.set()
        answers = imported.result()
    assert [bool(answer.result) for answer in answers] == [i != 20 for i in range(40)]
    assert max(count for kind, count in backend.batches if kind == "image") == 8
    wait_until(lambda: backend.daemon.engine.busy_since is None)


def test_decode_threads_follow_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: a large machine with a GPU, which would wait for four threads that decode."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 12)
    daemon = service.Daemon(settings_of(lumen_data_dir=tmp_path))
    try:
        assert len(daemon.intake.decoders._threads) == 12
    finally:
        daemon.intake.decoders.stop()


def test_a_single_picture_runs_on_all_cores_and_others_on_a_core_each() -> None:
    """Lost otherwise: half the speed of an app that sends one picture at a time, or an import that waits for it."""
    runs: list[tuple[str, int]] = []
    gate = threading.Event()

    def on_a_core(items: list[Any]) -> list[Any]:
        runs.append(("core", len(items)))
        return items

    def on_all_cores(items: list[Any]) -> list[Any]:
        runs.append(("all", len(items)))
        assert gate.wait(LIMIT_S)
        return items

    made = engine.Engine(workers=2)
    stage = engine.Stage("image", on_a_core, 8, engine.Stage.BULK, spread=True, run_single=on_all_cores)
    made.add(stage)
    made.start()

    def ask() -> engine.Job:
        job = engine.Job("", "", 0)
        made.expect(job)
        return submitted(made, stage, job)

    first = ask()
    wait_until(lambda: runs == [("all", 1)])
    others = [ask() for _ in range(3)]
    assert all(job.answer.result(LIMIT_S) for job in others) and not first.answer.done()
    gate.set()
    first.answer.result(LIMIT_S)
    assert runs[0] == ("all", 1) and sum(count for kind, count in runs if kind == "core") == 3
    runs.clear()
    decoding = engine.Job("", "", 0)
    made.expect(decoding)  # another request is being decoded
    ask().answer.result(LIMIT_S)
    decoding.answer.cancel()
    wait_until(lambda: made._expected == 0)
    for core_seconds in (60.0, 0.0):  # two clients that take turns do not get all cores in turns
        stage.cost = core_seconds
        ask().answer.result(LIMIT_S)
        wait_until(lambda: made._expected == 0)
    assert runs == [("core", 1), ("core", 1), ("all", 1)]
    made.stop()


def test_pictures_are_shared_out_among_the_cores_that_are_free() -> None:
    """Lost otherwise: half a machine, while the other half works on a batch of eight."""
    sizes: list[int] = []
    gate = threading.Event()

    def held(items: list[Any]) -> list[Any]:
        sizes.append(len(items))
        assert gate.wait(LIMIT_S)
        return items

    made = engine.Engine(workers=4)
    stage = made.add(engine.Stage("image", held, 8, engine.Stage.BULK, spread=True))
    jobs = [submitted(made, stage) for _ in range(20)]
    for job in jobs:
        made.expect(job)
    made.start()
    wait_until(lambda: len(sizes) == 4)
    assert sizes == [5, 5, 5, 5]
    gate.set()
    assert all(job.answer.result(LIMIT_S).content == b"1" for job in jobs)
    made.stop()


def test_the_last_free_worker_waits_for_its_share_while_a_core_decodes() -> None:
    """Lost otherwise: full batches when a few apps have one request each, or a picture that waits for files of others
    that take long to decode or are no pictures."""
    sizes: list[int] = []
    gate = threading.Event()

    def run(items: list[Any]) -> list[Any]:
        sizes.append(len(items))
        assert len(sizes) > 1 or gate.wait(LIMIT_S)  # the first batch occupies a worker
        return items

    decoding = 1
    made = engine.Engine(workers=2, decoding=lambda: decoding)
    stage = made.add(engine.Stage("image", run, 8, engine.Stage.BULK, spread=True))
    made.start()

    def expected() -> engine.Job:
        job = engine.Job("", "", 0)
        made.expect(job)
        return job

    jobs = [expected() for _ in range(6)]
    submitted(made, stage, jobs[0])
    wait_until(lambda: sizes == [1])  # while both are free, none waits
    stage.cost = LIMIT_S
    submitted(made, stage, jobs[1])
    submitted(made, stage, jobs[2])
    time.sleep(0.2)
    assert sizes == [1]
    submitted(made, stage, jobs[3])
    assert all(job.answer.result(LIMIT_S) for job in jobs[1:4])
    assert sizes == [1, 3]
    stage.cost, others = 0.3, [expected() for _ in range(8)]
    began = time.monotonic()
    submitted(made, stage, jobs[4]).answer.result(LIMIT_S)
    assert time.monotonic() - began >= 0.3
    stage.cost, decoding = 2 * LIMIT_S, 0  # and no client was answered just now
    time.sleep(0.1)
    submitted(made, stage, others.pop()).answer.result(LIMIT_S)
    gate.set()
    jobs[0].answer.result(LIMIT_S)
    made.stop()


def test_the_next_texts_run_while_many_clients_are_answered() -> None:
    """Lost otherwise: 10 ms after each batch for 64 clients, in which nothing is computed; one text in twenty."""
    sizes: list[int] = []
    went_on: list[bool] = []

    def run(items: list[Any]) -> list[Any]:
        sizes.append(len(items))
        return items

    def told(_: Any) -> None:
        until = time.monotonic() + LIMIT_S
        while len(sizes) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        went_on.append(len(sizes) >= 2)

    made = engine.Engine()
    stage = made.add(engine.Stage("text", run, 2, engine.Stage.TEXT))
    jobs = [submitted(made, stage) for _ in range(3)]
    jobs[0].answer.add_done_callback(told)
    made.start()
    assert all(job.answer.result(LIMIT_S).content == b"1" for job in jobs)
    assert went_on == [True] and sizes == [2, 1]
    made.stop()


def test_labels_get_their_turn_beside_texts_and_an_import() -> None:
    """Lost otherwise: a caller's own labels, and new label sets, for as long as others search and import."""
    ran: list[str] = []
    photos = threading.Semaphore(0)

    def texts(items: list[Any]) -> list[Any]:
        ran.append("text")
        assert photos.acquire(timeout=LIMIT_S) and photos.acquire(
            timeout=LIMIT_S
        )  # so long that a worker begins another
        return items

    def prompts(items: list[Any]) -> list[Any]:
        ran.append("prompts")
        return items

    def images(items: list[Any]) -> list[Any]:
        time.sleep(0.01)
        photos.release()
        return items

    made = engine.Engine(workers=1)
    text_stage = made.add(engine.Stage("text", texts, 1, engine.Stage.TEXT))
    prompt_stage = made.add(engine.Stage("prompts", prompts, 1, engine.Stage.BULK))
    image_stage = made.add(engine.Stage("image", images, 1, engine.Stage.BULK, spread=True))
    jobs = [submitted(made, stage) for stage in [text_stage] * 5 + [image_stage] * 30 + [prompt_stage]]
    made.start()
    assert all(job.answer.result(LIMIT_S).content == b"1" for job in jobs)
    assert ran == ["text", "prompts", *["text"] * 4]
    made.stop()


def test_the_engine_ends_when_it_is_told_to() -> None:
    """Lost otherwise: a stop that leaves a model at work, which the end of the process then crashes in."""
    began, ended = threading.Event(), threading.Event()

    def run(items: list[Any]) -> list[Any]:
        began.set()
        time.sleep(0.3)
        ended.set()
        return items

    made = engine.Engine(workers=2)
    submitted(made, made.add(engine.Stage("text", run, 1, engine.Stage.TEXT)))
    made.start()
    assert began.wait(LIMIT_S)
    made.stop()
    assert ended.is_set() and not any(thread.is_alive() for thread in made._threads)


def test_the_engine_tells_of_a_step_that_hangs_as_of_a_batch() -> None:
    """Lost otherwise: a daemon that answers nobody, calls itself well, and is never started again."""
    release = threading.Event()
    made = engine.Engine()
    stage = made.add(engine.Stage("text", lambda items: items, 1, engine.Stage.TEXT))
    job = submitted(made, stage)
    job.answer.add_done_callback(lambda _: release.wait(LIMIT_S))
    made.start()
    assert job.answer.result(LIMIT_S)
    time.sleep(0.1)  # nothing runs any more, but the engine has not gone on
    assert made.busy_since is not None
    release.set()
    wait_until(lambda: made.busy_since is None)
    made.stop()


def at_once() -> None:
    """The pause of a machine without requests."""


def test_a_machine_is_tuned_once_for_a_model_and_its_versions(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: seconds at every start, or a batch that was right for another machine."""
    backend = load(tiny_onnx)
    assert backends.kept_tuning(backend, 4, tmp_path) is None
    pauses: list[bool] = []
    first = backends.tune(backend, 4, tmp_path, lambda: pauses.append(True))
    assert 1 <= first.batch_size <= 4 and first.images_per_s > 0 and len(pauses) >= 2
    assert backends.kept_tuning(backend, 4, tmp_path) == first
    assert backends.kept_tuning(backend, 2, tmp_path) is None
    monkeypatch.setattr(backends, "_versions", lambda: ["onnxruntime 99"])
    assert backends.kept_tuning(backend, 4, tmp_path) is None
    monkeypatch.setattr(backends, "seconds_of_a_batch", lambda _, size: {1: 0.1, 2: 0.12}[size])
    assert backends.tune(backend, 2, tmp_path, at_once).batch_size == 2
    (tmp_path / "tuning.json").write_text("{")
    assert backends.kept_tuning(backend, 2, tmp_path) is None


def test_a_new_gpu_precision_or_runtime_is_tuned_anew(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the speed of a faster card, for which the batch of the previous one is kept for good."""
    backend = load(tiny_onnx)
    installed = {"onnxruntime": "1.32.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    def tuned_anew() -> bool:
        if backends.kept_tuning(backend, 2, tmp_path):
            return False
        backends.tune(backend, 2, tmp_path, at_once)
        return True

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(backends, "seconds_of_a_batch", lambda *_: 0.1)
    assert tuned_anew() and not tuned_anew()
    for name, value in (
        ("accelerator", "NVIDIA GeForce GTX 1060"),
        ("accelerator", "NVIDIA GeForce RTX 4090"),
        ("precision", "fp16"),
        ("runtime", "onnxrt-cuda"),
    ):
        monkeypatch.setattr(backend, name, value, raising=False)
        assert tuned_anew() and not tuned_anew(), name
    for changed in ({"onnxruntime-gpu": "1.24.0"}, {"onnxruntime-gpu": "1.25.0"}, {"onnxruntime": "1.33.0"}):
        installed.update(changed)
        assert tuned_anew() and not tuned_anew(), changed


def test_a_gpu_is_named_without_torch(tmp_path: Path) -> None:
    """Lost otherwise: a box with ONNX Runtime alone, on which a new card is taken for the old one."""
    assert machine.nvidia_gpus(tmp_path / "absent") == ""
    for bus, model in (("0000:41:00.0", "NVIDIA H100 80GB HBM3"), ("0000:01:00.0", "NVIDIA GeForce GTX 1060 6GB")):
        (tmp_path / bus).mkdir()
        text = f"Model: \t\t {model}\nIRQ:   \t\t 166\nGPU UUID: \t GPU-1:2\nDevice Minor: \t 0\n"
        (tmp_path / bus / "information").write_text(text)
    assert machine.nvidia_gpus(tmp_path) == "NVIDIA GeForce GTX 1060 6GB, NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("seconds", "size"),
    [
        ({1: [0.1], 2: [0.15], 4: [0.2]}, 4),
        ({1: [0.2], 2: [0.24], 4: [0.36]}, 2),  # which is longer than a text shall wait
        ({1: [0.3], 2: [0.5], 4: [0.1]}, 1),  # and no larger one is tried
        ({1: [0.1], 2: [3, 0.12], 4: [0.7]}, 2),  # another program was busy for a while
        ({1: [0.1], 2: [0.3, 0.3, 0.12], 4: [0.7]}, 2),
        ({1: [0.3], 2: [0.34, 0.34, 0.4], 4: [0.7]}, 1),  # and for once it was not
    ],
)
def test_a_tuning_holds_whatever_the_machine_did_for_a_moment(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, list[float]], size: int
) -> None:
    """Lost otherwise: a third of the speed for good, or seconds of each search, for what was a hiccup at one start."""
    backend = load(tiny_onnx)
    left = {of: list(times) for of, times in seconds.items()}  # the last stays

    def measured(_: Any, size: int) -> float:
        return left[size].pop(0) if len(left[size]) > 1 else left[size][0]

    monkeypatch.setattr(backends, "usable_cores", lambda: 2)  # or other sizes are tried as well
    monkeypatch.setattr(backend, "workers", 1)
    monkeypatch.setattr(backends, "seconds_of_a_batch", measured)
    assert backends._try_out(backend, 4, at_once).batch_size == size


def test_a_slow_board_is_not_kept_at_its_tuning(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: minutes of a first start, for sizes that are too long whatever comes of it."""
    backend = load(tiny_onnx)
    tried: list[int] = []

    def measured(_: Any, size: int) -> float:
        tried.append(size)
        return 5.0

    monkeypatch.setattr(backend, "workers", 1)
    monkeypatch.setattr(backends, "seconds_of_a_batch", measured)
    assert backends._try_out(backend, 4, at_once).batch_size == 1 and tried == [1, 1]


def test_the_capability_says_how_fast_this_machine_is(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: an app that cannot tell its user how long an import will take."""
    data = write_labels(tmp_path)
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none", "LUMEN_TUNE": "1"}
    node = Node(data, **settings).ready()
    try:
        wait_until(lambda: "clip_images_per_s" in node.stub.GetCapabilities(Empty()).extra, 60)
        extra = node.stub.GetCapabilities(Empty()).extra
        assert float(extra["clip_images_per_s"]) > 0 and 1 <= int(extra["clip_batch_size"]) <= 8
        assert int(extra["clip_single_image_cores"]) == machine.usable_cores()
        assert node.log.index("ready: ") < node.log.index("images a second")  # nobody waits for the tuning
        assert (data / "clip" / "onnxrt" / "tiny" / "tuning.json").is_file()
    finally:
        assert node.stop() == 0


def test_bench_measures_the_daemon_and_its_limits(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: the figures of docs/performance.md, which nobody could check."""
    common = ["--model", str(tiny_onnx), "--data-dir", str(tmp_path)]
    (tmp_path / "photos").mkdir()
    for i in range(3):
        picture(RED, (900, 700), i).save(tmp_path / "photos" / f"{i}.jpg")

    def measured(*options: str) -> str:
        for seconds in ("0.4", "4", "40"):  # a busy machine may answer nothing in less
            command = [sys.executable, str(ROOT / "bench.py"), *common, "--seconds", seconds, *options]
            run = subprocess.run(command, capture_output=True, text=True)
            if "set a longer time with --seconds" not in run.stderr:
                break
        assert run.returncode == 0, run.stderr
        return run.stdout

    said = measured("--cases", "640,mixed", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"))
    content = json.loads((tmp_path / "b.json").read_text())
    assert [(row["case"], row["clients"]) for row in content["rows"]] == [
        (case, clients) for case in ("640 px JPEG", "mixed") for clients in (1, 8, 64)
    ]
    assert all(row["per_s"] > 0 and row["cores_per_s"] > 0 and row["memory_mb"] > 50 for row in content["rows"])
    assert all(row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in content["rows"])
    assert [(row["case"], row["clients"]) for row in content["few"]] == [("640 px JPEG", n) for n in (1, 2, 4, 8)]
    assert all(row["per_s"] > 0 and row["ways_per_s"] > 0 for row in content["few"])
    assert content["rows"][0]["model_per_s"] > 0 and "Health during all cases: p99" in said
    assert Image.open(tmp_path / "b.png").size[0] == 1000
    assert re.search(
        r"3 pictures .* 0 not readable: .* 40,000 photos in about", measured("--photos", str(tmp_path / "photos"))
    )


class _HoldsPictures(pb_grpc.InferenceServicer):  # type: ignore[misc]
    """Answers texts at once and pictures when it may, as a daemon with many pictures does."""

    def __init__(self) -> None:
        self.held: list[bytes] = []
        self.release = threading.Event()

    def Infer(self, requests: Iterator[pb.InferRequest], _: Any) -> Iterator[pb.InferResponse]:
        for request in requests:
            if request.task == "clip_image_embed":
                self.held.append(request.payload)
                assert self.release.wait(LIMIT_S)
            yield pb.InferResponse(is_final=True)


def test_the_bench_simulates_cores_that_the_machine_does_not_have(tmp_path: Path) -> None:
    """Lost otherwise: what a large machine could do, for somebody who is about to buy one."""
    points = bench_simulation.measure(3, (0.005, 0.045), 4, tmp_path)
    assert [point["cores"] for point in points] == [1, 2, 3]
    for point in points:  # ten times less than without the sleep; answers that were held up may fall into the window
        assert 0 < point["per_s"] < 2 * point["ideal_per_s"] and point["core_ms"] > 0
    bench_simulation.plot(points, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (1000, 130)


def test_many_clients_of_the_bench_ask_for_the_mix_that_one_does() -> None:
    """Lost otherwise: a daemon that seems slower for 64 clients, who ask for larger pictures and fewer texts."""
    cases = [bench_load.Case("large", "clip_image_embed", b"large")] * 5
    cases += [bench_load.Case("small", "clip_image_embed", b"small")]
    cases += [bench_load.Case("text", "clip_embed", b"dog {}")] * 2
    holding = _HoldsPictures()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(64))
    pb_grpc.add_InferenceServicer_to_server(holding, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        clients = bench_load.Clients(address, cases, 64)
        wait_until(lambda: len(holding.held) == 64)
        small = holding.held.count(b"small")
        holding.release.set()
        assert len(clients.stop()) >= 64
        assert small in (10, 11)  # a sixth
    finally:
        holding.release.set()
        server.stop(None).wait()


# --- true size -----------------------------------------------------------------------------------------------------


def photographs() -> list[Path]:
    """Real ones: Debian's wallpapers, where they are installed."""
    folders = Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers")
    return [path for folder in folders for path in sorted(folder.rglob("*.jpg"))]


@pytest.mark.big
def test_true_size_backends_agree_with_openclip(big: Path, tmp_path: Path) -> None:
    """Lost otherwise: the right to compare our vectors with OpenCLIP's, at the size that people run."""
    import open_clip

    weights = str(big / "seeded.pt")
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", pretrained=weights)
    reference = model.eval(), transform, open_clip.get_tokenizer("ViT-B-32")
    pictures = [
        picture(c, size, i)
        for i, (c, size) in enumerate(zip(COLOURS.values(), [(1200, 800), (640, 480), (333, 999)] * 2, strict=True))
    ]
    pictures += [Image.open(path) for path in photographs()[:4]]
    texts = ["a red bicycle", "x", "“It’s” a café", "word " * 200]
    expected = reference_vectors(reference, pictures=pictures), reference_vectors(reference, texts=texts)
    pixels = np.stack([pixels_of(encoded(p.convert("RGB"), "PNG")) for p in pictures])
    for options in (("torch", f"ViT-B-32:{weights}"), ("onnxrt", str(big / "onnx"))):
        backend = backends.create_backend(ModelOptions("CLIP", *options, tmp_path))
        assert backend.dim == 512
        assert (np.sum(backend.encode_images(pixels) * expected[0], axis=1) > 0.9999).all()
        assert (np.sum(backend.encode_text(backend.tokenize(texts)) * expected[1], axis=1) > 0.9999).all()


@pytest.mark.big
def test_int8_fits_a_small_board(big: Path, tmp_path: Path) -> None:
    """Lost otherwise: the boards with 1 GB. Prints figures of docs/performance.md: pytest -s -m big -k small_board"""
    data, photo = write_labels(tmp_path), encoded(picture(RED, (1600, 1200)))
    resident = {}
    for kind, backend, model in (
        ("torch", "torch", f"ViT-B-32:{big / 'seeded.pt'}"),
        ("fp32", "onnxrt", big / "onnx"),
        ("int8", "onnxrt", big / "int8"),
    ):
        settings = {"CLIP_BACKEND": backend, "CLIP_MODEL": model, "BIOCLIP_BACKEND": "none"}
        Node(data, **settings).ready().stop()  # computes and keeps the vectors of ImageNet's labels
        started = time.monotonic()
        node = Node(data, **settings).ready()
        ready = time.monotonic() - started
        try:
            asked = [
                pb.InferRequest(task="clip_image_embed", payload=photo),
                pb.InferRequest(task="clip_embed", payload=b"a dog"),
            ]
            assert all(not response.error.message for response in node.infer(*asked * 20))
            resident[kind] = resident_mb(node)
        finally:
            assert node.stop() == 0
        print(f"\n{kind}: {resident[kind]:.0f} MB resident, {ready:.1f} s from start to ready")
    assert resident["int8"] < 350 < resident["fp32"] < resident["torch"]


@pytest.mark.big
def test_scaled_decode_on_real_photographs(big: Path, tmp_path: Path) -> None:
    """Lost otherwise: the right to decode at a fraction. Prints its cosines: pytest -s -m big -k real_photographs"""
    paths = [path for path in photographs() if min(Image.open(path).size) >= 1000]
    if not paths:
        pytest.skip("no real photographs here; Debian's gnome-backgrounds and plasma-workspace-wallpapers have some")
    backend = backends.create_backend(ModelOptions("CLIP", "onnxrt", str(big / "onnx"), tmp_path))
    cosines = []
    for path in paths[:40]:
        full, draft = (backend.encode_images(pixels_of(path.read_bytes(), draft)[None])[0] for draft in (False, True))
        cosines.append(float(full @ draft))
    print(f"\n{len(cosines)} photographs: mean cosine {np.mean(cosines):.6f}, worst {min(cosines):.6f}")
    assert min(cosines) > 0.995
