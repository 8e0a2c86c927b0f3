"""Comparisons at true size whose figures docs/performance.md quotes. They run only if `-m measure` selects them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import backends
import export
import label_cache
import labels
import machine
import model_files
import photo_index
import preprocess
import search
import species
from label_cache import CacheKey, TextVectors
from settings import ModelOptions
from tests import families
from tests.kit import Node, encoded, one_model, pixels_of, run_client, write_labels

pytestmark = pytest.mark.measure

LOGIT_SCALE = 100.0
ROWS_OF_A_FAMILY = 400


@pytest.fixture(scope="session", autouse=True)
def selected(measuring: bool) -> None:
    """Skips before the models of true size are made."""
    if not measuring:
        pytest.skip("measures at true size; run it with: python -m pytest -s -m measure tests/test_measurements.py")


def opened(folder: Path, data: Path) -> model_files.Backend:
    return backends.create_backend(ModelOptions("CLIP", "onnxrt", str(folder), data))


# --- scaled decode -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def jpeg_files() -> list[bytes]:
    """100 to 199 JPEG files, or all if there are fewer, of the folder that LUMEN_PHOTOS names."""
    folder = os.environ.get("LUMEN_PHOTOS")
    if not folder:
        pytest.skip("needs photographs; run it with: LUMEN_PHOTOS=FOLDER python -m pytest -s -m measure -k fidelity")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    assert paths, f"LUMEN_PHOTOS={folder}: no JPEG files in it"
    return [path.read_bytes() for path in paths[:: max(1, len(paths) // 100)]]


def test_fidelity_of_scaled_jpeg_decode(
    jpeg_files: list[bytes], big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the reason why scaled decode is on by default. Prints the figures of docs/performance.md.

    For each margin that scaled decode can keep: the cosine to full decode, and the core time of decoding.
    """
    backend = opened(big / "onnx", tmp_path)

    def vectors(draft: bool) -> tuple[NDArray[np.float32], float]:
        started, recipe = time.process_time(), backend.preprocess
        pixels = np.stack([preprocess.decode_image(file, [recipe], 1 << 30, draft)[recipe] for file in jpeg_files])
        core_ms = 1000 * (time.process_time() - started) / len(jpeg_files)
        with ThreadPoolExecutor(backend.workers) as workers:
            pieces = [pixels[i : i + 4] for i in range(0, len(pixels), 4)]
            return np.concatenate(list(workers.map(backend.encode_images, pieces))), core_ms

    full, core_ms = vectors(False)
    print(f"\nfull decode of {len(jpeg_files)} JPEG files: {core_ms:.0f} core ms each")
    default = preprocess.DRAFT_MARGIN
    # docs/performance.md says 0.999968, 0.999997 and 0.999999; other photographs may differ a little.
    for margin, least in ((1, 0.9999), (2, 0.99999), (4, 0.99999)):
        monkeypatch.setattr(preprocess, "DRAFT_MARGIN", margin)
        scaled, core_ms = vectors(True)
        cosines = np.sum(full * scaled, axis=1)
        print(
            f"at least {margin} x the model's side{' (the default)' * (margin == default)}: cosine mean "
            f"{cosines.mean():.6f}, worst {cosines.min():.6f}; {core_ms:.0f} core ms each"
        )
        assert cosines.min() >= least


