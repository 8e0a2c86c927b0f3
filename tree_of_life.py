"""Where the names and vectors of species come from: TreeOfLife on the hub, or the operator's file or folder.

The result is always `text_vectors.npz` with the names; see `label_cache`. A start that finds it reads nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
import label_cache
import machine
import species
from errors import BackendError, DamagedCache, LabelError, SettingError, one_line
from label_cache import CacheKey, TextVectors
from model_files import Encode, Say, encoder_of, fetch_file, quiet
from settings import DATA_DIR, DEFAULT_MODELS, SPECIES_SOURCES, ModelOptions
from species import RECIPE

log = logging.getLogger("lumen.tree_of_life")

SOURCES = SPECIES_SOURCES
NAMES_10M = ("imageomics/TreeOfLife-10M", "embeddings/txt_emb_species.json")
REPO_200M = "imageomics/TreeOfLife-200M"
REVISION_200M = "5f2dc493b3dc0e544438a04038ab15faa646b749"
FILE_200M = "embeddings/txt_emb_bioclip-2"  # with .npy the vectors, with .json their names
NAMES_200M = "names.json"  # its names, while it is converted
PUBLISHED = "published"  # the recipe of published vectors
# The least cosine of a published vector, an average over 80 prompts, with the vector of our prompt. Vectors of another
# model have a cosine near 0.
PUBLISHED_COSINE = 0.5
MODELS_200M = ("bioclip-2", "bioclip-2-int8")  # last parts of the ids of models that the published vectors belong to
DISK_200M = 3_200_000_000  # bytes: panels and the file, 1.33 GB each, names 0.3 GB, and a reserve
MEMORY_200M = 1_400_000_000  # bytes: all rows, which should stay in the page cache because scoring reads all of them
PANEL_DIMS = 16  # dimensions that are transposed at a time: 55 MB of float32 for 867,455 species
ETA_WINDOW_S = 600
STATUS_S = 10  # seconds between two progress reports


class Progress:
    """The progress of species that are not available yet: a text for clients, which `say` receives as well."""

    def __init__(self, source: str, say: Say) -> None:
        self.failure = ""
        self._say, self._said = say, 0.0
        self.begin(source)

    def begin(self, source: str) -> None:
        self.name = source
        self._seen: deque[tuple[float, int, int]] = deque()  # time, done, total

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._seen.append((now, done, total))
        while self._seen[0][0] < now - ETA_WINDOW_S:
            self._seen.popleft()
        if now - self._said > STATUS_S:
            self._said = now
            self._say(f"serving; {self}")

    def __str__(self) -> str:
        name, seen = self.name, self._seen
        if self.failure:
            return f"{name}: {self.failure}"
        if not seen:
            return f"{name}: beginning"
        (since, first, _), (now, last, total) = seen[0], seen[-1]
        text = f"{name}: {last:,} of {total:,} {'MB' if name == SOURCES[1] else 'labels'}"
        if last <= first or now - since < 1:
            return text
        return f"{text}, {about((total - last) * (now - since) / (last - first))} left"


def about(seconds: float) -> str:
    """A duration, rounded, for people."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} s"


def is_folder(source: str) -> bool:
    """Whether BIOCLIP_LABELS is a folder that `build` made."""
    return (Path(source) / label_cache.FILE).is_file()


def check_own(source: str) -> None:
    """Raises SettingError if the source is the operator's own file or folder and is missing, without reading it."""
    if source and source not in SOURCES and not is_folder(source):
        names_file(source, DATA_DIR)


def names_file(source: str, data_dir: Path, say: Say = quiet) -> Path:
    """The label file of a source whose vectors are computed: the operator's, or the hub's, which is downloaded once.

    Raises SettingError for the former and LabelError for the latter.
    """
    if source and source not in SOURCES:
        path = Path(source)
        if not path.is_file():
            allowed = f"{' or '.join(SOURCES)}, a JSON file, or a folder with {label_cache.FILE}"
            raise SettingError(f"BIOCLIP_LABELS={source}: no such file; allowed: {allowed}")
        return path
    path = data_dir / "bioclip" / "txt_emb_species.json"
    if not path.is_file():
        fetch_file(path, *NAMES_10M, say, check=lineages_of)
    return path


