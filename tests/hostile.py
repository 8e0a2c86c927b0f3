"""Peers and files that do not behave, and what a fault may leave behind: nothing."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen import ml_service_pb2 as pb
from tests.kit import BLUE, COLOURS, GREEN, LIMIT_S, RED, ROOT, SERVICE, Node, encoded, picture, wait_until

# An ordinary daemon whose patience is shorter, so that a test need not wait for minutes.
IMPATIENT = """
import importlib, json, os, sys
sys.path.insert(0, "@ROOT@")
import lumen_clip
for name, value in json.loads(os.environ["CONSTANTS"]).items():
    module, *within, constant = name.split(".")
    home = importlib.import_module(module)
    for part in within:
        home = getattr(home, part)
    assert hasattr(home, constant), name
    setattr(home, constant, value)
sys.exit(lumen_clip.main())
"""


PATIENCE = {"streams.CHUNK_IDLE_S": 2, "streams.READER_IDLE_S": 2, "streams.STREAM_IDLE_S": 90}


def impatient(folder: Path, constants: dict[str, Any]) -> dict[str, Any]:
    """Of a Node: such a daemon's program and environment."""
    script = folder / "impatient.py"
    script.write_text(IMPATIENT.replace("@ROOT@", str(ROOT)))
    return {"program": (sys.executable, str(script)), "CONSTANTS": json.dumps(constants)}


def held(message: pb.InferRequest, release: threading.Event) -> Iterator[pb.InferRequest]:
    yield message
    release.wait(2 * LIMIT_S)


def threads_and_files(node: Node) -> tuple[int, int]:
    process = Path(f"/proc/{node.process.pid}")
    return len(list((process / "task").iterdir())), len(list((process / "fd").iterdir()))


def poisons() -> dict[str, bytes]:
    """Whole files that are not what they seem, by what is wrong with them."""

    def png(width: int, height: int, bits: int, colour: int, body: bytes, *extra: tuple[bytes, bytes]) -> bytes:
        parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), *extra]
        made = b"\x89PNG\r\n\x1a\n"
        for kind, data in [*parts, (b"IDAT", zlib.compress(body, 9)), (b"IEND", b"")]:
            made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        return made

    jpeg, photo = encoded(picture(RED)), picture(RED)
    frames = [picture(c, (64, 64)) for c in COLOURS.values()]
    return {
        "88 megapixels": png(9400, 9400, 1, 0, bytes(9400 * 1176)),
        "2 x 65535": encoded(Image.new("RGB", (2, 65535)), "PNG"),
        "65535 x 2": encoded(Image.new("RGB", (65535, 2)), "PNG"),
        "1 x 1": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "no size": png(0, 0, 8, 2, b""),
        "a header that lies": png(4000, 4000, 8, 2, b"short"),
        "a text that swells": png(8, 8, 8, 0, bytes(72), (b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000)))),
        "a profile that swells": png(8, 8, 8, 0, bytes(72), (b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000)))),
        "a huge profile": encoded(photo, icc_profile=bytes(3_000_000)),
        "a huge EXIF": encoded(photo, exif=b"Exif\0\0" + bytes(60_000)),
        "EXIF that lies": encoded(photo, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "a JPEG and a web page": jpeg + b"<html><script>alert(1)</script></html>",
        "a JPEG and an archive": jpeg + b"PK\3\4" + bytes(200),
        "an archive first": b"PK\3\4" + bytes(200) + jpeg,
        "two JPEGs": jpeg + jpeg,
        "CMYK": encoded(photo.convert("CMYK")),
        "16 bits": encoded(Image.fromarray(np.full((90, 90), 40_000, np.uint16)), "PNG"),
        "moving": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "moving PNG": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "nothing but a start": b"\xff\xd8\xff",
        "a JPEG of 65500 lines": jpeg.replace(struct.pack(">HH", 240, 300), struct.pack(">HH", 65500, 65500), 1),
    }


def mutants(count: int, seed: int) -> Iterator[bytes]:
    """Damaged JPEG, PNG, WebP and AVIF files: bytes changed, cut, doubled and spliced, early ones more often."""
    rng = np.random.default_rng(seed)
    size = (96, 72)
    kinds = [encoded(picture(RED, size), kind) for kind in ("JPEG", "PNG", "WEBP", "AVIF")]
    kinds += [
        encoded(picture(BLUE, size), "JPEG", progressive=True),
        encoded(picture(BLUE, size), "WEBP", lossless=True),
    ]
    for number in range(count):
        data = bytearray(kinds[number % len(kinds)])
        for _ in range(int(rng.integers(1, 12))):
            at = int(len(data) * rng.random() ** 3)  # headers are where parsers believe
            size_of = int(rng.integers(1, 64))
            match int(rng.integers(6)):
                case 0:
                    data[at] ^= 1 << int(rng.integers(8))
                case 1:
                    data[at : at + 4] = bytes(rng.choice([0, 0xFF, 0x7F, 0x80], 4).astype(np.uint8))
                case 2:
                    del data[at : at + size_of]
                case 3:
                    data[at:at] = data[at : at + size_of]
                case 4:
                    data[at:at] = rng.integers(0, 256, size_of, np.uint8).tobytes()
                case 5:
                    other = kinds[int(rng.integers(len(kinds)))]
                    data[at : at + size_of] = other[at : at + size_of]
            if not data:
                break
        yield bytes(data) or b"\0"


