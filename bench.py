"""The daemon's speed as a ratio to what the machine can do, measured in one run.

    python bench.py                          # ViT-B-32, ONNX Runtime, fp32; about ten minutes
    python bench.py --precision int8         # or --backend torch
    python bench.py --few                    # one to eight requests at a time, as photo apps have
    python bench.py --photos ~/Photos        # an import of one's own pictures
    python bench.py --against host:50051     # any server that speaks the protocol
    python bench.py --immich 3003            # previews and texts over HTTP, as immich sends them
    python bench.py --simulate 64            # rates with up to 64 simulated cores

The weights are random and have real size. They are built once and kept in `data/bench`. Nothing is downloaded. Each
rate is compared with two limits: `model` is the raw model on prepared inputs, at its best batch size. `cores` is the
rate that the cores would reach if only decoding and the model took core time. The two limits and the loads of 1, 8 and
64 clients are measured in turns. The clients run on the same cores, in a separate process (`bench_load.py`), and do as
little as possible. The column `client` is their core time. The last column, `share`, is the share of decoding and the
model in all core time. It does not depend on other programs on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import empty_pb2
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import backends
import bench_simulation
import export
import machine
import model_files
import preprocess
import torch_backend
from bench_load import (
    FEW,
    IN_FLIGHT,
    Case,
    Clients,
    Server,
    Window,
    ask_http,
    immich_request,
    load,
    make_cases,
    ping,
    send_http_until_stopped,
    text_of,
    watch,
)
from gen import ml_service_pb2 as pb
from settings import ModelOptions

HERE = Path(__file__).resolve().parent
WINDOW, FEW_WINDOW = 4.0, 2.0  # seconds of one turn, and of one with few requests at a time
LIBRARY = 40_000  # photographs
SIMULATED_CASE = "640 px JPEG"
FEW_CASES = ("1440 px JPEG", "640 px JPEG")


@dataclass
class Row:
    case: str
    clients: int
    per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    model_per_s: float = 0.0
    cores_per_s: float = 0.0
    memory_mb: float = 0.0
    core_ms: float = 0.0  # the daemon's, of one request
    client_ms: float = 0.0  # the clients' core time of one request
    useful_share: float = 0.0  # what decoding and the model take, as a share of both

    def cells(self) -> list[str]:
        def share(limit: float) -> str:
            return f"{limit:.1f} ({self.per_s / limit:.2f})" if limit else ""

        times = [f"{value:.0f}" for value in (self.p50_ms, self.p95_ms, self.p99_ms)]
        rest = [f"{self.memory_mb:.0f}" if self.memory_mb else "", f"{self.core_ms:.1f}" if self.core_ms else ""]
        rest += [f"{self.client_ms:.1f}", f"{self.useful_share:.2f}" if self.core_ms and self.useful_share else ""]
        rates = [f"{self.per_s:.1f}", share(self.model_per_s), share(self.cores_per_s)]
        return [self.case, str(self.clients), *rates, *times, *rest]


HEAD = ["case", "clients", "per s", "model (ratio)", "cores (ratio)", "p50 ms", "p95", "p99", "MB", "core ms", "client"]
HEAD += ["share"]


# --- the limits -------------------------------------------------------------------------------------------------


class Limits:
    """The raw model in this process, on ready inputs: ONNX Runtime's sessions or OpenCLIP itself; and the decoder.

    They are measured each time they are asked for, because the speed of a machine changes from minute to minute.
    """

    def __init__(self, backend: model_files.Backend, seconds: float) -> None:
        """`seconds` bounds each measurement."""
        self.backend, self.cores, self._seconds = backend, machine.usable_cores(), seconds
        self._threads = ThreadPoolExecutor(self.cores)
        ways = list((self._torch_ways if isinstance(backend, torch_backend.TorchBackend) else self._onnx_ways)(backend))
        self._whole, self._split = ways[::2], ways[1::2]  # of each batch size: one on all cores, one on each core
        self._best_size, self._best = max(ways, key=lambda way: rate(way[1], way[0], seconds))

    def _ready_pixels(self) -> Iterator[NDArray[np.uint8]]:
        side = self.backend.preprocess.size
        for size in (1, 2, 4, 8, 16, *((32, 64, 128, 256) if self.backend.accelerator else ())):
            yield np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)

    def _on_each_core(self, run: Callable[[], Any]) -> None:
        list(self._threads.map(lambda _: run(), range(self.cores)))

    def _torch_ways(self, backend: Any) -> Iterator[tuple[int, Callable[[], Any]]]:
        """OpenCLIP's own `encode_image` on ready tensors: all threads on one batch, and a batch on each core.

        A GPU runs one batch at a time.
        """
        import torch

        device = next(backend.model.parameters())

        def encode(ready: Any, threads: int) -> None:
            if torch.get_num_threads() != threads:  # counted for each thread
                torch.set_num_threads(threads)
            with torch.inference_mode():
                backend.model.encode_image(ready).cpu()

        for pixels in self._ready_pixels():
            ready = torch.from_numpy(preprocess.normalize(pixels, backend.preprocess)).to(device.device, backend.dtype)
            whole = len(pixels), partial(encode, ready, self.cores)
            split = len(pixels) * self.cores, partial(self._on_each_core, partial(encode, ready, 1))
            yield from (whole, whole if backend.accelerator else split)

    def _onnx_ways(self, backend: Any) -> Iterator[tuple[int, Callable[[], Any]]]:
        """All threads on one batch with ONNX Runtime's own settings, and a batch on each core."""
        import onnxruntime

        alone = onnxruntime.SessionOptions()
        alone.intra_op_num_threads = 1
        whole = onnxruntime.InferenceSession(str(backend.image.path))
        one_core = onnxruntime.InferenceSession(str(backend.image.path), alone)
        name, fixed = whole.get_inputs()[0].name, whole.get_inputs()[0].shape[0]

        for pixels in self._ready_pixels():
            if not isinstance(fixed, int) or len(pixels) == fixed:
                yield len(pixels), partial(whole.run, None, {name: pixels})
                yield len(pixels) * self.cores, partial(self._on_each_core, partial(one_core.run, None, {name: pixels}))

    def images_per_s(self) -> float:
        return rate(self._best, self._best_size, self._seconds)

    def ways_per_s(self, case: Case, count: int) -> float:
        """Pictures a second of `count` clients with one request each, by the better of two ways.

        One picture after the other: decoded on one core, then in the model on all cores. Or each on a core of its own,
        in batches of as many as there are for a core. A model with a fixed batch size runs that.
        """
        decode = partial(preprocess.decode_image, case.payload, [self.backend.preprocess], 1 << 30, draft=True)
        decode_s = 1 / rate(decode, 1, self._seconds)
        size, whole = self._whole[0]
        busy, fitting = min(count, self.cores), [way for way in self._split if way[0] <= max(count, self.cores)]
        size_of_all, split = fitting[-1] if fitting else self._split[0]
        split_s = self.cores / rate(split, size_of_all, self._seconds)
        return max(1 / (decode_s + 1 / rate(whole, size, self._seconds)), busy / (decode_s + split_s))

    def cores_per_s(self, case: Case) -> float:
        """Requests a second if decoding and the model took their core time, and nothing else took any."""
        times = collections.Counter(case.parts)
        core_s = sum(count * sum(self.core_s(part).values()) for part, count in times.items())
        return self.cores * len(case.parts) / core_s

    def core_s(self, case: Case) -> dict[str, float]:
        """Core seconds of one request of a case, by what they are spent on."""
        if case.task != "clip_image_embed":
            tokens = self.backend.tokenize([text_of(case, number).decode() for number in range(32)])
            runs = (core_seconds(partial(self.backend.encode_text, tokens[:n]), n, self._seconds) for n in (8, 32))
            return {"text model": min(runs)}
        recipes = [self.backend.preprocess]
        decode = partial(preprocess.decode_image, case.payload, recipes, 1 << 30, draft=True)
        return {
            "decode": core_seconds(decode, 1, self._seconds),
            "image model": core_seconds(self._best, self._best_size, self._seconds),
        }


