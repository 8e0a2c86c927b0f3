"""The load of `bench.py`: what is asked, the processes that ask it, and the daemon that answers."""

from __future__ import annotations

import asyncio
import collections
import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf import empty_pb2
from numpy.typing import NDArray
from PIL import Image

from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc

IN_FLIGHT = {1: 32, 8: 4, 64: 1}  # clients -> requests that each has in progress
FEW = (1, 2, 4, 8)  # clients with one request each, as photo apps have
HERE = Path(__file__).resolve().parent
INFER = "/home_native.v1.Inference/Infer"
TEXTS = 10_000  # different texts, more than a daemon remembers, of equal length: each digit is one token


@dataclass(frozen=True)
class Case:
    """A request that is sent again and again, or a mix of such cases in turn. A number replaces the {} of a text."""

    name: str
    task: str = ""
    payload: bytes = b""
    mix: tuple[Case, ...] = ()

    @property
    def parts(self) -> tuple[Case, ...]:
        return self.mix or (self,)


def photograph(width: int, height: int) -> Image.Image:
    """Structure at every scale, as photographs have it, so that the file has a photograph's size."""
    rng = np.random.default_rng(0)
    levels = np.zeros((height, width, 3), np.float32)
    for cell in (512, 128, 32, 8, 2):
        shape = (max(2, height // cell), max(2, width // cell), 3)
        noise = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        levels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) * cell**0.4
    levels -= levels.min()
    return Image.fromarray((levels * 255 / levels.max()).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_cases() -> list[Case]:
    words = "a red bicycle that leans on the wall of an old house by the sea at sunset "
    large = Case("12 MP JPEG", "clip_image_embed", encoded(photograph(4000, 3000), "JPEG", quality=88))
    preview = Case("1440 px JPEG", "clip_image_embed", encoded(photograph(1440, 1080), "JPEG", quality=80))
    small = Case("640 px JPEG", "clip_image_embed", encoded(photograph(640, 480), "JPEG", quality=85))
    thumbnail = Case("WebP thumbnail", "clip_image_embed", encoded(photograph(320, 240), "WEBP", quality=80))
    short = Case("short text", "clip_embed", b"dog {}")
    long = Case("long text", "clip_embed", ("{} " + words * 6).encode())
    mixed = Case("mixed", mix=(small, small, small, small, large, thumbnail, short, short))
    return [large, preview, small, thumbnail, short, long, mixed]


def requests(cases: Sequence[Case], numbers: Iterator[int]) -> Iterator[bytes]:
    """Endlessly, the cases in turn, serialized."""
    pictures = {case.name: message(case, b"") for case in cases if case.task == "clip_image_embed"}
    for case in itertools.cycle(cases):
        yield pictures.get(case.name) or message(case, text_of(case, next(numbers)))


def message(case: Case, text: bytes) -> bytes:
    return bytes(pb.InferRequest(task=case.task, payload=text or case.payload).SerializeToString())


def text_of(case: Case, number: int) -> bytes:
    return case.payload.decode().format(f"{number % TEXTS:04d}").encode()


# --- the processes that ask --------------------------------------------------------------------------------------


def core_s_of(pid: int) -> float:
    """The core time that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Clients:
    """`count` clients in a process of their own, each with a connection, a stream and a few requests in progress."""

    numbers = 0  # the texts that all clients have sent so far

    def __init__(
        self,
        address: str,
        cases: Sequence[Case | bytes],
        count: int,
        each: int = 0,
        ask: Callable[..., None] | None = None,
    ) -> None:
        """`each`: requests that each client has in progress; 0: as IN_FLIGHT says. `ask`: the body of the process."""
        spawn = multiprocessing.get_context("spawn")
        self._over = spawn.Event()
        self._found, theirs = spawn.Pipe(duplex=False)
        arguments = (address, cases, (count, each or IN_FLIGHT[count]), Clients.numbers, self._over, theirs)
        self._process = spawn.Process(target=ask or send_until_stopped, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        if not self._found.recv():  # True with the first answer
            raise SystemExit("bench: the clients did not get an answer")

    def core_s(self) -> float:
        return core_s_of(self._process.pid or 0)

    def stop(self) -> list[tuple[float, float]]:
        """(answered at, seconds) of each answer."""
        self._over.set()
        answers, numbers = self._found.recv()
        Clients.numbers += numbers
        self._process.join()
        return list(answers)


def send_until_stopped(
    address: str, cases: Sequence[Case], clients: tuple[int, int], number: int, over: Any, found: Any
) -> None:
    """The process of `Clients`. `clients`: how many, and the requests of each in progress.

    Pictures are serialized before it begins, and one thread serves all streams.
    """
    (count, each), numbers, answers = clients, itertools.count(number), list[tuple[float, float]]()
    ready = requests(cases, numbers)  # shared: with a cycle for each of 64 clients, a mix would take 20 s

    async def ask() -> None:
        sent = collections.deque[float]()
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        channel: Any = grpc.aio.insecure_channel(address, options)
        async with channel:
            call = channel.stream_stream(INFER, response_deserializer=pb.InferResponse.FromString)()
            for _ in range(each):
                sent.append(time.perf_counter())
                await call.write(next(ready))
            while sent:
                response = await call.read()
                if response.error.message:
                    raise RuntimeError(response.error.message)
                now = time.perf_counter()
                if not answers:
                    found.send(True)
                answers.append((now, now - sent.popleft()))
                if not over.is_set():
                    sent.append(time.perf_counter())
                    await call.write(next(ready))
            await call.done_writing()
            await call.code()

    async def ask_all() -> None:
        await asyncio.gather(*(ask() for _ in range(count)))

    asyncio.run(ask_all())
    found.send((answers, next(numbers) - number))


def immich_request(case: Case, model: str, text: bytes = b"") -> bytes:
    """The HTTP request by which immich's server asks for a case."""
    picture = case.task == "clip_image_embed"
    entries = json.dumps({"clip": {"visual" if picture else "textual": {"modelName": model}}})
    more = '; filename="blob"\r\nContent-Type: application/octet-stream' if picture else ""
    head = f'--lumen\r\nContent-Disposition: form-data; name="entries"\r\n\r\n{entries}\r\n--lumen\r\n'
    head += f'Content-Disposition: form-data; name="{"image" if picture else "text"}"{more}\r\n\r\n'
    body = head.encode() + (text or case.payload) + b"\r\n--lumen--\r\n"
    head = "POST /predict HTTP/1.1\r\nHost: bench\r\nContent-Type: multipart/form-data; boundary=lumen\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask_http(
    address: str, requests: Iterator[bytes], over: Callable[[], bool], pause: float = 0.0
) -> list[tuple[float, float]]:
    """One client over HTTP, with one request in progress; -> (answered at, seconds) of each answer."""
    reader, writer = await asyncio.open_connection(*address.split(":"))
    answers = []
    while not over():
        sent = time.perf_counter()
        writer.write(next(requests))
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        if not head.startswith(b"HTTP/1.1 200 ") or not length:
            raise RuntimeError(head.decode("latin-1"))
        await reader.readexactly(int(length[1]))
        answers.append((time.perf_counter(), time.perf_counter() - sent))
        await asyncio.sleep(pause)
    writer.close()
    return answers


def send_http_until_stopped(
    address: str, requests: Sequence[bytes], clients: tuple[int, int], number: int, over: Any, found: Any
) -> None:
    """Like `send_until_stopped`, for whole HTTP requests."""

    async def ask_all() -> list[tuple[float, float]]:
        await ask_http(address, iter(requests[:1]), iter([False, True]).__next__)
        found.send(True)
        asking = (ask_http(address, itertools.cycle(requests), over.is_set) for _ in range(clients[0]))
        return list(itertools.chain.from_iterable(await asyncio.gather(*asking)))

    found.send((asyncio.run(ask_all()), 0))


def ping(address: str, over: Any, found: Any) -> None:
    """The body of a process: asks for Health ten times a second; puts the seconds that each call took."""
    stub, times = pb_grpc.InferenceStub(grpc.insecure_channel(address)), []
    while not over.is_set():
        started = time.perf_counter()
        stub.Health(empty_pb2.Empty())
        times.append(time.perf_counter() - started)
        time.sleep(0.1)
    found.put(times)


# --- the daemon -------------------------------------------------------------------------------------------------


class Server:
    """The daemon in a process of its own, or one that runs already."""

    def __init__(
        self, address: str, environment: dict[str, str] | None, program: Sequence[str] = (str(HERE / "lumen_clip.py"),)
    ) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.output: list[str] = []
        if environment is not None:
            command = [sys.executable, *program, "--host", "127.0.0.1", "--port", "0"]
            self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            address = self._wait()
        self.address = address
        options = [("grpc.max_receive_message_length", -1)]
        self.stub: Any = pb_grpc.InferenceStub(grpc.insecure_channel(address, options))

    def _wait(self) -> str:
        assert self.process and self.process.stderr
        port = ""
        for line in self.process.stderr:
            self.output.append(line)
            if found := re.search(r"listening on \S+ port (\d+)", line):
                port = found[1]
            if "ready: " in line:
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return f"127.0.0.1:{port}"
        raise SystemExit("bench: the daemon did not start:\n" + "".join(self.output))

    def memory_mb(self) -> float:
        if not self.process:
            return 0.0
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024  # type: ignore[index]

    def core_s(self) -> float:
        return core_s_of(self.process.pid) if self.process else 0.0

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()


@dataclass
class Window:
    """The figures of a load over some seconds."""

    seconds: float
    per_s: float
    latencies: NDArray[np.float64]  # seconds, one for each answer
    core_s: float  # the daemon's
    client_s: float


def load(server: Server, cases: Sequence[Case], count: int, seconds: float, each: int = 0) -> Window:
    """Closed-loop load of `count` clients, measured once it is steady. `each`: see `Clients`."""
    return watch(server, Clients(server.address, cases, count, each), seconds)


def watch(server: Server, clients: Clients, seconds: float) -> Window:
    """The figures of clients that have begun. They are ended."""
    time.sleep(0.75 * seconds)
    begin, core, client = time.perf_counter(), server.core_s(), clients.core_s()
    time.sleep(seconds)
    end, core, client = time.perf_counter(), server.core_s() - core, clients.core_s() - client
    answers = np.array(sorted(answer for answer in clients.stop() if begin <= answer[0] < end))
    if len(np.unique(answers)) < 8:
        raise SystemExit(f"bench: fewer than 8 answers within {seconds:.1f} s; set a longer time with --seconds")
    # Answers come in batches. The slope of their count does not depend on how many batches the window's edges cut off.
    per_s = float(np.polyfit(answers[:, 0] - begin, np.arange(len(answers)), 1)[0])
    return Window(end - begin, per_s, answers[:, 1], core, client)
