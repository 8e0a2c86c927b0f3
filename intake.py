"""Intake: a whole request becomes a job, whose payload is prepared and handed to the engine.

Nothing here knows gRPC. Whatever a request contains, its job is finished and gives back what it held.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import machine
from assembly import Budget, Lease
from engine import DecodePool, Engine, Job
from fair_queue import Flow
from journal import Journal
from logs import Traffic
from settings import Settings
from tasks import Models, Request, Task, find_task, prepare, prepared_bytes, read_meta

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
        self.payloads = Budget(4 * settings.lumen_max_request_mb << 20)  # bytes of requests until they are prepared
        self.pixels = Budget(settings.lumen_max_megapixels * 1_000_000)  # in the decoders: of one picture or of several
        self.prepared = Budget(PREPARED_MAX)

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
