"""The wire as real clients speak it, and its limits."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

import chunks
import errors
import tasks
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.kit import LIMIT_S, RED, ROOT, SERVICE, Node, encoded, in_chunks, picture, wait_until, write_labels

# --- the wire ------------------------------------------------------------------------------------------------------


def test_chunks_make_a_request_whatever_their_order_and_ids(node: Node) -> None:
    """Lost otherwise: photographs over 1 MiB; the app sends them in chunks, with an empty correlation id."""
    photo = encoded(picture(RED, (900, 700)), "PNG")
    whole = node.result("clip_image_embed", photo)["vector"]
    ordered = in_chunks(photo, 7, task="clip_image_embed", payload_mime="image/webp", meta={"a": "b"})
    shuffled = in_chunks(photo, 5, task="clip_image_embed", correlation_id="s")[::-1]
    mixed = [
        m
        for pair in zip(
            in_chunks(photo, 4, task="clip_image_embed", correlation_id="x"),
            in_chunks(b"a dog", 4, task="clip_embed", correlation_id="y"),
            strict=True,
        )
        for m in pair
    ]
    plain = in_chunks(photo, 3, task="clip_image_embed")
    for message in plain:
        message.offset = 0  # some clients leave it out
    responses = node.infer(*ordered, *shuffled, *mixed, *plain)
    assert [r.correlation_id for r in responses] == ["", "s", "x", "y", ""]
    for response in (responses[0], responses[1], responses[2], responses[4]):
        assert json.loads(response.result)["vector"] == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"seq": 1}], "total"),
        ([{"offset": 4}], "total"),
        ([{"total": 1, "seq": 3}], "total"),
        ([{"total": 2, "seq": 2}], "seq"),
        ([{"total": 3}, {"total": 3}], "seq"),
        ([{"total": 2}, {"total": 3, "seq": 1}], "total"),
        ([{"total": 2}, {"total": 2, "seq": 1, "offset": 99}], "offset"),
        ([{"total": 2}, {"total": 2, "seq": 1, "meta": {"a": "b"}}], "meta"),
        ([{"total": 2}, {"total": 2, "seq": 1, "payload_mime": "text/html"}], "payload_mime"),
        ([{"total": 2**63}], "total"),
        ([{"total": 2, "seq": 1}], "total"),  # and never the other one
    ],
)
def test_wrong_chunk_fields_are_answered_once_and_the_stream_goes_on(
    torch_node: Node, messages: Any, said: str
) -> None:
    """Lost otherwise: a request that is never answered, or the memory of a small board."""
    lies = [pb.InferRequest(correlation_id="lie", **{"task": "clip_embed", "payload": b"ab"} | m) for m in messages]
    responses = torch_node.infer(*lies, pb.InferRequest(correlation_id="good", task="clip_embed", payload=b"a dog"))
    by_id = {r.correlation_id: r for r in responses}
    assert len(responses) == 2 and by_id["good"].result
    assert by_id["lie"].error.code == pb.ERROR_CODE_INVALID_ARGUMENT and by_id["lie"].error.message.startswith(said)
    assert by_id["lie"].is_final and not by_id["lie"].result_mime


def test_an_id_that_failed_can_be_used_again(torch_node: Node) -> None:
    """Lost otherwise: all requests of a client with empty ids, after its first bad one."""
    bad = in_chunks(b"a dog", 5, task="clip_embed")
    bad[1].meta["x"] = "y"
    responses = torch_node.infer(*bad, *in_chunks(b"a cat", 5, task="clip_embed"))
    assert ["meta" in responses[0].error.message, bool(responses[1].result), len(responses)] == [True, True, 2]


def test_unfinished_requests_and_their_bytes_are_bounded() -> None:
    """Lost otherwise: the memory of a board to one client that never ends what it begins."""
    assembler = chunks.Assembler(1000)
    for i in range(chunks.OPEN_IDS_MAX):
        assert assembler.add(pb.InferRequest(correlation_id=str(i), total=2), b"x") is None
    with pytest.raises(errors.BadInput, match="unfinished"):
        assembler.add(pb.InferRequest(correlation_id="one more", total=2), b"x")
    assert len(assembler.unfinished()) == chunks.OPEN_IDS_MAX
    assert chunks.CHUNK_COST < assembler.held() / chunks.OPEN_IDS_MAX < 2 * chunks.CHUNK_COST + 20
    before = assembler.held()
    with pytest.raises(errors.BadInput, match="1000 bytes"):
        assembler.add(pb.InferRequest(correlation_id="0", seq=1, total=2), b"x" * 1000)
    assert len(assembler.unfinished()) == chunks.OPEN_IDS_MAX - 1 and assembler.held() < before


def test_a_complete_request_is_answered_before_half_close(node: Node) -> None:
    """Lost otherwise: old clients, which keep their stream open and wait."""
    release = threading.Event()

    def requests() -> Iterator[pb.InferRequest]:
        yield pb.InferRequest(correlation_id="1", task="clip_embed", payload=b"a dog")
        release.wait(LIMIT_S)

    call = node.stub.Infer(requests(), timeout=LIMIT_S)
    assert next(call).correlation_id == "1"
    release.set()
    assert list(call) == []


def test_answers_keep_the_order_of_requests_and_one_bad_one_fails_alone(node: Node) -> None:
    """Lost otherwise: with empty ids a client can only go by order."""
    photo = encoded(picture(RED))
    requests = []
    for i in range(40):
        task, payload = [("clip_image_embed", photo), ("clip_embed", b"a dog"), ("clip_image_embed", b"rubbish")][i % 3]
        requests.append(pb.InferRequest(correlation_id=str(i), task=task, payload=payload))
    responses = node.infer(*requests)
    assert [r.correlation_id for r in responses] == [str(i) for i in range(40)]
    assert [r.error.code for r in responses] == [[0, 0, pb.ERROR_CODE_INVALID_ARGUMENT][i % 3] for i in range(40)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task": "ocr", "payload": b"x"}, "task: 'ocr' is unknown; allowed: clip_classify"),
        ({"task": "", "payload": b"x"}, "task: ''"),
        ({"task": "__class__\0", "payload": b"x"}, "task: "),
        ({"task": "clip_embed", "payload": b""}, "payload: it is empty"),
        ({"task": "clip_embed", "payload": b" \n"}, "payload: the text is blank"),
        ({"task": "clip_embed", "payload": b"\xff\xfe"}, "payload: the text is not UTF-8"),
        ({"task": "clip_embed", "payload": b"a" * 70_000}, "payload: a text of 70000 bytes; allowed: 65536"),
        (
            {"task": "clip_embed", "payload": b"x", "payload_mime": "image/png"},
            "payload_mime: 'image/png'; clip_embed takes text/plain",
        ),
        (
            {"task": "clip_classify", "payload": b"x", "payload_mime": "text/plain"},
            "payload_mime: 'text/plain'; clip_classify takes image/jpeg",
        ),
        (
            {"task": "clip_classify", "payload": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"},
            "payload: not an image",
        ),
    ],
)
def test_bad_input_is_told_the_field_and_what_is_allowed(node: Node, fields: Any, said: str) -> None:
    """Lost otherwise: an evening of guessing."""
    [response] = node.infer(pb.InferRequest(correlation_id="c", **fields))
    assert response.error.code == pb.ERROR_CODE_INVALID_ARGUMENT and response.error.message.startswith(said)
    assert (response.correlation_id, response.is_final, response.result, response.result_mime) == ("c", True, b"", "")


def test_a_stream_without_a_request_is_refused(torch_node: Node) -> None:
    """Lost otherwise: the SDK sees the end of a stream and no reason."""
    with pytest.raises(grpc.RpcError) as error:
        torch_node.infer()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_capabilities_satisfy_the_sdk(node: Node) -> None:
    """Lost otherwise: the node is never routable; the SDK reads these once."""
    streamed = list(node.stub.StreamCapabilities(Empty(), timeout=LIMIT_S))
    assert [c.service_name for c in streamed] == ["clip", "bioclip"]
    whole = node.stub.GetCapabilities(Empty())
    default = {name for name in tasks.TASKS if not name.startswith("semantic")}
    assert {t.name for t in whole.tasks} == default == {t.name for c in streamed for t in c.tasks}
    for capability in (*streamed, whole):
        assert capability.protocol_version == "1.0" and capability.service_name
        assert list(capability.precisions) == ["fp32"] and capability.max_concurrency == 64
        assert capability.runtime in ("torch", "onnxrt")
    tensors = {t.name for c in streamed for t in c.tasks if t.tensor_preprocess_id == "bioclip2_224_image_v1"}
    assert tensors == {"bioclip_classify", "bioclip_image_embed"}


def test_health_and_reflection_speak_the_standard_protocols(node: Node) -> None:
    """Lost otherwise: Docker's and Kubernetes' health checks, and grpcurl."""
    node.stub.Health(Empty(), timeout=LIMIT_S)
    check = health_pb2_grpc.HealthStub(node.channel).Check
    for name in ("", SERVICE):
        assert check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = reflection_pb2_grpc.ServerReflectionStub(node.channel).ServerReflectionInfo(iter([request]))
    assert SERVICE in [s.name for s in answer.list_services_response.service]


def test_frequent_pings_do_not_end_the_connection(torch_node: Node) -> None:
    """Lost otherwise: every slow request of the Go SDK, which pings each 10 s, ends in too_many_pings."""
    options = [
        ("grpc.keepalive_time_ms", 300),
        ("grpc.http2.min_time_between_pings_ms", 300),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    release = threading.Event()

    def requests() -> Iterator[pb.InferRequest]:
        release.wait(3)  # ten pings; the third would be one too many
        yield pb.InferRequest(task="clip_embed", payload=b"a dog")

    with grpc.insecure_channel(torch_node.address, options) as channel:
        [response] = pb_grpc.InferenceStub(channel).Infer(requests(), timeout=LIMIT_S)
    assert response.result


def test_gen_is_what_the_proto_generates(tmp_path: Path) -> None:
    """Lost otherwise: the wire drifts from its contract."""
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-Igen=.",
        f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}",
    ]
    subprocess.run([*command, f"--grpc_python_out={tmp_path}", "gen/ml_service.proto"], cwd=ROOT, check=True)
    for name in ("ml_service_pb2.py", "ml_service_pb2.pyi", "ml_service_pb2_grpc.py"):
        assert (ROOT / "gen" / name).read_text() == (tmp_path / "gen" / name).read_text(), name


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_node(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> Iterator[Node]:
    """A daemon with small limits and one model."""
    node = Node(
        write_labels(tmp_path_factory.mktemp("small-data"), tiny_onnx),
        CLIP_BACKEND="onnxrt",
        BIOCLIP_BACKEND="none",
        CLIP_MODEL=tiny_onnx,
        LUMEN_MAX_STREAMS=3,
        LUMEN_MAX_REQUEST_MB=1,
        LUMEN_MAX_MEGAPIXELS=1,
    ).ready()
    yield node
    assert node.stop() == 0, node.log


def test_more_streams_than_allowed_are_told_so_while_health_answers(small_node: Node) -> None:
    """Lost otherwise: silence under load, and a supervisor that thinks the daemon is dead."""
    release = threading.Event()

    def held() -> Iterator[pb.InferRequest]:
        yield pb.InferRequest(task="clip_embed", payload=b"a dog")
        release.wait(LIMIT_S)

    calls = [small_node.stub.Infer(held(), timeout=LIMIT_S) for _ in range(3)]
    for call in calls:
        assert next(call).result
    with pytest.raises(grpc.RpcError) as error:
        small_node.infer(pb.InferRequest(task="clip_embed", payload=b"a dog"))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "3 Infer streams" in error.value.details()
    small_node.stub.Health(Empty(), timeout=LIMIT_S)
    calls[0].cancel()  # one leaves without a word, and its place is free

    def admitted() -> bool:
        with contextlib.suppress(grpc.RpcError):
            return bool(small_node.infer(pb.InferRequest(task="clip_embed", payload=b"a dog"))[0].result)
        return False

    wait_until(admitted)
    release.set()


def test_what_is_too_large_is_refused_and_the_stream_goes_on(small_node: Node) -> None:
    """Lost otherwise: one panorama costs all other photographs on the stream."""
    noise = np.random.default_rng(0).bytes(1_500_000)
    wide = encoded(Image.new("RGB", (2000, 1000)), "PNG")
    narrow = encoded(Image.new("RGB", (1, 60_000)), "PNG")
    requests = [
        pb.InferRequest(correlation_id="single", task="clip_image_embed", payload=noise),
        *in_chunks(noise, 6, correlation_id="chunked", task="clip_image_embed"),
        pb.InferRequest(correlation_id="wide", task="clip_image_embed", payload=wide),
        pb.InferRequest(correlation_id="narrow", task="clip_image_embed", payload=narrow),
        pb.InferRequest(correlation_id="good", task="clip_embed", payload=b"a dog"),
    ]
    found = {r.correlation_id: r.error.message for r in small_node.infer(*requests)}
    assert found.pop("good") == ""
    assert {k: re.sub(r" \(.*", "", v) for k, v in found.items()} == {
        "single": "payload: over 1048576 bytes, the most that a request may have",
        "chunked": "payload: over 1048576 bytes, the most that a request may have",
        "wide": "payload: the image has 2000 x 1000 pixels; allowed: 1000000 in all",
        "narrow": "payload: the image is too narrow",
    }


def test_a_model_that_is_left_out_is_not_offered(small_node: Node) -> None:
    """Lost otherwise: clients route species to a node that has none."""
    assert [c.service_name for c in small_node.stub.StreamCapabilities(Empty())] == ["clip"]
    assert {t.name for t in small_node.stub.GetCapabilities(Empty()).tasks} == {
        "clip_classify",
        "clip_embed",
        "clip_image_embed",
    }
    assert "switched off" in small_node.ask("smart_classify", encoded(picture(RED))).error.message
