"""lumen-clip: CLIP and BioCLIP-2 over gRPC (`home_native.v1.Inference`), batched across all clients.

The way of one request:

    stream's reader thread   chunks -> one whole Request         (Assembler, Stream.read)
    decode threads           bytes -> pixels or token ids        (DecodePool, prepare)
    the inference thread     the task's steps, in true batches   (Engine; it alone touches a model)
    stream's own thread      answers, in the order of requests   (Stream.answers)

A task is a generator that yields the steps it needs; TASKS is the one table that routing, validation and
capabilities read. `main()` binds the port first, then loads the models, then tells mDNS and systemd.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import heapq
import hmac
import ipaddress
import itertools
import json
import logging
import os
import queue
import re
import signal
import socket
import ssl
import sys
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import empty_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import backends
import labels
import watch
from backends import Backend, BackendError, BadInput, Preprocess
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from labels import LabelError, LabelSet
from watch import Journal, Traffic

log = logging.getLogger("lumen")

VERSION = "1.0.0"
HERE = Path(__file__).resolve().parent
DATA_DIR = HERE / "data"
# What `--demo` sets: an ordinary model in the ordinary layout, and the names of what it was shown.
DEMO_DIR = HERE / "gen" / "demo"
DEMO = {
    "CLIP_BACKEND": "onnxrt",
    "CLIP_MODEL": str(DEMO_DIR),
    "BIOCLIP_MODEL": str(DEMO_DIR),
    "CLIP_LABELS": str(DEMO_DIR / "names.json"),
    "BIOCLIP_LABELS": str(DEMO_DIR / "species.json"),
}
PROTOCOL_VERSION = "1.0"
SERVICE = "home_native.v1.Inference"
TOPK_MAX = 1000  # of any classification; what is asked beyond it is clamped
OWN_LABELS_MAX = 256  # labels a caller may bring
TEXTS_KEPT = 4096  # text vectors that a model remembers (2 to 3 KB each): searches and labels come again and again
TEXT_BYTES_MAX = 65_536  # a tower reads 77 tokens; this bounds the cleaning
CHUNKS_MAX = 65_536  # of one request
OPEN_IDS_MAX = 64  # unfinished requests on one stream
WINDOW = 32  # requests of one stream in work; then its reader waits, and the client with it
TURN_SECONDS = 0.05  # each request that a stream has in work puts its next one so much further back in line
CHUNK_IDLE_S = 30  # between two chunks of one request
STREAM_IDLE_S = 300  # of a stream that has nothing in work
READER_IDLE_S = 60  # of a client that does not read its answer
FAILURES_MAX = 3  # batches in a row that fail as a whole; a model that does so needs a new start
DRAIN_S = 20  # for requests in work when the daemon is told to stop
TRAFFIC_LOG_S = 60  # between two lines that say what went through


# --- settings ---------------------------------------------------------------------------------------------------


class SettingError(ValueError):
    """An operator's value is not allowed; the text is one line that names the variable."""


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"allowed: {', '.join(allowed)}")
        return text

    return parse


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
            raise ValueError(f"allowed: a whole number from {low} to {high}")
        return int(text)

    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _mdns_types(text: str) -> tuple[str, ...]:
    types = () if text == "off" else _names(text)
    if not all(t.startswith("_") and t.endswith(("._tcp.local.", "._tcp.local")) for t in types):
        raise ValueError("allowed: service types such as _lumen._tcp.local., separated by commas, or off")
    return tuple(t.rstrip(".") + "." for t in types)


def _mdns_name(text: str) -> str:
    if "." in text or not 0 < len(text.encode()) <= 63:
        raise ValueError("allowed: one DNS label, 1 to 63 bytes without a dot")
    return text


def _ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ValueError("allowed: an IPv4 address") from None


def _templates(text: str) -> int:
    return int(_choice(*map(str, labels.TEMPLATES))(text))


def _switch(text: str) -> bool:
    return _choice("0", "1")(text) == "1"


def _setting(default: Any, parse: Callable[[str], Any] = str) -> Any:
    return field(default=default, metadata={"parse": parse})


_BACKEND = _choice("torch", "onnxrt", "rknn", "none")
_BATCH = _number(1, 1024)


