"""The inference thread, its lanes and the decode threads: who waits for whom, what runs as one batch, in which order.

A task is a generator that yields `(line, items)` and gets the items' results; it knows nothing of threads or batches.
Nothing here knows gRPC, models or tasks. Only the engine's own thread advances a task.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent import futures
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import orjson

import machine
from inputs import BadInput
from watch import Traffic

log = logging.getLogger("lumen.engine")

TENSOR_MIME = "application/octet-stream"


class Line:
    """The items that wait for one engine, which runs them in batches: `run(items) -> one result an item`."""

    SCORING, TEXT, BULK = range(3)

    def __init__(
        self,
        name: str,
        run: Callable[[list[Any]], Sequence[Any]],
        batch_size: int,
        kind: int,
        spread: bool = False,
        share: Callable[[Any], float] = lambda item: 1.0,
        journaled: bool = False,
    ) -> None:
        """`spread`: a batch keeps one core busy, so that each lane may run one. `share`: how much of a place in a batch
        an item takes; all items of a batch count as its largest, for they are padded to that. `journaled`: if a batch
        crashes the process, its payloads are suspected; see `Journal`."""
        self.name, self.run, self.batch_size = name, run, batch_size
        self.kind, self.spread, self.share, self.journaled = kind, spread, share, journaled
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
        # A value that is not finite would be `null`; `backends.unit_rows` and `create_backend` let none come here.
        return orjson.dumps(self.content, option=orjson.OPT_SERIALIZE_NUMPY)

    def mime(self) -> str:
        return TENSOR_MIME if isinstance(self.content, bytes) else f"application/json;schema={self.schema}"


class Job:
    """A request on its way; `answer` resolves to an Answer or to the exception that the client shall hear of."""

    def __init__(self, correlation_id: str, due: float, task: str, size: int) -> None:
        self.correlation_id, self.task, self.size = correlation_id, task, size  # as the client named them; bytes
        self.due = due  # when its turn comes, by time.monotonic()
        self.digest = ""  # sha-256 of the payload in hex, if it may be suspected of a crash; see `Journal`
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


Batch = list[tuple[_Step, int]]
Handed = queue.SimpleQueue[tuple[Line, Batch] | None]  # None: there is no more


class Engine:
    """The one inference thread, and a lane for each core. No timer: a batch is what has gathered while the last ran.

    Batches of a line that is spread run on lanes, so that no core waits until another has finished its part, and a text
    need not wait for pictures: it takes the cores from the lanes. All others run on the inference thread. The engine's
    own thread advances the tasks and forms the batches meanwhile.
    """

    def __init__(
        self,
        holding: Callable[[Sequence[str]], AbstractContextManager[None]] | None = None,
        traffic: Traffic | None = None,
        lanes: int = 1,
    ) -> None:
        """`holding`: entered while a batch runs, with the digests of its payloads if its line is journaled."""
        self._traffic = traffic or Traffic(())
        self._began: dict[int, float] = {}  # by thread: when its batch, or its pass, began, by time.monotonic()
        self.failed_in_a_row = 0  # batches of which not one item had a result
        self._holding = holding or (lambda digests: nullcontext())
        self._changed = threading.Condition()
        self._lines: list[Line] = []
        self._new: list[Job] = []
        self._free = lanes
        self._inferring = False  # the inference thread has a batch
        self._for_lanes: Handed = queue.SimpleQueue()
        self._for_inference: Handed = queue.SimpleQueue()
        self._ended: list[tuple[Line, Batch, Sequence[Any]]] = []  # with the results
        self._serial = itertools.count()  # keeps the order of items that are due together
        self._text_ran_last = False
        self._stopping = False
        self.thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        work = [("inference", self._for_inference, 0), *((f"lane-{i}", self._for_lanes, 5) for i in range(lanes))]
        self._workers = [
            threading.Thread(target=self._work, args=arguments, name=name, daemon=True) for name, *arguments in work
        ]

    def add(self, line: Line) -> Line:
        self._lines.append(line)
        return line

    def start(self) -> None:
        for thread in (self.thread, *self._workers):
            thread.start()

    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in (self.thread, *self._workers))

    @property
    def busy_since(self) -> float | None:
        """When the oldest batch or pass that runs now began, by time.monotonic()."""
        return min(self._began.copy().values(), default=None)

    def submit(self, job: Job) -> None:
        with self._changed:
            self._new.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Ends the threads, waiting up to five seconds for the batches that they have, whose results nobody gets."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        for handed in (self._for_inference, *[self._for_lanes] * (len(self._workers) - 1)):
            handed.put(None)
        until = time.monotonic() + 5
        for thread in (self.thread, *self._workers):
            if thread.is_alive():  # else it was never started
                thread.join(max(0.0, until - time.monotonic()))

    def _loop(self) -> None:
        thread = threading.get_ident()
        while True:
            with self._changed:
                while not (self._new or self._ended or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    return
            self._began[thread] = time.monotonic()
            self._pass()
            del self._began[thread]

    def _pass(self) -> None:
        """Takes tasks on, and begins the batches that may begin. A method, so that nothing of it is kept idly."""
        with self._changed:
            new, self._new = self._new, []
            ended, self._ended = self._ended, []
        for job in new:
            self._advance(job, None)
        texts = [end for end in ended if end[0].kind == Line.TEXT]
        for line, batch, results in ended:
            if line.spread:
                self._free += 1
            else:
                self._inferring = False
            if line.kind != Line.TEXT:
                self._settle(line, batch, results)
        self._begin_all()
        for end in texts:  # 64 clients take 10 ms to be told, for which the next batch need not wait
            self._settle(*end)
        self._begin_all()

    def _begin_all(self) -> None:
        while line := self._choose():
            self._begin(line)

    def _choose(self) -> Line | None:
        """Scoring first, for it ends what has begun; text next, but never twice while others wait; then by due time."""
        waiting = [ln for ln in self._lines if ln.waiting and (self._free if ln.spread else not self._inferring)]
        if not waiting:
            return None
        kinds = {line.kind for line in waiting}
        if Line.SCORING in kinds:
            kind = Line.SCORING
        elif kinds == {Line.TEXT, Line.BULK}:
            kind = Line.BULK if self._text_ran_last else Line.TEXT
        else:
            kind = min(kinds)
        chosen = min((line for line in waiting if line.kind == kind), key=lambda line: line.waiting[0])
        if kind != Line.SCORING and not chosen.spread:  # lanes take no turn of the inference thread's
            self._text_ran_last = kind == Line.TEXT
        return chosen

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

    def _begin(self, line: Line) -> None:
        """Hands a line's next batch to the inference thread or to a lane."""
        size = min(line.batch_size, -(-len(line.waiting) // self._free)) if line.spread else line.batch_size
        batch: Batch = []
        largest = 0.0
        while line.waiting:
            _, _, step, position = line.waiting[0]
            if not step.job.answer.cancelled():  # else nobody waits for it any more
                largest = max(largest, line.share(step.results[position]))
                if batch and (len(batch) + 1) * largest > size:
                    break
                batch.append((step, position))
            heapq.heappop(line.waiting)
        if not batch:
            return
        if line.spread:
            self._free -= 1
            self._for_lanes.put((line, batch))
        else:
            self._inferring = True
            self._for_inference.put((line, batch))

    def _work(self, handed: Handed, behind: int) -> None:
        machine.step_back(behind)
        while (work := handed.get()) is not None:
            line, batch = work
            results = self._run(line, batch)
            with self._changed:
                self._ended.append((line, batch, results))
                self._changed.notify()
            del work, batch, results  # which would hold pictures until the next batch comes

    def _run(self, line: Line, batch: Batch) -> Sequence[Any]:
        items = [step.results[position] for step, position in batch]
        digests = list(dict.fromkeys(step.job.digest for step, _ in batch)) if line.journaled else []
        thread = threading.get_ident()
        self._began[thread] = time.monotonic()
        with self._holding(digests):
            results = self._results(line, items)
        del self._began[thread]
        return results

    def _settle(self, line: Line, batch: Batch, results: Sequence[Any]) -> None:
        """Takes the tasks of a batch that has run on."""
        self._traffic.ran(line.name, len(batch))
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
        machine.step_back(4)  # before the lanes: a batch is as large as what is decoded by then
        while (work := self._work.get()[2]) is not None:
            work()
