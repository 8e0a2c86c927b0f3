"""The four RPCs of `home_native.v1.Inference`, the capabilities, and the gRPC server."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from concurrent import futures
from functools import partial
from typing import Any

import grpc
from google.protobuf import empty_pb2

import machine
import tasks
from decode_pool import DecodePool
from engine import TENSOR_MIME, Engine
from gen import ml_service_pb2 as pb
from intake import Intake
from journal import Journal
from machine import clock
from metrics import Traffic
from security import SHORT_CALLS_MAX, ShortCalls, TokenInterceptor, read_token, stream_handler, tls_credentials
from settings import VERSION, Settings
from species import LABEL_FORMATS, RANKS
from streams import OPEN_PER_PLACE, READING_S, SHUTTING_DOWN, Stream, Streams
from tasks import TASKS, Models, Task

log = logging.getLogger("lumen.service")

PROTOCOL_VERSION = "1.0"
SERVICE = "home_native.v1.Inference"
KEEPALIVE_S, KEEPALIVE_PATIENCE_S = 30, 10  # seconds between pings to a client, and for its answer
# Seconds after which gRPC asks the client to open a new connection; the old one ends with its last stream. The photo
# app reads the capabilities once per connection, so it learns within a minute that species have become available.
CONNECTION_AGE_S = 45
NO_LIMIT = 2**31 - 1  # the largest number that gRPC's options take
CONNECTIONS_MAX = 4096
HTTP_CONNECTIONS_MAX = 256  # of the port for immich, whose server opens a few
FILES_RESERVED = 48  # open files that are no connections: models, caches, the log, mDNS
FAILURES_MAX = 3  # batches of a tower that may fail in a row before the process ends, to start again


class Daemon:
    """The four RPCs and what they share: the engine, the intake, the open streams, the models."""

    def __init__(self, settings: Settings, journal: Journal | None = None) -> None:
        self.settings = settings
        self.journal = journal or Journal()
        self.traffic = Traffic(TASKS)
        cores = machine.usable_cores()
        decoders = DecodePool(cores)
        self.engine = Engine(self.journal.holding, self.traffic, cores, decoders.busy)
        self.intake = Intake(settings, self.journal, self.traffic, self.engine, decoders)
        self.short_calls = ShortCalls(SERVICE, self.alive)
        self.loading = "starting"  # the reason that clients are given while the models load
        self._models: Models | None = None
        self.streams = Streams(settings.lumen_max_streams, self.intake)
        self.traffic.open_streams.set_function(self.streams.count_open)

    def serve(self, models: Models) -> None:
        """Starts answering requests."""
        self.engine.start()
        self._models = models
        if models.operator_sets and models.clip:
            models.operator_sets.start(models.clip.encoder(self.engine))
        self.short_calls.set_serving(True)

    def serving(self) -> Models | None:
        """The models, or None while they load and after the daemon was told to stop."""
        return None if self.streams.draining else self._models

    def reload(self) -> None:
        """Has the operator's label sets read again."""
        if self._models and self._models.operator_sets:
            log.info("reading the label sets again")
            self._models.operator_sets.reload()

    def drain(self, seconds: float) -> None:
        """Refuses new calls, and ends each stream after its requests are answered. Waits up to `seconds`."""
        self.short_calls.health.enter_graceful_shutdown()
        self.streams.drain(seconds)

    def check(self) -> None:
        """Ends calls that occupy a thread or memory without need. The main thread calls this every few seconds."""
        self.streams.check()
        self.short_calls.cancel_expired()

    def make_room(self) -> int:
        """Ends calls that wait for a message; -> how many of them were streams. For when memory is short."""
        self.short_calls.cancel_expired(READING_S)
        return self.streams.make_room()

    def trouble(self) -> str:
        """What is wrong with the threads of the engine or the decode pool, or ""."""
        engine, decoders, limit = self.engine, self.intake.decoders, self.settings.lumen_hang_s
        if not (engine.is_alive() and decoders.is_alive()):
            return "a thread of the engine or of the decoders has died"
        busy = {"a batch or a task's step": engine.busy_since, "the preparation of a request": decoders.busy_since}
        for what, since in busy.items():
            if since is not None and clock.now() - since > limit:
                return f"{what} has been running for over {limit} s (LUMEN_HANG_S)"
        for tower, count in engine.failures.copy().items():
            if count >= FAILURES_MAX:
                return f"{tower}: {count} batches failed in a row"
        return ""

    def alive(self) -> bool:
        """Whether the process should go on: while the models load, and as long as inference has no trouble."""
        return self._models is None or not self.trouble()

    def handlers(self) -> dict[str, Any]:
        """The handlers of the four RPCs. Those that take Empty do not wait for it: silent calls hold nothing."""
        empty = empty_pb2.Empty
        return {
            "Infer": stream_handler(self.Infer, pb.InferRequest, pb.InferResponse),
            "GetCapabilities": stream_handler(self.GetCapabilities, empty, pb.Capability),
            "StreamCapabilities": stream_handler(self.StreamCapabilities, empty, pb.Capability),
            "Health": stream_handler(self.Health, empty, empty),
        }

    def _ready(self, context: Any) -> Models:
        if self.streams.draining:
            context.abort(SHUTTING_DOWN.code, SHUTTING_DOWN.details)
        if self._models is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"not ready: {self.loading}")
        assert self._models is not None
        return self._models

    def Infer(self, request_iterator: Iterator[pb.InferRequest], context: Any) -> Iterator[pb.InferResponse]:
        stream = Stream(self.streams, self._ready(context), request_iterator, context)
        if not self.streams.admit(stream):
            text = f"{self.settings.lumen_max_streams} Infer streams are open already; try later"
            self.traffic.count_rejected("too many streams", context.peer())
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if not context.add_callback(partial(self.streams.remove, stream)):
            self.streams.remove(stream)
        if self.streams.draining:  # since `_ready`, so that `drain` may not have seen this stream
            stream.close(SHUTTING_DOWN)
        return stream.responses()

    def GetCapabilities(self, _: Any, context: Any) -> Iterator[pb.Capability]:
        models = self._ready(context)
        yield self._capability("clip" if models.clip else "bioclip", models, ("clip", "bioclip"), models.offered())

    def StreamCapabilities(self, _: Any, context: Any) -> Iterator[pb.Capability]:
        """One for each model. The Lumen SDK sends tensors for `semantic_image_embed` to a service "siglip" alone, so
        the semantic tasks have one of their own if their model takes such tensors."""
        models = self._ready(context)
        apart = [task for task in models.offered() if task.models == ("semantic",)]
        if not any(task.tensor_id(models.loaded["semantic"].backend.preprocess) for task in apart):
            apart = []
        for name in ("clip", "bioclip"):
            if model := models.loaded.get(name):
                offered = [task for task in models.offered() if models.loaded.get(task.models[0]) is model]
                yield self._capability(name, models, (name,), [task for task in offered if task not in apart])
        if apart:
            yield self._capability("siglip", models, (models.semantic,), apart)

    def Health(self, _: Any, context: Any) -> Iterator[empty_pb2.Empty]:
        """Empty has no fields, so the trailing metadata says what does not run as the operator asked."""
        backs = [model.backend for model in self._models.loaded.values()] if self._models else []
        refusals = dict.fromkeys(back.refusal for back in backs if back.refusal)  # always ASCII
        context.set_trailing_metadata([("lumen-degraded", f"the NPU is not used: {text}") for text in refusals])
        yield empty_pb2.Empty()

    def _capability(self, service: str, models: Models, names: Sequence[str], offered: Sequence[Task]) -> pb.Capability:
        loaded = {name: model for name in names if (model := models.loaded.get(name))}
        backs = {name: model.backend for name, model in loaded.items()}
        runtimes = list(dict.fromkeys(back.runtime for back in backs.values()))
        extra = {"version": VERSION}
        for name, back in backs.items():
            extra[f"{name}_model"] = back.model_id
            extra[f"{name}_embedding_dim"] = str(back.dim)
            extra[f"{name}_runtime"] = back.runtime
            extra[f"{name}_space"] = back.space
            if back.logit_bias is not None:
                extra[f"{name}_scores"] = "softmax,sigmoid"
            if back.npu or back.refusal:
                extra[f"{name}_npu"] = back.npu or f"refused: {back.refusal}"
            if back.self_test_cosine is not None:
                extra[f"{name}_self_test"] = f"{back.self_test_cosine:.7f}"
            extra[f"{name}_lanes"] = str(back.workers)
            extra[f"{name}_batch_size"] = str(loaded[name].image.batch_size)
            extra[f"{name}_single_image_cores"] = str(back.single_image_cores)
            if tuning := loaded[name].tuning:
                extra[f"{name}_images_per_s"] = f"{tuning.images_per_s:.1f}"
        if "bioclip" in loaded:
            there = f"{len(models.species):,} species" if models.species else "none"
            extra["bioclip_labels"] = str(models.progress or there)
        if "clip" in loaded and models.operator_sets:
            extra |= models.operator_sets.facts()
        return pb.Capability(
            service_name=service,
            model_ids=[back.model_id for back in backs.values()],
            runtime=runtimes[0] if len(runtimes) == 1 else "mixed",
            max_concurrency=self.settings.lumen_max_streams,
            precisions=sorted({back.precision for back in backs.values()}),
            extra=extra,
            tasks=[self._io_task(task, models) for task in offered],
            protocol_version=PROTOCOL_VERSION,
        )

    def _io_task(self, task: Task, models: Models) -> pb.IOTask:
        backend = models.loaded[task.models[0]].backend
        text = task.takes == "text"
        limits = {"max_payload_size": str(tasks.TEXT_BYTES_MAX if text else self.intake.request_bytes_max)}
        if not text:
            limits["max_pixels"] = str(self.settings.lumen_max_megapixels * 1_000_000)
        if task.topk:
            limits |= {"topk_default": str(task.topk), "topk_max": str(tasks.TOPK_MAX)}
        else:
            limits["dim"] = str(backend.dim)
        if task.species:
            limits |= {"label_formats": ",".join(LABEL_FORMATS), "ranks": ",".join((*RANKS, "auto"))}
            limits["within_max"] = str(tasks.TAXA_MAX)
        if task.caller_labels:
            limits["labels_max"] = str(tasks.CALLER_LABELS_MAX)
        tensor_id = task.tensor_id(backend.preprocess)
        mimes = tasks.TEXT_MIMES if text else tasks.IMAGE_MIMES + ((TENSOR_MIME,) if tensor_id else ())
        return pb.IOTask(
            name=task.name,
            input_mimes=mimes,
            output_mimes=[f"application/json;schema={task.schema}"] + [TENSOR_MIME] * (not task.topk),
            limits=limits,
            tensor_preprocess_id=tensor_id,
            tensor_batching_supported=bool(tensor_id),
        )