def written_page(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    page, font = Image.new("RGB", size, "white"), ImageFont.load_default(max(12, size[0] // 45))
    for top in range(4, size[1], max(16, size[0] // 35)):
        words = rng.choice(["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "0123456789"], 14)
        ImageDraw.Draw(page).text((4, top), " ".join(words), "black", font)
    return page


def line_art(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    drawing = Image.new("RGB", size, "white")
    for ends in rng.integers(0, (*size, *size), (220, 4)):
        ImageDraw.Draw(drawing).line(tuple(map(int, ends)), "black", int(rng.integers(1, 4)))
    return drawing


def test_fidelity_of_scaled_decode_of_text_and_line_art(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the reason why the margin is not smaller. Prints the figures of docs/performance.md.

    For each margin: pictures that are decoded at exactly this multiple of the model's side, which is its worst case.
    """
    backend, rng = opened(big / "onnx", tmp_path), np.random.default_rng(0)
    recipe = backend.preprocess
    print()
    for margin in (1.0, 1.25, 1.5, 1.75, 2.0, 2.5):
        monkeypatch.setattr(preprocess, "DRAFT_MARGIN", margin)
        worst = {}
        for draw in (written_page, line_art):
            heights = [int(recipe.size * margin * scale) + 1 for scale in (2, 4)] * 3
            files = [encoded(draw((height * 4 // 3, height), rng), quality=88) for height in heights]
            full, scaled = (
                backend.encode_images(
                    np.stack([preprocess.decode_image(file, [recipe], 1 << 30, draft)[recipe] for file in files])
                )
                for draft in (False, True)
            )
            worst[draw.__name__] = float(np.sum(full * scaled, axis=1).min())
        print(f"exactly {margin} x the model's side: worst cosine", worst)
        assert margin != 2 or min(worst.values()) > 0.9995  # the default; the page says 0.9997


# --- int8 ----------------------------------------------------------------------------------------------------------


def test_int8_against_fp32(big: Path, tmp_path: Path) -> None:
    """Lost otherwise: what int8 gains and what it costs. Prints the figures of docs/performance.md.

    Both run in turns on ready pixels: batches on each core, then a single image on all cores.
    """
    fp32, int8 = opened(big / "onnx", tmp_path), opened(big / "int8", tmp_path)
    pixels = np.stack([pixels_of(encoded(picture, "PNG")) for picture in export.sample_pictures(20)])
    images = np.sum(fp32.encode_images(pixels) * int8.encode_images(pixels), axis=1)
    tokens = fp32.tokenize(export.TEXTS)
    texts = np.sum(fp32.encode_text(tokens) * int8.encode_text(tokens), axis=1)
    for part, cosines in (("image", images), ("text", texts)):
        print(f"\n{part} cosine of int8 to fp32: mean {cosines.mean():.5f}, worst {cosines.min():.5f}", end="")
    print()
    for backend in (fp32, int8):
        backend.prepare_single()

    def of_batches(backend: Any) -> float:
        return float(4 * backend.workers / backends.seconds_of_a_batch(backend, 4))

    def of_a_single_image(backend: Any) -> float:
        started = time.perf_counter()
        backend.encode_single(pixels[:1])
        return 1 / (time.perf_counter() - started)

    for kind, measure in (("batches", of_batches), ("a single image", of_a_single_image)):
        rates: tuple[list[float], list[float]] = [], []
        for _ in range(7):
            for backend, found in zip((fp32, int8), rates, strict=True):
                found.append(measure(backend))
        ratio = statistics.median(small / full for full, small in zip(*rates, strict=True))
        full, small = (statistics.median(found) for found in rates)
        print(f"{kind}: fp32 {full:.1f} images/s, int8 {small:.1f}: {ratio:.2f} times as fast")
    assert images.min() > 0.99965 and texts.min() > 0.9975  # the page says 0.9997 and 0.998


def test_int8_of_a_convolutional_tower(tmp_path: Path) -> None:
    """Lost otherwise: why the image tower of MobileCLIP stays in float. Prints the figures of docs/performance.md.

    Batches of 4 on one core, in turns.
    """
    import onnxruntime
    from onnxruntime import quantization

    families.seeded("MobileCLIP2-S0", tmp_path / "s0")
    export.export(str(tmp_path / "s0"), tmp_path / "fp32")
    recipe, source = opened(tmp_path / "fp32", tmp_path).preprocess, tmp_path / "fp32" / "visual" / "model.onnx"
    files = [encoded(picture, "PNG") for picture in export.sample_pictures(20)]
    pixels = np.stack([preprocess.decode_image(file, [recipe], 1 << 30, False)[recipe] for file in files])

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(pixels)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self._rows, None)
            return None if row is None else {"image": row[None]}

    kinds = {"fp32": source, "dynamic": tmp_path / "dynamic.onnx", "static": tmp_path / "static.onnx"}
    quantization.quantize_dynamic(source, kinds["dynamic"], op_types_to_quantize=["Conv", "MatMul", "Gemm"])
    quantization.quantize_static(source, kinds["static"], Calibration(), per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {kind: onnxruntime.InferenceSession(str(path), options) for kind, path in kinds.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(7):
        for kind, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: pixels[:4]})
            seconds[kind].append(time.perf_counter() - started)
    vectors = {
        kind: model_files.unit_rows(session.run(None, {session.get_inputs()[0].name: pixels})[0])
        for kind, session in sessions.items()
    }
    for kind in ("dynamic", "static"):
        speed = statistics.median(full / small for full, small in zip(seconds["fp32"], seconds[kind], strict=True))
        worst = float(np.sum(vectors["fp32"] * vectors[kind], axis=1).min())
        print(f"\n{kind}: {speed:.2f} times as fast as fp32, worst cosine {worst:.5f}", end="")
        assert worst > 0.97  # what `export.py` asks of int8: the speed is the reason, not the exactness


# --- start ---------------------------------------------------------------------------------------------------------


def test_start_times_of_models_for_small_boards(tmp_path: Path) -> None:
    """Lost otherwise: why to export with `--labels`. Prints the figures of docs/models.md.

    Exports in int8, each started on a new data folder and again, in turns.
    """
    names, seconds = ("MobileCLIP2-S0", "ViT-B-32"), dict[tuple[str, str], list[float]]()
    for name in names:
        families.seeded(name, tmp_path / f"{name}-source")
        asked = ["--model", str(tmp_path / f"{name}-source"), "--to", str(tmp_path / name), "--precision", "int8"]
        assert export.main([*asked, "--labels", "--data-dir", str(write_labels(tmp_path / "data"))]) == 0
    for turn in range(14):
        for name in names:
            data = write_labels(tmp_path / f"{name}-{turn}")
            for start in ("first", "later"):
                began = time.monotonic()
                node = Node(data, **one_model(tmp_path / name, CLIP_TEMPLATES=7)).ready()
                seconds.setdefault((name, start), []).append(time.monotonic() - began)
                assert node.stop() == 0 and "computing the text vectors" not in node.log
    for (name, start), found in seconds.items():
        print(f"\n{name}, {start} start: {statistics.median(found):.2f} s, at best {min(found):.2f}", end="")


# --- scoring -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[384_490, 867_455], ids=["TreeOfLife-10M", "TreeOfLife-200M"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, CacheKey]]:
    """(the file of a tree of life of true size with random vectors, its key). It has up to 1.3 GB."""
    key = CacheKey("random", "none", "", request.param, 768)
    # In a process of its own, so that what is measured later cannot reuse the memory that it frees.
    writing = multiprocessing.get_context("spawn").Process(target=write_tree, args=(tmp_path, key))
    writing.start()
    writing.join()
    assert writing.exitcode == 0
    yield tmp_path / label_cache.FILE, key
    shutil.rmtree(tmp_path)


def write_tree(folder: Path, key: CacheKey) -> None:
    rng = np.random.default_rng(0)
    sizes = (min(label_cache.BLOCK, key.count - start) for start in range(0, key.count, label_cache.BLOCK))
    blocks = (model_files.unit_rows(rng.standard_normal((size, key.dim), np.float32)) for size in sizes)
    names = [f"a/b/c/d/{i // ROWS_OF_A_FAMILY:05}/{i // 8:07}/{i % 8}/*" for i in range(key.count)]
    label_cache.save(folder, key, blocks, names, species.depths(names))
    assert label_cache.load(folder / label_cache.FILE, key.meta())  # compares the checksums, once for all loads


def test_scoring_of_a_tree_of_life_at_true_size(tree: tuple[Path, CacheKey]) -> None:
    """Lost otherwise: the speed at which species are found, or the right ones. Prints figures of docs/performance.md.

    Scoring runs in turns with reading all rows once and with copying them once.
    """
    path, key = tree
    before, started = anonymous_mb(), time.perf_counter()
    stored = label_cache.load(path, key.meta())
    assert stored and stored.names
    known = species.Species(stored, LOGIT_SCALE)
    ready = time.perf_counter() - started
    print(f"\n{key.count:,} x {key.dim}, {stored.vecs.nbytes / 1e9:.2f} GB: ready in {ready:.2f} s")
    rng = np.random.default_rng(1)
    asked, scan = [], labels.Cosines(stored.vecs)
    for batch in (1, 2, 4, 8):
        near = np.stack([stored.vecs[i].astype(np.float32) for i in rng.integers(0, key.count, batch)])
        asked.append(model_files.unit_rows(near + rng.standard_normal((batch, key.dim), np.float32) * 0.1))
        print_speeds(stored.vecs, scan, known, asked[-1])
    grown = anonymous_mb() - before
    print(f"anonymous memory: {grown:.0f} MB more")
    assert grown < 100  # the rows stay in their file
    for queries in asked:
        assert_as_brute_force(stored, known, queries)


def print_speeds(
    rows: NDArray[Any], scan: labels.Cosines, known: species.Species, queries: NDArray[np.float32]
) -> None:
    """Of one batch of queries: the median time of each step, and the rows that are read in a second."""
    assert scan.threads
    runs: dict[str, Callable[[], Any]] = {
        "reading the rows": partial(on_each_core, scan.threads, read, rows),
        "a plain copy of them": partial(on_each_core, scan.threads, copy, rows),
        "their cosines": partial(scan, queries),
        "top 5": partial(known.answers, queries, [species.SpeciesOptions(5)] * len(queries)),
        "top 5 families": partial(known.answers, queries, [species.SpeciesOptions(5, rank="family")] * len(queries)),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(15):
        for name, run in runs.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            found[name].append((time.perf_counter() - started, time.process_time() - used))
    medians = {
        name: [1000 * statistics.median(kind) for kind in zip(*times, strict=True)] for name, times in found.items()
    }
    told = ", ".join(f"{name} {wall:.0f} ms ({core:.0f} core ms)" for name, (wall, core) in medians.items())
    print(f"batch of {len(queries)}: {told}")
    for unit, at in (("second", 0), ("second of a core", 1)):
        speeds = (f"{name} {rows.nbytes / 1e6 / medians[name][at]:.1f}" for name in list(runs)[:3])
        print(f"    GB of rows a {unit}: {', '.join(speeds)}")


def assert_as_brute_force(stored: TextVectors, known: species.Species, queries: NDArray[np.float32]) -> None:
    """The best five species and families are those of float64 sums over float32 cosines, with their probabilities."""
    rows, names = stored.vecs, stored.names
    assert names
    blocks = (rows[at : at + label_cache.BLOCK].astype(np.float32) for at in range(0, len(rows), label_cache.BLOCK))
    logits = LOGIT_SCALE * np.concatenate([queries @ block.T for block in blocks], axis=1).astype(np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    families = np.add.reduceat(probabilities, np.arange(0, len(rows), ROWS_OF_A_FAMILY), axis=1)
    for rank, expected, step in (("species", probabilities, 1), ("family", families, ROWS_OF_A_FAMILY)):
        answers = known.answers(queries, [species.SpeciesOptions(5, rank=rank)] * len(queries))
        for found, row in zip(answers, expected, strict=True):
            best = np.argsort(-row, kind="stable")[:5]
            lineages = [species.render(names[int(i) * step], "lineage", species.RANKS.index(rank)) for i in best]
            assert [label for label, _ in found.labels] == lineages
            assert np.abs(np.array([score for _, score in found.labels]) - row[best]).max() < 1e-6


# --- search --------------------------------------------------------------------------------------------------------


def fill_index(index: photo_index.Index, photos: list[photo_index.Photo], space: str, dim: int) -> NDArray[np.float32]:
    """Adds random vectors, and returns them: float32 `[n, dim]`."""
    rng = np.random.default_rng(0)
    vectors = model_files.unit_rows(rng.standard_normal((len(photos), dim), np.float32))
    for number, (photo, vector) in enumerate(zip(photos, vectors, strict=True)):
        sha256 = number.to_bytes(32, "big")
        index.add_vector(sha256, space, vector)
        index.add_file(photo, sha256)
    index.commit()
    return vectors


def test_search_of_10_000_photographs_with_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: a search that one waits for. Prints figures of docs/performance.md.

    The whole command with the demo: start, folder, index, daemon, scores. The vectors are random.
    """
    for number in range(10_000):
        path = tmp_path / "photos" / f"{number // 100:02}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    node = Node(tmp_path / "data", ("--demo",)).ready()
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        space, dim = node.ask("clip_embed", b"a bird").meta["space"], 128
        photos, _ = photo_index.scan(str(tmp_path / "photos"))
        with contextlib.closing(photo_index.Index(photo_index.index_path())) as index:
            fill_index(index, photos, space, dim)
        seconds, before = [], resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(9):
            started = time.perf_counter()
            run = run_client(str(tmp_path / "photos"), "a red bicycle", address=node.address, program="search.py")
            seconds.append(time.perf_counter() - started)
            assert run.returncode == 0 and run.stdout.count("\n") == 10 and run.stderr == "", run.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    finally:
        assert node.stop() == 0, node.log
    core = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(seconds)
    told = f"median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s, {core:.2f} core seconds"
    print(f"\n{len(photos):,} photographs: {told}")
    assert statistics.median(seconds) < 1


def test_search_of_100_000_vectors(tmp_path: Path) -> None:
    """Lost otherwise: a search that one waits for, or the right photographs. Prints figures of docs/performance.md."""
    photos = [photo_index.Photo(f"/photos/{number:06}.jpg", number, 1) for number in range(100_000)]
    with contextlib.closing(photo_index.Index(tmp_path / "search.sqlite")) as index:
        stored = fill_index(index, photos, "space", 512)
        started = time.perf_counter()
        paths, vectors = index.vectors("/photos", "space", 512)
        loaded = time.perf_counter() - started
    assert paths == [photo.path for photo in photos] and np.array_equal(vectors, stored)
    queries = model_files.unit_rows(np.random.default_rng(1).standard_normal((15, 512), np.float32))
    seconds = []
    for query in queries:
        started = time.perf_counter()
        found = search.best(vectors, query, 30, -1)
        seconds.append(time.perf_counter() - started)
        exact = stored.astype(np.float64) @ query
        assert [row for row, _ in found] == np.argsort(-exact)[:30].tolist()
    first, median, worst = (round(1000 * found) for found in (seconds[0], statistics.median(seconds), max(seconds)))
    told = f"loaded in {loaded:.2f} s, first search {first} ms, median {median} ms, worst {worst} ms"
    size = (tmp_path / "search.sqlite").stat().st_size
    print(f"\n{len(paths):,} x 512: {told}; the index has {size / 1e6:.0f} MB")
    assert statistics.median(seconds) < 0.2


def on_each_core(threads: ThreadPoolExecutor, work: Callable[[Any], None], rows: NDArray[Any]) -> None:
    list(threads.map(work, np.array_split(rows, machine.usable_cores())))


def read(rows: NDArray[Any]) -> None:
    np.bitwise_xor.reduce(rows.reshape(-1).view(np.uint64))


def copy(rows: NDArray[Any]) -> None:
    parts = np.array_split(rows, 8)
    into = np.empty_like(parts[0])  # larger than a cache
    for part in parts:
        np.copyto(into[: len(part)], part)


def anonymous_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) / 1024
