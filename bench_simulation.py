"""The daemon on more cores than this machine has, for `bench.py --simulate`: decoding and the model sleep.

Everything else is real: gRPC, the threads, the queue, and the Python of decoding, on a picture so small that its pixels
take almost no time. So the rates show how many pictures a second one process can handle, whatever the cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import machine
from bench_load import Case, Clients, Server, encoded, photograph, watch

CLIENTS = 8


@dataclass(frozen=True)
class Point:
    cores: int
    ideal_per_s: float  # if decoding and the model took their time on each core, and nothing else took any
    per_s: float
    core_ms: float  # the daemon's own core time of one request, without decoding and the model


def measure(most: int, parts: tuple[float, float], seconds: float, data: Path) -> list[dict[str, Any]]:
    """The rates with 1, 2, 4 and so on up to `most` cores. `parts`: core seconds of decoding and of the model."""
    case = Case("small JPEG", "clip_image_embed", encoded(photograph(224, 168), "JPEG", quality=60))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CLIP_", "BIOCLIP_", "LUMEN_", "BATCH_"))}
    environment |= {"LUMEN_DATA_DIR": str(data / "simulation"), "LUMEN_TUNE": "0"}
    print("  ".join(cell.rjust(14) for cell in ("simulated cores", "ideal per s", "per s (ratio)", "core ms")))
    points = []
    for cores in sorted({2**power for power in range(most.bit_length())} | {most}):
        program = [str(Path(__file__)), str(cores), *map(str, parts)]
        server = Server("", environment, [*program, "--demo"])
        try:
            window = watch(server, Clients(server.address, [case], CLIENTS, max(4, 3 * cores // 2)), seconds)
        finally:
            server.stop()
        core_ms = 1000 * window.core_s / (window.per_s * window.seconds)
        point = Point(cores, cores / sum(parts), window.per_s, core_ms)
        points.append(point)
        rate = f"{point.per_s:.0f} ({point.per_s / point.ideal_per_s:.2f})"
        cells = (str(cores), f"{point.ideal_per_s:.0f}", rate, f"{core_ms:.2f}")
        print("  ".join(cell.rjust(14) for cell in cells), flush=True)
    return [asdict(point) for point in points]


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Bars of the rates, on a linear scale, with a mark for the ideal where it is inside the picture."""
    font, height, top_rate = ImageFont.load_default(16), 26, 1.2 * max(point["per_s"] for point in points)
    image = Image.new("RGB", (1000, height * (len(points) + 2)), "white")
    pen = ImageDraw.Draw(image)
    pen.text((10, 4), "pictures a second of one process; the line is the rate without any overhead", "black", font)
    for line, point in enumerate(points, 1):
        top, length = line * height + 6, 700 * point["per_s"] / top_rate
        pen.text((10, top), f"{point['cores']} core{'s' * (point['cores'] > 1)}", "black", font)
        pen.rectangle((120, top, 120 + length, top + height - 8), "#3b6ea5")
        ideal = 120 + 700 * point["ideal_per_s"] / top_rate
        if ideal < 830:
            pen.line((ideal, top - 3, ideal, top + height - 5), "black", 2)
        pen.text((850, top), f"{point['per_s']:.0f}/s", "black", font)
    image.save(path)


def main() -> int:
    """The daemon, on simulated cores: `bench_simulation.py CORES DECODE_S MODEL_S` and options of the daemon."""
    parser = argparse.ArgumentParser("bench_simulation.py")
    for name, kind in (("cores", int), ("decode_s", float), ("model_s", float)):
        parser.add_argument(name, type=kind)
    options, rest = parser.parse_known_args()
    machine.usable_cores = lambda *_: options.cores  # before other files import it
    import backends
    import lumen_clip
    import preprocess

    open_real, decode_real = backends.create_backend, preprocess.decode_image

    def decode(*arguments: Any, **more: Any) -> Any:
        time.sleep(options.decode_s)
        return decode_real(*arguments, **more)

    def open_simulated(*arguments: Any) -> Any:
        backend: Any = open_real(*arguments)
        row = np.full((1, backend.dim), backend.dim**-0.5, np.float32)

        def encode(pixels: Any) -> Any:
            time.sleep(options.model_s * len(pixels))
            return np.repeat(row, len(pixels), axis=0)

        backend.encode_images = backend.encode_single = encode
        backend.prepare_single = lambda: None
        return backend

    vars(backends)["create_backend"], vars(preprocess)["decode_image"] = open_simulated, decode
    return lumen_clip.main(rest)


if __name__ == "__main__":
    sys.exit(main())
