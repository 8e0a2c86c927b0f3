"""Fair queueing: whose work runs next when several clients wait for the same resource.

This is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) on measured work. Each flow has an account of the
work that it has received, and the flow that has received least is served first. A flow that was idle starts at the
virtual time, which is the account of the flow that was served last. So it gains nothing from its idle time and loses
nothing by its past work, and a single picture does not wait behind the queue of an import, however long that is.

The work of an item is known when the item is done. Until then its flow is charged the expected work. Expected work
counts for the order, but not for the virtual time. Otherwise a new flow would come last if others were charged too
much.

Flows have two levels. Connections share the resource with each other, and the streams of a connection share the part
of their connection. The first protects clients from an app that opens many streams; the second protects clients that
reach the daemon through one connection of a proxy.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Flow = tuple[Hashable, ...]  # (connection, stream); the accounts and queues also have (connection,)
T = TypeVar("T")

FIRST_COST = 0.01  # core seconds that an item is expected to take before one has been measured
COST_WEIGHT = 0.2  # of the last item or batch in the moving average of an item's cost
# Accounts kept, about 500 bytes each. The least recently used one is dropped. No more flows can be queued at once, and
# a flow that comes back later starts at the virtual time, as a new one does.
ACCOUNTS_MAX = 1024


@dataclass(slots=True)
class Account:
    """Work of a flow, and the virtual time of the level below it, all in core seconds."""

    done: float = 0.0
    expected: float = 0.0  # of what is being done
    virtual_time: float = 0.0


class Shares:
    """The accounts of all flows for one resource. Several queues may share them; not thread-safe."""

    def __init__(self) -> None:
        self._root = Account()
        self._last_expected = self._last = 0.0  # core seconds of the last work
        self._accounts: OrderedDict[Flow, Account] = OrderedDict()

    def work(self, path: Flow) -> float:
        """Core seconds received, on the scale of the virtual time of the level above."""
        # A lookup that does not touch the order costs half.
        account = self._accounts.get(path) or self._account(path)
        return account.done + account.expected

    def join(self, flow: Flow, first: bool) -> None:
        """A flow that was idle has something to do again. `first`: its whole connection was idle."""
        stream, connection = self._account(flow), self._account(flow[:1])
        if first:
            connection.done = max(connection.done, self._root.virtual_time)
        stream.done = max(stream.done, connection.virtual_time)

    def tolerance(self) -> float:
        """Core seconds by which the work of two flows may differ and still count as equal: half an item's."""
        return min(self._last_expected, self._last) / 2

    def begin(self, flow: Flow, expected: float) -> None:
        """A flow was chosen, for work that is expected to take so many core seconds."""
        self._last_expected = expected
        parent = self._root
        for account in (self._account(flow[:1]), self._account(flow)):
            parent.virtual_time = max(parent.virtual_time, account.done)
            account.expected += expected
            parent = account

    def end(self, flow: Flow, expected: float, seconds: float) -> None:
        """Work that was begun with `expected` core seconds is done. It took `seconds` core seconds."""
        self._last = seconds
        for account in (self._account(flow[:1]), self._account(flow)):
            account.expected = max(0.0, account.expected - expected)
            account.done += seconds

    def _account(self, path: Flow) -> Account:
        account = self._accounts.get(path)
        if account is None:
            parent = self._account(path[:1]) if len(path) > 1 else self._root
            account = self._accounts[path] = Account(parent.virtual_time)
            if len(self._accounts) > ACCOUNTS_MAX:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(path)
        return account


class FairQueue(Generic[T]):
    """Items that wait for a resource: the least served flow first, and first in, first out within a flow.

    Among flows whose work differs by less than half an item's, the one that waits longest is next. Otherwise clients
    with equal requests would change places in each round, because no two batches take equally long, and some would wait
    for two rounds.

    Not thread-safe.
    """

    def __init__(self, shares: Shares) -> None:
        self.length = 0  # items
        self._shares = shares
        self._queued: dict[Flow, dict[Flow, deque[T]]] = {}  # connection -> stream -> items

    def push(self, flow: Flow, item: T) -> None:
        streams = self._queued.setdefault(flow[:1], {})
        if flow not in streams:
            self._shares.join(flow, first=not streams)
            streams[flow] = deque()
        streams[flow].append(item)
        self.length += 1

    def priority(self) -> float:
        """The work of the next connection. The queue with the lowest value is served first. It must not be empty."""
        return self._shares.work(self._first(self._queued))

    def head(self) -> tuple[Flow, T]:
        """The next item and its flow. The queue must not be empty."""
        streams = self._queued[self._first(self._queued)]
        flow = self._first(streams)
        return flow, streams[flow][0]

    def pop(self, flow: Flow, expected: float) -> T:
        """Takes the first item of a flow, whose work is expected to take so many core seconds; see `Shares.end`."""
        item = self._queued[flow[:1]][flow].popleft()
        self.length -= 1
        self._tidy(flow)
        self._shares.begin(flow, expected)
        return item

    def remove(self, flow: Flow, unwanted: Callable[[T], bool]) -> list[T]:
        """Takes out the items of a flow that are not wanted any more."""
        items = self._queued.get(flow[:1], {}).get(flow, deque())
        removed: list[T] = []
        for _ in range(len(items)):
            item = items.popleft()
            (removed if unwanted(item) else items).append(item)
        self.length -= len(removed)
        if removed:
            self._tidy(flow)
        return removed

    def _first(self, waiting: Mapping[Flow, object]) -> Flow:
        """The first of `waiting`, which is in the order of arrival, whose work is nearly the least."""
        paths = list(waiting)
        if len(paths) == 1:
            return paths[0]
        works = list(map(self._shares.work, paths))
        most = min(works) + self._shares.tolerance()
        return next(path for path, work in zip(paths, works, strict=True) if work <= most)

    def _tidy(self, flow: Flow) -> None:
        streams = self._queued[flow[:1]]
        if not streams[flow]:
            del streams[flow]
        if not streams:
            del self._queued[flow[:1]]
