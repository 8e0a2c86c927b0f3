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
from dataclasses import dataclass
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


class Stage:
    """The queue of one model tower or label set, whose items run in batches: `run(items) -> one result for each item`.

    `kind` decides the order. SCORING comes first, because it completes requests. TEXT and BULK take turns. BACKGROUND
    runs while no request is in progress, and otherwise for BACKGROUND_SHARE of the time.
    """

    SCORING, TEXT, BULK, BACKGROUND = range(4)

    def __init__(
        self,
        name: str,
        run: Callable[[list[Any]], Sequence[Any]],
        batch_size: int,
        kind: int,
        spread: bool = False,
        share: Callable[[Any], float] = lambda item: 1.0,
        tower: str = "",
        journaled: bool = False,
        run_single: Callable[[list[Any]], Sequence[Any]] | None = None,
        threads: int = 0,
    ) -> None:
        """`spread`: a batch occupies one core, so each worker may run one. `share`: the part of a place in a batch that
        an item takes. All items of a batch count as its largest, because they are padded to that. `tower`: the part of
        a model that runs the items; see `Engine.failures`. `journaled`: if a batch crashes the process, its payloads
        are suspected; see `Journal`. `run_single`: for the only item of the only request in progress, on all cores.
        `threads`: threads of its own, each of which may run a batch, for a GPU; 0: it uses those of the engine."""
        self.run_single, self.threads = run_single, threads
        self.running = 0  # batches
        self.handed: Handed = queue.SimpleQueue()  # for threads of its own
        self.name, self.run, self.batch_size = name, run, batch_size
        self.kind, self.spread, self.share, self.tower, self.journaled = kind, spread, share, tower, journaled
        self.queue: FairQueue[Entry] = FairQueue(Shares())  # `Engine.add` gives stages of one kind the same shares
        self.cost = FIRST_COST  # core seconds of an item, a moving average
        self.waits_until = self.look_again_at = 0.0  # by time.monotonic(); see `Engine._waits_for_share`
        self.ran_items, self.ran_s = 0, 0.0  # of all batches: their items, and the seconds that they took
        self.alone_items, self.alone_s = 0, 0.0  # the same of those that began while no request was in progress
        self._fits, self._fits_until = batch_size, 0.0

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


class Job:
    """A request in progress. `answer` resolves to an Answer, or to the exception that the client is told about.

    Cancelling `answer` cancels the job: its items are removed from the queues, with their pixels.
    """

    def __init__(self, correlation_id: str, task: str, size: int, flow: Flow = ("", "")) -> None:
        """`task`: the name that the client sent. `size`: bytes. `flow`: the client's connection and stream."""
        self.correlation_id, self.task, self.size, self.flow = correlation_id, task, size, flow
        self.digest = ""  # sha-256 of the payload in hex, if it may be suspected of a crash; see `Journal`
        self.arrived = time.monotonic()
        self.prepared_s = 0.0  # core seconds of its preparation that its flow has not been charged for yet
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


class _Step:
    """One `yield` of a task. The job continues when the last of its items has its result."""

    def __init__(self, job: Job, items: Sequence[Any]) -> None:
        self.job = job
        self.results = list(items)  # each element is the item first, then its result
        self.missing = len(items)
        self.error: Exception | None = None


Entry = tuple[_Step, int]  # an item: its step, and its position there


@dataclass
class Batch:
    """Entries that run together."""

    stage: Stage
    entries: list[Entry]
    expected: list[float]  # core seconds of each entry, preparation included
    results: Sequence[Any] = ()
    seconds: float = 0.0
    alone: bool = False  # a background batch that began while no request was in progress
    single: bool = False  # the item of the only request in progress; it may use all cores


Handed = queue.SimpleQueue[Batch | None]  # None ends the thread