def rate(run: Callable[[], Any], items: int, seconds: float) -> float:
    """Items a second over all runs, as the rate of a server is counted."""
    run()
    taken: list[float] = []
    while sum(taken) < seconds:
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return items * len(taken) / sum(taken)


def core_seconds(run: Callable[[], Any], items: int, seconds: float) -> float:
    """Core time of one item."""
    run()
    runs, started, cpu = 0, time.perf_counter(), time.process_time()
    while runs < 3 or time.perf_counter() - started < seconds:
        run()
        runs += 1
    return (time.process_time() - cpu) / runs / items


def row_of(case: str, clients: int, windows: Sequence[Window], limits: Sequence[tuple[float, float]]) -> Row:
    """`limits`: (raw model, cores) of each measurement."""
    seconds = sum(window.seconds for window in windows)
    count = sum(window.per_s * window.seconds for window in windows)
    p50, p95, p99 = 1000 * np.percentile(np.concatenate([window.latencies for window in windows]), (50, 95, 99))
    row = Row(case, clients, count / seconds, float(p50), float(p95), float(p99))
    row.core_ms = 1000 * sum(window.core_s for window in windows) / count
    row.client_ms = 1000 * sum(window.client_s for window in windows) / count
    if limits:
        row.model_per_s, row.cores_per_s = (statistics.mean(found) for found in zip(*limits, strict=True))
    return row


