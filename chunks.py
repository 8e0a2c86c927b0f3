"""Chunks of one stream -> whole requests, and the bounds of what all streams may hold.

Nothing here is bounded by a number that a client sent, and nothing knows gRPC's calls or what a request asks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from errors import BadInput
from gen import ml_service_pb2 as pb
from machine import clock
from tasks import Request

CHUNKS_MAX = 65_536  # of one request
OPEN_IDS_MAX = 64  # unfinished requests on one stream
CHUNKS_RESERVED = 1024  # for so many chunks a request has room as soon as it begins
UNFINISHED_MAX = 2  # times the size that one request may have: bytes of unfinished requests on one stream
ID_MAX = 1000  # characters of a correlation id
ENVELOPE_MAX = 4 << 20  # bytes of a message beside its payload: 256 labels of 1,000 characters, and room to spare
META_MAX = 256  # entries
CHUNK_COST = 512  # bytes that keeping a chunk takes, were it empty


@dataclass
class Unfinished:
    """A request of which chunks are missing."""

    request: Request  # as its first chunk told; the payload is still empty
    total: int
    reserved: int  # bytes of the payload, as its first chunk lets one expect
    since: float = field(default_factory=clock.now)
    size: int = 0  # bytes of the payloads
    parts: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # seq -> offset, payload

    def payload(self) -> int:
        """Bytes of the payload: what has come, or what is expected if that is more."""
        return max(self.size, self.reserved)

    def held(self) -> int:
        """Bytes that are set aside, with what keeping the chunks takes."""
        return self.request.held + self.payload() + max(len(self.parts), self.reserved_chunks()) * CHUNK_COST

    def reserved_chunks(self) -> int:
        return min(self.total, CHUNKS_RESERVED)


class Assembler:
    """Chunks of one stream -> whole requests, keyed by the literal correlation id, which may be empty.

    Bounded in bytes and in count, never by a number that the client sent. An id that failed is answered once; the
    rest of its chunks is ignored until a chunk with seq 0 begins it anew.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._open: dict[str, Unfinished] = {}
        self._failed: OrderedDict[str, None] = OrderedDict()

    def add(self, message: pb.InferRequest, payload: bytes) -> Request | None:
        """The request that this message completes, or None. `payload` was taken out of the message: it holds a copy.

        Raises BadInput.
        """
        key = message.correlation_id
        if len(key) > ID_MAX:
            raise BadInput(f"correlation_id: over {ID_MAX} characters")
        if key in self._failed:
            if message.seq > 0:
                return None
            del self._failed[key]
        try:
            return self._add(key, message, payload)
        except BadInput:
            self.drop(key)
            self._failed[key] = None
            if len(self._failed) > OPEN_IDS_MAX:
                self._failed.popitem(last=False)
            raise

    def unfinished(self) -> list[str]:
        return list(self._open)

    def since(self) -> float:
        """When the oldest unfinished request began, by `machine.clock`; without end if there is none."""
        return min((request.since for request in list(self._open.values())), default=math.inf)

    def held(self) -> int:
        """Bytes that are set aside for unfinished requests."""
        return sum(request.held() for request in self._open.values())

    def room_for(self, message: pb.InferRequest, payload: bytes) -> tuple[int, bool]:
        """Bytes to be set aside before a message is added, whose payload was taken out of it; and whether it belongs to
        a request that has begun.

        With its first chunk a request gets what the whole needs if all chunks are as large, so that uploads which have
        begun do not wait for each other.
        """
        if waiting := self._open.get(message.correlation_id):
            chunk = CHUNK_COST if len(waiting.parts) >= waiting.reserved_chunks() else 0
            return chunk + max(0, waiting.size + len(payload) - waiting.payload()), True
        chunks = max(1, min(int(message.total), CHUNKS_RESERVED))
        beside: int = message.ByteSize() + CHUNK_COST * chunks
        return beside + max(len(payload), self._expected(message, payload)), False

    def _expected(self, message: pb.InferRequest, payload: bytes) -> int:
        """Bytes of the whole payload, if all chunks are as large as the first one."""
        return min(len(payload) * min(int(message.total), CHUNKS_MAX), self._max_bytes)

    def drop(self, key: str) -> None:
        self._open.pop(key, None)

    def _add(self, key: str, message: pb.InferRequest, payload: bytes) -> Request | None:
        envelope = self._check_envelope(message)
        if key not in self._open and message.total <= 1:
            if message.seq or message.offset:
                raise BadInput(
                    f"total: {message.total} with seq {message.seq} and offset {message.offset}; "
                    "allowed: the number of chunks on each of them"
                )
            self._check_size(len(payload))
            return self._request(message, payload, envelope)
        self._check_chunk(message)
        if key not in self._open:
            if len(self._open) >= OPEN_IDS_MAX:
                raise BadInput(f"correlation_id: more than {OPEN_IDS_MAX} unfinished requests on one stream")
            reserved, most = self._expected(message, payload), UNFINISHED_MAX * self._max_bytes
            if sum(request.payload() for request in self._open.values()) + reserved > most:
                raise BadInput(f"payload: more than {most} bytes of unfinished requests on one stream")
            self._open[key] = Unfinished(self._request(message, b"", envelope), message.total, reserved)
        waiting = self._open[key]
        self._check_same(waiting, message)
        waiting.parts[message.seq] = message.offset, payload
        waiting.size += len(payload)
        self._check_size(waiting.size)
        if len(waiting.parts) < waiting.total:
            return None
        parts = [waiting.parts[seq] for seq in range(waiting.total)]
        self._check_offsets(parts)
        self.drop(key)
        waiting.request.payload = b"".join(payload for _, payload in parts)
        waiting.request.held += waiting.size
        return waiting.request

    @staticmethod
    def _request(first: pb.InferRequest, payload: bytes, envelope: int) -> Request:
        held = len(payload) + envelope
        return Request(first.correlation_id, first.task, first.payload_mime, dict(first.meta), payload, held)

    @staticmethod
    def _check_envelope(message: pb.InferRequest) -> int:
        """-> bytes of all but the payload."""
        size: int = message.ByteSize()
        if size > ENVELOPE_MAX:
            raise BadInput(f"meta: {size} bytes beside the payload; allowed: {ENVELOPE_MAX}")
        if len(message.meta) > META_MAX:
            raise BadInput(f"meta: {len(message.meta)} entries; allowed: {META_MAX}")
        return size

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise BadInput(f"payload: over {self._max_bytes} bytes, the most that a request may have")

    @staticmethod
    def _check_chunk(message: pb.InferRequest) -> None:
        if message.total > CHUNKS_MAX:
            raise BadInput(f"total: {message.total}; allowed: up to {CHUNKS_MAX} chunks")
        if message.seq >= message.total:
            raise BadInput(f"seq: {message.seq} of total {message.total}; allowed: 0 to total - 1")

    @staticmethod
    def _check_same(waiting: Unfinished, message: pb.InferRequest) -> None:
        if message.seq in waiting.parts:
            raise BadInput(f"seq: {message.seq} was sent twice")
        first = waiting.request
        for name, told, now in (
            ("total", waiting.total, message.total),
            ("task", first.task, message.task),
            ("payload_mime", first.mime, message.payload_mime),
            ("meta", first.meta, dict(message.meta)),
        ):
            if told != now:
                raise BadInput(f"{name}: it differs between the chunks of one request")

    @staticmethod
    def _check_offsets(parts: Sequence[tuple[int, bytes]]) -> None:
        if not any(offset for offset, _ in parts):  # some clients leave it at 0
            return
        length = 0
        for seq, (offset, payload) in enumerate(parts):
            if offset != length:
                raise BadInput(f"offset: {offset} on chunk {seq}; the chunks before it have {length} bytes")
            length += len(payload)