def lineages_of(path: Path, own: bool = False) -> list[str]:
    """The lineages of a JSON list of `[[kingdom, ..., epithet], common name]`, in the file's order.

    The file is parsed row by row, because 867,455 rows as one object would take half a gigabyte. Raises LabelError, or
    SettingError if it is the operator's `own`.
    """
    kind, name = (SettingError, f"BIOCLIP_LABELS={path}") if own else (LabelError, path)
    try:
        found = [species.lineage(index, row) for index, row in enumerate(_rows(path))]
    except (OSError, ValueError, RecursionError) as error:
        complaint = f"{name}: not a JSON list of [[kingdom, ..., species], common name]"
        raise kind(f"{complaint} ({str(error)[:200]})") from error
    if not found:
        raise kind(f"{name}: an empty list")
    return found


def _rows(path: Path, size: int = 1 << 20) -> Iterator[Any]:
    """The elements of a JSON list of lists. Raises ValueError."""
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8") as file:
        text = file.read(size).lstrip()
        if not text.startswith("["):
            raise ValueError("not a list")
        at = 1
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if text[at : at + 1] == "]":
                return
            try:
                row, at = decode(text, at)
            except ValueError:
                more = file.read(size)  # the row may continue there
                if not more:
                    raise
                text, at = text[at:] + more, 0
            else:
                yield row


# --- a set that is there ----------------------------------------------------------------------------------------


def open_folder(
    folder: Path, note: Path | None = None, quick: bool = False, setting: str = "BIOCLIP_LABELS="
) -> TextVectors:
    """The content of a folder that `build` made; see `label_cache.load`. Raises SettingError, which names `setting`."""
    file = f"{setting}{folder}: {label_cache.FILE}"
    try:
        found = label_cache.load(folder / label_cache.FILE, note=note, quick=quick)
    except (OSError, DamagedCache) as error:
        raise SettingError(f"{file} cannot be used ({error})") from error
    if not found or not len(found.depth):
        raise SettingError(f"{file} has no lineages; `tree_of_life.py build` makes such files")
    return found


def ready_made(folder: Path, dim: int, encode: Encode, note: Path) -> TextVectors:
    """The vectors of the operator's folder, which need not be ours to write: `note` remembers that its checksums were
    read. Raises SettingError, also if they are not those of the model."""
    found = open_folder(folder, note)
    if found.vecs.shape[1] != dim:
        text = f"vectors of {found.vecs.shape[1]} dimensions, and the model's have {dim}"
    elif not belongs(found, encode):
        text = f"its vectors are not those of this model, but of {found.meta['model_id']}"
    else:
        return found
    raise SettingError(f"BIOCLIP_LABELS={folder}: {text}")


def kept(folder: Path, wanted: dict[str, Any], encode: Encode) -> TextVectors | None:
    """The vectors that an earlier start kept, if their meta contains `wanted` and they belong to this model."""
    path = folder / label_cache.FILE
    if not wanted.items() <= label_cache.meta_of(path).items():
        return None
    found = label_cache.load_or_none(path, wanted)
    return found if found and len(found.depth) and belongs(found, encode) else None


def belongs(found: TextVectors, encode: Encode) -> bool:
    floor = PUBLISHED_COSINE if found.meta["recipe"] == PUBLISHED else label_cache.PROBE_COSINE
    return label_cache.fits(found.vecs, found.names, RECIPE, encode, floor)


# --- a set that is computed -------------------------------------------------------------------------------------


def computed(
    folder: Path, path: Path, model_id: str, dim: int, encode: Encode, progress: label_cache.Progress
) -> TextVectors:
    """Computes the vectors of a label file and saves them in `folder` with the names. Raises LabelError."""
    names = sorted(lineages_of(path))
    key = CacheKey(model_id, RECIPE.name, machine.sha256_of(path), len(names), dim)
    return label_cache.cached_vectors(folder, names, RECIPE, encode, key, (), progress, species.depths(names))


# --- a set that is published ------------------------------------------------------------------------------------


def published_obstacle(folder: Path, model_id: str) -> str:
    """The reason why TreeOfLife-200M's vectors cannot be used for a model and kept in `folder`, or "".

    A clause for the log. Disk space that an interrupted conversion occupies already is not needed again.
    """
    if model_id.rpartition("/")[2].lower() not in MODELS_200M:
        return f"its vectors are BioCLIP-2's, and not those of {model_id}"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    need = DISK_200M - sum(path.stat().st_size for path in _building(folder).glob("*"))
    if free < need:
        return f"it needs {need / 1e9:.1f} GB of disk space, and {existing} has {free / 1e9:.1f} GB free"
    available, _ = machine.memory()
    if available < MEMORY_200M:
        return f"it needs {MEMORY_200M / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available"
    return ""


