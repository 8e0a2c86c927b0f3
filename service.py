"""The four RPCs of `home_native.v1.Inference`: requests to jobs, answers in their order.

Each Infer call has two threads: a reader, which makes jobs of messages, and gRPC's own, which answers them.
"""

from __future__ import annotations

import itertools
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf import empty_pb2
from grpc_health.v1 import health, health_pb2

import machine
from assembly import ID_MAX, Assembler, ChunkError, Overload
from engine import TENSOR_MIME, Engine, Job, forget_frames
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from inputs import BadInput
from intake import Intake
from journal import Journal
from logs import Traffic
from machine import clock
from security import (
    MALFORMED,
    SHORT_CALLS_MAX,
    ShortCallLimiter,
    TokenInterceptor,
    hide_exceptions,
    internal_error,
    read_token,
    short_call_handlers,
    tls_credentials,
    tolerant_parser,
)
from settings import VERSION, Settings
from tasks import (
    IMAGE_MIMES,
    OWN_LABELS_MAX,
    TASKS,
    TAXA_MAX,
    TEXT_BYTES_MAX,
    TEXT_MIMES,
    TOPK_MAX,
    Models,
    NotReady,
    Request,
    Task,
)
from taxa import LABEL_FORMATS, RANKS

log = logging.getLogger("lumen.service")

PROTOCOL_VERSION = "1.0"
SERVICE = "home_native.v1.Inference"
WINDOW = 32  # requests of one stream in work; then its reader waits, and the client with it
CHUNK_IDLE_S = 30  # between two chunks of one request
STREAM_IDLE_S = 300  # of a stream that has nothing in work
READER_IDLE_S = 60  # of a client that does not read its answer
WANTED_BYTES_S = 2  # of waiting for memory, after which the oldest incomplete request is ended
UPLOAD_S = 20  # for which a request in chunks may be incomplete while others wait for memory
WANTED_IDLE_S = 30  # of a stream that has nothing in work, when all places are taken and somebody wants one
ANSWERED_S = 1  # after its last answer a stream may be about to end; so long a new stream waits for its place
READING_S = 0.5  # of a message that is on its way, when memory is short
KEEPALIVE_S, KEEPALIVE_PATIENCE_S = 30, 10  # between pings that a peer must answer, and for its answer
# Of a connection; gRPC then asks the client to open another one, and ends this one after its last stream. The photo app
# reads the capabilities once per connection, so it learns within a minute of species that are there now.
CONNECTION_AGE_S = 45
NO_LIMIT = 2**31 - 1  # of a number in gRPC's options
OPEN_PER_PLACE = 2  # streams, those included that need no place; see `Stream.needs_place`
CONNECTIONS_MAX = 4096
FILES_OF_OURS = 48  # models, caches, the log, mDNS
FAILURES_MAX = 3  # batches in a row that fail as a whole; a model that does so needs a new start


