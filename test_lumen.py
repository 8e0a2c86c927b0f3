"""The contract: what the daemon promises to its clients and to its operator, shown with the demo model.

    python -m pytest test_lumen.py

Needs requirements-edge.txt and pytest. Each test talks to the real daemon, which runs as a child process. The folder
`tests/` has everything else.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc

ROOT = Path(__file__).resolve().parent
PICTURES = {path.stem: path.read_bytes() for path in (ROOT / "gen" / "demo" / "pictures").glob("*.png")}
SERVICE = "home_native.v1.Inference"
SECONDS = 60  # for anything; a busy machine is no failure


class Daemon:
    """The daemon with the demo model, as a child process on a free port."""

    def __init__(self, data: Path, **environment: str) -> None:
        """`data`: the folder of its caches. No hub can be reached."""
        options = ("--demo", "--host", "127.0.0.1", "--port", "0", "--log-level", "debug")
        nowhere = {"LUMEN_DATA_DIR": str(data), "HF_ENDPOINT": "http://127.0.0.1:9"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "lumen_clip.py"), *options],
            env=os.environ | nowhere | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._changed:
                self.log += line
                self._changed.notify_all()

    def wait_for(self, pattern: str) -> str:
        """The first group of a pattern that the log must show."""
        with self._changed:
            assert self._changed.wait_for(lambda: re.search(pattern, self.log), SECONDS), self.log
        match = re.search(pattern, self.log)
        assert match
        return match[1]

    def ready(self) -> Daemon:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.wait_for(r'port ([0-9]+); loading')}")
        self.stub = pb_grpc.InferenceStub(self.channel)
        self.wait_for("(ready): ")
        return self

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)

    def infer(self, *requests: pb.InferRequest) -> list[pb.InferResponse]:
        """One stream with these requests."""
        return list(self.stub.Infer(iter(requests), timeout=SECONDS))

    def ask(self, task: str, payload: bytes, **meta: str) -> Any:
        """The JSON of an answer."""
        [response] = self.infer(pb.InferRequest(task=task, payload=payload, meta=meta))
        assert not response.error.message, response.error.message
        assert response.is_final and response.result_mime.startswith("application/json;schema=")
        return json.loads(response.result)

    def vector(self, task: str, payload: bytes) -> list[float]:
        answer = self.ask(task, payload)
        vector: list[float] = answer["vector"]
        assert len(vector) == answer["dim"] and math.hypot(*vector) == pytest.approx(1, abs=1e-5)
        return vector


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("data")).ready()
    yield daemon
    assert daemon.stop() == 0 and "Traceback" not in daemon.log, daemon.log


@pytest.mark.parametrize("model", ["clip", "bioclip"])
def test_a_text_finds_its_picture(daemon: Daemon, model: str) -> None:
    """`clip_image_embed` and `clip_embed` have one space, so that a library can be searched; so has BioCLIP."""
    pictures = {name: daemon.vector(f"{model}_image_embed", data) for name, data in PICTURES.items()}
    for name in ("bicycle", "penguin", "sunflower"):
        text = daemon.vector(f"{model}_embed", f"a photo of a {name}.".encode())
        cosines = {other: sum(map(operator.mul, text, vector)) for other, vector in pictures.items()}
        assert max(cosines, key=lambda other: cosines[other]) == name


def test_a_picture_is_classified(daemon: Daemon) -> None:
    """`clip_classify` returns the `topk` likeliest labels, best first."""
    labels = daemon.ask("clip_classify", PICTURES["bicycle"], topk="3")["labels"]
    assert len(labels) == 3 and "bicycle" in labels[0]["label"]
    assert labels == sorted(labels, key=lambda row: -row["score"]) and 0 < labels[0]["score"] <= 1


def test_a_caller_brings_labels_of_its_own(daemon: Daemon) -> None:
    """Scores are probabilities over exactly these labels."""
    own = ["a penguin", "a bicycle", "a house"]
    labels = daemon.ask("clip_classify", PICTURES["penguin"], labels=json.dumps(own))["labels"]
    assert labels[0]["label"] == "a penguin" and {row["label"] for row in labels} == set(own)
    assert sum(row["score"] for row in labels) == pytest.approx(1, abs=1e-4)


def test_a_species_has_its_lineage(daemon: Daemon) -> None:
    """`bioclip_classify` answers with the eight slots that the photo app parses, and within a taxon when asked to."""
    [fox, *_] = daemon.ask("bioclip_classify", PICTURES["fox"])["labels"]
    assert fox["label"] == "Animalia/Chordata/Mammalia/Carnivora/Canidae/Vulpes/vulpes/red fox"
    birds = daemon.ask("bioclip_classify", PICTURES["fox"], within="Aves", label_format="common")["labels"]
    assert birds and "red fox" not in {row["label"] for row in birds}


def test_a_scene_is_routed(daemon: Daemon) -> None:
    """`smart_classify` names the species of an animal, and the scene of anything else."""
    assert daemon.ask("smart_classify", PICTURES["koala"])["labels"][0]["label"].startswith("Animalia/")
    assert daemon.ask("smart_classify", PICTURES["house"])["labels"][0]["label"] == "a photo of a landscape"


def test_capabilities_say_what_works(daemon: Daemon) -> None:
    """One message with all tasks, or one for each model; then the stream ends."""
    whole = daemon.stub.GetCapabilities(Empty(), timeout=SECONDS)
    streamed = list(daemon.stub.StreamCapabilities(Empty(), timeout=SECONDS))
    tasks = {task.name for task in whole.tasks}
    assert tasks == {
        *("clip_classify", "clip_embed", "clip_image_embed", "smart_classify"),
        *("bioclip_classify", "bioclip_embed", "bioclip_image_embed"),
    }
    assert [capability.service_name for capability in streamed] == ["clip", "bioclip"]
    assert {task.name for capability in streamed for task in capability.tasks} == tasks
    assert all(capability.protocol_version == "1.0" for capability in (whole, *streamed))


def test_health_and_reflection_answer(daemon: Daemon) -> None:
    """The service's own Health, the standard one for supervisors, and reflection for grpcurl."""
    assert daemon.stub.Health(Empty(), timeout=SECONDS) == Empty()
    asked = health_pb2.HealthCheckRequest(service=SERVICE)
    answered = health_pb2_grpc.HealthStub(daemon.channel).Check(asked, timeout=SECONDS)
    assert answered.status == health_pb2.HealthCheckResponse.SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    mirror = reflection_pb2_grpc.ServerReflectionStub(daemon.channel)
    [listed] = mirror.ServerReflectionInfo(iter([request]), timeout=SECONDS)
    assert SERVICE in {service.name for service in listed.list_services_response.service}