def _building(folder: Path) -> Path:
    return folder / ".building" / REVISION_200M[:16]


def published(folder: Path, model_id: str, progress: label_cache.Progress) -> TextVectors:
    """TreeOfLife-200M's vectors, transposed to rows while they are downloaded, and saved in `folder`.

    Each part, PANEL_DIMS dimensions of all rows, is a file in `.building/`, so a kill costs at most one part. Species
    without a vector (all zeros) are left out. At most about 250 MB are held in memory. Raises LabelError.
    """
    from huggingface_hub import HfFileSystem

    building = _building(folder)
    try:
        building.mkdir(parents=True, exist_ok=True)
        # Without the cache of instances, which would remember a file that was missing at an earlier attempt.
        hub = HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"), skip_instance_cache=True)
        with hub.open(f"datasets/{REPO_200M}@{REVISION_200M}/{FILE_200M}.npy", "rb", cache_type="none") as source:
            dim, count = _npy_shape(source)
            used = _panels(building, source, dim, _order(building, count), progress)
        names = list(itertools.compress(sorted(lineages_of(building / NAMES_200M)), used))
        return _assemble(folder, model_id, dim, names, used)
    except LabelError:
        raise
    except Exception as error:  # the hub's client, its HTTP library and the disk each raise their own kinds
        log.debug("TreeOfLife-200M failed", exc_info=True)
        raise LabelError(f"TreeOfLife-200M cannot be fetched and kept in {folder} ({one_line(error)})") from error


def _npy_shape(source: Any) -> tuple[int, int]:
    version = np.lib.format.read_magic(source)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(source)
    if len(shape) != 2 or fortran or dtype != np.dtype("<f4") or shape[0] > shape[1]:
        raise LabelError(f"TreeOfLife-200M: vectors of shape {shape}, {dtype}; expected float32 [dim, species]")
    return int(shape[0]), int(shape[1])


def _order(building: Path, count: int) -> NDArray[np.int32]:
    """Downloads the names, once; -> the column of each in their sorted order, int32 `[count]`.

    The names themselves, over 100 MB, are read again when the vectors are there.
    """
    path, source = building / NAMES_200M, f"{FILE_200M}.json"
    try:
        lineages = lineages_of(path)
    except LabelError:  # it has not been downloaded yet, or is damaged
        lineages = fetch_file(path, REPO_200M, source, quiet, REVISION_200M, check=lineages_of)
    if len(lineages) != count:
        raise LabelError(f"TreeOfLife-200M: {len(lineages)} names for {count} vectors")
    return np.array(sorted(range(count), key=lineages.__getitem__), np.int32)


def _panels(
    building: Path, source: Any, dim: int, order: NDArray[np.int32], progress: label_cache.Progress
) -> NDArray[np.bool_]:
    """Makes the missing files `panel-N.npy`, float16 `[count, PANEL_DIMS]`, sorted. Returns which rows are used."""
    count = len(order)
    begin, used = source.tell(), np.zeros(count, bool)
    for first in range(0, dim, PANEL_DIMS):
        dims = min(PANEL_DIMS, dim - first)
        path = building / f"panel-{first}.npy"
        if not path.exists():
            source.seek(begin + first * count * 4)
            data = source.read(dims * count * 4)
            if len(data) != dims * count * 4:
                raise OSError(f"the vectors end after {begin + first * count * 4 + len(data)} bytes")
            panel = np.frombuffer(data, "<f4").reshape(dims, count)
            rows = np.empty((count, dims), np.float16)
            for column in range(dims):
                rows[:, column] = panel[column][order]
            with machine.replacing(path) as file:
                np.save(file, rows)
            del data, panel, rows
        used |= np.load(path, mmap_mode="r").any(axis=1)
        progress((first + dims) * count * 4 >> 20, dim * count * 4 >> 20)
    return used