@dataclass(frozen=True)
class Settings:
    """Every setting under its variable's name in lower case; README has the table. An empty variable is unset."""

    clip_backend: str = _setting("torch", _BACKEND)
    bioclip_backend: str = _setting("", _BACKEND)  # "": CLIP's
    clip_model: str = _setting("ViT-B-32:laion2b_s34b_b79k")
    bioclip_model: str = _setting("hf-hub:imageomics/bioclip-2")
    clip_device: str = _setting("")
    bioclip_device: str = _setting("")
    clip_precision: str = _setting("fp32", _choice("fp32", "fp16"))
    bioclip_precision: str = _setting("fp32", _choice("fp32", "fp16"))
    batch_size: int = _setting(8, _BATCH)
    clip_max_batch_size: int = _setting(0, _BATCH)  # 0: BATCH_SIZE
    bioclip_max_batch_size: int = _setting(0, _BATCH)
    clip_onnx_image: str = _setting("")
    clip_onnx_text: str = _setting("")
    bioclip_onnx_image: str = _setting("")
    bioclip_onnx_text: str = _setting("")
    clip_ort_providers: tuple[str, ...] = _setting((), _names)
    bioclip_ort_providers: tuple[str, ...] = _setting((), _names)
    clip_rknn_model: str = _setting("")
    bioclip_rknn_model: str = _setting("")
    clip_rknn_target: str = _setting("", _choice(*backends.NPU_CORES))  # "": what the device tree says
    bioclip_rknn_target: str = _setting("", _choice(*backends.NPU_CORES))
    clip_rknn_cores: int = _setting(0, _number(0, 3))  # 0: all that there are and that memory allows
    bioclip_rknn_cores: int = _setting(0, _number(0, 3))
    clip_labels: str = _setting("")  # "": ImageNet-1k
    bioclip_labels: str = _setting("")  # "": TreeOfLife-10M
    clip_templates: int = _setting(7, _templates)
    clip_mdns_type: tuple[str, ...] = _setting(("_homenative-node._tcp.local.", "_lumen._tcp.local."), _mdns_types)
    clip_mdns_name: str = _setting("CLIP-Image-Processor", _mdns_name)
    clip_mdns_uuid: str = _setting("")
    clip_mdns_status: str = _setting("ready")
    clip_mdns_version: str = _setting("1.0.0")
    advertise_ip: str = _setting("", _ipv4)
    lumen_data_dir: Path = _setting(DATA_DIR, Path)
    lumen_jpeg_draft: bool = _setting(True, _switch)
    lumen_tune: bool = _setting(True, _switch)
    lumen_tls_cert: str = _setting("")  # "": plaintext
    lumen_tls_key: str = _setting("")
    lumen_tls_client_ca: str = _setting("")
    lumen_token_file: str = _setting("")
    lumen_hang_s: int = _setting(120, _number(1, 86_400))
    lumen_max_streams: int = _setting(64, _number(1, 4096))
    lumen_max_request_mb: int = _setting(64, _number(1, 1024))
    lumen_max_megapixels: int = _setting(40, _number(1, 1000))
    lumen_metrics_port: int = _setting(0, _number(0, 65535))  # 0: none

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Raises SettingError: one line with the variable, its value and what is allowed."""
        values: dict[str, Any] = {}
        for setting in fields(cls):
            name = setting.name.upper()
            if text := environment.get(name, "").strip():
                try:
                    values[setting.name] = setting.metadata["parse"](text)
                except ValueError as error:
                    raise SettingError(f"{name}={text}: {error}") from None
        settings = cls(**values)
        if settings.backend_of("clip") == settings.backend_of("bioclip") == "none":
            raise SettingError("CLIP_BACKEND=none: there is nothing to serve; allowed for one of the two models")
        return settings

    def backend_of(self, model: str) -> str:
        return self.clip_backend if model == "clip" else self.bioclip_backend or self.clip_backend

    def options(self, model: str) -> backends.ModelOptions:
        """What the backend of "clip" or "bioclip" needs to know."""
        shared = {"device", "precision", "onnx_image", "onnx_text", "ort_providers"}
        shared |= {"rknn_model", "rknn_target", "rknn_cores"}
        return backends.ModelOptions(
            name=model.upper(),
            backend=self.backend_of(model),
            model=getattr(self, f"{model}_model"),
            data_dir=self.lumen_data_dir,
            **{name: getattr(self, f"{model}_{name}") for name in shared},
        )

    def batch_size_of(self, model: str) -> int:
        return int(getattr(self, f"{model}_max_batch_size")) or self.batch_size


# --- the inference thread ---------------------------------------------------------------------------------------


class Line:
    """The items that wait for one engine, which runs them in batches: `run(items) -> one result an item`."""

    SCORING, TEXT, BULK = range(3)

    def __init__(self, name: str, run: Callable[[list[Any]], Sequence[Any]], batch_size: int, kind: int) -> None:
        self.name, self.run, self.batch_size, self.kind = name, run, batch_size, kind
        self.waiting: list[tuple[float, int, _Step, int]] = []  # a heap by the due time


Steps = Generator[tuple[Line, Sequence[Any]], list[Any], "Answer"]  # a task at work


@dataclass(frozen=True)
class Answer:
    """What a task returns: an object for JSON under the schema's name, or bytes as they are; and meta."""

    schema: str
    content: dict[str, Any] | bytes
    meta: dict[str, str]

    def encoded(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        return json.dumps(self.content, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode()

    def mime(self) -> str:
        return TENSOR_MIME if isinstance(self.content, bytes) else f"application/json;schema={self.schema}"


class Job:
    """A request on its way; `answer` resolves to an Answer or to the exception that the client shall hear of."""

    def __init__(self, correlation_id: str, due: float, task: str, size: int) -> None:
        self.correlation_id, self.task, self.size = correlation_id, task, size  # as the client named them; bytes
        self.due = due  # when its turn comes, by time.monotonic()
        self.digest = ""  # sha-256 of the payload, once it is worked on
        self.arrived = time.monotonic()
        self.steps: Steps | None = None
        self.answer: futures.Future[Answer] = futures.Future()

    def finish(self, result: Answer | Exception) -> None:
        if self.answer.set_running_or_notify_cancel():  # False: the client has left
            if isinstance(result, BadInput):
                forget_frames(result)
            if isinstance(result, Exception):
                self.answer.set_exception(result)
            else:
                self.answer.set_result(result)


def forget_frames(error: BaseException | None) -> None:
    """Lets go of the frames that an exception came through.

    They hold the job that holds the exception, so that payloads and decoded pictures would stay until Python's
    collector comes by, which knows nothing of their size.
    """
    while error is not None:
        error.__traceback__, following = None, error.__cause__ or error.__context__
        error.__cause__ = error.__context__ = None
        error = following


class _Step:
    """One `yield` of a task: the job goes on when the last of its items has its result."""

    def __init__(self, job: Job, count: int) -> None:
        self.job = job
        self.results: list[Any] = [None] * count
        self.missing = count
        self.error: Exception | None = None


class Engine:
    """The one inference thread. No timer: a batch is what has gathered while the last one ran."""

    def __init__(
        self,
        holding: Callable[[Sequence[str]], AbstractContextManager[None]] | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """`holding`: entered while a batch runs, with the digests of its payloads; see `Journal`."""
        self._traffic = traffic or Traffic(TASKS)
        self.busy_since: float | None = None  # when the batch that runs now began, by time.monotonic()
        self.failed_in_a_row = 0  # batches of which not one item had a result
        self._holding = holding or (lambda digests: nullcontext())
        self._changed = threading.Condition()
        self._lines: list[Line] = []
        self._new: list[Job] = []
        self._serial = itertools.count()  # keeps the order of items that are due together
        self._text_ran_last = False
        self._stopping = False
        self.thread = threading.Thread(target=self._loop, name="inference", daemon=True)

    def line(self, name: str, run: Callable[[list[Any]], Sequence[Any]], batch_size: int, kind: int) -> Line:
        self._lines.append(Line(name, run, batch_size, kind))
        return self._lines[-1]

    def submit(self, job: Job) -> None:
        with self._changed:
            self._new.append(job)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self.thread.is_alive():
            self.thread.join(timeout=5)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._new or self._stopping or any(line.waiting for line in self._lines)):
                    self._changed.wait()
                if self._stopping:
                    return
                new, self._new = self._new, []
            for job in new:
                self._advance(job, None)
            if line := self._choose():
                self._run(line)

    def _choose(self) -> Line | None:
        """Scoring first, for it ends what has begun; text next, but never twice while others wait; then by due time."""
        waiting = [line for line in self._lines if line.waiting]
        if not waiting:
            return None
        kinds = {line.kind for line in waiting}
        if Line.SCORING in kinds:
            kind = Line.SCORING
        elif kinds == {Line.TEXT, Line.BULK}:
            kind = Line.BULK if self._text_ran_last else Line.TEXT
        else:
            kind = min(kinds)
        if kind != Line.SCORING:
            self._text_ran_last = kind == Line.TEXT
        return min((line for line in waiting if line.kind == kind), key=lambda line: line.waiting[0])

    def _advance(self, job: Job, results: list[Any] | None, error: Exception | None = None) -> None:
        """Takes a task to its next step, or to its end."""
        assert job.steps is not None  # set before submit()
        try:
            line, items = job.steps.throw(error) if error else job.steps.send(results)  # type: ignore[arg-type]
        except StopIteration as end:
            job.finish(end.value)
        except Exception as failure:
            job.finish(failure)
        else:
            step = _Step(job, len(items))
            for position, item in enumerate(items):
                step.results[position] = item
                heapq.heappush(line.waiting, (job.due, next(self._serial), step, position))

    def _run(self, line: Line) -> None:
        batch: list[tuple[_Step, int]] = []
        while line.waiting and len(batch) < line.batch_size:
            _, _, step, position = heapq.heappop(line.waiting)
            if not step.job.answer.cancelled():  # nobody waits for it any more
                batch.append((step, position))
        if not batch:
            return
        items = [step.results[position] for step, position in batch]
        digests = list(dict.fromkeys(step.job.digest for step, _ in batch if step.job.digest))
        self.busy_since = time.monotonic()
        with self._holding(digests):
            results = self._results(line, items)
        self.busy_since = None
        self._traffic.ran(line.name, len(items))
        failed = all(isinstance(result, Exception) for result in results)
        self.failed_in_a_row = self.failed_in_a_row + 1 if failed else 0
        for (step, position), result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                step.error = result
            step.results[position] = result
            step.missing -= 1
            if not step.missing:
                self._advance(step.job, step.results, step.error)

    @staticmethod
    def _results(line: Line, items: list[Any]) -> Sequence[Any]:
        """A batch that fails is run again item by item, so that one bad item fails alone."""
        try:
            log.debug("%s: batch of %d", line.name, len(items))
            return line.run(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
            log.warning("%s: a batch of %d failed, running its items alone (%s)", line.name, len(items), error)
        return [Engine._results(line, [item])[0] for item in items]


class DecodePool:
    """Threads that turn payloads into pixels, in the order of due times. Pillow frees the GIL meanwhile."""

    def __init__(self, threads: int) -> None:
        self._work: queue.PriorityQueue[tuple[float, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._serial = itertools.count()
        self._threads = [threading.Thread(target=self._loop, name=f"decode-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, due: float, work: Callable[[], None]) -> None:
        """`work` must not raise."""
        self._work.put((due, next(self._serial), work))

    def stop(self) -> None:
        for _ in self._threads:
            self._work.put((float("inf"), next(self._serial), None))
        for thread in self._threads:
            thread.join(timeout=5)

    def _loop(self) -> None:
        backends.step_back(10)
        while (work := self._work.get()[2]) is not None:
            work()


# --- models and tasks -------------------------------------------------------------------------------------------


class Model:
    """A backend with its lines. Prompts are texts nobody types a query with: they wait among the images."""

    def __init__(
        self, backend: Backend, name: str, engine: Engine, batch_size: int, tuning: backends.Tuning | None = None
    ) -> None:
        self.backend, self.tuning = backend, tuning

        def images(items: list[Any]) -> Sequence[Any]:
            return rows_of(backend.encode_images(np.stack(items)), len(items))

        def texts(items: list[Any]) -> Sequence[Any]:
            return rows_of(backend.encode_text(np.stack(items)), len(items))

        def rows_of(vectors: labels.Vectors, count: int) -> Sequence[Any]:
            if vectors.shape != (count, backend.dim):  # a fault of a runtime's, which would mix up answers
                raise RuntimeError(f"vectors of shape {vectors.shape}; expected {(count, backend.dim)}")
            return list(vectors)

        images_at_once = tuning.batch_size if tuning else batch_size
        self.image = engine.line(f"{name} image", images, images_at_once, Line.BULK)
        self.text = engine.line(f"{name} text", texts, batch_size, Line.TEXT)
        self.prompts = engine.line(f"{name} prompts", texts, batch_size, Line.BULK)
        self._known: OrderedDict[bytes, Any] = OrderedDict()  # tokens -> vector; the inference thread's alone

    def facts(self) -> dict[str, str]:
        """Meta of every answer."""
        return {"model_id": self.backend.model_id, "space": self.backend.space}

    def embed(self, tokens: Any, line: Line) -> Generator[Any, Any, list[Any]]:
        """Step: the vectors of token rows, int64 `[n, context_length]`; those at hand are not computed again."""
        keys = [np.trim_zeros(row, "b").tobytes() for row in tokens]
        found = {key: self._known[key] for key in keys if key in self._known}
        missing = {key: row for key, row in zip(keys, tokens, strict=True) if key not in found}
        if missing:
            found.update(zip(missing, (yield line, list(missing.values())), strict=True))
        for key in keys:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > TEXTS_KEPT:
            self._known.popitem(last=False)
        return [found[key] for key in keys]


class Models:
    """All that the tasks work with; `clip` or `bioclip` is None when its backend is "none"."""

    def __init__(
        self, engine: Engine, clip: Model | None, bioclip: Model | None, sets: Mapping[str, LabelSet], batch_size: int
    ) -> None:
        self.clip, self.bioclip = clip, bioclip
        self.sets = sets  # "classes", "scenes", "species"
        self._lines = {
            name: engine.line(f"{name} scoring", self._scorer(labelset), batch_size, Line.SCORING)
            for name, labelset in sets.items()
        }

    @staticmethod
    def _scorer(labelset: LabelSet) -> Callable[[list[Any]], Sequence[Any]]:
        def run(items: list[Any]) -> Sequence[Any]:
            rows = labelset.probabilities(np.stack([vector for vector, _, _ in items]))
            return [
                labelset.top(row, min(k, len(labelset)), render)
                for row, (_, k, render) in zip(rows, items, strict=True)
            ]

        return run

    def get(self, name: str) -> Model | None:
        return self.clip if name == "clip" else self.bioclip

    def ask(self, name: str) -> Model:
        """The model of a task that is offered; see `offered`."""
        model = self.get(name)
        assert model is not None
        return model

    def offered(self) -> list[Task]:
        return [task for task in TASKS.values() if all(self.get(name) for name in task.models)]

    def best(self, labelset: str, vector: Any, k: int, render: Callable[[str], str] = str) -> Generator[Any, Any, Any]:
        """Step: the k best labels of a built-in set."""
        return (yield self._lines[labelset], [(vector, k, render)])[0]

    def best_of_own(self, vector: Any, request: Request) -> Generator[Any, Any, Any]:
        """Step: the best of the labels that the caller brought."""
        clip = self.ask("clip")
        vectors = yield from clip.embed(request.tokens, clip.prompts)
        own = LabelSet(request.labels, np.stack(vectors), clip.backend.logit_scale)
        return own.top(own.probabilities(vector[None])[0], min(request.topk, len(own)))


@dataclass
class Request:
    """One whole request. The assembler fills the first part, `read_meta` the second, `prepare` the third."""

    correlation_id: str
    task: str
    mime: str
    meta: Mapping[str, str]
    payload: bytes

    topk: int = 0
    labels: tuple[str, ...] = ()
    template: str = ""
    label_format: str = "lineage"
    as_tensor: bool = False  # the answer, rather than JSON

    pixels: dict[str, Any] = field(default_factory=dict)  # model name -> uint8 [size, size, 3]
    tokens: Any = None  # int64 [n, context_length]: the text, or the caller's labels


def clip_classify(models: Models, request: Request) -> Steps:
    clip = models.ask("clip")
    vector = (yield clip.image, [request.pixels["clip"]])[0]
    if request.labels:
        best = yield from models.best_of_own(vector, request)
    else:
        best = yield from models.best("classes", vector, request.topk)
    return _labels_answer(best, clip, "clip_classification")


def bioclip_classify(models: Models, request: Request) -> Steps:
    bioclip = models.ask("bioclip")
    vector = (yield bioclip.image, [request.pixels["bioclip"]])[0]
    best = yield from models.best(
        "species", vector, request.topk, lambda lineage: labels.render_species(lineage, request.label_format)
    )
    return _labels_answer(best, bioclip, "bioclip_classification")


def smart_classify(models: Models, request: Request) -> Steps:
    clip = models.ask("clip")
    vector = (yield clip.image, [request.pixels["clip"]])[0]
    scene = yield from models.best("scenes", vector, 1)
    if scene[0][0] in labels.ANIMAL_SCENES:
        return (yield from bioclip_classify(models, request))
    return _labels_answer(scene, clip, "scene_classification")


def _embed_image(name: str) -> Callable[[Models, Request], Steps]:
    def embed(models: Models, request: Request) -> Steps:
        model = models.ask(name)
        return _embedding_answer((yield model.image, [request.pixels[name]])[0], model, request)

    return embed


def _embed_text(name: str) -> Callable[[Models, Request], Steps]:
    def embed(models: Models, request: Request) -> Steps:
        model = models.ask(name)
        return _embedding_answer((yield from model.embed(request.tokens, model.text))[0], model, request)

    return embed


def _labels_answer(best: list[tuple[str, float]], model: Model, source: str) -> Answer:
    rows = [{"label": label, "score": score} for label, score in best]
    content = {"labels": rows, "model_id": model.backend.model_id}
    return Answer("labels_v1", content, {**model.facts(), "labels_count": str(len(rows)), "source": source})


def _embedding_answer(vector: Any, model: Model, request: Request) -> Answer:
    meta = {**model.facts(), "dim": str(len(vector))}
    if request.as_tensor:
        # The Lumen SDK knows no layout for a vector; its own tests call one [1, dim] in NCHW.
        form = {"dtype": "fp32", "shape": f"[1,{len(vector)}]", "layout": "NCHW", "format": "contiguous"}
        form |= {"byte_order": "little"}
        meta |= {"lumen.output.kind": "tensor"} | {f"lumen.output.tensor.{key}": value for key, value in form.items()}
        return Answer("", vector.astype("<f4").tobytes(), meta)
    content = {"vector": vector.tolist(), "dim": len(vector), "model_id": model.backend.model_id}
    return Answer("embedding_v1", content, meta)


IMAGE_MIMES = ("image/jpeg", "image/png", "image/webp") + (("image/avif",) if "AVIF" in backends.IMAGE_FORMATS else ())
TENSOR_MIME = "application/octet-stream"
TEXT_MIMES = ("text/plain", "text/markdown", "text/html")


@dataclass(frozen=True)
class Task:
    """A row of the table: what a task takes, what it gives, and its defaults and limits."""

    name: str
    run: Callable[[Models, Request], Steps]
    models: tuple[str, ...]  # all must be loaded; capabilities list the task under the first
    takes: str  # "image" or "text"
    topk: int = 0  # default; 0: the task has none
    own_labels: bool = False
    label_formats: bool = False
    tensor: bool = False  # takes ready-made tensors, where the model's recipe has an id

    @property
    def schema(self) -> str:
        return "labels_v1" if self.topk else "embedding_v1"


TASKS = {
    task.name: task
    for task in (
        Task("clip_classify", clip_classify, ("clip",), "image", topk=5, own_labels=True),
        Task("clip_embed", _embed_text("clip"), ("clip",), "text"),
        Task("clip_image_embed", _embed_image("clip"), ("clip",), "image"),
        Task("smart_classify", smart_classify, ("clip", "bioclip"), "image", topk=3, label_formats=True),
        Task("bioclip_classify", bioclip_classify, ("bioclip",), "image", topk=3, label_formats=True, tensor=True),
        Task("bioclip_embed", _embed_text("bioclip"), ("bioclip",), "text"),
        Task("bioclip_image_embed", _embed_image("bioclip"), ("bioclip",), "image", tensor=True),
    )
}
TOPK_KEYS = ("TopK", "topK", "top_k", "top-k", "lumen.top_k", "topk")


def read_meta(task: Task, request: Request) -> None:
    """Checks the request against its task's row and fills its options. Raises BadInput, naming the field."""
    base = request.mime.partition(";")[0].strip().lower()
    fits = base.startswith("text/") if task.takes == "text" else base.startswith("image/") or base == TENSOR_MIME
    if base and not fits:
        allowed = TEXT_MIMES if task.takes == "text" else (*IMAGE_MIMES, TENSOR_MIME)
        raise BadInput(f"payload_mime: {request.mime[:80]!r}; {task.name} takes {', '.join(allowed)}")
    if not request.payload:
        raise BadInput("payload: it is empty")
    meta = request.meta
    if task.topk:
        request.topk = next((_topk(key, meta[key]) for key in TOPK_KEYS if key in meta), task.topk)
    if task.own_labels and "labels" in meta:
        request.labels = _own_labels(meta["labels"])
    if task.takes == "text" or request.labels:
        default = "a photo of a {}." if request.labels else "{}"
        request.template = meta.get("prompt_template", default)
        if request.template.count("{}") != 1 or len(request.template) > 1000:
            raise BadInput("meta prompt_template: allowed: a text with one {} in it, of at most 1000 characters")
    if not task.topk:
        kind = meta.get("lumen.output.kind", "") or "json"
        if kind not in ("json", "tensor"):
            raise BadInput(f"meta lumen.output.kind: {kind[:80]!r}; allowed: json, tensor")
        request.as_tensor = kind == "tensor"
    if task.label_formats and "label_format" in meta:
        request.label_format = meta["label_format"]
        if request.label_format not in labels.LABEL_FORMATS:
            raise BadInput(
                f"meta label_format: {meta['label_format'][:80]!r}; allowed: {', '.join(labels.LABEL_FORMATS)}"
            )


def _topk(key: str, text: str) -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit()) or not digits.strip("0"):
        raise BadInput(f"meta {key}: {text[:80]!r}; allowed: a whole number from 1 (at most {TOPK_MAX} are returned)")
    return TOPK_MAX if len(digits.lstrip("0")) > 9 else min(int(digits), TOPK_MAX)


def _own_labels(text: str) -> tuple[str, ...]:
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate is JSON, but no text
    except (ValueError, RecursionError):
        content = None
    if (
        not isinstance(content, list)
        or not 1 <= len(content) <= OWN_LABELS_MAX
        or not all(isinstance(label, str) and label.strip() and len(label) <= 1000 for label in content)
    ):
        raise BadInput(
            f"meta labels: allowed: a JSON list of 1 to {OWN_LABELS_MAX} texts, none blank or over 1000 characters"
        )
    return tuple(dict.fromkeys(content))


def prepare(task: Task, request: Request, models: Models, settings: Settings) -> None:
    """Turns the payload into what the models take: pixels for each, or token ids. Raises BadInput."""
    if task.takes == "text":
        if len(request.payload) > TEXT_BYTES_MAX:
            raise BadInput(f"payload: a text of {len(request.payload)} bytes; allowed: {TEXT_BYTES_MAX}")
        try:
            text = request.payload.decode("utf-8")
        except UnicodeDecodeError:
            raise BadInput("payload: the text is not UTF-8") from None
        if not text.strip():
            raise BadInput("payload: the text is blank")
        prompt = request.template.replace("{}", text)
        request.tokens = models.ask(task.models[0]).backend.tokenize([prompt])
        return
    recipes = {name: models.ask(name).backend.preprocess for name in task.models}
    request.pixels = _pixels(task, request, recipes, settings)
    if request.labels:
        prompts = [request.template.replace("{}", label) for label in request.labels]
        request.tokens = models.ask("clip").backend.tokenize(prompts)


def _pixels(task: Task, request: Request, recipes: Mapping[str, Preprocess], settings: Settings) -> dict[str, Any]:
    kind = request.meta.get("lumen.input.kind", "") or "raw"
    if kind == "raw":
        limit = settings.lumen_max_megapixels * 1_000_000
        pictures = backends.decode_image(request.payload, set(recipes.values()), limit, settings.lumen_jpeg_draft)
        return {name: pictures[recipe] for name, recipe in recipes.items()}
    recipe = recipes[task.models[0]]
    if kind != "tensor" or not task.tensor or not recipe.tensor_id:
        allowed = "raw, tensor" if task.tensor and recipe.tensor_id else "raw"
        raise BadInput(f"meta lumen.input.kind: {kind[:80]!r}; {task.name} takes {allowed}")
    return {task.models[0]: backends.pixels_from_tensor(request.payload, request.meta, recipe)}


# --- one stream -------------------------------------------------------------------------------------------------


class Overload(Exception):
    """The memory set aside for payloads is taken."""


class Budget:
    """Bytes of payloads that are held and not yet decoded, over all streams."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._changed = threading.Condition()

    def take(self, size: int, gone: Callable[[], bool]) -> None:
        """Waits for room, for the decoder makes some. Raises Overload if none comes or the client is gone."""
        deadline = time.monotonic() + CHUNK_IDLE_S
        with self._changed:
            while self._free < size:
                if gone() or time.monotonic() > deadline:
                    raise Overload
                self._changed.wait(1)
            self._free -= size

    def give(self, size: int) -> None:
        with self._changed:
            self._free += size
            self._changed.notify_all()


class ChunkError(ValueError):
    """Chunks that do not make a request; the text is for the client."""


class Assembler:
    """Chunks of one stream -> whole requests, keyed by the literal correlation id, which may be empty.

    Bounded in bytes and in count, never by a number that the client sent. An id that failed is answered once; the
    rest of its chunks is ignored until a chunk with seq 0 begins it anew.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._open: dict[str, dict[int, pb.InferRequest]] = {}
        self._sizes: dict[str, int] = {}
        self._failed: OrderedDict[str, None] = OrderedDict()

    def add(self, message: pb.InferRequest, payload: bytes) -> Request | None:
        """The request that this message, whose payload is handed in, completes, or None. Raises ChunkError."""
        key = message.correlation_id
        if key in self._failed:
            if message.seq > 0:
                return None
            del self._failed[key]
        try:
            return self._add(key, message, payload)
        except ChunkError:
            self.drop(key)
            self._failed[key] = None
            if len(self._failed) > OPEN_IDS_MAX:
                self._failed.popitem(last=False)
            raise

    def unfinished(self) -> list[str]:
        return list(self._open)

    def held(self) -> int:
        """Bytes of chunks that wait for the rest of their requests."""
        return sum(self._sizes.values())

    def drop(self, key: str) -> None:
        self._open.pop(key, None)
        self._sizes.pop(key, None)

    def _add(self, key: str, message: pb.InferRequest, payload: bytes) -> Request | None:
        if key not in self._open and message.total <= 1:
            if message.seq or message.offset:
                raise ChunkError(
                    f"total: {message.total} with seq {message.seq} and offset {message.offset}; "
                    "allowed: the number of chunks on each of them"
                )
            self._check_size(len(payload))
            return self._request(message, payload)
        chunks = self._open.setdefault(key, {})
        if len(self._open) > OPEN_IDS_MAX:
            raise ChunkError(f"correlation_id: more than {OPEN_IDS_MAX} unfinished requests on one stream")
        self._check_chunk(chunks, message)
        chunks[message.seq] = message
        self._sizes[key] = self._sizes.get(key, 0) + len(payload)
        self._check_size(self._sizes[key])
        if len(chunks) < message.total:
            return None
        parts = [chunks[seq] for seq in range(message.total)]
        self._check_offsets(parts)
        self.drop(key)
        return self._request(parts[0], b"".join(part.payload for part in parts))

    @staticmethod
    def _request(first: pb.InferRequest, payload: bytes) -> Request:
        return Request(first.correlation_id, first.task, first.payload_mime, dict(first.meta), payload)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise ChunkError(f"payload: over {self._max_bytes} bytes, the most that a request may have")

    @staticmethod
    def _check_chunk(chunks: Mapping[int, pb.InferRequest], message: pb.InferRequest) -> None:
        if message.total > CHUNKS_MAX:
            raise ChunkError(f"total: {message.total}; allowed: up to {CHUNKS_MAX} chunks")
        if message.seq >= message.total:
            raise ChunkError(f"seq: {message.seq} of total {message.total}; allowed: 0 to total - 1")
        if message.seq in chunks:
            raise ChunkError(f"seq: {message.seq} was sent twice")
        for first in itertools.islice(chunks.values(), 1):
            for name in ("total", "task", "payload_mime", "meta"):
                if getattr(first, name) != getattr(message, name):
                    raise ChunkError(f"{name}: it differs between the chunks of one request")

    @staticmethod
    def _check_offsets(parts: Sequence[pb.InferRequest]) -> None:
        if not any(part.offset for part in parts):  # some clients leave it at 0
            return
        length = 0
        for part in parts:
            if part.offset != length:
                raise ChunkError(f"offset: {part.offset} on chunk {part.seq}; the chunks before it have {length} bytes")
            length += len(part.payload)


@dataclass(frozen=True)
class Closing:
    """The last thing in a stream's line of jobs: how it ends."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""


class Stream:
    """One Infer call: a reader thread makes jobs of its messages, its own thread answers them in their order."""

    def __init__(self, daemon: Daemon, models: Models, messages: Iterator[pb.InferRequest], context: Any) -> None:
        self._daemon, self._models, self._messages, self._context = daemon, models, messages, context
        self._jobs: queue.SimpleQueue[Job | Closing] = queue.SimpleQueue()
        self._in_work: set[Job] = set()
        self._window = threading.Semaphore(WINDOW)
        self._assembler = Assembler(daemon.settings.lumen_max_request_mb << 20)
        self._gone = False  # the client has left or the call is over
        self._idle_since = time.monotonic()
        self._yielding_since: float | None = None  # the answer that gRPC has not taken from us yet

    def answers(self) -> Iterator[pb.InferResponse]:
        if not self._context.add_callback(self._leave):
            return
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        try:
            while isinstance(job := self._jobs.get(), Job):
                try:
                    response = self._response(job)
                except futures.CancelledError:
                    return
                self._daemon.traffic.ended(job, OUTCOMES[response.error.code])
                self._in_work.discard(job)
                self._yielding_since = time.monotonic()
                yield response
                self._yielding_since, self._idle_since = None, time.monotonic()
                self._window.release()
            if job.code is not grpc.StatusCode.OK and not self._gone:
                log.info("a stream ended: %s, %s", job.code.name, job.details)
                self._context.abort(job.code, job.details)
        finally:
            self._leave()
            for job in list(self._in_work):
                self._daemon.traffic.ended(job, "cancelled")

    def check(self, now: float) -> None:
        """Ends a stream that holds a thread for nothing. Called now and then by the daemon's main thread."""
        silent = now - self._idle_since
        if self._yielding_since is not None:
            if now - self._yielding_since > READER_IDLE_S:
                log.info("a stream ended: its client does not read")
                self._context.cancel()
        elif self._in_work:
            return
        elif self._assembler.unfinished() and silent > CHUNK_IDLE_S:
            self.close(Closing(grpc.StatusCode.DEADLINE_EXCEEDED, f"no chunk for {CHUNK_IDLE_S} s"))
        elif silent > STREAM_IDLE_S:
            self.close(Closing(grpc.StatusCode.DEADLINE_EXCEEDED, f"no request for {STREAM_IDLE_S} s"))

    def close(self, closing: Closing) -> None:
        """Answers what is in work, then ends the stream."""
        self._jobs.put(closing)

    def _leave(self) -> None:
        self._gone = True
        for job in list(self._in_work):
            job.answer.cancel()
        self._window.release()
        self._jobs.put(Closing())

    def _read(self) -> None:
        closing = Closing()
        held = 0  # bytes taken from the budget for chunks that wait for the rest of their requests
        empty = True
        try:
            for message in self._messages:
                empty = False
                self._idle_since = time.monotonic()
                payload = message.payload  # each access makes a copy
                size = len(payload)
                self._daemon.budget.take(size, lambda: self._gone)
                held += size
                try:
                    request = self._assembler.add(message, payload)
                except ChunkError as error:
                    self._start(message.correlation_id, None, BadInput(str(error)))
                else:
                    if request:
                        held -= len(request.payload)
                        self._start(request.correlation_id, request)
                self._daemon.budget.give(held - self._assembler.held())
                held = self._assembler.held()
                if self._gone:
                    break
            for key in self._assembler.unfinished():
                self._start(key, None, BadInput("total: the stream ended before the last chunk of this request"))
            if empty:
                closing = Closing(grpc.StatusCode.INVALID_ARGUMENT, "the stream carried no request")
        except Overload:
            closing = Closing(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many bytes of requests are waiting; try later")
        except grpc.RpcError:
            log.debug("a client left its stream")
        except Exception:
            log.exception("a stream's reader failed")
            closing = Closing(grpc.StatusCode.INTERNAL, "internal error")
        finally:
            self._daemon.budget.give(held)
            self._jobs.put(closing)

    def _start(self, correlation_id: str, request: Request | None, error: BadInput | None = None) -> None:
        """Puts a request in line for its answer, and to work; one that failed already has an error instead."""
        self._window.acquire()
        size = len(request.payload) if request else 0
        due = time.monotonic() + len(self._in_work) * TURN_SECONDS
        job = Job(correlation_id, due, request.task if request else "", size)
        self._daemon.traffic.queued(1)
        job.answer.add_done_callback(lambda _: self._daemon.traffic.queued(-1))
        self._in_work.add(job)
        self._jobs.put(job)
        try:
            if request is None or self._gone:
                raise error or BadInput("the client has left")
            task = self._task(request.task)
            read_meta(task, request)
        except BadInput as bad:
            self._daemon.budget.give(size)
            job.finish(bad)
            return
        if task.takes == "text":  # quick: no reason to wait among pictures
            self._prepare(job, task, request, size)
        else:
            self._daemon.decoders.submit(job.due, lambda: self._prepare(job, task, request, size))

    def _task(self, name: str) -> Task:
        offered = self._models.offered()
        for task in offered:
            if task.name == name:
                return task
        allowed = ", ".join(task.name for task in offered)
        reason = "its model is switched off here" if name in TASKS else "unknown"
        raise BadInput(f"task: {name[:80]!r} is {reason}; allowed: {allowed}")

    def _prepare(self, job: Job, task: Task, request: Request, size: int) -> None:
        try:
            if job.answer.cancelled():
                return
            job.digest = hashlib.sha256(request.payload).hexdigest()
            journal = self._daemon.journal
            journal.check(job.digest)
            with journal.holding([job.digest], "prepare"):
                prepare(task, request, self._models, self._daemon.settings)
            job.steps = task.run(self._models, request)
            self._daemon.engine.submit(job)
        except Exception as error:
            job.finish(error)
        finally:
            request.payload = b""
            self._daemon.budget.give(size)

    def _response(self, job: Job) -> pb.InferResponse:
        """Waits for a job's answer. Raises CancelledError when the client has left."""
        if error := job.answer.exception():
            return _error_response(job, error)
        answer = job.answer.result()
        try:
            result = answer.encoded()
        except Exception as error:
            return _error_response(job, error)
        self._daemon.journal.answered(job.digest)
        milliseconds = round((time.monotonic() - job.arrived) * 1000)
        return pb.InferResponse(
            correlation_id=job.correlation_id,
            is_final=True,
            result=result,
            meta={**answer.meta, "lat_ms": str(milliseconds)},
            total=1,
            result_mime=answer.mime(),
            result_schema=answer.schema,
        )


OUTCOMES = {0: "ok", pb.ERROR_CODE_INVALID_ARGUMENT: "invalid_argument", pb.ERROR_CODE_INTERNAL: "internal"}


def _error_response(job: Job, error: BaseException) -> pb.InferResponse:
    """An error has an empty result and result_mime, so that no client takes it for an answer."""
    if isinstance(error, BadInput):
        code, text = pb.ERROR_CODE_INVALID_ARGUMENT, str(error)
    else:
        # The client gets a number, the log gets the story.
        code, text = pb.ERROR_CODE_INTERNAL, f"internal error {uuid.uuid4().hex[:8]}; the daemon's log says more"
        log.error("%s", text.partition(";")[0], exc_info=error)
        forget_frames(error)
    problem = pb.Error(code=code, message=text)
    return pb.InferResponse(correlation_id=job.correlation_id, is_final=True, error=problem, total=1)


# --- the service ------------------------------------------------------------------------------------------------


class Daemon(pb_grpc.InferenceServicer):  # type: ignore[misc]
    """The four RPCs, and what they share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.journal = Journal()
        self.traffic = Traffic(TASKS)
        self.engine = Engine(self.journal.holding, self.traffic)
        self.decoders = DecodePool(min(backends.usable_cores(), 4))  # each may hold a decoded picture of 160 MB
        self.budget = Budget(4 * settings.lumen_max_request_mb << 20)
        self.health = health.HealthServicer()
        self.loading = "starting"  # said to clients until the models are there
        self._models: Models | None = None
        self._admission = threading.BoundedSemaphore(settings.lumen_max_streams)
        self._streams: set[Stream] = set()
        self._draining = False
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def serve(self, models: Models) -> None:
        """From now on requests are answered."""
        self._models = models
        self.engine.thread.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def drain(self) -> None:
        """Answers what is in work and ends every stream; the port is closed by the caller."""
        self._draining = True
        self.health.enter_graceful_shutdown()
        for stream in list(self._streams):
            stream.close(Closing(grpc.StatusCode.UNAVAILABLE, "the daemon is shutting down"))

    def check_streams(self) -> None:
        for stream in list(self._streams):
            stream.check(time.monotonic())

    def stop_serving(self) -> None:
        self._draining = True
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def trouble(self) -> str:
        """What is wrong with the inference thread, or ""."""
        engine, limit = self.engine, self.settings.lumen_hang_s
        busy_since = engine.busy_since
        if not engine.thread.is_alive():
            return "the inference thread has died"
        if busy_since is not None and time.monotonic() - busy_since > limit:
            return f"a batch has been running for over {limit} s (LUMEN_HANG_S)"
        if engine.failed_in_a_row >= FAILURES_MAX:
            return f"{engine.failed_in_a_row} batches failed in a row"
        return ""

    def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            self.health.set(name, status)

    def _ready(self, context: Any) -> Models:
        if self._draining:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the daemon is shutting down")
        if self._models is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"not ready: {self.loading}")
        assert self._models is not None
        return self._models

    def Infer(self, request_iterator: Iterator[pb.InferRequest], context: Any) -> Iterator[pb.InferResponse]:
        models = self._ready(context)
        if not self._admission.acquire(blocking=False):
            text = f"{self.settings.lumen_max_streams} Infer streams are open already; try later"
            self.traffic.turned_away("too many streams", context.peer())
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        stream = Stream(self, models, request_iterator, context)
        self._streams.add(stream)
        self.traffic.stream(1)
        try:
            yield from stream.answers()
        finally:
            self.traffic.stream(-1)
            self._streams.discard(stream)
            self._admission.release()

    def GetCapabilities(self, request: empty_pb2.Empty, context: Any) -> pb.Capability:
        models = self._ready(context)
        return self._capability("clip" if models.clip else "bioclip", models, ("clip", "bioclip"))

    def StreamCapabilities(self, request: empty_pb2.Empty, context: Any) -> Iterator[pb.Capability]:
        models = self._ready(context)
        for name in ("clip", "bioclip"):
            if models.get(name):
                yield self._capability(name, models, (name,))

    def Health(self, request: empty_pb2.Empty, context: Any) -> empty_pb2.Empty:
        """Its answer has no fields: what runs otherwise than the operator asked stands in the trailing metadata."""
        loaded = [model.backend for name in ("clip", "bioclip") if self._models and (model := self._models.get(name))]
        refusals = dict.fromkeys(back.refusal for back in loaded if back.refusal)  # ASCII: no client's, no path's text
        context.set_trailing_metadata([("lumen-degraded", f"the NPU is not used: {text}") for text in refusals])
        return empty_pb2.Empty()

    def _capability(self, service: str, models: Models, names: Sequence[str]) -> pb.Capability:
        loaded = {name: model for name in names if (model := models.get(name))}
        backs = {name: model.backend for name, model in loaded.items()}
        runtimes = list(dict.fromkeys(back.runtime for back in backs.values()))
        extra = {"version": VERSION}
        for name, back in backs.items():
            extra[f"{name}_model"] = back.model_id
            extra[f"{name}_embedding_dim"] = str(back.dim)
            extra[f"{name}_runtime"] = back.runtime
            extra[f"{name}_space"] = back.space
            if back.npu or back.refusal:
                extra[f"{name}_npu"] = back.npu or f"refused: {back.refusal}"
            if back.self_test_cosine is not None:
                extra[f"{name}_self_test"] = f"{back.self_test_cosine:.7f}"
            extra[f"{name}_batch_size"] = str(loaded[name].image.batch_size)
            if tuning := loaded[name].tuning:
                extra[f"{name}_images_per_s"] = f"{tuning.images_per_s:.1f}"
        return pb.Capability(
            service_name=service,
            model_ids=[back.model_id for back in backs.values()],
            runtime=runtimes[0] if len(runtimes) == 1 else "mixed",
            max_concurrency=self.settings.lumen_max_streams,
            precisions=sorted({back.precision for back in backs.values()}),
            extra=extra,
            tasks=[self._io_task(task, models) for task in models.offered() if task.models[0] in names],
            protocol_version=PROTOCOL_VERSION,
        )

    def _io_task(self, task: Task, models: Models) -> pb.IOTask:
        backend = models.ask(task.models[0]).backend
        limits = {"max_payload_size": str(self.settings.lumen_max_request_mb << 20)}
        if task.takes == "image":
            limits["max_pixels"] = str(self.settings.lumen_max_megapixels * 1_000_000)
        else:
            limits["max_payload_size"] = str(TEXT_BYTES_MAX)
        if task.topk:
            limits |= {"topk_default": str(task.topk), "topk_max": str(TOPK_MAX)}
        else:
            limits["dim"] = str(backend.dim)
        if task.own_labels:
            limits["labels_max"] = str(OWN_LABELS_MAX)
        tensor_id = backend.preprocess.tensor_id if task.tensor else ""
        mimes = TEXT_MIMES if task.takes == "text" else IMAGE_MIMES + ((TENSOR_MIME,) if tensor_id else ())
        return pb.IOTask(
            name=task.name,
            input_mimes=mimes,
            output_mimes=[f"application/json;schema={task.schema}"] + [TENSOR_MIME] * (not task.topk),
            limits=limits,
            tensor_preprocess_id=tensor_id,
            tensor_batching_supported=bool(tensor_id),
        )


# --- doors ------------------------------------------------------------------------------------------------------


def tls_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """None for plaintext. Raises SettingError for files that are not a certificate, its key and a CA."""
    names = "lumen_tls_cert", "lumen_tls_key", "lumen_tls_client_ca"
    paths = {name: getattr(settings, name) for name in names}
    if not any(paths.values()):
        return None
    for name, other in (names[:2], names[1::-1], (names[2], names[0])):
        if paths[name] and not paths[other]:
            raise SettingError(f"{name.upper()}={paths[name]}: needs {other.upper()} as well")
    pem: dict[str, bytes | None] = dict.fromkeys(names)
    for name, path in paths.items():
        if path:
            pem[name] = _read_setting(name, path)
    try:  # gRPC itself takes anything, and then refuses every client
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(paths[names[0]], paths[names[1]])
    except (OSError, ValueError) as error:
        text = f"not a PEM certificate that {names[1].upper()} is the key of ({error})"
        raise SettingError(f"{names[0].upper()}={paths[names[0]]}: {text}") from error
    try:
        if paths[names[2]]:
            context.load_verify_locations(paths[names[2]])
    except (OSError, ValueError) as error:
        raise SettingError(f"{names[2].upper()}={paths[names[2]]}: not a PEM certificate ({error})") from error
    certificate, key, ca = (pem[name] for name in names)
    assert certificate and key
    return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=bool(ca))


def read_token(settings: Settings, host: str) -> bytes:
    """The bearer token that every call must carry, or b"". Raises SettingError."""
    path = settings.lumen_token_file
    if not path:
        return b""
    token = _read_setting("lumen_token_file", path).strip()
    if not re.fullmatch(rb"[!-~]{16,4096}", token):
        raise SettingError(f"LUMEN_TOKEN_FILE={path}: allowed: one token of 16 printable ASCII characters or more")
    if not settings.lumen_tls_cert and not _is_loopback(host):
        text = "without LUMEN_TLS_CERT the token would travel in the clear; allowed then: --host 127.0.0.1"
        raise SettingError(f"LUMEN_TOKEN_FILE={path}: {text}")
    if Path(path).stat().st_mode & 0o077:
        log.warning("LUMEN_TOKEN_FILE=%s can be read by others on this machine; chmod 600", path)
    return token


def _read_setting(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingError(f"{name.upper()}={path}: {error.strerror}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Doorkeeper(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Turns away calls without the token, before they hold anything. The standard health service stays open.

    The refusal reads no message: one that waited for it would let silent strangers hold threads.
    """

    def __init__(self, token: bytes) -> None:
        self._expected = b"Bearer " + token

        def refuse(_: Any, context: Any) -> None:
            log.info("turned away %s: no valid token", context.peer())
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "metadata authorization: allowed: Bearer and the token")

        self._refusal = grpc.stream_stream_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        sent = [value for key, value in details.invocation_metadata if key == "authorization"]
        known = any(hmac.compare_digest(str(value).encode(), self._expected) for value in sent)
        if known or details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return continuation(details)
        return self._refusal


def start_server(daemon: Daemon, host: str, port: int) -> tuple[grpc.Server, int]:
    """Binds the port and serves; -> (server, the port). Raises OSError in one line if the port cannot be had, and
    SettingError if the doors cannot be closed as the settings say."""
    credentials, token = tls_credentials(daemon.settings), read_token(daemon.settings, host)
    family, address = (socket.AF_INET6, f"[{host}]:{port}") if ":" in host else (socket.AF_INET, f"{host}:{port}")
    with socket.socket(family) as probe:  # says why a port cannot be had; gRPC does not
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {error.strerror or error}") from error
    threads = daemon.settings.lumen_max_streams + 8  # eight more, so that Health never waits for a stream
    message_bytes = (daemon.settings.lumen_max_request_mb + 1) << 20
    server = grpc.server(
        futures.ThreadPoolExecutor(threads, "grpc"),
        maximum_concurrent_rpcs=threads,
        interceptors=[Doorkeeper(token)] if token else [],
        options=[
            ("grpc.so_reuseport", 0),  # two daemons on one port would share it without a word
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", message_bytes),
            # The Lumen SDK pings every 10 s; the defaults would end its connection with too_many_pings.
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            # A peer that is gone is noticed within 40 s; without ping_timeout_ms it takes 90.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 10_000),
        ],
    )
    pb_grpc.add_InferenceServicer_to_server(daemon, server)
    health_pb2_grpc.add_HealthServicer_to_server(daemon.health, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    server.start()
    return server, bound


def load_models(settings: Settings, engine: Engine, say: Callable[[str], None]) -> Models:
    """Loads what the settings ask for; `say` is told what is being done. Raises BackendError or LabelError."""
    loaded: dict[str, Model | None] = {"clip": None, "bioclip": None}
    sets: dict[str, LabelSet] = {}
    notices: list[str] = []
    for name in loaded:
        if settings.backend_of(name) == "none":
            continue
        options = settings.options(name)
        # Clients are told this too: a file's name, and not where it lies.
        where = "" if options.model.startswith("hf-hub:") else "[^:]*/"
        say(f"loading {re.sub(where, '', options.model)} ({options.backend})")
        backend = backends.create_backend(options)
        folder = settings.lumen_data_dir / name / backend.runtime / backend.model_id.replace("/", "--")
        tuning = None
        if settings.lumen_tune:
            say(f"trying how {backend.model_id} runs best here")
            tuning = backends.tuned(backend, settings.batch_size_of(name), folder)
        loaded[name] = Model(backend, name, engine, settings.batch_size_of(name), tuning)
        log.info(
            "%s: %s on %s, %d dimensions, %s", name, backend.model_id, backend.runtime, backend.dim, backend.precision
        )
        if backend.notice and backend.notice not in notices:
            notices.append(backend.notice)
            log.warning("%s: %s", backend.model_id, backend.notice)
        sets |= _label_sets(name, backend, folder, settings, say)
        if name == "bioclip":
            # Only bioclip_embed asks for it from here on, and BioCLIP-2's takes half a gigabyte. People who search do
            # so with CLIP's, which stays.
            backend.rest_text()
    return Models(engine, loaded["clip"], loaded["bioclip"], sets, settings.batch_size)


def _label_sets(
    name: str, backend: Backend, folder: Path, settings: Settings, say: Callable[[str], None]
) -> dict[str, LabelSet]:
    """`folder` keeps what belongs to this model on this runtime."""

    def encode(texts: list[str]) -> labels.Vectors:
        return backend.encode_text(backend.tokenize(texts))

    if name == "clip":
        names = labels.class_names(settings.lumen_data_dir, settings.clip_labels)
        own = settings.clip_labels
        recipe = (labels.names_recipe if own else labels.imagenet_recipe)(settings.clip_templates)
        older = sorted((settings.lumen_data_dir / name).glob("*_imagenet_vectors.npz"))
    else:
        names = labels.species_names(settings.lumen_data_dir, settings.bioclip_labels)
        recipe = labels.SPECIES_RECIPE
        older = [settings.lumen_data_dir / name / "text_vectors.npz"]
    say(f"text vectors of {len(names)} labels for {backend.model_id}")
    vectors = labels.cached_vectors(
        folder,
        names,
        recipe,
        encode,
        labels.CacheKey.of(names, recipe, backend.model_id, backend.dim),
        older,
        lambda done, total: say(f"computing text vectors for {backend.model_id}: {done} of {total} labels"),
    )
    if name == "bioclip":
        return {"species": LabelSet(names, vectors, backend.logit_scale, backend.similarities)}
    scenes = labels.label_vectors(labels.SCENES, labels.SCENE_RECIPE, encode)
    return {
        "classes": LabelSet(names, vectors, backend.logit_scale, backend.similarities),
        "scenes": LabelSet(labels.SCENES, scenes, backend.logit_scale),
    }


# --- being found and being supervised ---------------------------------------------------------------------------


def advertised_ip(host: str) -> str | None:
    """The one IPv4 address that the LAN reaches us at, or None. Nothing is sent, and no internet is needed."""
    if host not in ("0.0.0.0", "::"):
        try:
            own = ipaddress.ip_address(host)
        except ValueError:
            return None
        return None if own.version == 6 or own.is_loopback else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("224.0.0.251", 5353))  # the mDNS group: the kernel names the interface it would use
            found = str(probe.getsockname()[0])
        except OSError:
            return None
    return None if ipaddress.ip_address(found).is_loopback else found


def is_own(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


class Beacon:
    """The mDNS advertisement. It stands only while the models answer; a network without mDNS costs a warning."""

    def __init__(self, settings: Settings, host: str, port: int, runtime: str) -> None:
        self._settings, self._host, self._port = settings, host, port
        self._runtime = runtime
        self._zeroconf: Any = None
        self._address: str | None = ""  # of which is announced; None: there is none
        self.look_around()

    def look_around(self) -> None:
        """Announces the address that the LAN reaches us at, if it is another one than before.

        Boards start before their network, cables are pulled, and routers give out new addresses.
        """
        if not self._settings.clip_mdns_type:
            return
        address = self._settings.advertise_ip or advertised_ip(self._host)
        if address == self._address:
            return
        self.close()
        self._address = address
        if address is None:
            log.warning("mDNS: no address that others could reach; set ADVERTISE_IP to be found")
            return
        try:
            self._announce(address)
        except Exception as error:  # zeroconf raises its own kinds and OSError; none is worth the service
            log.warning("mDNS: not advertised (%s: %s)", type(error).__name__, error)

    def _announce(self, address: str) -> None:
        from zeroconf import InterfaceChoice, IPVersion, ServiceInfo, Zeroconf

        settings = self._settings
        properties = {
            "uuid": settings.clip_mdns_uuid or kept_uuid(settings.lumen_data_dir),
            "status": settings.clip_mdns_status,
            "version": settings.clip_mdns_version,
            "v": settings.clip_mdns_version,
            "runtime": self._runtime,
            **({"tls": "1"} if settings.lumen_tls_cert else {}),
        }
        # An address that is not ours (a container's host, say) is announced on all interfaces.
        interfaces = [address] if is_own(address) else InterfaceChoice.All
        zeroconf = self._zeroconf = Zeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)
        for kind in settings.clip_mdns_type:
            info = ServiceInfo(
                kind,
                f"{settings.clip_mdns_name}.{kind}",
                port=self._port,
                properties=properties,
                server=f"lumen-clip-{properties['uuid'][:8]}.local.",
                addresses=[socket.inet_aton(address)],
            )
            zeroconf.register_service(info, allow_name_change=True)
            log.info("mDNS: %s at %s:%d", info.name, address, self._port)

    def close(self) -> None:
        """Says goodbye, so that clients forget us at once."""
        if self._zeroconf:
            try:
                self._zeroconf.unregister_all_services()
                self._zeroconf.close()
            except Exception as error:  # as above; the network may be gone
                log.warning("mDNS: no goodbye (%s: %s)", type(error).__name__, error)
            self._zeroconf = None


def kept_uuid(data_dir: Path) -> str:
    """This node's name across restarts."""
    path = data_dir / "uuid"
    try:
        return str(uuid.UUID(path.read_text().strip()))
    except (OSError, ValueError):
        fresh = str(uuid.uuid4())
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        backends.replace_file(path, f"{fresh}\n".encode())
    except OSError as error:
        log.warning("cannot keep the node's uuid in %s (%s)", path, error)
    return fresh


def notify(state: str) -> None:
    """Tells systemd, when it has started us (sd_notify's one datagram)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


# --- main -------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "lumen_clip.py", description="CLIP and BioCLIP-2 over gRPC. Settings come from the environment; see README.md."
    )
    parser.add_argument("--port", type=int, default=50051, help="0 takes a free one (default: 50051)")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all, IPv4)")
    parser.add_argument("--demo", action="store_true", help="serve the small emoji model in gen/demo; not announced")
    parser.add_argument("--doctor", action="store_true", help="say what keeps the daemon from running here, and leave")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", default="text", choices=("text", "json"))
    parser.add_argument("--version", action="version", version=f"lumen-clip {VERSION}")
    parsed = parser.parse_args(arguments)
    if not 0 <= parsed.port <= 65535:
        parser.error(f"--port {parsed.port}: allowed: 0 to 65535")
    parsed.host = parsed.host.strip("[]")
    return parsed


def demo_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The demo's models in place of the operator's. Photo apps do not find it unless CLIP_MDNS_TYPE says so."""
    mdns = {"CLIP_MDNS_TYPE": "off"}
    kept = {
        name: value
        for name, value in environment.items()
        if name.startswith("CLIP_MDNS_") or not name.startswith(("CLIP_", "BIOCLIP_"))
    }
    return mdns | kept | DEMO


def trim_memory() -> None:
    """Has glibc give freed memory back to the system; left alone it keeps that of pictures for each thread.

    Done now and then, for it costs milliseconds; a limit on what malloc keeps (M_MMAP_THRESHOLD) costs as much for
    each photograph that arrives.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:  # musl has none
        trim(0)


def load_in_background(daemon: Daemon, done: Callable[[Models | BaseException], None]) -> None:
    """Loads on its own thread, so that signals and RPCs are heard meanwhile."""

    def say(text: str) -> None:
        daemon.loading = text
        notify(f"STATUS={text}")

    def load() -> None:
        try:
            done(load_models(daemon.settings, daemon.engine, say))
        except BaseException as error:
            done(error)

    threading.Thread(target=load, name="load", daemon=True).start()


def serve_metrics(daemon: Daemon, host: str) -> None:
    """Raises SettingError."""
    port = daemon.settings.lumen_metrics_port
    try:
        watch.serve_metrics(daemon.traffic, host, port)
    except ImportError:
        text = "prometheus-client is not installed; pip install prometheus-client"
        raise SettingError(f"LUMEN_METRICS_PORT={port}: {text}") from None
    except OSError as error:
        raise SettingError(f"LUMEN_METRICS_PORT={port}: {error.strerror or error}") from None


def see_the_doctor(options: argparse.Namespace) -> int:
    """Says line by line what the configuration depends on; -> 1 if it cannot run here."""
    try:
        import doctor
    except ImportError:
        print("lumen-clip: --doctor: doctor.py is not here; copy it beside lumen_clip.py", file=sys.stderr)
        return 2
    findings = []
    environment: Mapping[str, str] = demo_environment(os.environ) if options.demo else os.environ
    try:
        settings = Settings.from_environment(environment)
    except SettingError as error:
        findings.append(("settings", doctor.FAILURE, f"{error}; the rest is of the defaults"))
        settings = Settings()
    return doctor.report(findings + doctor.examine(doctor.Visit(settings, options.host, options.port)))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # The level is ours; libraries speak when something is wrong.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if options.log_format == "json":
        logging.root.handlers[0].setFormatter(watch.JSONLines())
        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # bars are no JSON
    log.setLevel(options.log_level.upper())
    if options.doctor:
        return see_the_doctor(options)
    try:
        settings = Settings.from_environment(demo_environment(os.environ) if options.demo else os.environ)
        daemon = Daemon(settings)
        if settings.lumen_metrics_port:
            serve_metrics(daemon, options.host)
        server, port = start_server(daemon, options.host, options.port)
    except (SettingError, OSError) as error:
        print(f"lumen-clip: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    daemon.journal.open(settings.lumen_data_dir)
    log.info("listening on %s port %d; loading models", options.host, port)

    events: queue.SimpleQueue[Models | BaseException | None] = queue.SimpleQueue()  # None: told to stop
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: events.put(None))
    load_in_background(daemon, events.put)
    event = events.get()
    if event is None:
        log.info("stopped while loading")
        _leave(0)
    if isinstance(event, BaseException):
        _report(event)
        _leave(1)
    assert isinstance(event, Models)
    daemon.serve(event)
    capability = daemon.GetCapabilities(empty_pb2.Empty(), None)
    beacon = Beacon(settings, options.host, port, capability.runtime)
    trim_memory()
    notify("READY=1\nSTATUS=serving")
    log.info("ready: %s", ", ".join(task.name for task in event.offered()))
    if trouble := supervise(daemon, beacon, events):
        log.critical("%s; leaving, so that a supervisor starts the daemon again", trouble)
        daemon.stop_serving()
        beacon.close()
        server.stop(None).wait(2)  # what is in work has no one who could answer it
        _leave(1)

    notify("STOPPING=1")
    log.info("stopping: answering what is in work")
    beacon.close()
    daemon.drain()
    server.stop(DRAIN_S).wait()
    daemon.decoders.stop()
    daemon.engine.stop()
    daemon.traffic.say(0)
    log.info("stopped")
    return 0


def supervise(daemon: Daemon, beacon: Beacon, events: queue.SimpleQueue[Models | BaseException | None]) -> str:
    """Waits for the signal to stop and looks after the streams meanwhile; -> "" or what is wrong with inference.

    systemd is told that all is well only while the inference thread gets on: nothing else cures a driver that hangs.
    """
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    beat = min(5.0, watchdog or 5.0, daemon.settings.lumen_hang_s / 2)
    while True:
        try:
            events.get(timeout=beat)
            return ""
        except queue.Empty:
            daemon.check_streams()
            beacon.look_around()
            trim_memory()
            daemon.traffic.say(TRAFFIC_LOG_S)
        if trouble := daemon.trouble():
            return trouble
        if watchdog:
            notify("WATCHDOG=1")


def _report(error: BaseException) -> None:
    if isinstance(error, BackendError | LabelError):
        print(f"lumen-clip: {error}", file=sys.stderr)
    else:
        log.critical("loading the models failed", exc_info=error)


def _leave(status: int) -> None:
    """Ends the process while a load may be deep in native code, which an orderly exit would wait for."""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