@dataclass(frozen=True)
class Closing:
    """The last thing in a stream's line of jobs: how it ends."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""


SHUTTING_DOWN = Closing(grpc.StatusCode.UNAVAILABLE, "the daemon is shutting down")


class Stream:
    """One Infer call: a reader thread makes jobs of its messages, its own thread answers them in their order."""

    _numbers = itertools.count()

    def __init__(self, daemon: Daemon, models: Models, messages: Iterator[pb.InferRequest], context: Any) -> None:
        self._daemon, self._models, self._messages, self._context = daemon, models, messages, context
        self.connection: str = context.peer()  # its address and port
        self._flow = self.connection, next(self._numbers)
        self._jobs: queue.SimpleQueue[Job | Closing] = queue.SimpleQueue()
        self._in_work: set[Job] = set()
        self._window = threading.Semaphore(WINDOW)
        self._assembler = Assembler(daemon.settings.lumen_max_request_mb << 20)
        self._line = threading.Lock()  # of who puts what into the line of jobs
        self._closed = False  # a closing stands in it
        self._gone = False  # the client has left or the call is over
        self._held = 0  # bytes taken from the budget for chunks that wait for the rest of their requests
        self._idle_since = clock.now()
        self._reading_since: float | None = None  # when the reader began to wait for a message
        self._yielding_since: float | None = None  # the answer that gRPC has not taken from us yet
        self._answered_since: float | None = None  # when the last request in work was answered
        self._half_closed = False  # the client sends no more
        self.over = False  # its thread has gone

    def answers(self) -> Iterator[pb.InferResponse]:
        if not self._context.add_callback(self._leave):
            return
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        answered = 0
        try:
            while isinstance(job := self._jobs.get(), Job):
                try:
                    response = self._response(job)
                except futures.CancelledError:
                    return
                self._daemon.traffic.count_request(job, OUTCOMES[response.error.code])
                self._yielding_since = clock.now()
                self._in_work.discard(job)
                self._answered_since = self._yielding_since
                if not self.needs_place():
                    self._daemon.place_may_be_free()
                yield response
                self._yielding_since, self._idle_since = None, clock.now()
                self._window.release()
                answered += 1
            if job.code is not grpc.StatusCode.OK and not self._gone:
                log.info("a stream ended: %s, %s", job.code.name, job.details)
                self._context.abort(job.code, job.details)
        finally:
            log.debug("a stream is over after %d answers%s", answered, ", cut off" if self._gone else "")
            self._leave()
            for job in list(self._in_work):
                self._daemon.traffic.count_request(job, "cancelled")

    def check(self, now: float) -> None:
        """Ends a stream that holds a thread for nothing. Called now and then by the daemon's main thread."""
        silent = now - self._idle_since
        if self._yielding_since is not None:
            if now - self._yielding_since > READER_IDLE_S and not self._gone:
                log.info("a stream ended: its client does not read")
                self._gone = True
                self._context.cancel()
        elif self._in_work:
            return
        elif self._assembler.unfinished() and silent > CHUNK_IDLE_S:
            self.close(Closing(grpc.StatusCode.DEADLINE_EXCEEDED, f"no chunk for {CHUNK_IDLE_S} s"))
        elif silent > STREAM_IDLE_S:
            self.close(Closing(grpc.StatusCode.DEADLINE_EXCEEDED, f"no request for {STREAM_IDLE_S} s"))

    def needs_place(self) -> bool:
        """Whether the stream counts for LUMEN_MAX_STREAMS: not once all is answered and the client sends no more.

        A client that has its answer may open its next stream before gRPC has ended this one.
        """
        done = self._half_closed and not self._in_work
        return not (done or self._gone)

    def may_end(self, now: float) -> bool:
        """Whether all was answered just now, so that the client may be about to close the stream."""
        return not self._in_work and self._answered_since is not None and now - self._answered_since < ANSWERED_S

    def uploading(self, now: float) -> float:
        """Seconds since the oldest of its unfinished requests began; negative if there is none."""
        return now - self._assembler.since()

    def silent(self, now: float) -> float:
        """Seconds for which the stream has had nothing in work."""
        return 0.0 if self._in_work or self._yielding_since is not None else now - self._idle_since

    def reading(self, now: float) -> float:
        """Seconds for which a message has been on its way, or none has been."""
        return 0.0 if self._reading_since is None else now - self._reading_since

    def close(self, closing: Closing) -> None:
        """Answers what is in work, then ends the stream. What comes from now on is not begun: the end answers it."""
        with self._line:
            self._closed = True
            self._jobs.put(closing)

    def _leave(self) -> None:
        self._gone = True
        for job in list(self._in_work):
            job.answer.cancel()
        self._window.release()
        self._jobs.put(Closing())

    def _read(self) -> None:
        closing = Closing()
        try:
            empty = True
            self._reading_since = clock.now()
            for message in self._messages:
                self._reading_since, self._idle_since = None, clock.now()
                empty = False
                if message is MALFORMED:
                    closing = Closing(grpc.StatusCode.INVALID_ARGUMENT, "bytes that are no InferRequest")
                    break
                self._take(message)
                del message  # else it stays until the next one comes
                if self._gone:
                    break
                self._reading_since = clock.now()
            self._reading_since = None
            for key in self._assembler.unfinished():
                if self._gone:
                    break
                self._start(key, None, BadInput("total: the stream ended before the last chunk of this request"))
            self._half_closed = True
            self._daemon.place_may_be_free()
            if empty:
                closing = Closing(grpc.StatusCode.INVALID_ARGUMENT, "the stream carried no request")
        except Overload:
            closing = Closing(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many bytes of requests are waiting; try later")
        except grpc.RpcError:
            self._gone = True
        except Exception as error:
            closing = Closing(grpc.StatusCode.INTERNAL, internal_error(error))
        finally:
            self._reading_since = None
            self._daemon.intake.payloads.give(self._held)
            self._jobs.put(closing)

    def _take(self, message: pb.InferRequest) -> None:
        """One message into the assembler, and the request that it completes to work. Raises Overload."""
        payload = message.payload  # each access makes a copy
        message.ClearField("payload")
        room, has_begun = self._assembler.room_for(message, payload)
        self._daemon.intake.payloads.take(room, lambda: self._gone, CHUNK_IDLE_S, has_begun)
        self._held += room
        try:
            request = self._assembler.add(message, payload)
        except ChunkError as error:
            self._start(message.correlation_id[:ID_MAX], None, BadInput(str(error)))
        else:
            if request:
                self._held -= request.held
                self._start(request.correlation_id, request)
        kept = self._assembler.held()
        self._daemon.intake.payloads.give(self._held - kept)
        self._held = kept

    def _start(self, correlation_id: str, request: Request | None, error: BadInput | None = None) -> None:
        """Puts a request in line for its answer, and to work; one that failed already has an error instead."""
        self._window.acquire()
        job = self._daemon.intake.job(correlation_id, self._flow, request)
        with self._line:
            if self._closed:
                job.answer.cancel()
            else:
                self._in_work.add(job)
                self._jobs.put(job)
        if self._gone:  # `_leave` may not have seen this job
            job.answer.cancel()
        if error:
            job.finish(error)
        if request:
            self._daemon.intake.begin(job, request, self._models, alone=self._in_work == {job})

    def _response(self, job: Job) -> pb.InferResponse:
        """Waits for a job's answer. Raises CancelledError when the client has left."""
        if error := job.answer.exception():
            return _error_response(job, error)
        answer = job.answer.result()
        milliseconds = round((time.monotonic() - job.arrived) * 1000)
        try:
            response = pb.InferResponse(
                correlation_id=job.correlation_id,
                is_final=True,
                result=answer.encoded(),
                meta={**answer.meta, "lat_ms": str(milliseconds)},
                total=1,
                result_mime=answer.mime(),
                result_schema=answer.schema,
            )
        except Exception as error:
            return _error_response(job, error)
        self._daemon.journal.answered(job.digest)
        return response


OUTCOMES = {
    0: "ok",
    pb.ERROR_CODE_INVALID_ARGUMENT: "invalid_argument",
    pb.ERROR_CODE_UNAVAILABLE: "unavailable",
    pb.ERROR_CODE_INTERNAL: "internal",
}


def _error_response(job: Job, error: BaseException) -> pb.InferResponse:
    """An error has an empty result and result_mime, so that no client takes it for an answer."""
    if isinstance(error, BadInput):
        code, text = pb.ERROR_CODE_INVALID_ARGUMENT, str(error)
    elif isinstance(error, NotReady):
        code, text = pb.ERROR_CODE_UNAVAILABLE, str(error)
    else:
        code, text = pb.ERROR_CODE_INTERNAL, internal_error(error)
        forget_frames(error)
    text = text.encode("utf-8", "replace").decode()  # protobuf takes no lone surrogates
    problem = pb.Error(code=code, message=text)
    return pb.InferResponse(correlation_id=job.correlation_id, is_final=True, error=problem, total=1)


# --- the service ------------------------------------------------------------------------------------------------


class Daemon(pb_grpc.InferenceServicer):  # type: ignore[misc]
    """The four RPCs, and what they share."""

    def __init__(self, settings: Settings, journal: Journal | None = None) -> None:
        self.settings = settings
        self.journal = journal or Journal()
        self.traffic = Traffic(TASKS)
        self.engine = Engine(self.journal.holding, self.traffic, machine.usable_cores())
        self.intake = Intake(settings, self.journal, self.traffic, self.engine)
        self.health = health.HealthServicer()
        self.short_calls = ShortCallLimiter()
        self.loading = "starting"  # said to clients until the models are there
        self._models: Models | None = None
        self._streams: set[Stream] = set()  # a stream stays until gRPC has sent its status
        self._streams_changed = threading.Condition()
        self._draining = False
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def serve(self, models: Models) -> None:
        """From now on requests are answered."""
        self._models = models
        self.engine.start()
        if models.own and models.clip:
            models.own.watch(models.clip.encoder(self.engine))
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def drain(self, seconds: float) -> None:
        """Ends every stream once its requests are answered, refuses new ones, and waits so long for all of that."""
        self._draining = True
        self.health.enter_graceful_shutdown()
        for stream in list(self._streams):
            stream.close(SHUTTING_DOWN)
        with self._streams_changed:
            self._streams_changed.wait_for(lambda: not self._streams, seconds)

    def check_streams(self) -> None:
        now = clock.now()
        streams = list(self._streams)
        for stream in streams:
            stream.check(now)
        oldest = max(streams, key=lambda stream: stream.uploading(now), default=None)
        if oldest and oldest.uploading(now) > UPLOAD_S and self.intake.payloads.waited() > WANTED_BYTES_S:
            text = f"a request has been incomplete for over {UPLOAD_S} s, and others wait for its memory; try later"
            oldest.close(Closing(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
        self.short_calls.cancel_expired(time.monotonic())

    def make_room(self) -> int:
        """When memory is short: ends the streams whose next message has been on its way for a while; -> how many.

        gRPC holds up to LUMEN_MAX_REQUEST_MB of each before we see a byte of it, and has no limit over all. Whatever is
        in work is answered first.
        """
        now = clock.now()
        slow = [stream for stream in list(self._streams) if stream.reading(now) > READING_S]
        for stream in slow:
            stream.close(Closing(grpc.StatusCode.RESOURCE_EXHAUSTED, "memory is short; try later, or in chunks"))
        self.short_calls.cancel_expired(time.monotonic(), READING_S)
        return len(slow)

    def stop_serving(self) -> None:
        self._draining = True
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def trouble(self) -> str:
        """What is wrong with the threads that do the work, or ""."""
        engine, decoders, limit = self.engine, self.intake.decoders, self.settings.lumen_hang_s
        if not (engine.is_alive() and decoders.is_alive()):
            return "a thread of the engine or of the decoders has died"
        for what, since in (
            ("a batch or a task's step", engine.busy_since),
            ("the preparation of a request", decoders.busy_since),
        ):
            if since is not None and clock.now() - since > limit:
                return f"{what} has been running for over {limit} s (LUMEN_HANG_S)"
        for tower, count in engine.failures.copy().items():
            if count >= FAILURES_MAX:
                return f"{tower}: {count} batches failed in a row"
        return ""

    def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            self.health.set(name, status)

    def handlers(self) -> dict[str, Any]:
        """The four RPCs for gRPC. Those that take Empty do not wait for it, so that who sends none holds nothing."""

        def unread(method: Callable[[empty_pb2.Empty, Any], Any]) -> Callable[[Any, Any], Iterator[Any]]:
            return lambda _, context: iter((method(empty_pb2.Empty(), context),))

        def streamed(_: Any, context: Any) -> Iterator[pb.Capability]:
            return self.StreamCapabilities(empty_pb2.Empty(), context)

        empty, capability = empty_pb2.Empty, pb.Capability
        methods = {
            "Infer": (self.Infer, tolerant_parser(pb.InferRequest.FromString), pb.InferResponse.SerializeToString),
            "GetCapabilities": (unread(self.GetCapabilities), empty.FromString, capability.SerializeToString),
            "StreamCapabilities": (streamed, empty.FromString, capability.SerializeToString),
            "Health": (unread(self.Health), empty.FromString, empty.SerializeToString),
        }
        return {
            name: grpc.stream_stream_rpc_method_handler(hide_exceptions(behaviour), read, write)
            for name, (behaviour, read, write) in methods.items()
        }

    def _ready(self, context: Any) -> Models:
        if self._draining:
            context.abort(SHUTTING_DOWN.code, SHUTTING_DOWN.details)
        if self._models is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"not ready: {self.loading}")
        assert self._models is not None
        return self._models

    def Infer(self, request_iterator: Iterator[pb.InferRequest], context: Any) -> Iterator[pb.InferResponse]:
        models = self._ready(context)
        stream = Stream(self, models, request_iterator, context)
        if not self._admit(stream):
            text = f"{self.settings.lumen_max_streams} Infer streams are open already; try later"
            self.traffic.count_rejected("too many streams", context.peer())
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self.traffic.count_streams(1)
        try:
            if not context.add_callback(partial(self._remove_stream, stream)):
                self._remove_stream(stream)
            if self._draining:  # since `_ready`, so that `drain` may not have seen this stream
                stream.close(SHUTTING_DOWN)
            yield from stream.answers()
        finally:
            stream.over = True
            self.traffic.count_streams(-1)

    def _admit(self, stream: Stream) -> bool:
        """Gives the stream a place, if there is one now or if one may become free in a moment.

        The first stream of a connection may exceed the limit, so that one client cannot take all places from others.
        """
        with self._streams_changed:
            if not self._has_place(stream):
                now = clock.now()
                ends = self._end_a_silent_stream(now) or any(other.may_end(now) for other in self._streams)
                if not (ends and self._streams_changed.wait_for(partial(self._has_place, stream), ANSWERED_S)):
                    return False
            self._streams.add(stream)
        return True

    def _has_place(self, stream: Stream) -> bool:
        taken = [other for other in self._streams if other.needs_place()]
        most = self.settings.lumen_max_streams
        first = all(other.connection != stream.connection for other in taken)
        still_open = sum(not other.over for other in self._streams)
        return (first or len(taken) < most) and still_open < OPEN_PER_PLACE * most

    def _end_a_silent_stream(self, now: float) -> bool:
        """Ends the stream that has had nothing in work for longest, if that is long."""
        silent = max(self._streams, key=lambda stream: stream.silent(now))
        if silent.silent(now) < WANTED_IDLE_S:
            return False
        text = f"no request for {WANTED_IDLE_S} s, and others wanted the place"
        silent.close(Closing(grpc.StatusCode.DEADLINE_EXCEEDED, text))
        return True

    def place_may_be_free(self) -> None:
        """To be called when a stream no longer needs its place."""
        with self._streams_changed:
            self._streams_changed.notify_all()

    def _remove_stream(self, stream: Stream) -> None:
        with self._streams_changed:
            self._streams.discard(stream)
            self._streams_changed.notify_all()

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
            extra[f"{name}_lanes"] = str(back.lanes)
            extra[f"{name}_batch_size"] = str(loaded[name].image.batch_size)
            if tuning := loaded[name].tuning:
                extra[f"{name}_images_per_s"] = f"{tuning.images_per_s:.1f}"
        if "bioclip" in loaded:
            there = f"{len(models.species):,} species" if models.species else "none"
            extra["bioclip_labels"] = str(models.progress or there)
        if "clip" in loaded and models.own:
            extra |= models.own.facts()
        return pb.Capability(
            service_name=service,
            model_ids=[back.model_id for back in backs.values()],
            runtime=runtimes[0] if len(runtimes) == 1 else "mixed",
            max_concurrency=self.settings.lumen_max_streams,
            precisions=sorted({back.precision for back in backs.values()}),
            extra=extra,
            tasks=[self._io_task(task, models) for task in models.offered() if models.name_of(task.models[0]) in names],
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
        if task.species:
            limits |= {"label_formats": ",".join(LABEL_FORMATS), "ranks": ",".join((*RANKS, "auto"))}
            limits["within_max"] = str(TAXA_MAX)
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


def start_server(daemon: Daemon, host: str, port: int) -> tuple[grpc.Server, int]:
    """Binds the port and serves; -> (server, the port). Raises OSError in one line if the port cannot be had, and
    SettingError if the TLS or token files cannot be used."""
    credentials, token = tls_credentials(daemon.settings), read_token(daemon.settings, host)
    family, address = (socket.AF_INET6, f"[{host}]:{port}") if ":" in host else (socket.AF_INET, f"{host}:{port}")
    with socket.socket(family) as probe:  # says why a port cannot be had; gRPC does not
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {error.strerror or error}") from error
    # Beside the streams: calls that are over in a moment, and as many that are just being refused.
    threads = OPEN_PER_PLACE * daemon.settings.lumen_max_streams + 2 * SHORT_CALLS_MAX
    message_bytes = (daemon.settings.lumen_max_request_mb + 1) << 20
    server = grpc.server(
        futures.ThreadPoolExecutor(threads, "grpc"),
        maximum_concurrent_rpcs=threads,
        interceptors=[TokenInterceptor(token, daemon.traffic.count_rejected)] if token else [],
        options=[
            ("grpc.so_reuseport", 0),  # two daemons on one port would share it without a word
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", message_bytes),
            # The Lumen SDK pings every 10 s; the defaults would end its connection with too_many_pings.
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_connection_age_ms", 1000 * CONNECTION_AGE_S),
            ("grpc.max_connection_age_grace_ms", NO_LIMIT),
            # A peer that is gone is noticed within 40 s; without ping_timeout_ms it takes 90.
            ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_S),
            ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_PATIENCE_S),
            ("grpc.http2.ping_timeout_ms", 1000 * KEEPALIVE_PATIENCE_S),
            # Of a connection. More than all may use; without it streams that are opened and reset pile up in gRPC.
            ("grpc.max_concurrent_streams", 4 * threads),
            ("grpc.max_allowed_incoming_connections", machine.files_for(CONNECTIONS_MAX, FILES_OF_OURS)),
            ("grpc.server_handshake_timeout_ms", 20_000),  # and not two minutes, for connections that say nothing
            # Nobody packs photographs; what 60 kB can swell to, before we see it, is 64 MB.
            ("grpc.compression_enabled_algorithms_bitset", 1),
        ],
    )
    short = short_call_handlers(daemon.short_calls, daemon.health, SERVICE)
    for name, handlers in (SERVICE, daemon.handlers()), *short.items():
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
        # A queue for each method, so that a flood of one does not stand in the way of Health.
        server.add_registered_method_handlers(name, handlers)  # type: ignore[attr-defined]
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    server.start()
    return server, bound
