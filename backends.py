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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import torch_backend
from errors import one_line, unreadable
from machine import replace_file, usable_cores
from model_files import Backend, Say, quiet, split_model
from onnx_backend import open_onnx, source_of, tower_file
from preprocess import decode_image
from rknn_backend import open_rknn
from settings import ModelOptions

log = logging.getLogger("lumen.backends")

TUNING = 5  # version of the method; a new one makes every machine tune again
TURNS = 3  # measurements of each batch size
LONGEST_BATCH_S = 0.35  # the longest batch on all cores, because a text has to wait for it
LONGEST_SPLIT_S = 1.0  # the longest batch on one core, for which only other pictures have to wait


def create_backend(options: ModelOptions, say: Say = quiet) -> Backend:
    """Loads a model and runs both towers once, so that the first request is as fast as the others.

    Raises SettingError or BackendError with one line that names the variable.
    """
    kinds: dict[str, Callable[[ModelOptions, Say], Backend]] = {
        "torch": torch_backend.TorchBackend,
        "onnxrt": open_onnx,
        "rknn": open_rknn,
    }
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


def check_sources(options: ModelOptions) -> None:
    """Looks for what a model's settings name, as far as that needs no download and no runtime. Raises SettingError."""
    image = options.rknn_model if options.backend == "rknn" else options.onnx_image
    try:
        if options.backend == "torch":
            torch_backend.is_repository(options) or split_model(options)
            return
        folder, repo, _ = source_of(options, image)
        if options.backend == "onnxrt" and (image or not repo):
            tower_file(options, folder, "ONNX_IMAGE", image, "visual")
        if options.onnx_text or not repo:
            tower_file(options, folder, "ONNX_TEXT", options.onnx_text, "textual")
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
    """How this machine runs the images of a model best, and how fast that is on decoded pixels."""

    arrangement: str
    batch_size: int
    images_per_s: float


def tuned(backend: Backend, most: int, folder: Path) -> Tuning:
    """Chooses the fastest arrangement and batch size. It measures them for a few seconds, once per machine and model.

    `most` bounds the batch. What was found is kept as `tuning.json` in `folder`.
    """
    key = _tuning_key(backend, most)
    path = folder / "tuning.json"
    try:
        kept = json.loads(path.read_text())
        found = Tuning(**kept["tuning"]) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # missing, or of another format
        found = None
    if found is None:
        found = _try_out(backend, most)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"key": key, "tuning": asdict(found)}).encode())
        except OSError as error:
            log.warning("cannot keep the tuning in %s (%s); the next start tries again", folder, error)
    if found.arrangement in backend.arrangements() and found.arrangement != backend.arrangements()[0]:
        backend.arrange(found.arrangement)
    log.info("%s: images run %s, up to %d at once, %.1f a second", backend.model_id, *asdict(found).values())
    return found


def _tuning_key(backend: Backend, most: int) -> str:
    """Everything that a tuning depends on. If any of it changes, the next start tunes again."""
    hardware = [_processor(), usable_cores(), backend.accelerator]
    model = [backend.runtime, backend.precision, backend.space]
    return json.dumps([TUNING, *hardware, *model, most, *_versions()])


def _try_out(backend: Backend, most: int) -> Tuning:
    """The fastest arrangement and batch size within the time limits; of nearly equal ones the smallest batch.

    Sizes take turns, for a machine is seldom as fast now as it was a second ago. Another arrangement than the first
    has to be a tenth faster: the trial runs alone, and where decoding competes for the cores, threads that wait for
    each other at every operator lose up to half (measured with torch).
    """
    sizes = sorted({size for size in (1, 2, 4, usable_cores(), 8, 2 * usable_cores(), 16, 32) if size < most} | {most})
    found: list[Tuning] = []
    for arrangement in reversed(backend.arrangements()):  # the first one is last, so that it is in use at the end
        backend.arrange(arrangement)
        longest = LONGEST_BATCH_S if backend.workers == 1 else LONGEST_SPLIT_S
        taken: dict[int, list[float]] = {}
        for size in sizes:
            seconds = min(seconds_of_a_batch(backend, size) for _ in range(2))  # the first run allocates memory
            if seconds <= longest or size == 1:
                taken[size] = [seconds]
            if seconds > longest:
                break
        for _ in range(TURNS if len(taken) > 1 else 0):
            for size, times in taken.items():
                times.append(seconds_of_a_batch(backend, size))
        for size, times in taken.items():
            seconds = statistics.median(times)
            if seconds <= longest or size == 1:
                found.append(Tuning(arrangement, size, round(backend.workers * size / seconds, 2)))
    best = max(found, key=lambda t: t.images_per_s * (1.1 if t.arrangement == backend.arrangements()[0] else 1))
    equal = [t for t in found if t.arrangement == best.arrangement and t.images_per_s >= 0.985 * best.images_per_s]
    return min(equal, key=lambda t: t.batch_size)


def seconds_of_a_batch(backend: Backend, size: int) -> float:
    """The mean duration of a batch, while each worker runs one.

    If each has a core, core time is measured instead, which other programs do not affect while a machine boots.
    """
    side = backend.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    clock = time.perf_counter if backend.workers == 1 else time.thread_time

    def run(_: int) -> float:
        started = clock()
        backend.encode_images(pixels)
        return clock() - started

    with ThreadPoolExecutor(backend.workers) as workers:
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
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
