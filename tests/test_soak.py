"""Half an hour of everything at once, and what the daemon is like after it."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import threading
import time
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest

from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.hostile import INFER, PATIENCE, RawPeer, held, impatient, mutants, poisons, threads_and_files
from tests.kit import COLOURS, Node, encoded, picture, resident_mb, write_labels


class Load:
    """Three honest clients, one with damaged pictures, and a vandal."""

    def __init__(self, node: Node, seed: int) -> None:
        self.node, self.seed, self.over = node, seed, threading.Event()
        self.counts, self.wrong = collections.Counter[str](), list[str]()
        self.photos = [encoded(picture(c, (640, 480))) for c in COLOURS.values()]
        self.texts = [f"a photo of thing {i}".encode() for i in range(200)]
        self.expected = {asked: node.result(self.task(asked), asked)["vector"] for asked in self.photos + self.texts}

    def task(self, asked: bytes) -> str:
        return "clip_image_embed" if asked in self.photos else "clip_embed"

    def for_seconds(self, seconds: float) -> None:
        self.over.clear()
        works = [*(partial(self.honest, i) for i in range(3)), self.poisoner, self.vandal]
        threads = [threading.Thread(target=work) for work in works]
        for thread in threads:
            thread.start()
        self.over.wait(seconds)
        self.over.set()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()

    def honest(self, number: int) -> None:
        rng = np.random.default_rng([self.seed, number])
        with grpc.insecure_channel(self.node.address) as channel:
            stub = pb_grpc.InferenceStub(channel)
            while not self.over.is_set():
                asked = [self.photos[int(rng.integers(len(self.photos)))] for _ in range(int(rng.integers(1, 12)))]
                asked += [self.texts[int(rng.integers(len(self.texts)))] for _ in range(int(rng.integers(1, 12)))]
                requests = [pb.InferRequest(task=self.task(payload), payload=payload) for payload in asked]
                try:
                    responses = list(stub.Infer(iter(requests), timeout=60))
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:  # which is an answer under such load
                        self.wrong.append(f"{error.code()}: {error.details()}")
                    self.counts["told to come later"] += 1
                    time.sleep(0.2)
                    continue
                for payload, response in zip(asked, responses, strict=True):
                    self.counts["right"] += 1
                    if not np.allclose(json.loads(response.result)["vector"], self.expected[payload], atol=1e-5):
                        self.wrong.append("another vector")

    def poisoner(self) -> None:
        specials = list(poisons().values())
        for number in itertools.count():
            part = [*mutants(60, self.seed * 1000 + number), specials[number % len(specials)]]
            requests = (pb.InferRequest(task="clip_image_embed", payload=data) for data in part)
            with contextlib.suppress(grpc.RpcError):
                for response in self.node.stub.Infer(requests, timeout=60):
                    self.counts["poisoned"] += 1
                    if response.error.code not in (0, pb.ERROR_CODE_INVALID_ARGUMENT):
                        self.wrong.append(response.error.message)
            if self.over.wait(0.5):
                return

    def vandal(self) -> None:
        rng = np.random.default_rng([self.seed, 99])
        acts = [self.half_a_frame, self.no_request, self.cancelled]
        acts += [self.half_a_request, self.lie, self.labels_of_its_own]
        while not self.over.wait(0.1):
            self.counts["vandalised"] += 1
            with contextlib.suppress(grpc.RpcError, OSError):
                acts[int(rng.integers(len(acts)))](rng)

    def half_a_frame(self, rng: np.random.Generator) -> None:
        peer = RawPeer(self.node)
        peer.socket.sendall(rng.integers(0, 256, 50, np.uint8).tobytes())
        peer.socket.close()

    def no_request(self, rng: np.random.Generator) -> None:
        raw = self.node.channel.stream_stream(INFER, lambda data: data, lambda data: data)
        list(raw(iter([rng.integers(0, 256, 80, np.uint8).tobytes()]), timeout=5))

    def cancelled(self, rng: np.random.Generator) -> None:
        """With its work under way."""
        request = pb.InferRequest(task="clip_image_embed", payload=self.photos[0])
        call = self.node.stub.Infer(iter([request] * 20))
        time.sleep(float(rng.random() / 20))
        call.cancel()

    def half_a_request(self, rng: np.random.Generator) -> None:
        """And silence; its end comes from the daemon."""
        message = pb.InferRequest(task="clip_embed", payload=b"a", total=3, correlation_id="x")
        list(self.node.stub.Infer(held(message, threading.Event()), timeout=10))

    def lie(self, rng: np.random.Generator) -> None:
        message = pb.InferRequest(task="clip_embed", payload=b"a", total=2**63, seq=int(rng.integers(9)))
        list(self.node.stub.Infer(iter([message, message]), timeout=5))

    def labels_of_its_own(self, rng: np.random.Generator) -> None:
        meta = {"labels": json.dumps([f"{rng.random()}" for _ in range(50)]), "topk": "9" * 50}
        request = pb.InferRequest(task="clip_classify", payload=self.photos[1], meta=meta)
        list(self.node.stub.Infer(iter([request]), timeout=60))

    def measured(self) -> tuple[float, int, int]:
        """MB, threads and files, with all quiet, after the same work, when the daemon has given back what it freed."""
        for asked in self.photos * 4 + self.texts[:24]:
            self.node.result(self.task(asked), asked)
        time.sleep(15)
        return resident_mb(self.node), *threads_and_files(self.node)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_hostile_and_honest_load_for_half_an_hour(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_onnx: Path
) -> None:
    """Lost otherwise: the daemon that runs for months. LUMEN_SOAK_MINUTES (30) and LUMEN_SEED change it."""
    if "soak" not in request.config.option.markexpr:
        pytest.skip("takes half an hour; run it with: python -m pytest -s -m soak")
    minutes, seed = float(os.environ.get("LUMEN_SOAK_MINUTES", "30")), int(os.environ.get("LUMEN_SEED", "5"))
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none"}
    node = Node(write_labels(tmp_path / "data"), **impatient(tmp_path, PATIENCE), **settings).ready()
    try:
        load = Load(node, seed)
        load.for_seconds(minutes * 60 * 0.25)
        settled = load.measured()
        load.for_seconds(minutes * 60 * 0.75)
        ended = load.measured()
    finally:
        status = node.stop()
    print(f"\n{minutes:g} minutes, seed {seed}: {dict(load.counts)}")
    print("MB, threads and files after a quarter {:.1f} {} {}; at the end {:.1f} {} {}".format(*settled, *ended))
    assert not load.wrong, load.wrong[:5]
    assert min(load.counts[kind] for kind in ("right", "poisoned", "vandalised")) > 100 * minutes / 30
    assert ended[0] - settled[0] < 5 and ended[1] <= settled[1] + 2 and ended[2] <= settled[2] + 2
    assert status == 0 and "Traceback" not in node.log
