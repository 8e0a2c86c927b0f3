"""Intake: a whole request becomes a job, whose payload is prepared and handed to the engine.

Nothing here knows gRPC. Whatever a request contains, its job is finished and gives back what it held.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import machine
from engine import DecodePool, Engine, Job
from errors import Overload
from fair_queue import Flow
from journal import Journal
from logs import Traffic
from settings import Settings
from tasks import Models, Request, Task, find_task, prepare, prepared_bytes, read_meta


class Budget:
    """So much of something, over all streams: bytes of payloads, pixels in the decoders, what waits for the model.

    First come, first served: otherwise small parts that are taken and given back all the time would leave no room for a
    large one. A request that has begun and needs more to be completed comes first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._free = limit
        self._changed = threading.Condition()
        self._waiting: OrderedDict[object, float] = OrderedDict()  # who waits, whoever is next first, and since when

    def take(self, size: int, gone: Callable[[], bool], patience: float = math.inf, has_begun: bool = False) -> None:
        """Waits up to `patience` seconds until others have given back enough. Raises Overload if they do not, or if the
        client is gone. `has_begun`: the request already holds a part."""
        deadline, ticket = time.monotonic() + patience, object()
        with self._changed:
            self._waiting[ticket] = time.monotonic()
            if has_begun:
                self._waiting.move_to_end(ticket, last=False)
            try:
                while self._free < size or next(iter(self._waiting)) is not ticket:
                    if gone() or time.monotonic() > deadline:
                        raise Overload
                    self._changed.wait(min(1.0, max(0.0, deadline - time.monotonic()) + 0.01))
                self._free -= size
            finally:
                del self._waiting[ticket]
                self._changed.notify_all()  # whoever is next may have room as well

    def overdraw(self, size: int) -> None:
        """Takes at once, even if more than the limit is then in use; later callers of `take` wait longer."""
        with self._changed:
            self._free -= size

    def give(self, size: int) -> None:
        with self._changed:
            self._free += size
            self._changed.notify_all()

    @property
    def used(self) -> int:
        return self._limit - self._free

    def waited(self) -> float:
        """Seconds for which somebody has been waiting by now."""
        with self._changed:
            return time.monotonic() - min(self._waiting.values(), default=math.inf)


class Lease:
    """A part of a budget that was taken, and is given back once, however often and by whom `release` is called."""

    def __init__(self, budget: Budget, size: int) -> None:
        self._budget, self._size = budget, size
        self._lock = threading.Lock()

    def release(self, _: object = None) -> None:
        """Gives back what is left. It takes an argument so that it can be a future's callback."""
        self.shrink(0)

    def shrink(self, size: int) -> None:
        """Gives back all but `size`, if that much is left."""
        with self._lock:
            surplus, self._size = max(self._size - size, 0), min(self._size, size)
        self._budget.give(surplus)


PREPARED_MAX = 256 << 20  # bytes of pixels, labels and token ids that wait for the model, over all streams
DECODE_THREADS_MAX = 4
# Longer texts wait in the fair order: cleaning 64 KB of short lines takes half a second, during which the GIL is held.
SHORT_TEXT_BYTES = 1024
TASK_NAME_SHOWN = 80  # characters of a task's name that are kept for the log


class Intake:
    """Takes requests in, for any number of threads: bounded in memory, and in the fair order of the decode pool."""

    def __init__(self, settings: Settings, journal: Journal, traffic: Traffic, engine: Engine) -> None:
        self._settings, self._journal, self._traffic, self._engine = settings, journal, traffic, engine
        self.decoders = DecodePool(min(machine.usable_cores(), DECODE_THREADS_MAX))
        self.payloads = Budget(4 * self.request_bytes_max)  # bytes of requests until they are prepared
        self.pixels = Budget(settings.lumen_max_megapixels * 1_000_000)  # in the decoders: of one picture or of several
        self.prepared = Budget(PREPARED_MAX)

    @property
    def request_bytes_max(self) -> int:
        return self._settings.lumen_max_request_mb << 20

    def job(self, correlation_id: str, flow: Flow, request: Request | None) -> Job:
        """The job of a request, which `begin` starts. None: of one that could not be assembled."""
        task, size = (request.task[:TASK_NAME_SHOWN], len(request.payload)) if request else ("", 0)
        job = Job(correlation_id, task, size, flow)
        self._traffic.count_queued(1)
        # Callbacks capture as little as they can: they live as long as the job.
        job.answer.add_done_callback(partial(_no_longer_queued, self._traffic))
        self._engine.expect(job)
        return job

    def begin(self, job: Job, request: Request, models: Models, alone: bool = False) -> None:
        """Starts a job. From now on `request.held` bytes of `payloads` are this object's to give back.

        Waits while too many prepared requests wait for the model, but not for a client that has no other request in
        progress (`alone`). Does not raise: the job finishes with whatever goes wrong. A job that is over already only
        gives back.
        """
        payload = Lease(self.payloads, request.held)
        job.answer.add_done_callback(payload.release)
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
            prepared = Lease(self.prepared, most)
            job.answer.add_done_callback(prepared.release)
            work = partial(self._prepare, job, task, request, models, payload, prepared)
            if task.takes == "text" and len(request.payload) <= SHORT_TEXT_BYTES:  # must not wait among pictures
                work()
            else:
                self.decoders.submit(job, work)
        except Exception as error:
            job.finish(error)

    def finished(self, job: Job, outcome: str) -> None:
        """Counts a request that has its response, or whose client has left ("cancelled")."""
        self._traffic.count_request(job, outcome)
        if outcome == "ok":
            self._journal.answered(job.digest)

    def _prepare(self, job: Job, task: Task, request: Request, models: Models, payload: Lease, prepared: Lease) -> None:
        """Payload -> pixels or token ids, then to the engine. Does not raise."""
        began = time.thread_time()
        try:
            if job.answer.done():
                return
            if task.takes == "image":
                job.digest = hashlib.sha256(request.payload).hexdigest()
                self._journal.check(job.digest)
            with self._journal.holding([job.digest] if job.digest else [], "prepare"):
                prepare(task, request, models, self._settings, partial(self._room, job.answer.cancelled))
            prepared.shrink(prepared_bytes(task, request, models))
            job.prepared_s = time.thread_time() - began
            job.steps = task.run(models, request)
            self._engine.submit(job)
        except Exception as error:
            job.finish(error)
        finally:
            request.payload, request.meta = b"", {}
            payload.release()

    @contextmanager
    def _room(self, cancelled: Callable[[], bool], pixels: int) -> Iterator[None]:
        with self.decoders.waiting():
            self.pixels.take(pixels, cancelled)
        try:
            yield
        finally:
            self.pixels.give(pixels)


def _no_longer_queued(traffic: Traffic, _: object) -> None:
    traffic.count_queued(-1)