@contextlib.contextmanager
def outlived(node: Node, named: str = "", times: int = 1) -> Iterator[None]:
    """The oracle of every fault: a good request is answered right afterwards, threads and files are back
    to what they were (within 2), and exactly one line of the log names the fault (or each of so many)."""
    photo = encoded(picture(GREEN))
    expected = node.result("clip_image_embed", photo)["vector"]
    before, seen = threads_and_files(node), len(node.log)

    def naming() -> list[str]:
        return [line for line in node.log[seen:].splitlines() if re.search(named, line)]

    yield
    answer = node.stub.Infer(iter([pb.InferRequest(task="clip_image_embed", payload=photo)]), timeout=LIMIT_S)
    assert json.loads(next(answer).result)["vector"] == expected
    with contextlib.suppress(AssertionError):
        wait_until(lambda: all(now <= then + 2 for now, then in zip(threads_and_files(node), before, strict=True)))
    assert all(now <= then + 2 for now, then in zip(threads_and_files(node), before, strict=True)), (
        f"threads and files: {before} before, {threads_and_files(node)} after"
    )
    if named:
        with contextlib.suppress(AssertionError):
            wait_until(lambda: len(naming()) >= times)
        assert len(naming()) == times, naming()


class RawPeer:
    """A client that speaks as much HTTP/2 as it takes to misbehave below gRPC."""

    HEADERS, RESET, SETTINGS, PING, GOODBYE, WINDOW = 1, 3, 4, 6, 7, 8

    def __init__(self, node: Node, settings: bytes = b"", buffer: int = 0) -> None:
        host, port = node.address.split(":")
        self.socket = socket.socket()
        self.socket.settimeout(5)
        if buffer:  # bytes that the kernel takes though we do not read
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect((host, int(port)))
        self.windows = {0: 65535}  # bytes that the daemon takes: of the connection, and of each stream
        self.seen: list[tuple[int, int]] = []  # kinds of frames and their streams
        self._initial, self._unread = 65535, b""
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self.frame(self.SETTINGS, 0, 0, settings))

    @staticmethod
    def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
        return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body

    def call(self, method: str, stream: int = 1, **more: str) -> None:
        fields = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x", "te": "trailers"}
        fields |= {"content-type": "application/grpc"} | {k.replace("_", "-"): v for k, v in more.items()}
        texts = [(k.encode(), v.encode()) for k, v in fields.items()]
        block = b"".join(bytes([0, len(k)]) + k + bytes([len(v)]) + v for k, v in texts)
        self.socket.sendall(self.frame(self.HEADERS, 4, stream, block))
        self.windows[stream] = self._initial

    def send(self, data: bytes, stream: int = 1, seconds: float = 20) -> int:
        """As much of a stream's data as the daemon takes; -> bytes."""
        sent, deadline = 0, time.monotonic() + seconds
        while sent < len(data) and time.monotonic() < deadline:
            room = min(self.windows[0], self.windows[stream], 16384)
            if room <= 0:
                self.listen()
                continue
            part = data[sent : sent + room]
            self.socket.sendall(self.frame(0, 0, stream, part))
            sent += len(part)
            self.windows[0] -= len(part)
            self.windows[stream] -= len(part)
        return sent

    def listen(self) -> bool:
        """Reads what has come, and answers as HTTP/2 wants it; -> False when the connection is over."""
        try:
            heard = self.socket.recv(1 << 16)
        except TimeoutError:
            return True
        except OSError:
            return False
        self._unread += heard
        while len(self._unread) >= 9 and len(self._unread) >= 9 + int.from_bytes(self._unread[:3], "big"):
            size = int.from_bytes(self._unread[:3], "big")
            head, body, self._unread = self._unread[:9], self._unread[9 : 9 + size], self._unread[9 + size :]
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            self.seen.append((kind, stream))
            if kind == self.WINDOW:
                self.windows[stream] = self.windows.get(stream, 0) + int.from_bytes(body, "big")
            elif kind == self.SETTINGS and not flags & 1:
                for i in range(0, size, 6):
                    if body[i : i + 2] == b"\0\4":
                        initial = int.from_bytes(body[i + 2 : i + 6], "big")
                        for other in [other for other in self.windows if other]:
                            self.windows[other] += initial - self._initial
                        self._initial = initial
                self.socket.sendall(self.frame(self.SETTINGS, 1, 0))
            elif kind == self.PING and not flags & 1:
                self.socket.sendall(self.frame(self.PING, 1, 0, body))
        return bool(heard)

    def close(self) -> None:
        self.socket.close()


INFER = f"/{SERVICE}/Infer"