def test_chunks_arrive_in_any_order(daemon: Daemon) -> None:
    """A large picture may come in pieces, between those of another request of the same stream."""

    def pieces(name: str, size: int = 500) -> list[pb.InferRequest]:
        data = PICTURES[name]
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        fields: dict[str, Any] = {"task": "clip_image_embed", "correlation_id": name, "total": len(parts)}
        return [pb.InferRequest(payload=part, seq=i, offset=i * size, **fields) for i, part in enumerate(parts)]

    fox, house = pieces("fox")[::-1], pieces("house")
    interleaved = [chunk for pair in zip(fox, house, strict=False) for chunk in pair]
    interleaved += fox[len(house) :] + house[len(fox) :]
    answers = {r.correlation_id: json.loads(r.result)["vector"] for r in daemon.infer(*interleaved)}
    for name in ("fox", "house"):
        assert answers[name] == pytest.approx(daemon.vector("clip_image_embed", PICTURES[name]), abs=1e-5)


def test_clients_share_batches(daemon: Daemon) -> None:
    """Requests that wait at the same time run as one batch, whatever stream they came from, with the same results."""
    alone = {name: daemon.vector("clip_image_embed", data) for name, data in PICTURES.items()}
    seen = len(daemon.log)

    def ask(name: str) -> bool:
        requests = [pb.InferRequest(task="clip_image_embed", payload=PICTURES[name])] * 30
        return all(
            json.loads(response.result)["vector"] == pytest.approx(alone[name], abs=1e-5)
            for response in daemon.infer(*requests)
        )

    with ThreadPoolExecutor(len(PICTURES)) as clients:
        assert all(clients.map(ask, PICTURES))
    sizes = [int(size) for size in re.findall(r"clip image: batch of (\d+)", daemon.log[seen:])]
    assert sum(sizes) == 30 * len(PICTURES) and max(sizes) > 1