def _assemble(folder: Path, model_id: str, dim: int, names: list[str], used: NDArray[np.bool_]) -> TextVectors:
    """Writes the file from the panels. `names`: of the rows that are used."""
    building = _building(folder)
    panels = [np.load(building / f"panel-{first}.npy", mmap_mode="r") for first in range(0, dim, PANEL_DIMS)]

    def blocks() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(used), label_cache.BLOCK):
            part = slice(start, start + label_cache.BLOCK)
            rows = np.concatenate([panel[part] for panel in panels], axis=1, dtype=np.float32)[used[part]]
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            yield rows / norms if (np.abs(norms - 1) > 1e-3).any() else rows

    key = CacheKey(model_id, PUBLISHED, REVISION_200M, len(names), dim)
    more = {"source": f"{REPO_200M}/{FILE_200M}.npy@{REVISION_200M}", "zero_rows_dropped": int((~used).sum())}
    label_cache.save(folder, key, blocks(), names, species.depths(names), more)
    log.info("TreeOfLife-200M: %d species, %d without a vector left out", len(names), more["zero_rows_dropped"])
    shutil.rmtree(building, ignore_errors=True)
    with suppress(OSError):  # it is not empty if it also contains parts of computed labels
        building.parent.rmdir()
    found = label_cache.load(folder / label_cache.FILE, key.meta())
    assert found is not None
    return found


# --- python tree_of_life.py build | info | verify ---------------------------------------------------------------


def build(options: argparse.Namespace) -> TextVectors:
    """Makes `text_vectors.npz` in a folder. Raises SettingError, LabelError or BackendError."""
    from tqdm import tqdm

    if options.labels == SOURCES[1]:
        with tqdm(desc=options.labels, unit="MB") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return published(options.to, "imageomics/bioclip-2", show)

    path = names_file(options.labels, DATA_DIR)
    name = options.model or DEFAULT_MODELS["BIOCLIP"]
    model = ModelOptions("BIOCLIP", options.backend, name, DATA_DIR, device=options.device)
    backend = backends.create_backend(model)
    encode = encoder_of(backend)
    return computed(options.to, path, backend.model_id, backend.dim, encode, lambda done, total: None)


def info(folder: Path) -> list[str]:
    """Describes the content of a folder, for people. Raises SettingError."""
    found = open_folder(folder, setting="")
    size = (folder / label_cache.FILE).stat().st_size
    lines = [f"{name}: {value}" for name, value in found.meta.items()]
    taxa_of = (f"{np.count_nonzero(found.depth <= rank):,} {name}" for rank, name in enumerate(species.RANKS))
    return [*lines, f"taxa: {', '.join(taxa_of)}", f"size: {size / 1e6:,.0f} MB"]


def verify(folder: Path) -> list[str]:
    """Reads a folder completely. Returns what is wrong with it. Raises SettingError."""
    (folder / label_cache.NOTE).unlink(missing_ok=True)
    found = open_folder(folder, setting="")  # which reads the checksums
    wrong = []
    for start in range(0, len(found.vecs), label_cache.BLOCK):
        rows = found.vecs[start : start + label_cache.BLOCK].astype(np.float32)
        if (bad := ~(np.abs(np.linalg.norm(rows, axis=1) - 1) <= 1e-2)).any():
            wrong.append(f"row {start + int(bad.argmax())} is not of unit length")
    try:
        if not np.array_equal(species.depths(found.names), found.depth):
            wrong.append("depth is not that of its lineages")
    except ValueError as error:
        wrong.append(str(error))
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "tree_of_life.py", description="Text vectors of species: made on a PC, copied to a board."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build", help="compute or fetch them; goes on where it was stopped")
    making.add_argument("--labels", default=SOURCES[0], metavar="SOURCE", help=f"{', '.join(SOURCES)}, or a JSON file")
    making.add_argument("--model", default="", help="as BIOCLIP_MODEL")
    making.add_argument("--backend", default="torch", choices=("torch", "onnxrt"), help="as BIOCLIP_BACKEND")
    making.add_argument("--device", default="", help="as BIOCLIP_DEVICE")
    making.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    for name, text in (("info", "say what a folder holds"), ("verify", "read all of it; 1 if something is wrong")):
        commands.add_parser(name, help=text).add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if options.command == "build":
            print(f"{options.to}: {len(build(options).vecs):,} species; BIOCLIP_LABELS={options.to}")
            return 0
        lines = info(options.folder) if options.command == "info" else verify(options.folder)
    except (SettingError, LabelError, BackendError, OSError) as error:
        print(f"tree_of_life.py: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines or ["no errors found"]))
    return 1 if options.command == "verify" and lines else 0


if __name__ == "__main__":
    sys.exit(main())