# --- the runs ---------------------------------------------------------------------------------------------------


def measure_cases(server: Server, limits: Limits | None, cases: Sequence[Case], seconds: float) -> list[Row]:
    """The rows. For each case, one, eight and 64 clients take turns, with the limits in between, so that other programs
    on the machine slow all of them down alike."""
    turns = max(1, round(seconds / WINDOW))

    def limits_of(case: Case) -> list[tuple[float, float]]:
        if not limits:
            return []
        return [(limits.images_per_s() if case.task == "clip_image_embed" else 0.0, limits.cores_per_s(case))]

    rows = []
    for case in cases:
        found, windows = limits_of(case), {clients: list[Window]() for clients in IN_FLIGHT}
        for _ in range(turns):
            for clients, seen in windows.items():
                seen.append(load(server, case.parts, clients, seconds / turns))
            found += limits_of(case)
        for clients, seen in windows.items():
            row = row_of(case.name, clients, seen, found)
            row.memory_mb = server.memory_mb()
            if limits:
                row.useful_share = 1000 * limits.cores / row.cores_per_s / (row.core_ms + row.client_ms)
            rows.append(row)
            print("  ".join(cell.rjust(14) for cell in row.cells()), flush=True)
    return rows


def measure_few(server: Server, limits: Limits | None, cases: Sequence[Case], seconds: float) -> list[dict[str, Any]]:
    """The rates of few clients with one request each, in turns with the limit. The ratio is the median of the turns.

    A window is short, because the speed of all cores together changes from second to second on a virtual machine.
    """
    rows: list[dict[str, Any]] = []
    turns = max(1, round(seconds / FEW_WINDOW))
    print("  ".join(cell.rjust(14) for cell in ("case", "clients, 1 each", "per s", "ways (ratio)", "p50 ms", "p95")))
    for case in cases:
        for count in FEW:
            found, windows = [limits.ways_per_s(case, count)] if limits else [], []
            for _ in range(turns):
                windows.append(load(server, [case], count, seconds / turns, 1))
                found += [limits.ways_per_s(case, count)] if limits else []
            row = row_of(case.name, count, windows, [])
            around = [(before + after) / 2 for before, after in pairwise(found)]
            ratio = (
                statistics.median(window.per_s / ways for window, ways in zip(windows, around, strict=True))
                if found
                else 0.0
            )
            ways = statistics.mean(around) if found else 0.0
            kept = {"case": case.name, "clients": count, "per_s": row.per_s}
            rows.append(kept | {"ways_per_s": ways, "ratio": ratio, "p50_ms": row.p50_ms})
            cells = [f"{row.per_s:.1f}", f"{ways:.1f} ({ratio:.2f})" if ways else ""]
            cells = [case.name, str(count), *cells, f"{row.p50_ms:.0f}", f"{row.p95_ms:.0f}"]
            print("  ".join(cell.rjust(14) for cell in cells), flush=True)
    return rows


