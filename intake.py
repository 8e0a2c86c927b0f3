"""Turns a complete request into a job: checks it, prepares its payload within limits, and submits it to the engine.

This file knows nothing of gRPC. Whatever a request contains, its job finishes and releases what it held.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from decode_pool import DecodePool
from engine import Engine, Job
from errors import Overload
from fair_queue import Flow
from journal import Journal
from metrics import Traffic
from settings import Settings
from tasks import Models, Request, Task, find_task, prepare, prepared_bytes, read_meta

log = logging.getLogger("lumen.intake")

PREPARED_MAX = 256 << 20  # bytes of pixels, labels and token ids that wait for the model, over all streams
# Longer texts wait in the fair order: cleaning 64 KB of short lines takes half a second, during which the GIL is held.
SHORT_TEXT_BYTES = 1024
TASK_NAME_SHOWN = 80  # characters of a task's name that are kept for the log


class Budget:
    """A limit over all streams: on bytes of payloads, on pixels in the decoders, on prepared input of the models.

    First come, first served. Otherwise a large request would wait for ever, while small ones take what is released.
    Requests that have begun and need more come first, so that they are completed.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self.used = limit, 0
        self._lock = threading.RLock()  # entering it costs less than entering the condition
        self._changed = threading.Condition(self._lock)
        self._waiting: OrderedDict[object, float] = OrderedDict()  # tickets in their order -> waiting since

    def take(self, size: int, gone: Callable[[], bool], patience: float = math.inf, has_begun: bool = False) -> None:
        """Takes `size`, and waits up to `patience` seconds until there is enough.

        Raises Overload if there is not, or if the client has left (`gone`). `has_begun`: the request holds a part.
        """
        with self._lock:
            if not self._waiting and self.used + size <= self._limit:
                self.used += size
                return
            deadline, ticket = time.monotonic() + patience, object()
            self._waiting[ticket] = time.monotonic()
            if has_begun:
                self._waiting.move_to_end(ticket, last=False)
            try:
                while self.used + size > self._limit or next(iter(self._waiting)) is not ticket:
                    if gone() or time.monotonic() > deadline:
                        raise Overload
                    self._changed.wait(min(1.0, max(0.0, deadline - time.monotonic()) + 0.01))
                self.used += size
            finally:
                del self._waiting[ticket]
                self._changed.notify_all()  # there may be enough for the next one as well

    def overdraw(self, size: int) -> None:
        """Takes `size` at once, even beyond the limit. Later callers of `take` wait longer."""
        with self._lock:
            self.used += size

    def give(self, size: int) -> None:
        with self._lock:
            self.used -= size
            if self._waiting:
                self._changed.notify_all()

    def waited(self) -> float:
        """Seconds since the longest wait in progress began; negative if nothing waits."""
        with self._lock:
            return time.monotonic() - min(self._waiting.values(), default=math.inf)


class Lease:
    """A part of a budget, which is given back at the latest when `answer` is there or cancelled. Thread-safe."""

    def __init__(self, budget: Budget, size: int, answer: Future[Any]) -> None:
        self._budget, self._size = budget, size
        self._lock = threading.Lock()
        answer.add_done_callback(lambda _: self.shrink(0))

    def shrink(self, size: int) -> None:
        """Gives back all but `size`."""
        with self._lock:
            surplus, self._size = max(self._size - size, 0), min(self._size, size)
        if surplus:
            self._budget.give(surplus)


class Intake:
    """Starts jobs, within the limits on memory and in the fair order of the decode pool. Thread-safe."""

    def __init__(
        self, settings: Settings, journal: Journal, traffic: Traffic, engine: Engine, decoders: DecodePool
    ) -> None:
        self._settings, self._journal, self._traffic, self._engine = settings, journal, traffic, engine
        self.decoders = decoders
        self.request_bytes_max = settings.lumen_max_request_mb << 20
        self.payloads = Budget(4 * self.request_bytes_max)  # bytes of requests that are not prepared yet
        self.pixels = Budget(settings.lumen_max_megapixels * 1_000_000)  # in the decoders, of all pictures together
        self.prepared = Budget(PREPARED_MAX)

    def job(self, request: Request, flow: Flow) -> Job:
        """Creates the job of a request; `begin` starts it."""
        job = Job(request.correlation_id, request.task[:TASK_NAME_SHOWN], len(request.payload), flow)
        self._engine.expect(job)
        return job

    def begin(self, job: Job, request: Request, models: Models, alone: bool = False) -> None:
        """Starts a job, and takes over the `request.held` bytes of `payloads`, which it gives back.

        Waits while too many prepared requests wait for the models, unless the client has no other request in progress
        (`alone`). Does not raise: errors finish the job. A job that is already over only gives back.
        """
        payload = Lease(self.payloads, request.held, job.answer)
        if job.answer.done():
            return
        try:
            task = find_task(models, request.task)
            read_meta(task, request)
            most = prepared_bytes(task, request, models)
            if alone:
                self.prepared.overdraw(most)
            else:
                self.prepared.take(most, job.answer.cancelled)
            prepared = Lease(self.prepared, most, job.answer)
            work = partial(self._prepare, job, task, request, models, payload, prepared)
            if task.takes == "text" and len(request.payload) <= SHORT_TEXT_BYTES:
                work()()  # at once, so that short texts do not wait behind pictures
            else:
                self.decoders.submit(job.flow, job.answer, work)
        except Exception as error:
            job.finish(error)

    def finished(self, job: Job, outcome: str) -> None:
        """Counts a request that was answered, or whose client has left ("cancelled")."""
        seconds = time.monotonic() - job.arrived
        self._traffic.count_request(job.task, seconds, outcome)
        # %a and the limits keep a client from writing lines into the log.
        text = "request %a: %a, %d bytes, %d ms, %s"
        log.debug(text, job.correlation_id[:40], job.task[:40], job.size, 1000 * seconds, outcome)
        if outcome == "ok":
            self._journal.answered(job.digest)

    def _prepare(
        self, job: Job, task: Task, request: Request, models: Models, payload: Lease, prepared: Lease
    ) -> Callable[[], None]:
        """Turns the payload into pixels or token ids; -> what submits the job to the engine. Does not raise."""
        began = time.thread_time()
        try:
            if job.answer.done():
                return lambda: None
            if task.takes == "image":
                job.digest = hashlib.sha256(request.payload).hexdigest()
                self._journal.check(job.digest)
            with self._journal.holding([job.digest] if job.digest else [], "prepare"):
                prepare(task, request, models, self._settings, partial(self._room, job.answer.cancelled))
            prepared.shrink(prepared_bytes(task, request, models))
            job.prepared_s = time.thread_time() - began
            job.steps = task.run(models, request)
            return partial(self._engine.submit, job)
        except Exception as error:
            job.finish(error)
            return lambda: None
        finally:
            request.payload, request.meta = b"", {}
            payload.shrink(0)

    @contextmanager
    def _room(self, cancelled: Callable[[], bool], pixels: int) -> Iterator[None]:
        with self.decoders.waiting():
            self.pixels.take(pixels, cancelled)
        try:
            yield
        finally:
            self.pixels.give(pixels)