def start_server(daemon: Daemon, host: str, port: int) -> tuple[grpc.Server, int]:
    """Binds the port and starts the server; -> (server, port).

    Raises OSError with one line if the port cannot be bound, and SettingError if the TLS or token files are not valid.
    """
    credentials, token = tls_credentials(daemon.settings), read_token(daemon.settings, host)
    family, address = (socket.AF_INET6, f"[{host}]:{port}") if ":" in host else (socket.AF_INET, f"{host}:{port}")
    with socket.socket(family) as probe:  # gives the reason if it cannot be bound; gRPC does not
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {error.strerror or error}") from error
    # For streams, for short calls, and for as many calls that are being rejected.
    threads = OPEN_PER_PLACE * daemon.settings.lumen_max_streams + 2 * SHORT_CALLS_MAX
    files = FILES_RESERVED + (HTTP_CONNECTIONS_MAX if daemon.settings.lumen_immich_port else 0)
    message_bytes = (daemon.settings.lumen_max_request_mb + 1) << 20
    server = grpc.server(
        futures.ThreadPoolExecutor(threads, "grpc"),
        maximum_concurrent_rpcs=threads,
        interceptors=[TokenInterceptor(token, daemon.traffic.count_rejected)] if token else [],
        options=[
            ("grpc.so_reuseport", 0),  # otherwise two daemons on one port would share its connections
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", message_bytes),
            # The Lumen SDK sends a ping every 10 s. The defaults would end its connection with too_many_pings.
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_connection_age_ms", 1000 * CONNECTION_AGE_S),
            ("grpc.max_connection_age_grace_ms", NO_LIMIT),
            # A lost connection is noticed within 40 s; without ping_timeout_ms it would take 90 s.
            ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_S),
            ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_PATIENCE_S),
            ("grpc.http2.ping_timeout_ms", 1000 * KEEPALIVE_PATIENCE_S),
            # Per connection, and more than all connections need. Without it, calls that are opened and reset at once
            # accumulate in gRPC.
            ("grpc.max_concurrent_streams", 4 * threads),
            ("grpc.max_allowed_incoming_connections", machine.files_for(CONNECTIONS_MAX, files)),
            ("grpc.server_handshake_timeout_ms", 20_000),  # for silent connections; the default is two minutes
            # No client compresses photographs, and 60 kB could become 64 MB before we see it.
            ("grpc.compression_enabled_algorithms_bitset", 1),
        ],
    )
    for name, handlers in (SERVICE, daemon.handlers()), *daemon.short_calls.handlers().items():
        # A queue for each method, so that many calls of one method do not delay Health.
        server.add_registered_method_handlers(name, handlers)  # type: ignore[attr-defined]
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    server.start()
    return server, bound