def measure_waits(server: Server, limits: Limits | None, cases: Sequence[Case], seconds: float) -> dict[str, float]:
    """A text alone, then a text while an import of photographs keeps the daemon busy; milliseconds."""
    by_name = {case.name: case for case in cases}
    texts = (text_of(by_name["short text"], number) for number in itertools.count(Clients.numbers))

    def ask() -> float:
        text = pb.InferRequest(task="clip_embed", payload=next(texts))
        started = time.perf_counter()
        list(server.stub.Infer(iter([text])))
        return 1000 * (time.perf_counter() - started)

    ask()
    alone = [ask() for _ in range(100)]
    found = {"text, idle daemon: p50": statistics.median(alone)}
    if limits:
        tokens = limits.backend.tokenize([next(texts).decode()])
        found["raw forward of that text"] = 1000 / rate(partial(limits.backend.encode_text, tokens), 1, seconds / 4)
    importing = Clients(server.address, [by_name["640 px JPEG"]], 1)
    time.sleep(seconds / 2)
    busy, until = [], time.perf_counter() + 3 * seconds
    while time.perf_counter() < until:
        busy.append(ask())
        time.sleep(0.05)
    at = [answered for answered, _ in importing.stop()]
    p50, p95 = np.percentile(busy, (50, 95))
    extra = server.stub.GetCapabilities(empty_pb2.Empty()).extra
    per_s = (len(at) - 1) / (at[-1] - at[0])
    found |= {"text during an import: p50": float(p50), "text during an import: p95": float(p95)}
    if "clip_batch_size" in extra:
        at_once = int(extra["clip_batch_size"]) * int(extra["clip_lanes"])
        found["one image batch"] = 1000 * at_once / per_s
    return found


def measure_immich(server: Server, http: str, seconds: float) -> list[dict[str, Any]]:
    """Previews over HTTP as immich sends them, in turns with the same over gRPC; and texts over HTTP meanwhile."""
    from immich import immich_name  # needs aiohttp

    by_name = {case.name: case for case in make_cases()}
    case, text = by_name["1440 px JPEG"], by_name["short text"]
    model = immich_name(server.stub.GetCapabilities(empty_pb2.Empty()).extra["clip_model"])
    preview = [immich_request(case, model)]
    texts = (immich_request(text, model, text_of(text, number)) for number in itertools.count())
    turns, rows = max(1, round(seconds / WINDOW)), []
    names = ("clients, 1 each", "gRPC per s", "HTTP per s", "ratio", "HTTP p50 ms", "p95", "text p50 ms", "p95")
    print("  ".join(name.rjust(15) for name in names))
    for count in FEW:
        over_grpc, over_http, waits = list[Window](), list[Window](), list[float]()
        for _ in range(turns):
            over_grpc.append(load(server, [case], count, seconds / turns, 1))
            over_http.append(watch(server, Clients(http, preview, count, 1, send_http_until_stopped), seconds / turns))
            importing = Clients(http, preview, count, 1, send_http_until_stopped)
            asking = ask_http(http, texts, partial(_is_past, time.perf_counter() + seconds / turns), 0.05)
            waits += [1000 * took for _, took in asyncio.run(asking)]
            importing.stop()
        grpc_row, row = row_of(case.name, count, over_grpc, []), row_of(case.name, count, over_http, [])
        p50, p95 = np.percentile(waits, (50, 95))
        rows.append({"clients": count, "grpc_per_s": grpc_row.per_s, "http_per_s": row.per_s, "p50_ms": row.p50_ms})
        rows[-1] |= {"p95_ms": row.p95_ms, "text_p50_ms": float(p50), "text_p95_ms": float(p95)}
        rows[-1] |= {"grpc_core_ms": grpc_row.core_ms, "http_core_ms": row.core_ms}
        cells = [str(count), f"{grpc_row.per_s:.1f}", f"{row.per_s:.1f}", f"{row.per_s / grpc_row.per_s:.2f}"]
        cells += [f"{value:.0f}" for value in (row.p50_ms, row.p95_ms, p50, p95)]
        print("  ".join(cell.rjust(15) for cell in cells), flush=True)
    print(f"memory of the daemon: {server.memory_mb():.0f} MB")
    return rows


def _is_past(when: float) -> bool:
    return time.perf_counter() > when