class Engine:
    """One inference thread, and a worker for each core. A batch is what arrived while the last one ran.

    Batches of a stage that is spread run on the workers, so that no core waits for another one. The last free worker
    may wait for a larger batch; see `_waits_for_share`. Workers have a lower priority, so a text does not wait for
    pictures. A stage for a GPU has threads of its own, which feed it. All other batches run one at a time: background
    batches on a thread with the priority of a worker, the rest on the inference thread. Meanwhile the engine's own
    thread advances the tasks and forms the next batches.
    """

    def __init__(
        self,
        holding: Callable[[Sequence[str]], AbstractContextManager[None]] | None = None,
        traffic: Traffic | None = None,
        workers: int = 1,
        decoding: Callable[[], int] = lambda: 0,
    ) -> None:
        """`holding`: a context for each batch, called with the digests of its payloads if its stage is journaled.
        `decoding`: how many cores decode pictures at the moment."""
        self._decoding = decoding
        self._traffic = traffic or Traffic()
        self._began: dict[int, float] = {}  # thread -> when its batch or its pass began, by `machine.clock`
        self.failures = Counter[str]()  # tower -> how many batches in a row failed completely
        self._holding = holding or (lambda digests: nullcontext())
        self._changed = threading.Condition()
        self._stages: list[Stage] = []
        self._shares = {kind: Shares() for kind in (Stage.SCORING, Stage.TEXT, Stage.BULK, Stage.BACKGROUND)}
        self._new: list[Job] = []
        self._cancelled: set[Flow] = set()  # flows of which a job was cancelled
        self._expected = 0  # requests that wait for their responses, in whatever stage
        # Flow that was answered and has not asked again -> RETURN_S after its response, by time.monotonic()
        self._returning: dict[Flow, float] = {}
        self._shared_at = 0.0  # when a request last came while another was in progress, by time.monotonic()
        self._workers = self._free_workers = workers
        self._inferring = False  # the inference thread or the background thread runs a batch
        self._background_from = 0.0  # when background work may run while requests wait, by time.monotonic()
        self._idle_from = 0.0  # IDLE_S after the last response, by time.monotonic()
        self._for_workers: Handed = queue.SimpleQueue()
        self._for_inference: Handed = queue.SimpleQueue()
        self._for_background: Handed = queue.SimpleQueue()
        self._ended: list[Batch] = []
        self._text_ran_last = self._stopping = False
        self.thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        work = [("inference", self._for_inference, 0), ("background", self._for_background, machine.WORKER_NICE)]
        work += [(f"worker-{i}", self._for_workers, machine.WORKER_NICE) for i in range(workers)]
        self._threads = [
            threading.Thread(target=self._work, args=arguments, name=name, daemon=True) for name, *arguments in work
        ]

    def add(self, stage: Stage) -> Stage:
        """Call it before `start` for a stage with threads of its own."""
        stage.queue = FairQueue(self._shares[stage.kind])
        self._stages.append(stage)
        for i in range(stage.threads):
            arguments, name = (stage.handed, 0), f"{stage.name}-{i}"
            self._threads.append(threading.Thread(target=self._work, args=arguments, name=name, daemon=True))
        return stage

    def start(self) -> None:
        for thread in (self.thread, *self._threads):
            thread.start()

    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in (self.thread, *self._threads))

    @property
    def busy_since(self) -> float | None:
        """When the oldest batch or pass in progress began, by `machine.clock`; None if there is none."""
        return min(self._began.copy().values(), default=None)

    def wait_for_a_pause(self, most_s: float = float("inf")) -> None:
        """Blocks until the engine runs and no request has been in progress for IDLE_S, or `most_s` seconds are over."""
        until = time.monotonic() + most_s
        while not self.thread.is_alive() or time.monotonic() < min(until, until if self._expected else self._idle_from):
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
            if answer.cancelled() or not self._expected:
                self._changed.notify()

    def submit(self, job: Job) -> None:
        with self._changed:
            self._new.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Ends the threads. Waits up to five seconds for batches in progress, whose results are dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        own = [stage.handed for stage in self._stages for _ in range(stage.threads)]
        for handed in (self._for_inference, self._for_background, *[self._for_workers] * self._workers, *own):
            handed.put(None)
        until = time.monotonic() + 5
        for thread in (self.thread, *self._threads):
            if thread.is_alive():  # otherwise it was never started
                thread.join(max(0.0, until - time.monotonic()))

    def _loop(self) -> None:
        thread = threading.get_ident()
        while True:
            with self._changed:
                if not (self._new or self._ended or self._cancelled or self._stopping):
                    self._changed.wait(self._until_next())
                if self._stopping:
                    return
            self._began[thread] = clock.now()
            self._pass()
            del self._began[thread]

    def _pass(self) -> None:
        """Advances tasks and starts batches. A separate method, so that an idle engine holds no local variables."""
        with self._changed:
            new, self._new = self._new, []
            ended, self._ended = self._ended, []
            cancelled, self._cancelled = self._cancelled, set()
        self._sweep(cancelled)
        for job in new:
            self._advance(job, None)
        for batch in ended:
            self._account_for(batch)
            if batch.stage.kind != Stage.TEXT:
                self._settle(batch)
        self._begin_all()
        for batch in ended:  # after `_begin_all`, because responses to 64 clients take 10 ms
            if batch.stage.kind == Stage.TEXT:
                self._settle(batch)
        self._begin_all()

    def _sweep(self, flows: set[Flow]) -> None:
        """Removes the items of cancelled jobs from the queues, with their pixels."""
        for flow in flows:
            for stage in self._stages:
                for step, position in stage.queue.remove(flow, lambda entry: entry[0].job.answer.cancelled()):
                    step.results[position] = None
                    step.job.discard()

    def _begin_all(self) -> None:
        while stage := self._choose():
            self._begin(stage)

    def _choose(self) -> Stage | None:
        """Chooses the stage whose batch starts next, or None.

        Scoring comes first, because it completes requests. Text comes next, but never twice in a row while pictures
        wait. Within a kind, the fair order decides. Background work comes last; see BACKGROUND_SHARE.
        """
        ready = [stage for stage in self._stages if stage.queue.length and self._has_thread(stage)]
        background = [stage for stage in ready if stage.kind == Stage.BACKGROUND]
        if background and (time.monotonic() >= self._background_from or self._is_idle()):
            return background[0]
        ready = [stage for stage in ready if stage.kind != Stage.BACKGROUND]
        if not ready:
            return None
        kinds = {stage.kind for stage in ready}
        if Stage.SCORING in kinds:
            kind = Stage.SCORING
        elif kinds == {Stage.TEXT, Stage.BULK}:
            kind = Stage.BULK if self._text_ran_last else Stage.TEXT
        else:
            kind = min(kinds)
        same = [stage for stage in ready if stage.kind == kind]
        chosen = same[0] if len(same) == 1 else min(same, key=lambda stage: stage.queue.priority())
        if kind != Stage.SCORING and not (chosen.spread or chosen.threads):  # those do not use the inference thread
            self._text_ran_last = kind == Stage.TEXT
        return chosen

    def _has_thread(self, stage: Stage) -> bool:
        """Whether the thread that a stage needs is free."""
        if stage.threads:
            return stage.running < stage.threads
        if stage.spread:
            return self._free_workers > 0 and not self._waits_for_share(stage)
        return not self._inferring

    def _waits_for_share(self, stage: Stage) -> bool:
        """Whether the last free worker waits until its share of the pictures is decoded: a larger batch is faster.

        It does while a core decodes, or while a client that was just answered may ask again. It waits no longer than an
        average picture takes, because what is decoded may belong to others, or may not be a picture.
        """
        now = time.monotonic()
        with self._changed:
            returns = [until for until in self._returning.values() if until > now]
        share = min(stage.size_limit(), -(-(self._expected + len(returns)) // self._workers))
        if self._free_workers > 1 or stage.queue.length >= share or not (returns or self._decoding()):
            return False
        stage.waits_until = stage.waits_until or now + stage.cost
        stage.look_again_at = min(stage.waits_until, max(returns, default=stage.waits_until))
        return now < stage.waits_until

    def _is_idle(self) -> bool:
        """Whether no request is in progress, and none has been for IDLE_S."""
        return not self._is_busy() and time.monotonic() >= self._idle_from

    def _is_busy(self) -> bool:
        waiting = any(stage.queue.length for stage in self._stages if stage.kind != Stage.BACKGROUND)
        return bool(self._expected or waiting or self._is_running())

    def _is_running(self) -> bool:
        """Whether a batch runs."""
        return any(stage.running for stage in self._stages)

    def _until_next(self) -> float | None:
        """Seconds until a batch may start although nothing happens; None if a batch or a request must end first."""
        free = self._free_workers > 0
        begin = [stage.look_again_at for stage in self._stages if stage.waits_until and stage.queue.length and free]
        if not self._inferring and any(stage.queue.length for stage in self._stages if stage.kind == Stage.BACKGROUND):
            begin.append(self._background_from if self._is_busy() else min(self._background_from, self._idle_from))
        return max(0.0, min(begin) - time.monotonic()) if begin else None

    def _advance(self, job: Job, results: list[Any] | None, error: Exception | None = None) -> None:
        """Runs a task until its next step or its end."""
        if job.answer.cancelled():
            job.discard()
            return
        assert job.steps is not None  # set before submit()
        try:
            stage, items = job.steps.throw(error) if error else job.steps.send(results)  # type: ignore[arg-type]
        except StopIteration as end:
            job.finish(end.value)
        except Exception as failure:
            job.finish(failure)
        else:
            step = _Step(job, items)
            for position in range(len(items)):
                stage.queue.push(job.flow, (step, position))

    def _is_single(self, stage: Stage) -> bool:
        """Whether the next batch is the item of the only request in progress, and none came beside another just now."""
        alone = self._expected == 1 and stage.queue.length == 1 and not self._is_running()
        return alone and stage.run_single is not None and time.monotonic() > self._shared_at + 2 * stage.cost

    def _begin(self, stage: Stage) -> None:
        """Forms a stage's next batch and gives it to the inference thread, a worker or the background thread."""
        size, queued = stage.size_limit(), stage.queue.length
        if stage.spread:  # the other workers get their share of what is queued, and of what is still decoded or runs
            size = min(size, -(-queued // self._free_workers), -(-max(self._expected, queued) // self._workers))
        alone = stage.kind == Stage.BACKGROUND and self._is_idle()
        if stage.kind == Stage.BACKGROUND and not alone:
            size = 1  # a text that arrives meanwhile has to wait for it
        batch = Batch(stage, [], [], alone=alone, single=self._is_single(stage))
        largest = 0.0
        while stage.queue.length:
            flow, (step, position) = stage.queue.head()
            largest = max(largest, stage.share(step.results[position]))
            if batch.entries and (len(batch.entries) + 1) * largest > size:
                break
            batch.expected.append(stage.cost + step.job.prepared_s)
            batch.entries.append(stage.queue.pop(flow, batch.expected[-1]))
        stage.running += 1
        stage.waits_until = 0.0
        if stage.threads:
            stage.handed.put(batch)
        elif stage.spread:
            self._free_workers -= 1
            self._for_workers.put(batch)
        else:
            self._inferring = True
            (self._for_background if stage.kind == Stage.BACKGROUND else self._for_inference).put(batch)

    def _work(self, handed: Handed, lower: int) -> None:
        machine.lower_thread_priority(lower)
        while (batch := handed.get()) is not None:
            started = time.monotonic()
            batch.results = self._run(batch)
            batch.seconds = time.monotonic() - started
            with self._changed:
                self._ended.append(batch)
                self._changed.notify()
            del batch  # it would keep its pictures in memory until the next batch

    def _run(self, batch: Batch) -> Sequence[Any]:
        items = [step.results[position] for step, position in batch.entries]
        digests = list(dict.fromkeys(step.job.digest for step, _ in batch.entries)) if batch.stage.journaled else []
        thread = threading.get_ident()
        self._began[thread] = clock.now()
        with self._holding(digests):
            run = batch.stage.run_single if batch.single else None
            results = self._results(batch.stage, items, run or batch.stage.run)
        del self._began[thread]
        return results

    def _account_for(self, batch: Batch) -> None:
        """Marks the batch's thread as free, and charges the flows for the time that the batch took."""
        stage, count = batch.stage, len(batch.entries)
        stage.running -= 1
        if stage.spread:
            self._free_workers += 1
        elif not stage.threads:
            self._inferring = False
        # Batches of a GPU that run at the same time share it.
        cores = 1 if stage.spread and not batch.single else self._workers / max(1, stage.threads)
        # If a batch took much longer than others, the cause is outside: a stopped process, a model that was loaded
        # again. Its flows are not charged for that.
        cost = min(batch.seconds * cores / count, max(COST_RISE * stage.cost, COST_FLOOR))
        seconds = cost * count / cores
        if stage.kind == Stage.BACKGROUND:
            self._background_from = time.monotonic() + seconds * (1 / BACKGROUND_SHARE - 1)
        for (step, _), expected in zip(batch.entries, batch.expected, strict=True):
            self._shares[stage.kind].end(step.job.flow, expected, cost + step.job.prepared_s)
            step.job.prepared_s = 0.0
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
        for (step, position), result in zip(batch.entries, batch.results, strict=True):
            if isinstance(result, Exception):
                step.error = result
            step.results[position] = result
            step.missing -= 1
            if not step.missing:
                self._advance(step.job, step.results, step.error)

    @staticmethod
    def _results(stage: Stage, items: list[Any], run: Callable[[list[Any]], Sequence[Any]]) -> Sequence[Any]:
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
