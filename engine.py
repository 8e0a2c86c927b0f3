"""Scheduling: the request queues, the inference thread and its workers.

A task is a generator that yields `(stage, items)` and receives the results of the items. It knows nothing of threads or
batches. This file knows nothing of gRPC, models or tasks. Only the engine's own thread advances a task.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent import futures
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson

import machine
from errors import BadInput
from fair_queue import COST_WEIGHT, FIRST_COST, FairQueue, Flow, Shares
from machine import clock
from metrics import Traffic

log = logging.getLogger("lumen.engine")

TENSOR_MIME = "application/octet-stream"
SMALLER_S = 300.0  # after a batch failed: seconds for which batches keep the smaller size that worked
# The most that one batch may cost an item: so many times the average, or so many core seconds, whichever is more.
COST_RISE, COST_FLOOR = 10, 0.5
BACKGROUND_SHARE = 0.05  # of the time, for background work while requests wait, so that it completes eventually
# Seconds after the last answer until background work may use the whole machine, because many clients make short pauses
IDLE_S = 1.0
RETURN_S = 0.006  # seconds from a response to the next request of a client that waits for each of its responses

Run = Callable[[list[Any]], Sequence[Any]]


@dataclass
class Pool:
    """Threads that run batches."""

    free: int  # how many of them run none
    handed: queue.SimpleQueue[Batch | None] = field(default_factory=queue.SimpleQueue)  # None ends a thread


@dataclass(eq=False)
class Stage:
    """The queue of one model tower or label set, whose items run in batches: `run(items) -> one result for each item`.

    `kind` decides the order. SCORING comes first, because it completes requests. TEXT and BULK take turns. BACKGROUND
    runs while no request is in progress, and otherwise for BACKGROUND_SHARE of the time.
    """

    SCORING, TEXT, BULK, BACKGROUND = range(4)

    name: str
    run: Run
    batch_size: int
    kind: int
    spread: bool = False  # a batch occupies one core, so each worker may run one
    # The part of a place in a batch that an item takes. All items of a batch count as its largest, because they are
    # padded to that.
    share: Callable[[Any], float] = lambda item: 1.0
    tower: str = ""  # the part of a model that runs the items; see `Engine.failures`
    journaled: bool = False  # if a batch crashes the process, its payloads are suspected; see `Journal`
    run_single: Run | None = None  # for the only item of the only request in progress, on all cores
    threads: int = 0  # of its own, each of which may run a batch, for a GPU; 0: it uses those of the engine

    queue: FairQueue[Entry] = field(init=False)  # `Engine.add` gives stages of one kind the same shares
    pool: Pool = field(init=False)  # the threads that run its batches
    cost: float = FIRST_COST  # core seconds of an item, a moving average
    waits_until: float = 0.0  # for its share, by time.monotonic(), as `look_again_at`; see `Engine._waits`
    look_again_at: float = 0.0
    ran_items: int = 0  # in all batches
    ran_s: float = 0.0  # seconds that these batches took
    alone_items: int = 0  # the same two of the batches that began while no request was in progress
    alone_s: float = 0.0
    _fits: int = 0  # items of a batch, until `_fits_until`, by time.monotonic()
    _fits_until: float = 0.0

    def size_limit(self) -> int:
        """The most items that a batch may have now."""
        return min(self._fits, self.batch_size) if time.monotonic() < self._fits_until else self.batch_size

    def remember_size(self, size: int) -> None:
        """Limits batches to this size for a while: a larger one failed, because of memory for example."""
        self._fits, self._fits_until = min(size, self.size_limit()), time.monotonic() + SMALLER_S
        log.warning("%s: batches of at most %d for the next %d s", self.name, self._fits, SMALLER_S)


Steps = Generator[tuple[Stage, Sequence[Any]], list[Any], "Answer"]  # a task at work


@dataclass(frozen=True)
class Answer:
    """What a task returns: an object that is sent as JSON of the named schema, or raw bytes; and meta."""

    schema: str
    content: dict[str, Any] | bytes
    meta: dict[str, str]

    def encoded(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        # A value that is not finite would become `null`; `unit_rows` and `create_backend` reject such values.
        return orjson.dumps(self.content, option=orjson.OPT_SERIALIZE_NUMPY)

    def mime(self) -> str:
        return TENSOR_MIME if isinstance(self.content, bytes) else f"application/json;schema={self.schema}"


@dataclass(eq=False)
class Job:
    """A request in progress. `answer` resolves to an Answer, or to the exception that the client is told about.

    Cancelling `answer` cancels the job: its items are removed from the queues, with their pixels.
    """

    correlation_id: str
    task: str  # the name that the client sent
    size: int  # bytes
    flow: Flow = ("", "")  # the client's connection and stream
    digest: str = ""  # sha-256 of the payload in hex, if it may be suspected of a crash; see `Journal`
    arrived: float = field(default_factory=time.monotonic)
    prepared_s: float = 0.0  # core seconds of its preparation that its flow has not been charged for yet
    steps: Steps | None = None
    # Of the current `yield`: each element is the item first, then its result. The job continues with the last of them.
    results: Any = None
    missing: int = 0  # the number of results that are not there yet
    error: Exception | None = None  # a result that is an exception
    answer: futures.Future[Answer] = field(default_factory=futures.Future)

    def finish(self, result: Answer | Exception) -> None:
        if self.answer.set_running_or_notify_cancel():  # False: the client has left
            if isinstance(result, BadInput):
                forget_frames(result)
            if isinstance(result, Exception):
                self.answer.set_exception(result)
            else:
                self.answer.set_result(result)

    def discard(self) -> None:
        """Drops the task of a cancelled job. Only the engine's own thread may call it."""
        steps, self.steps = self.steps, None
        if steps:
            steps.close()