def measure_photos(server: Server, folder: Path) -> str:
    kinds = {".jpg", ".jpeg", ".png", ".webp", ".avif"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)[:2000]
    if not paths:
        raise SystemExit(f"bench: --photos {folder}: no pictures in it")
    room, failed, size = threading.Semaphore(IN_FLIGHT[1]), 0, 0

    def messages() -> Iterator[pb.InferRequest]:
        nonlocal size
        for path in paths:
            room.acquire()
            payload = path.read_bytes()
            size += len(payload)
            yield pb.InferRequest(correlation_id=path.name, task="clip_image_embed", payload=payload)

    started = time.perf_counter()
    for response in server.stub.Infer(messages()):
        failed += bool(response.error.message)
        room.release()
    took = time.perf_counter() - started
    return (
        f"{len(paths)} pictures of {size / len(paths) / 1e6:.1f} MB on average in {took:.1f} s, {failed} not readable: "
        f"{len(paths) / took:.1f} a second; {LIBRARY:,} photos in about {LIBRARY / len(paths) * took / 3600:.1f} hours"
    )


# --- setting up and reporting -----------------------------------------------------------------------------------


def build_model(data: Path, options: argparse.Namespace) -> str:
    """The value of CLIP_MODEL: true-size random weights in `data`, built on the first run (needs torch)."""
    if options.model:
        return str(options.model)
    weights = data / f"{options.arch}.pt"
    if not weights.is_file():
        import open_clip
        import torch

        data.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        torch.save(open_clip.create_model(options.arch).state_dict(), weights.with_suffix(".part"))
        weights.with_suffix(".part").rename(weights)
    if options.backend == "torch":
        return f"{options.arch}:{weights}"
    folder = data / f"{options.arch}-{options.precision}"
    if not folder.is_dir():
        export.export(f"{options.arch}:{weights}", folder, options.precision)
    return str(folder)


