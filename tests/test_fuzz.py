"""Random bytes where bytes come in; LUMEN_FUZZ=100 takes a hundred times as long."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np

import chunks
import errors
import label_cache
import preprocess
import tasks
from gen import ml_service_pb2 as pb

# LUMEN_FUZZ=100 python -m pytest -k fuzz    goes on a hundred times as long
fuzzed = hypothesis.settings(
    max_examples=200 * int(os.environ.get("LUMEN_FUZZ", "1")),
    deadline=None,
    derandomize="LUMEN_FUZZ" not in os.environ,  # CI judges the change, not its luck
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


SHORT = st.text(max_size=12) | st.sampled_from(
    ["", "0", "-1", "true", "NaN", "\0", "[", "{}", "9" * 400, "1e309", "[1,3,224,224]"]
)


COUNTS = st.integers(0, 5) | st.integers(0, 2**64 - 1)


@fuzzed
@hypothesis.given(
    st.lists(
        st.builds(
            pb.InferRequest,
            correlation_id=st.sampled_from(["", "a", "b"]),
            task=st.sampled_from(["clip_embed", "x"]),
            payload=st.binary(max_size=40),
            seq=COUNTS,
            total=COUNTS,
            offset=COUNTS,
        ),
        max_size=40,
    )
)
def test_fuzz_chunks(messages: list[pb.InferRequest]) -> None:
    """Lost otherwise: a stream's reader, or memory, to chunks that nobody thought of."""
    assembler = chunks.Assembler(200)
    sent: dict[str, int] = {}
    for message in messages:
        key = message.correlation_id
        sent[key] = sent.get(key, 0) + len(message.payload)
        try:
            request = assembler.add(message, message.payload)
        except errors.BadInput as error:
            assert len(str(error)) < 300 and key not in assembler.unfinished()
            continue
        if request:
            assert request.correlation_id == key and len(request.payload) <= min(200, sent[key])
            assert key not in assembler.unfinished() or message.total <= 1
        # Payloads, the keeping of chunks, and what stands beside them.
        most = 200 + chunks.CHUNKS_RESERVED * chunks.CHUNK_COST + 100
        assert 0 <= assembler.held() <= most * len(assembler.unfinished())


@fuzzed
@hypothesis.given(st.binary(min_size=1, max_size=200), st.integers(1, 12), st.booleans(), st.randoms())
def test_fuzz_chunks_of_one_request_in_any_order(payload: bytes, count: int, offsets: bool, order: Any) -> None:
    """Lost otherwise: a photograph that arrived whole and was told to be damaged."""
    cuts = sorted(order.randrange(len(payload) + 1) for _ in range(count - 1))
    bounds = list(itertools.pairwise([0, *cuts, len(payload)]))
    messages = [
        pb.InferRequest(task="clip_embed", payload=payload[a:b], seq=i, total=count, offset=a if offsets else 0)
        for i, (a, b) in enumerate(bounds)
    ]
    order.shuffle(messages)
    assembler = chunks.Assembler(1000)
    made = [request for m in messages if (request := assembler.add(m, m.payload))]
    assert [request.payload for request in made] == [payload] and assembler.held() == 0


META_KEYS = st.sampled_from(
    [
        *tasks.TOPK_KEYS,
        "labels",
        "label_set",
        "min_score",
        "label_format",
        "prompt_template",
        "lumen.output.kind",
        "lumen.input.kind",
    ]
    + [f"lumen.tensor.{key}" for key in ("dtype", "shape", "layout", "format", "byte_order")]
    + ["lumen.preprocess.id", "lumen.preprocess.skip", "lumen.output.tensor.dtype"]
)


@fuzzed
@hypothesis.given(
    st.sampled_from(list(tasks.TASKS)),
    st.dictionaries(META_KEYS, SHORT | st.recursive(SHORT, lambda x: st.lists(x, max_size=3)).map(json.dumps)),
    st.binary(max_size=20),
    SHORT,
)
def test_fuzz_meta(task: str, meta: dict[str, str], payload: bytes, mime: str) -> None:
    """Lost otherwise: an internal error where a client should be told the field."""
    request = tasks.Request("x", task, mime, meta, payload)
    try:
        tasks.read_meta(tasks.TASKS[task], request)
    except errors.BadInput as error:
        assert re.match(r"(payload|payload_mime|meta [\w.-]+): ", str(error)) and len(str(error)) < 400
    else:
        assert 0 <= request.topk <= tasks.TOPK_MAX and len(request.labels) <= tasks.CALLER_LABELS_MAX


@fuzzed
@hypothesis.given(
    st.dictionaries(META_KEYS, SHORT),
    st.binary(max_size=300) | st.sampled_from([bytes(3 * 8 * 8 * 4), b"\xff" * (3 * 8 * 8 * 4), b"\x7f\x80" * 192]),
    st.sampled_from(["fp32", "fp16", "int8"]),
)
def test_fuzz_tensors(meta: dict[str, str], payload: bytes, dtype: str) -> None:
    """Lost otherwise: pixels that are none, on the thread that serves everybody."""
    recipe = preprocess.Preprocess(size=8)
    honest = {
        "lumen.tensor.layout": "NCHW",
        "lumen.tensor.format": "contiguous",
        "lumen.tensor.byte_order": "little",
        "lumen.preprocess.id": recipe.tensor_id,
        "lumen.preprocess.skip": "true",
        "lumen.tensor.dtype": dtype,
        "lumen.tensor.shape": "[1,3,8,8]",
    }
    for sent in (meta, {**meta, **honest}):
        with contextlib.suppress(errors.BadInput):
            pixels = preprocess.pixels_from_tensor(payload, sent, recipe)
            assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8


@fuzzed
@hypothesis.given(st.data())
def test_fuzz_the_label_cache_past_its_checksum(data: Any) -> None:
    """Lost otherwise: the start, or a wrong vector, by a disk that garbles what a checksum then blesses."""
    key = label_cache.CacheKey("model", "recipe", "sha", 8, 4)
    rows = np.eye(4, dtype=np.float32)[np.arange(8) % 4]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text_vectors.npz"
        label_cache.save(path.parent, key, [rows])
        with zipfile.ZipFile(path) as archive:
            members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
        for _ in range(data.draw(st.integers(1, 4))):
            member = members[data.draw(st.sampled_from(sorted(members)))]
            at = data.draw(st.integers(0, max(0, len(member) - 1)))
            match data.draw(st.sampled_from(["byte", "cut", "insert", "text"])):
                case "byte" if member:
                    member[at] = data.draw(st.integers(0, 255))
                case "cut":
                    del member[at:]
                case "insert":
                    member[at:at] = data.draw(st.binary(max_size=8))
                case "text":
                    old = data.draw(st.sampled_from([b"(8, 4)", b"<f4", b"False", b'"count": 8', b"{", b":"]))
                    new = data.draw(
                        st.sampled_from([b"(9, 9)", b"(1e9)", b"|O8", b"True", b"()", b"[", b'"count": []'])
                    )
                    member[:] = member.replace(old, new)
        with zipfile.ZipFile(
            path, "w", data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        ) as archive:
            for name, content in members.items():
                archive.writestr(name, bytes(content))
        raw = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(raw)
        if (found := label_cache.load_or_none(path, key.meta())) is not None:
            vectors = found.vecs
            assert vectors.shape == (8, 4) and np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 0.02
