"""The Infer streams: they turn requests into jobs, send the responses in order, and limit the number of streams."""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from chunks import ID_MAX, Assembler
from engine import Job, forget_frames
from errors import BadInput, NotReady, Overload
from gen import ml_service_pb2 as pb
from intake import Intake
from machine import clock
from security import MALFORMED, internal_error
from tasks import Models, Request

log = logging.getLogger("lumen.streams")

# Maximum requests in progress per stream, or two batches for each worker if that is more. Beyond it the server stops
# reading (backpressure).
WINDOW = 32
# Time limits in seconds. The daemon ends a stream that exceeds one of those from CHUNK_IDLE_S to READING_S. A place is
# one of LUMEN_MAX_STREAMS.
CHUNK_IDLE_S = 30  # time without the next chunk of an incomplete request
STREAM_IDLE_S = 300  # time without a request in progress
WANTED_IDLE_S = 30  # the same, while another stream waits for a place
READER_IDLE_S = 60  # time in which the client does not read a response
UPLOAD_S = 20  # age of an incomplete request, while others have waited for memory for WANTED_BYTES_S
READING_S = 0.5  # time that the reader has waited for a complete message, while memory is short
WANTED_BYTES_S = 2  # see UPLOAD_S
ANSWERED_S = 1  # time that a new stream waits for the place of a stream that may end soon; see `Stream.may_end`
# Time between the last response and the error that ends the stream. HAProxy 2.6 discards a response if it receives both
# at once.
LAST_RESPONSE_S = 0.1
OPEN_PER_PLACE = 2  # limit on all open streams, as a multiple of the places; see `Stream.needs_place`