def test_a_bad_request_fails_alone(daemon: Daemon) -> None:
    """Each error names the field, and is in the response of its own request; the stream goes on."""
    good = pb.InferRequest(task="clip_image_embed", payload=PICTURES["fox"])
    bad = {
        "payload: ": pb.InferRequest(task="clip_image_embed", payload=PICTURES["fox"][:200]),
        "task: ": pb.InferRequest(task="paint", payload=b"a fox"),
        "meta topk: ": pb.InferRequest(task="clip_classify", payload=PICTURES["fox"], meta={"topk": "0"}),
        "payload_mime: ": pb.InferRequest(task="clip_embed", payload=b"a fox", payload_mime="video/mp4"),
    }
    first, *refused, last = daemon.infer(good, *bad.values(), good)
    assert first.result and last.result
    for field, response in zip(bad, refused, strict=True):
        assert response.error.code == pb.ERROR_CODE_INVALID_ARGUMENT and response.error.message.startswith(field)
        assert not response.result and not response.result_mime


def test_answers_keep_the_order_of_requests(daemon: Daemon) -> None:
    """A client may send a thousand pictures on one stream and pair the answers by their order."""
    names = [*PICTURES] * 20
    requests = [pb.InferRequest(task="clip_image_embed", correlation_id=n, payload=PICTURES[n]) for n in names]
    assert [response.correlation_id for response in daemon.infer(*requests)] == names


def test_a_vector_can_be_had_as_bytes(daemon: Daemon) -> None:
    """Little-endian float32 with `lumen.output.kind=tensor`: a quarter of the size of JSON."""
    request = pb.InferRequest(task="clip_embed", payload=b"a fox", meta={"lumen.output.kind": "tensor"})
    [response] = daemon.infer(request)
    assert response.result_mime == "application/octet-stream" and len(response.result) == 4 * 128
    vector = memoryview(response.result).cast("f").tolist()
    assert vector == pytest.approx(daemon.vector("clip_embed", b"a fox"), abs=1e-6)


def test_a_second_start_computes_nothing(daemon: Daemon, tmp_path: Path) -> None:
    """Label vectors are kept. Neither start reached a hub."""
    first = Daemon(tmp_path).ready()
    labels = first.ask("clip_classify", PICTURES["house"])
    assert first.log.count("computing the text vectors") == 2 and first.stop() == 0
    second = Daemon(tmp_path).ready()
    assert "computing the text vectors" not in second.log and second.ask("clip_classify", PICTURES["house"]) == labels
    assert second.stop() == 0


def test_sigterm_answers_what_is_in_progress(tmp_path: Path) -> None:
    """Requests that the daemon has are answered; then it ends with status 0. Later ones are UNAVAILABLE."""
    daemon = Daemon(tmp_path).ready()
    sent = threading.Event()

    def requests() -> Iterator[pb.InferRequest]:
        for _ in range(20):
            yield pb.InferRequest(task="clip_image_embed", payload=PICTURES["fox"])
        sent.set()
        time.sleep(SECONDS)  # the client does not end the stream; the daemon does

    call, answers = daemon.stub.Infer(requests(), timeout=SECONDS), []
    with pytest.raises(grpc.RpcError) as error:
        for response in call:
            answers.append(response)
            if len(answers) == 1:
                assert sent.wait(SECONDS)
                daemon.process.send_signal(signal.SIGTERM)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE and all(response.result for response in answers)
    assert daemon.process.wait(SECONDS) == 0


def test_a_bad_setting_is_one_line(tmp_path: Path) -> None:
    """It names the variable, the value and what is allowed; the exit status is 2."""
    daemon = Daemon(tmp_path, BATCH_SIZE="many")
    assert daemon.process.wait(SECONDS) == 2
    daemon.wait_for(r"(BATCH_SIZE)=many: allowed: a whole number from 1 to 1024")
    assert len(daemon.log.splitlines()) == 1
