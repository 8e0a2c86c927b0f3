"""The photo app, which connects once, reads what a node can do once per connection, and retries nothing."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty

from gen import ml_service_pb2 as pb
from tests.hostile import impatient
from tests.kit import COLOURS, RED, SPECIES, Node, encoded, in_chunks, one_model, picture, wait_until, write_labels
from tests.photo_app import PhotoApp

LATE = [[["Animalia", "Chordata", "Aves", "", "", f"Avis{i}", "domestica"], f"bird {i}"] for i in range(300)]


def species_come_late(tmp_path: Path, tiny_onnx: Path, **constants: Any) -> Node:
    """A daemon whose species are computed while it serves."""
    data = write_labels(tmp_path / "data")
    (data / "bioclip" / "txt_emb_species.json").write_text(json.dumps(SPECIES + LATE))
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_MODEL": tiny_onnx}
    constants["label_cache.SHARD_LABELS"] = 64  # more labels than that are computed while the daemon serves
    return Node(data, **settings, **impatient(tmp_path, constants)).ready()


def app_learns_of_species(node: Node, rotations: int, step: float) -> None:
    """Until the app has classified a species, and so many connections more; meanwhile calls and a long import."""
    photo, failures = encoded(picture(RED)), []
    app, finished = PhotoApp(node.address), threading.Event()
    try:
        wait_until(lambda: "clip_image_embed" in app.services, 60)
        first = app.connections
        assert "bioclip_classify" not in app.services  # as today's board for days
        with pytest.raises(LookupError):
            app.call("bioclip_classify", pb.InferRequest(payload=photo))

        def import_photos() -> Iterator[pb.InferRequest]:
            """One stream for the whole time; each request comes in chunks that are spread over several connections."""
            number = 0
            while not finished.is_set():
                for chunk in in_chunks(photo, 4, task="clip_image_embed", correlation_id=str(number)):
                    yield chunk
                    finished.wait(step)
                number += 1

        def import_all() -> int:
            responses = list(app.stub.Infer(import_photos(), timeout=600))
            assert all(response.result for response in responses), responses[-1].error
            return len(responses)

        def use() -> int:
            count = 0
            while not finished.is_set():
                try:
                    assert app.call("clip_image_embed", pb.InferRequest(payload=photo)).result
                    count += 1
                except grpc.RpcError as error:
                    failures.append(error)
            return count

        with concurrent.futures.ThreadPoolExecutor(5) as clients:
            imported = clients.submit(import_all)
            used = [clients.submit(use) for _ in range(4)]
            node.wait_for("ready$", 300)  # "TreeOfLife-10M: ready"
            arrived = time.monotonic()
            wait_until(lambda: "bioclip_classify" in app.services, 120)
            print(f"\nthe app knew after {time.monotonic() - arrived:.0f} s", end="; ")
            assert json.loads(app.call("bioclip_classify", pb.InferRequest(payload=photo)).result)["labels"]
            wait_until(lambda: app.connections >= first + rotations, 600)
            finished.set()
            count = sum(call.result() for call in used)
            print(f"{count} calls and {imported.result()} imported, {app.connections} connections, {failures}")
        assert not failures and imported.result() > 0 and count > 0
    finally:
        finished.set()
        app.close()


def test_an_app_that_stays_connected_learns_of_species(tmp_path: Path, tiny_onnx: Path) -> None:
    """The app would never offer species on a board: they take longer to arrive than it takes to connect, and an
    unchanged app asks once per connection."""
    node = species_come_late(tmp_path, tiny_onnx, **{"service.CONNECTION_AGE_S": 2})
    try:
        app_learns_of_species(node, rotations=3, step=0.7)
    finally:
        assert node.stop() == 0, node.log


@pytest.mark.app
@pytest.mark.timeout(900)
def test_an_app_that_stays_connected_learns_of_species_within_a_minute(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_onnx: Path
) -> None:
    """The same with the daemon's own limits: pytest -s -m app"""
    if "app" not in request.config.option.markexpr:
        pytest.skip("takes four minutes; run it with: python -m pytest -s -m app")
    node = species_come_late(tmp_path, tiny_onnx)
    try:
        app_learns_of_species(node, rotations=3, step=20)
    finally:
        assert node.stop() == 0, node.log


@pytest.mark.parametrize("limit", [8, 64])
def test_a_client_that_keeps_to_max_concurrency_is_never_refused(tmp_path: Path, tiny_onnx: Path, limit: int) -> None:
    """Some of the app's calls would fail for good: it does as many at once as the capability says, and does not
    retry."""
    settings = one_model(tiny_onnx, LUMEN_MAX_STREAMS=limit)
    node = Node(write_labels(tmp_path), **settings).ready()
    try:
        [capability] = node.stub.StreamCapabilities(Empty(), timeout=20)
        assert capability.max_concurrency == limit

        def use(number: int) -> int:
            for i in range(640 // limit):
                text = f"{number} {i}".encode()
                call = node.stub.Infer(iter([pb.InferRequest(task="clip_embed", payload=text)]), timeout=60)
                assert next(call).result  # and goes on at once, as the SDK does
            return 1

        with concurrent.futures.ThreadPoolExecutor(limit) as callers:
            assert sum(callers.map(use, range(limit))) == limit
    finally:
        assert node.stop() == 0, node.log


def test_more_than_max_concurrency_is_refused_at_once(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client beyond the limit would wait in silence until its deadline, instead of asking another node."""
    backend, stub = watched
    monkeypatch.setattr(backend.daemon.streams, "_most", 4)
    request = pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED)))
    backend.gate.clear()
    calls = [stub.Infer(iter([request]), timeout=60) for _ in range(4)]
    wait_until(lambda: backend.daemon.engine._expected == 4)
    with pytest.raises(grpc.RpcError) as error:
        list(stub.Infer(iter([request]), timeout=60))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    backend.gate.set()
    assert all(next(call).result for call in calls)


def test_the_app_searches_with_our_clip_model(tmp_path: Path, tiny_onnx: Path) -> None:
    """The app's search would need a second node: it asks for `semantic_` tasks, and for one model id for both."""
    settings = one_model(tiny_onnx, LUMEN_SEMANTIC="clip")
    node = Node(write_labels(tmp_path), **settings).ready()
    app = PhotoApp(node.address)
    try:
        assert "semantic tasks: clip" in node.log and "no other node" in node.log
        wait_until(lambda: "semantic_text_embed" in app.services, 60)
        assert app.services["semantic_text_embed"] == app.services["semantic_image_embed"] == "clip"
        [capability] = node.stub.StreamCapabilities(Empty(), timeout=20)
        offered = {task.name: task for task in capability.tasks if task.name.startswith("semantic_")}
        assert all(not task.tensor_preprocess_id and task.limits["dim"] == "64" for task in offered.values())

        def vector(task: str, payload: bytes) -> Any:
            response = app.call(task, pb.InferRequest(payload=payload))
            answer = json.loads(response.result)
            assert response.result_mime == "application/json;schema=embedding_v1" and answer["dim"] == 64
            models.add(answer["model_id"])
            return np.array(answer["vector"])

        models: set[str] = set()
        index = np.stack([vector("semantic_image_embed", encoded(picture(c, seed=9))) for c in COLOURS.values()])
        found = [int((index @ vector("semantic_text_embed", text.encode())).argmax()) for text in COLOURS]
        assert found == list(range(len(COLOURS))) and models == {"tiny"}
        assert node.result("clip_embed", b"a dog")["vector"] == node.result("semantic_text_embed", b"a dog")["vector"]
    finally:
        app.close()
        assert node.stop() == 0, node.log