def environment_of(data: Path, options: argparse.Namespace, model: str) -> dict[str, str]:
    data.mkdir(parents=True, exist_ok=True)
    names = data / "names.json"  # ImageNet's are on a hub
    names.write_text(json.dumps([f"thing {i}" for i in range(1000)]))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CLIP_", "BIOCLIP_", "LUMEN_", "BATCH_"))}
    if options.immich:
        kept["LUMEN_IMMICH_PORT"] = str(options.immich)
    own = {"CLIP_BACKEND": options.backend, "CLIP_MODEL": model, "CLIP_LABELS": str(names), "CLIP_TEMPLATES": "1"}
    return {**kept, **own, "BIOCLIP_BACKEND": "none", "CLIP_MDNS_TYPE": "off", "LUMEN_DATA_DIR": str(data / "daemon")}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of the rates as shares of the `cores` limit."""
    shown = [row for row in rows if row.cores_per_s]
    if not shown:
        raise SystemExit("bench: --plot needs the limits, which --against does not measure")
    font, height = ImageFont.load_default(16), 26
    image = Image.new("RGB", (1000, height * (len(shown) + 2)), "white")
    pen = ImageDraw.Draw(image)
    pen.text((10, 4), "requests a second, as a share of decode + model core time over the cores", "black", font)
    for line, row in enumerate(shown, 1):
        share, top = row.per_s / row.cores_per_s, line * height + 6
        pen.text((10, top), f"{row.case}, {row.clients} client{'s' * (row.clients > 1)}", "black", font)
        pen.rectangle((260, top, 260 + 600 * min(share, 1.1), top + height - 8), "#3b6ea5")
        pen.text((270 + 600 * min(share, 1.1), top), f"{share:.2f}   {row.per_s:.1f}/s", "black", font)
    pen.line((860, height, 860, height * (len(shown) + 1)), "#999999")
    image.save(path)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench.py", description="The daemon against the limits of the machine.")
    parser.add_argument("--backend", choices=["onnxrt", "torch"], default="onnxrt")
    parser.add_argument("--precision", choices=["fp32", "int8"], default="fp32", help="of the ONNX export")
    parser.add_argument("--arch", default="ViT-B-32", help="an OpenCLIP architecture (default: ViT-B-32)")
    parser.add_argument("--model", type=Path, help="a folder of one's own instead of random weights")
    parser.add_argument("--seconds", type=float, default=8, help="of each row (default: 8)")
    parser.add_argument("--cases", default="", help="the beginnings of the cases to run, separated by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rates")
    parser.add_argument("--against", metavar="HOST:PORT", help="measure this server, without limits")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="measure an import of these only")
    parser.add_argument("--few", action="store_true", help="measure few requests at a time only")
    parser.add_argument("--immich", type=int, metavar="PORT", help="measure immich's requests only, on a free port")
    parser.add_argument(
        "--simulate",
        type=int,
        metavar="CORES",
        help="measure only the rates with 1, 2, 4 and so on up to CORES simulated cores",
    )
    parser.add_argument("--data-dir", type=Path, default=HERE / "data" / "bench")
    parsed = parser.parse_args(arguments)
    if parsed.against and (parsed.immich or parsed.simulate):
        parser.error("--immich and --simulate start a daemon; allowed without --against")
    if parsed.simulate is not None and not 1 <= parsed.simulate <= 256:
        parser.error("--simulate: allowed: 1 to 256")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    model = "" if options.against else build_model(options.data_dir, options)
    if options.simulate:
        [small] = (case for case in make_cases() if case.name == SIMULATED_CASE)
        times = Limits(open_backend(options, model), min(options.seconds / 8, 1)).core_s(small)
        seconds = times["decode"], times["image model"]
        points = bench_simulation.measure(options.simulate, seconds, options.seconds, options.data_dir)
        if options.json:
            options.json.write_text(json.dumps(points, indent=1) + "\n")
        if options.plot:
            bench_simulation.plot(points, options.plot)
        return 0
    server = Server(
        options.against or "", None if options.against else environment_of(options.data_dir, options, model)
    )
    try:
        if options.photos:
            print(measure_photos(server, options.photos))
            return 0
        if options.immich:
            rows = measure_immich(server, f"127.0.0.1:{options.immich}", options.seconds)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
            return 0
        report(server, None if options.against else open_backend(options, model), options)
    finally:
        server.stop()
    return 0


def open_backend(options: argparse.Namespace, model: str) -> model_files.Backend:
    if options.backend == "torch":
        import torch  # noqa: F401  # before the backend says how its threads shall wait: the limit is torch as it comes
    return backends.create_backend(ModelOptions("CLIP", options.backend, model, options.data_dir))


def report(server: Server, backend: model_files.Backend | None, options: argparse.Namespace) -> None:
    everything = make_cases()
    wanted = tuple(options.cases.split(","))
    cases = [case for case in everything if case.name.startswith(wanted)]
    limits = Limits(backend, min(options.seconds / 8, 1)) if backend else None
    extra = dict(server.stub.GetCapabilities(empty_pb2.Empty()).extra)
    print(f"{extra.get('clip_model', options.against)}: {extra}")
    few = measure_few(server, limits, [case for case in cases if case.name in FEW_CASES], options.seconds)
    if options.few:
        if options.json:
            options.json.write_text(json.dumps(few, indent=1) + "\n")
        return
    spawn = multiprocessing.get_context("spawn")
    over, found = spawn.Event(), spawn.Queue()
    pinging = spawn.Process(target=ping, args=(server.address, over, found), daemon=True)
    pinging.start()
    print("  ".join(cell.rjust(14) for cell in HEAD))
    rows = measure_cases(server, limits, cases, options.seconds)
    waits = measure_waits(server, limits, everything, options.seconds)
    over.set()
    health = 1000 * np.percentile(found.get(), 99)
    pinging.join()
    waits["Health during all cases: p99"] = float(health)
    for name, milliseconds in waits.items():
        print(f"{name}: {milliseconds:.1f} ms")
    parts: dict[str, float] = {}
    for case in everything if limits else ():
        if case.task:
            assert limits
            parts |= {f"{case.name}, {name}": 1000 * value for name, value in limits.core_s(case).items()}
    if parts:
        print("core ms of one: " + "; ".join(f"{name} {value:.1f}" for name, value in parts.items()))
    if options.json:
        content = {
            "capability": extra,
            "rows": [asdict(row) for row in rows],
            "few": few,
            "waits_ms": waits,
            "core_ms": parts,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    sys.exit(main())
