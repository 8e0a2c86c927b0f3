"""The threads that turn payloads into pixels or token ids."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import machine
from fair_queue import COST_WEIGHT, FIRST_COST, FairQueue, Flow, Shares
from machine import clock

# Prepares a request, and returns what follows when its thread no longer counts as busy. Neither may raise.
Work = Callable[[], Callable[[], None]]


class DecodePool:
    """Threads that turn payloads into pixels or token ids, in the fair order. Pillow releases the GIL meanwhile."""

    def __init__(self, threads: int) -> None:
        self._changed = threading.Condition()
        self._shares = Shares()
        self._queue: FairQueue[tuple[Future[Any], Work]] = FairQueue(self._shares)
        self._cost = FIRST_COST  # core seconds of a payload, a moving average
        self._began: dict[int, float] = {}  # thread -> when its payload was begun, by `machine.clock`
        self._stopping = False
        self._threads = [threading.Thread(target=self._loop, name=f"decode-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def busy_since(self) -> float | None:
        """When the oldest payload in progress was begun, by `machine.clock`; None if there is none."""
        return min(self._began.copy().values(), default=None)

    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def busy(self) -> int:
        """How many threads decode at the moment."""
        return len(self._began)

    def submit(self, flow: Flow, answer: Future[Any], work: Work) -> None:
        """Queues the work for a request. It is dropped if the answer is cancelled before its turn."""
        with self._changed:
            self._queue.push(flow, (answer, work))
            self._changed.notify()
        answer.add_done_callback(partial(self._drop, flow))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for a decode thread that waits for other threads. The wait does not count in `busy_since`."""
        thread = threading.get_ident()
        self._began.pop(thread, None)
        try:
            yield
        finally:
            self._began[thread] = clock.now()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _drop(self, flow: Flow, answer: Future[Any]) -> None:
        if answer.cancelled():
            with self._changed:
                self._queue.remove(flow, lambda entry: entry[0].cancelled())

    def _loop(self) -> None:
        machine.lower_thread_priority(machine.DECODER_NICE)
        while not self._stopping:
            self._run_next()

    def _run_next(self) -> None:
        """Waits for a payload and decodes it. A separate method, so that an idle thread holds no local variables."""
        with self._changed:
            while not (self._queue.length or self._stopping):
                self._changed.wait()
            if self._stopping:
                return
            flow, _ = self._queue.head()
            expected = self._cost
            _, work = self._queue.pop(flow, expected)
        thread, started = threading.get_ident(), time.thread_time()
        self._began[thread] = clock.now()
        then = work()
        del self._began[thread]
        seconds = time.thread_time() - started
        with self._changed:
            self._shares.end(flow, expected, seconds)
            self._cost += COST_WEIGHT * (seconds - self._cost)
        then()
