"""Opens a model on the backend that the operator chose, tests it, and finds how it runs best on this machine."""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import json
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import onnx_backend
import rknn_backend
import torch_backend
from errors import one_line, unreadable
from machine import lower_thread_priority, replace_file, usable_cores
from model_files import Backend, Say, quiet, split_model
from preprocess import decode_image
from settings import ModelOptions

log = logging.getLogger("lumen.backends")

TUNING = 6  # version of the method; a new one makes every machine tune again
TUNING_FILE = "tuning.json"
TURNS = 3  # measurements of each batch size
LONGEST_BATCH_S = 0.35  # the longest batch on all cores or on a GPU, because a text has to wait for it
TUNING_PRIORITY = 10  # steps of `nice` below the rest of the daemon, for requests that arrive meanwhile
LONGEST_SPLIT_S = 1.0  # the longest batch on one core, for which only other pictures have to wait


def create_backend(options: ModelOptions, say: Say = quiet) -> Backend:
    """Loads a model and runs both towers once, so that the first request is as fast as the others.

    Raises SettingError or BackendError with one line that names the variable.
    """
    kinds: dict[str, Callable[[ModelOptions, Say], Backend]] = {
        "torch": torch_backend.TorchBackend,
        "onnxrt": onnx_backend.open_onnx,
        "rknn": rknn_backend.open_rknn,
    }
    check_modules(options)
    backend = kinds[options.backend](options, say)
    try:
        side = backend.preprocess.size
        images = backend.encode_images(np.full((1, side, side, 3), 127, np.uint8))
        texts = backend.encode_text(backend.tokenize(["a photo"]))
    except Exception as error:
        log.debug("first run failed", exc_info=True)
        raise options.failure("MODEL", options.model, f"the model does not run ({one_line(error)})") from error
    if not (math.isfinite(backend.logit_scale) and backend.logit_scale > 0):
        raise options.error("MODEL", options.model, f"a logit scale of {backend.logit_scale}; allowed: above 0")
    if images.shape[1] != texts.shape[1]:
        text = f"image vectors have {images.shape[1]} dimensions and text vectors {texts.shape[1]}: not one model"
        raise options.error("MODEL", options.model, text)
    if backend.golden:
        cosine, floor = self_test(backend), float(backend.golden["floor"])
        if not cosine >= floor:
            text = f"self-test: cosine {cosine:.6f} to the vectors of its export; allowed: {floor} and more"
            raise options.failure("MODEL", options.model, text)
        backend.self_test_cosine = cosine
        log.info("%s: self-test: worst cosine %.7f", backend.model_id, cosine)
    return backend


def check_modules(options: ModelOptions) -> None:
    """Raises SettingError if a package is missing that the backend needs."""
    modules = ("torch", "open_clip") if options.backend == "torch" else ("onnxruntime", "tokenizers", "ftfy", "regex")
    # find_spec instead of import, because importing torch raises SIGILL on the CPUs of some boards.
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        needed = f"requirements{'' if options.backend == 'torch' else '-edge'}.txt"
        text = f"not installed: {', '.join(missing)}; install {needed}, or choose another backend"
        raise options.error("BACKEND", options.backend, text)


def check_sources(options: ModelOptions) -> None:
    """Looks for what a model's settings name, as far as that needs no download and no runtime. Raises SettingError."""
    try:
        if options.backend == "torch":
            torch_backend.is_repository(options) or split_model(options)
            return
        folder, repo, _ = onnx_backend.source_of(options)
        if options.backend == "onnxrt" and (options.onnx_image or not repo):
            onnx_backend.tower_file(options, folder, "visual")
        if options.onnx_text or not repo:
            onnx_backend.tower_file(options, folder, "textual")
    except PermissionError as error:
        raise unreadable(error) from error


def self_test(backend: Backend) -> float:
    """The worst cosine of this machine's vectors with OpenCLIP's, for the golden picture and texts of an export."""
    golden = backend.golden
    picture = decode_image(base64.b64decode(golden["picture"]), [backend.preprocess], 1 << 20, draft=False)
    found = [
        backend.encode_images(picture[backend.preprocess][None]),
        backend.encode_text(backend.tokenize(golden["texts"])),
    ]
    expected = np.array([golden["picture_vector"], *golden["text_vectors"]], np.float32)
    return float(np.sum(np.concatenate(found) * expected, axis=1).min())