def forget_frames(error: BaseException | None) -> None:
    """Drops the frames that an exception came through.

    They hold the job that holds the exception. Without this, payloads and decoded pictures stay in memory until
    Python's garbage collector runs, which does not know their size.
    """
    while error is not None:
        error.__traceback__, following = None, error.__cause__ or error.__context__
        error.__cause__ = error.__context__ = None
        error = following


def forget_locals(error: BaseException | None) -> None:
    """Drops the local variables of the frames that an exception came through, such as a model's activations.

    The traceback itself stays, for the log.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


Entry = tuple[Job, int]  # an item: its position in `Job.results`


@dataclass
class Batch:
    """Entries that run together."""

    stage: Stage
    entries: list[Entry]
    expected: list[float]  # core seconds of each entry, preparation included
    results: Sequence[Any] = ()
    seconds: float = 0.0
    alone: bool = False  # it began while no request was in progress
    single: bool = False  # the item of the only request in progress; it may use all cores


class Engine:
    """One inference thread, and a worker for each core. A batch is what arrived while the last one ran.

    Batches of a stage that is spread run on the workers, so that no core waits for another one. Workers have a lower
    priority, so a text does not wait for pictures. A stage for a GPU has threads of its own, which feed it. All other
    batches run one at a time: background batches on a thread with the priority of a worker, the rest on the inference
    thread. Meanwhile the engine's own thread advances the tasks and forms the next batches.
    """

    def __init__(
        self,
        holding: Callable[[Sequence[str]], AbstractContextManager[object]] = nullcontext,
        traffic: Traffic | None = None,
        workers: int = 1,
        decoding: Callable[[], int] = lambda: 0,
    ) -> None:
        """`holding`: a context for each batch, called with the digests of its payloads if its stage is journaled.
        `decoding`: how many cores decode pictures at the moment."""
        self._holding, self._traffic, self._decoding = holding, traffic or Traffic(), decoding
        self._began: dict[int, float] = {}  # thread -> when its batch or its pass began, by `machine.clock`
        self.failures = Counter[str]()  # tower -> how many batches in a row failed completely
        self._changed = threading.Condition()
        self._stages: list[Stage] = []
        self._shares = {kind: Shares() for kind in (Stage.SCORING, Stage.TEXT, Stage.BULK, Stage.BACKGROUND)}
        self._new: list[Job] = []
        self._cancelled: set[Flow] = set()  # flows of which a job was cancelled
        self._expected = 0  # requests that wait for their responses, in whatever stage
        # Flow that was answered and has not asked again -> RETURN_S after its response, by time.monotonic()
        self._returning: dict[Flow, float] = {}
        self._shared_at = 0.0  # when a request last came while another was in progress, by time.monotonic()
        self._running = 0  # batches
        self._cores, self._workers = workers, Pool(workers)
        # Only one of the two threads runs a batch at a time, so `_inference.free` counts for both.
        self._inference, self._background = Pool(1), Pool(1)
        self._background_from = 0.0  # when background work may run while requests wait, by time.monotonic()
        self._idle_from = 0.0  # IDLE_S after the last response, by time.monotonic()
        self._ended: list[Batch] = []
        self._text_ran_last = self._stopping = False
        self._threads = [threading.Thread(target=self._loop, name="engine", daemon=True)]
        self._pools: list[Pool] = []  # of each thread but the first
        self._add_thread("inference", self._inference, 0)
        self._add_thread("background", self._background, machine.WORKER_NICE)
        for i in range(workers):
            self._add_thread(f"worker-{i}", self._workers, machine.WORKER_NICE)

    def add(self, stage: Stage) -> Stage:
        """Call it before `start` for a stage with threads of its own."""
        stage.queue = FairQueue(self._shares[stage.kind])
        shared = self._workers if stage.spread else self._inference
        stage.pool = Pool(stage.threads) if stage.threads else shared
        self._stages.append(stage)
        for i in range(stage.threads):
            self._add_thread(f"{stage.name}-{i}", stage.pool, 0)
        return stage

    def _add_thread(self, name: str, pool: Pool, lower: int) -> None:
        self._pools.append(pool)
        self._threads.append(threading.Thread(target=self._work, args=(pool, lower), name=name, daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def busy_since(self) -> float | None:
        """When the oldest batch or pass in progress began, by `machine.clock`; None if there is none."""
        return min(self._began.copy().values(), default=None)

    def wait_for_a_pause(self, most_s: float = float("inf")) -> None:
        """Blocks until the engine runs and no request has been in progress for IDLE_S, or `most_s` seconds are over."""
        until = time.monotonic() + most_s
        while not self.is_alive() or time.monotonic() < min(until, until if self._expected else self._idle_from):
            time.sleep(IDLE_S / 4)

    def expect(self, job: Job) -> None:
        """Counts a request that is submitted later, when it is prepared. Until its response, background work waits."""
        self._traffic.count_queued(1)
        with self._changed:
            self._expected += 1
            self._returning.pop(job.flow, None)
            self._shared_at = time.monotonic() if self._expected > 1 else self._shared_at
        job.answer.add_done_callback(partial(self._answered, job.flow))

    def _answered(self, flow: Flow, answer: futures.Future[Answer]) -> None:
        self._traffic.count_queued(-1)
        with self._changed:
            now = time.monotonic()
            self._expected -= 1
            self._idle_from = now + IDLE_S
            self._returning = {other: until for other, until in self._returning.items() if until > now}
            self._returning[flow] = now + RETURN_S
            if answer.cancelled():
                self._cancelled.add(flow)
            if self._cancelled or not self._expected:
                self._changed.notify()

    def submit(self, job: Job) -> None:
        with self._changed:
            self._new.append(job)
            self._changed.notify()

    def results_of(self, stage: Stage, items: Sequence[Any]) -> list[Any]:
        """Runs items that belong to no request, and waits for their results. Raises what the stage raised for one."""
        found: list[Any] = []

        def steps() -> Steps:
            found.extend((yield stage, items))
            return Answer("", b"", {})

        job = Job("", "", 0)
        job.steps = steps()
        self.submit(job)
        job.answer.result()
        return found

    def stop(self) -> None:
        """Ends the threads. Waits up to five seconds for batches in progress, whose results are dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        for pool in self._pools:
            pool.handed.put(None)
        until = time.monotonic() + 5
        for thread in self._threads:
            if thread.is_alive():  # otherwise it was never started
                thread.join(max(0.0, until - time.monotonic()))

    def _loop(self) -> None:
        while not self._stopping:
            self._pass()

    def _pass(self) -> None:
        """Advances tasks and starts batches. A separate method, so that an idle engine holds no local variables."""
        with self._changed:
            if not (self._new or self._ended or self._cancelled or self._stopping):
                self._changed.wait(self._until_next())
            if self._stopping:
                return
            new, self._new = self._new, []
            ended, self._ended = self._ended, []
            cancelled, self._cancelled = self._cancelled, set()
        thread = threading.get_ident()
        self._began[thread] = clock.now()
        for flow in cancelled:
            for stage in self._stages:
                for job, position in stage.queue.remove(flow, lambda entry: entry[0].answer.cancelled()):
                    job.results[position] = None  # the pixels, for example
                    job.discard()
        for job in new:
            self._advance(job)
        for batch in ended:
            self._account_for(batch)
            if batch.stage.kind != Stage.TEXT:
                self._settle(batch)
        self._begin_all()
        for batch in ended:  # after `_begin_all`, because responses to 64 clients take 10 ms
            if batch.stage.kind == Stage.TEXT:
                self._settle(batch)
        self._begin_all()
        del self._began[thread]

    def _begin_all(self) -> None:
        while stage := self._choose():
            self._begin(stage)

    def _choose(self) -> Stage | None:
        """The stage whose batch starts next, or None. `Stage` describes the order of the kinds.

        A text never runs twice in a row while prompts or pictures wait. Within a kind, the fair order decides.
        """
        ready = [stage for stage in self._stages if stage.queue.length and stage.pool.free and not self._waits(stage)]
        kinds = {stage.kind for stage in ready}
        if not kinds:
            return None
        if Stage.BACKGROUND in kinds:  # its turn is rare; see `_waits`
            kind = Stage.BACKGROUND
        else:
            kind = Stage.BULK if self._text_ran_last and kinds == {Stage.TEXT, Stage.BULK} else min(kinds)
        same = [stage for stage in ready if stage.kind == kind]
        chosen = same[0] if len(same) == 1 else min(same, key=lambda stage: stage.queue.priority())
        if kind in (Stage.TEXT, Stage.BULK) and chosen.pool is self._inference:
            self._text_ran_last = kind == Stage.TEXT
        return chosen

    def _waits(self, stage: Stage) -> bool:
        """Whether a batch has to wait although a thread is free. `look_again_at` says for how long at most.

        Background work waits while requests are in progress; see BACKGROUND_SHARE. The last free worker waits until its
        share of the pictures is decoded, because a larger batch is faster: while a core decodes, or while a client that
        was just answered may ask again. It waits no longer than an average picture takes, because what is decoded may
        belong to others, or may not be a picture.
        """
        now = time.monotonic()
        if stage.kind == Stage.BACKGROUND:
            busy = self._expected or self._running
            stage.look_again_at = self._background_from if busy else min(self._background_from, self._idle_from)
            return now < stage.look_again_at
        if not stage.spread or stage.pool.free > 1:
            return False
        with self._changed:
            returns = [until for until in self._returning.values() if until > now]
        share = min(stage.size_limit(), -(-(self._expected + len(returns)) // self._cores))
        if stage.queue.length >= share or not (returns or self._decoding()):
            return False
        stage.waits_until = stage.waits_until or now + stage.cost
        stage.look_again_at = min(stage.waits_until, max(returns, default=stage.waits_until))
        return now < stage.waits_until

    def _until_next(self) -> float | None:
        """Seconds until a batch may start although nothing happens; None if a batch or a request must end first."""
        waiting = [stage for stage in self._stages if stage.queue.length and stage.pool.free]
        # Asked again, under the lock of the wait, because a request may have ended since `_choose` asked.
        begin = [stage.look_again_at if self._waits(stage) else 0.0 for stage in waiting]
        return max(0.0, min(begin) - time.monotonic()) if begin else None

    def _advance(self, job: Job) -> None:
        """Runs a task until its next step or its end."""
        results, error, job.results, job.error = job.results, job.error, None, None
        if job.answer.cancelled():
            job.discard()
            return
        assert job.steps is not None  # set before submit()
        try:
            stage, items = job.steps.throw(error) if error else job.steps.send(results)
        except StopIteration as end:
            job.finish(end.value)
        except Exception as failure:
            job.finish(failure)
        else:
            job.results, job.missing = list(items), len(items)
            for position in range(job.missing):
                stage.queue.push(job.flow, (job, position))

    def _is_single(self, stage: Stage) -> bool:
        """Whether the next batch is the item of the only request in progress, and none came beside another just now."""
        alone = self._expected == 1 and stage.queue.length == 1 and not self._running
        return alone and stage.run_single is not None and time.monotonic() > self._shared_at + 2 * stage.cost

    def _begin(self, stage: Stage) -> None:
        """Forms a stage's next batch and gives it to the inference thread, a worker or the background thread."""
        size, queued = stage.size_limit(), stage.queue.length
        if stage.spread:  # the other workers get their share of what is queued, and of what is still decoded or runs
            size = min(size, -(-queued // stage.pool.free), -(-max(self._expected, queued) // self._cores))
        alone = not (self._expected or self._running) and time.monotonic() >= self._idle_from
        if stage.kind == Stage.BACKGROUND and not alone:
            size = 1  # a text that arrives meanwhile has to wait for it
        batch = Batch(stage, [], [], alone=alone, single=self._is_single(stage))
        largest = 0.0
        while stage.queue.length:
            flow, (job, position) = stage.queue.head()
            largest = max(largest, stage.share(job.results[position]))
            if batch.entries and (len(batch.entries) + 1) * largest > size:
                break
            batch.expected.append(stage.cost + job.prepared_s)
            batch.entries.append(stage.queue.pop(flow, batch.expected[-1]))
        stage.waits_until = 0.0
        stage.pool.free -= 1
        self._running += 1
        (self._background if stage.kind == Stage.BACKGROUND else stage.pool).handed.put(batch)

    def _work(self, pool: Pool, lower: int) -> None:
        machine.lower_thread_priority(lower)
        while (batch := pool.handed.get()) is not None:
            self._run(batch)
            with self._changed:
                self._ended.append(batch)
                self._changed.notify()
            del batch  # it would keep its pictures in memory until the next batch

    def _run(self, batch: Batch) -> None:
        stage, thread, started = batch.stage, threading.get_ident(), time.monotonic()
        items = [job.results[position] for job, position in batch.entries]
        self._began[thread] = clock.now()
        with self._holding([job.digest for job, _ in batch.entries] if stage.journaled else []):
            run = stage.run_single if batch.single else None
            batch.results = self._results(stage, items, run or stage.run)
        del self._began[thread]
        batch.seconds = time.monotonic() - started

    def _account_for(self, batch: Batch) -> None:
        """Marks the batch's thread as free, and charges the flows for the time that the batch took."""
        stage, count = batch.stage, len(batch.entries)
        stage.pool.free += 1
        self._running -= 1
        # Batches of a GPU that run at the same time share it.
        cores = 1 if stage.spread and not batch.single else self._cores / max(1, stage.threads)
        # If a batch took much longer than others, the cause is outside: a stopped process, a model that was loaded
        # again. Its flows are not charged for that.
        cost = min(batch.seconds * cores / count, max(COST_RISE * stage.cost, COST_FLOOR))
        seconds = cost * count / cores
        if stage.kind == Stage.BACKGROUND:
            self._background_from = time.monotonic() + seconds * (1 / BACKGROUND_SHARE - 1)
        for (job, _), expected in zip(batch.entries, batch.expected, strict=True):
            self._shares[stage.kind].end(job.flow, expected, cost + job.prepared_s)
            job.prepared_s = 0.0
        stage.cost += COST_WEIGHT * (cost - stage.cost)
        stage.ran_items += count
        stage.ran_s += seconds
        if batch.alone:
            stage.alone_items += count
            stage.alone_s += seconds
        self._traffic.count_batch(stage.name, count)
        if stage.tower:
            failed = all(isinstance(result, Exception) for result in batch.results)
            self.failures[stage.tower] = self.failures[stage.tower] + 1 if failed else 0

    def _settle(self, batch: Batch) -> None:
        """Gives the results of a finished batch to its tasks, and advances them."""
        for (job, position), result in zip(batch.entries, batch.results, strict=True):
            if isinstance(result, Exception):
                job.error = result
            job.results[position] = result
            job.missing -= 1
            if not job.missing:
                self._advance(job)

    @staticmethod
    def _results(stage: Stage, items: list[Any], run: Run) -> Sequence[Any]:
        """Runs a batch. If it fails, it is run again in halves, so that an item that cannot be run fails alone.

        If all items succeed in smaller batches, the size was the cause, and the stage keeps the size that worked.
        """
        try:
            log.debug("%s: batch of %d", stage.name, len(items))
            return run(items)
        except Exception as error:
            error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None  # this frame has items
            forget_locals(error)
            if len(items) == 1:
                return [error]
            log.warning("%s: a batch of %d failed, running it in halves (%s)", stage.name, len(items), error)
        half = -(-len(items) // 2)
        results = [*Engine._results(stage, items[:half], run), *Engine._results(stage, items[half:], run)]
        if not any(isinstance(result, Exception) for result in results):
            stage.remember_size(half)
        return results