@dataclass(frozen=True)
class Closing:
    """The last entry in a stream's queue of jobs: the status with which it ends."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""


ENDED = Closing()
SHUTTING_DOWN = Closing(grpc.StatusCode.UNAVAILABLE, "the daemon is shutting down")


class Stream:
    """One Infer call. A reader thread turns its messages into jobs; gRPC's thread sends the responses in order."""

    _numbers = itertools.count()

    def __init__(self, streams: Streams, models: Models, messages: Iterator[pb.InferRequest], context: Any) -> None:
        self._streams, self._intake, self._models = streams, streams.intake, models
        self._messages, self._context = messages, context
        self.connection: str = context.peer()  # its address and port
        self._flow = self.connection, next(self._numbers)
        self._jobs: queue.SimpleQueue[Job | Closing] = queue.SimpleQueue()
        self._in_progress: set[Job] = set()
        self._window, self._window_size = threading.Semaphore(WINDOW), WINDOW
        self.assembler = Assembler(self._intake.request_bytes_max)
        self._queueing = threading.Lock()  # guards the order of `_jobs`
        self._closed = False  # `_jobs` contains a Closing
        self._gone = False  # the client has left or the call is over
        self._held = 0  # bytes taken from the budget for incomplete requests
        self._idle_since = clock.now()
        self.reading_since = math.inf  # when the reader began to wait for a message; infinity if it does not
        self._yielding_since = math.inf  # when gRPC began to send the current response; infinity if there is none
        self._answered_since = -math.inf  # when the last request in progress was answered
        self._half_closed = False  # the client sends no more requests
        self.over = False  # its thread has ended

    def responses(self) -> Iterator[pb.InferResponse]:
        answered = 0
        try:
            threading.Thread(target=self._read, name="reader", daemon=True).start()
            while isinstance(job := self._jobs.get(), Job):
                response, outcome = _response(job)
                self._intake.finished(job, outcome)
                self._yielding_since = self._answered_since = clock.now()
                self._in_progress.discard(job)
                if not self.needs_place():
                    self._streams.place_may_be_free()
                yield response
                self._yielding_since, self._idle_since = math.inf, clock.now()
                self._window.release()
                answered += 1
            if job.code is not grpc.StatusCode.OK and not self._gone:
                log.info("a stream ended: %s, %s", job.code.name, job.details)
                if answered:
                    time.sleep(LAST_RESPONSE_S)
                self._context.abort(job.code, job.details)
        except futures.CancelledError:
            pass  # the client has left
        finally:
            log.debug("a stream is over after %d answers, %d were not sent", answered, len(self._in_progress))
            self.leave()
            for job in list(self._in_progress):
                self._intake.finished(job, "cancelled")
            self.over = True

    def check(self, now: float) -> None:
        """Ends a stream that is idle, or whose client does not read. The main thread calls this every few seconds."""
        silent = self.silent(now)
        if now - self._yielding_since > READER_IDLE_S and not self._gone:
            log.info("a stream ended: the client does not read its responses")
            self._gone = True
            self._context.cancel()
        elif self.assembler.unfinished() and silent > CHUNK_IDLE_S:
            self.close(Closing(grpc.StatusCode.DEADLINE_EXCEEDED, f"no chunk for {CHUNK_IDLE_S} s"))
        elif silent > STREAM_IDLE_S:
            self.close(Closing(grpc.StatusCode.DEADLINE_EXCEEDED, f"no request for {STREAM_IDLE_S} s"))

    def needs_place(self) -> bool:
        """Whether the stream counts for LUMEN_MAX_STREAMS.

        It does not when the client sends no more requests and all are answered, or when it has left. It may then open
        its next stream before gRPC has ended this one.
        """
        return not (self._gone or (self._half_closed and not self._in_progress))

    def may_end(self, now: float) -> bool:
        """Whether the last request was answered just now, so that the client may be about to end the stream."""
        return not self._in_progress and now - self._answered_since < ANSWERED_S

    def silent(self, now: float) -> float:
        """Seconds for which the stream has had no request in progress."""
        return 0.0 if self._in_progress or self._yielding_since < math.inf else now - self._idle_since

    def close(self, closing: Closing) -> None:
        """Ends the stream after the requests in progress are answered. Later requests are not begun."""
        with self._queueing:
            self._closed = True
            self._jobs.put(closing)

    def leave(self) -> None:
        """Cancels the requests in progress: the client has left or the call is over."""
        self._gone = True
        for job in list(self._in_progress):
            job.answer.cancel()
        self._window.release()
        self._jobs.put(ENDED)

    def _read(self) -> None:
        closing = Closing(grpc.StatusCode.INVALID_ARGUMENT, "the stream carried no request")
        try:
            self.reading_since = clock.now()
            for message in self._messages:
                self.reading_since, self._idle_since = math.inf, clock.now()
                closing = ENDED
                if message is MALFORMED:
                    closing = Closing(grpc.StatusCode.INVALID_ARGUMENT, "a message is not an InferRequest")
                    break
                self._take(message)
                del message  # otherwise it stays in memory until the next one arrives
                if self._gone:
                    break
                self.reading_since = clock.now()
            self.reading_since = math.inf
            for key in self.assembler.unfinished():
                if self._gone:
                    break
                error = BadInput("total: the stream ended before the last chunk of this request")
                self._start(Request(key, "", "", {}, b""), error)
            self._half_closed = True
            self._streams.place_may_be_free()
        except Overload:
            closing = Closing(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many bytes of requests are waiting; try later")
        except grpc.RpcError:
            self._gone = True
        except Exception as error:
            closing = Closing(grpc.StatusCode.INTERNAL, internal_error(error))
        finally:
            self.reading_since = math.inf
            self._intake.payloads.give(self._held)
            self._jobs.put(closing)

    def _take(self, message: pb.InferRequest) -> None:
        """Adds a message to its request, and starts the request if it is complete. Raises Overload."""
        payload = message.payload  # each access makes a copy
        message.ClearField("payload")
        room, has_begun = self.assembler.room_for(message, payload)
        self._intake.payloads.take(room, lambda: self._gone, CHUNK_IDLE_S, has_begun)
        self._held += room
        try:
            request = self.assembler.add(message, payload)
        except BadInput as error:
            self._start(Request(message.correlation_id[:ID_MAX], "", "", {}, b""), error)
        else:
            if request:
                self._held -= request.held
                self._start(request)
        kept = self.assembler.held()
        self._intake.payloads.give(self._held - kept)
        self._held = kept

    def _start(self, request: Request, error: BadInput | None = None) -> None:
        """Adds a job to the queue of responses and starts it. With `error` the request has failed already."""
        wider = 2 * self._models.images_at_once() - self._window_size  # the tuning may have found larger batches
        if wider > 0:
            self._window.release(wider)
            self._window_size += wider
        self._window.acquire()
        job = self._intake.job(request, self._flow)
        with self._queueing:
            if self._closed:
                job.answer.cancel()
            else:
                self._in_progress.add(job)
                self._jobs.put(job)
        if self._gone:  # `leave` may have run before this job was added
            job.answer.cancel()
        if error:
            job.finish(error)
        else:
            self._intake.begin(job, request, self._models, alone=self._in_progress == {job})


# The outcome and the code of a request that fails.
FAILURES: dict[type[Any], tuple[str, Any]] = {
    BadInput: ("invalid_argument", pb.ERROR_CODE_INVALID_ARGUMENT),
    NotReady: ("unavailable", pb.ERROR_CODE_UNAVAILABLE),
    Exception: ("internal", pb.ERROR_CODE_INTERNAL),  # any other
}


def _response(job: Job) -> tuple[pb.InferResponse, str]:
    """Waits for the answer to a job; -> (response, outcome). Raises CancelledError if the client has left.

    With an error, result and result_mime are empty, so that no client reads the response as an answer.
    """
    try:
        answer = job.answer.result()
        response = pb.InferResponse(
            correlation_id=job.correlation_id,
            is_final=True,
            result=answer.encoded(),
            meta={**answer.meta, "lat_ms": str(round((time.monotonic() - job.arrived) * 1000))},
            total=1,
            result_mime=answer.mime(),
            result_schema=answer.schema,
        )
        return response, "ok"
    except futures.CancelledError:
        raise
    except Exception as error:
        outcome, code = FAILURES.get(type(error), FAILURES[Exception])
        text = internal_error(error) if outcome == "internal" else str(error)
        text = text.encode("utf-8", "replace").decode()  # protobuf takes no lone surrogates
        forget_frames(error)  # those of this function too, which hold the job
        problem = pb.Error(code=code, message=text)
        return pb.InferResponse(correlation_id=job.correlation_id, is_final=True, error=problem, total=1), outcome


class Streams:
    """The open Infer streams: admits new ones, and ends those that are idle or hold memory for nothing."""

    def __init__(self, most: int, intake: Intake) -> None:
        """`most`: the number of places; see `Stream.needs_place`."""
        self._most, self.intake = most, intake
        self._streams: set[Stream] = set()  # contains a stream until gRPC has sent its final status
        self._changed = threading.Condition()
        self.draining = False

    def admit(self, stream: Stream) -> bool:
        """Admits a stream if there is a place, or if one becomes free within ANSWERED_S.

        The first stream of a connection may exceed the limit, so that one client cannot occupy all places.
        """
        with self._changed:
            if not self._has_place(stream):
                now = clock.now()
                ends = self._end_a_silent_stream(now) or any(other.may_end(now) for other in self._streams)
                if not (ends and self._changed.wait_for(partial(self._has_place, stream), ANSWERED_S)):
                    return False
            self._streams.add(stream)
        return True

    def _has_place(self, stream: Stream) -> bool:
        taken = [other for other in self._streams if other.needs_place()]
        first = all(other.connection != stream.connection for other in taken)
        return (first or len(taken) < self._most) and self.count_open() < OPEN_PER_PLACE * self._most

    def count_open(self) -> int:
        """The number of streams whose thread has not ended."""
        return sum(not stream.over for stream in list(self._streams))

    def _end_a_silent_stream(self, now: float) -> bool:
        """Ends the stream that has been silent for longest, if that is at least WANTED_IDLE_S."""
        silent = max(self._streams, key=lambda stream: stream.silent(now))
        if silent.silent(now) < WANTED_IDLE_S:
            return False
        text = f"no request for {WANTED_IDLE_S} s, and other clients needed its place"
        silent.close(Closing(grpc.StatusCode.DEADLINE_EXCEEDED, text))
        return True

    def place_may_be_free(self) -> None:
        """A stream calls this when it no longer needs its place."""
        with self._changed:
            self._changed.notify_all()

    def remove(self, stream: Stream) -> None:
        """gRPC calls this when it has sent the final status of a stream, or when the client has left."""
        stream.leave()
        with self._changed:
            self._streams.discard(stream)
            self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Ends every stream after its requests are answered, and waits up to `seconds` for that."""
        self.draining = True
        for stream in list(self._streams):
            stream.close(SHUTTING_DOWN)
        with self._changed:
            self._changed.wait_for(lambda: not self._streams, seconds)

    def check(self) -> None:
        """Ends streams that occupy memory or a place without need."""
        now, streams = clock.now(), list(self._streams)
        for stream in streams:
            stream.check(now)
        oldest = min(streams, key=lambda stream: stream.assembler.since(), default=None)
        if oldest and now - oldest.assembler.since() > UPLOAD_S and self.intake.payloads.waited() > WANTED_BYTES_S:
            text = f"a request has been incomplete for over {UPLOAD_S} s, and others wait for its memory; try later"
            oldest.close(Closing(grpc.StatusCode.RESOURCE_EXHAUSTED, text))

    def make_room(self) -> int:
        """Ends each stream whose reader has waited for a complete message for READING_S. Returns their number.

        This is called when memory is short. gRPC buffers up to LUMEN_MAX_REQUEST_MB of each message before it passes it
        on, and has no limit for all messages together. Requests in progress are answered first.
        """
        now = clock.now()
        slow = [stream for stream in list(self._streams) if now - stream.reading_since > READING_S]
        for stream in slow:
            stream.close(Closing(grpc.StatusCode.RESOURCE_EXHAUSTED, "memory is short; try later, or in chunks"))
        return len(slow)