@dataclass(frozen=True)
class Tuning:
    """The best batch size for images of a model on this machine, and how fast that is on decoded pixels."""

    batch_size: int
    images_per_s: float


def kept_tuning(backend: Backend, most: int, folder: Path) -> Tuning | None:
    """The tuning in `folder`, if it is for this model, this machine and batches of at most `most` images."""
    try:
        kept = json.loads((folder / TUNING_FILE).read_text())
        return Tuning(**kept["tuning"]) if kept["key"] == _tuning_key(backend, most) else None
    except (OSError, ValueError, KeyError, TypeError):  # missing, or of another format
        return None


def tune(backend: Backend, most: int, folder: Path, pause: Callable[[], None]) -> Tuning:
    """Finds the best batch size and keeps it in `folder`. `pause` is called before each measurement and may wait."""
    found = _try_out(backend, most, pause)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"key": _tuning_key(backend, most), "tuning": asdict(found)}
        replace_file(folder / TUNING_FILE, json.dumps(content).encode())
    except OSError as error:
        log.warning("cannot keep the tuning in %s (%s); the next start tries again", folder, error)
    return found


def _tuning_key(backend: Backend, most: int) -> str:
    """Everything that a tuning depends on. If any of it changes, the next start tunes again."""
    hardware = [_processor(), usable_cores(), backend.accelerator]
    model = [backend.runtime, backend.precision, backend.space]
    return json.dumps([TUNING, *hardware, *model, most, *_versions()])


def _try_out(backend: Backend, most: int, pause: Callable[[], None]) -> Tuning:
    """The fastest batch size within the time limit; of nearly equal ones the smallest.

    Sizes take turns, because the speed of a machine changes from second to second. A size for which the memory does not
    suffice, and all above it, are left out.
    """
    usual = (1, 2, 4, usable_cores(), 8, 2 * usable_cores(), 16, 32, 64, 128, 256)
    sizes = sorted({size for size in usual if size < most} | {most})
    longest = LONGEST_BATCH_S if backend.workers == 1 or backend.on_gpu else LONGEST_SPLIT_S

    def measured(size: int) -> float:
        pause()
        return seconds_of_a_batch(backend, size)

    taken: dict[int, list[float]] = {}
    for size in sizes:
        try:
            seconds = min(measured(size) for _ in range(2))  # the first run allocates memory
        except Exception as error:  # each runtime has its own for a lack of memory
            if not taken:
                raise
            log.warning("%s: batches of %d images fail (%s)", backend.model_id, size, one_line(error))
            break
        if seconds <= longest or size == 1:
            taken[size] = [seconds]
        if seconds > longest:
            break
    for _ in range(TURNS if len(taken) > 1 else 0):
        for size, times in taken.items():
            times.append(measured(size))
    usual_s = {size: statistics.median(times) for size, times in taken.items()}
    rates = {size: round(backend.workers * size / s, 2) for size, s in usual_s.items() if s <= longest or size == 1}
    return next(Tuning(size, rate) for size, rate in rates.items() if rate >= 0.985 * max(rates.values()))


def seconds_of_a_batch(backend: Backend, size: int) -> float:
    """The mean duration of a batch, while each worker runs one.

    If each has a core, core time is measured instead, which other programs do not affect while a machine boots.
    """
    side = backend.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    clock = time.perf_counter if backend.workers == 1 or backend.on_gpu else time.thread_time

    def run(_: int) -> float:
        started = clock()
        backend.encode_images(pixels)
        return clock() - started

    with ThreadPoolExecutor(backend.workers, initializer=lower_thread_priority, initargs=(TUNING_PRIORITY,)) as workers:
        return statistics.mean(workers.map(run, range(backend.workers)))


def _processor() -> str:
    """The model of the processor; `platform` knows only the instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    parts = {line for line in lines if line.startswith(("model name", "CPU part", "CPU implementer"))}
    return " ".join(" ".join(sorted(parts)).split()) or platform.machine()


def _versions() -> list[str]:
    """Names and versions of the installed runtimes."""
    versions = []
    for name in ("onnxruntime", "onnxruntime-gpu", "torch", "rknn-toolkit-lite2"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return versions
