"""The cache file of a label set's text vectors: built once, complete or absent, mapped into memory.

`text_vectors.npz` is an ordinary uncompressed npz. Its members begin at multiples of 64 bytes, so a large one can be
mapped. Processes then share its pages, and the kernel can drop them when memory is short.

    vecs      float32 [n, dim], or float16 if that would exceed HALF_PRECISION_BYTES; rows of unit length
    meta      JSON with what the vectors depend on; see `CacheKey`
    names     UTF-8, without separators, and `offsets`, int64 [n + 1]; only of lineages
    depth     uint8 [n], only of lineages: the first rank in which a row differs from the previous one

Nothing is unpickled. A kill at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from errors import DamagedCache
from labels import Recipe, label_vectors
from machine import replace_file, replacing
from model_files import Encode

log = logging.getLogger("lumen.label_cache")

Progress = Callable[[int, int], None]  # (labels done, labels in all)

CACHE_FORMAT = 1
FILE = "text_vectors.npz"
NOTE = "text_vectors.checked.json"
SHARD_LABELS = 2048  # labels that are saved together while a set is built; a kill costs at most so many
HALF_PRECISION_BYTES = 256 << 20  # larger float32 matrices are stored as float16 and mapped; logits change by 0.0025
BLOCK = 8192  # rows that are converted at a time: 25 MB of float32 at 768 dimensions
PROBE_LABELS = 4  # labels that are encoded again to check whether a cache belongs to the model
# The least cosine of such a label. Two batches of bfloat16 differ by more than 0.0001, and other models by far more.
PROBE_COSINE = 0.999
ALIGNMENT = 64  # bytes


class Names(Sequence[str]):
    """Names that stay in the file. Only those that are accessed become strings."""

    def __init__(self, text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """`offsets`: where each name begins in the text, and where the last one ends."""
        self.text, self.offsets = text, offsets

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        text, offsets = bytearray(), np.zeros(len(names) + 1, np.int64)
        for end, name in enumerate(names, 1):
            text += name.encode()
            offsets[end] = len(text)
        return cls(np.frombuffer(text, np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, at: int) -> str:  # type: ignore[override]  # nothing takes slices of them
        if not 0 <= at < len(self.offsets) - 1:
            raise IndexError(at)
        return self.text[self.offsets[at] : self.offsets[at + 1]].tobytes().decode("utf-8")


@dataclass(frozen=True)
class TextVectors:
    """The vectors of a label set, and the rest of its file. Only lineages have `names` and `depth`."""

    vecs: NDArray[Any]  # float32 or float16 [n, dim]
    names: Sequence[str] = ()
    depth: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheKey:
    """What the text vectors of a label set depend on. The weights are not part of it; `fits` checks them."""

    model_id: str
    recipe: str
    names_sha256: str
    count: int
    dim: int

    @classmethod
    def of(cls, names: Sequence[str], recipe: Recipe, model_id: str, dim: int) -> CacheKey:
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        return cls(model_id, recipe.name, digest, len(names), dim)

    def meta(self) -> dict[str, Any]:
        return {"format": CACHE_FORMAT, **vars(self)}


# --- writing ----------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    key: CacheKey,
    rows: Iterable[NDArray[Any]],
    names: Sequence[str] = (),
    depth: NDArray[np.uint8] | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Writes `text_vectors.npz`, and a copy of its meta as JSON for people. Raises OSError.

    `rows`: blocks of unit rows, `[key.count, key.dim]` together; only one is in memory at a time. `more`: for the meta.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".text_vectors.*.tmp"):  # of killed processes; another process may be writing newer ones
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    dtype = np.dtype(np.float16 if is_large(key.count, key.dim) else np.float32)
    meta = json.dumps({**key.meta(), "dtype": str(dtype), **(more or {})}, indent=2).encode()
    with replacing(folder / FILE) as file, zipfile.ZipFile(file, "w") as archive:
        _add_blocks(archive, "vecs", dtype, (key.count, key.dim), rows)
        if depth is not None:
            stored = Names.of(names)
            _add(archive, "offsets", stored.offsets)
            _add(archive, "names", stored.text)
            _add(archive, "depth", depth)
        _add(archive, "meta", np.frombuffer(meta, np.uint8))
    replace_file(folder / "text_vectors.meta.json", meta)
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def is_large(count: int, dim: int) -> bool:
    """Whether a set of this size is stored as float16 and mapped."""
    return count * dim * 4 > HALF_PRECISION_BYTES


def _add(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    _add_blocks(archive, name, array.dtype, array.shape, [array])


def _add_blocks(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]
) -> None:
    """Adds an array that comes in blocks of rows. It begins at a multiple of ALIGNMENT in the file."""
    assert archive.fp is not None
    header = io.BytesIO()  # itself a multiple of ALIGNMENT
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    info = zipfile.ZipInfo(f"{name}.npy")
    begin = archive.fp.tell() + 30 + len(info.filename) + 20 + 4  # the local header and its extra fields
    padding = -begin % ALIGNMENT
    info.extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)  # as Android aligns
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(header.getvalue())
        for block in blocks:
            member.write(np.ascontiguousarray(block, dtype).data)


# --- reading ----------------------------------------------------------------------------------------------------


def load(
    path: Path, wanted: Mapping[str, Any] | None = None, note: Path | None = None, quick: bool = False
) -> TextVectors | None:
    """Loads `path` if its meta contains `wanted`, otherwise returns None. Raises FileNotFoundError and DamagedCache.

    A large file is mapped, and its checksums are verified only once. The file `note` records that; by default it is
    beside `path`. With `quick`, the checksums of a large file are not verified, and nothing is written.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            meta = json.loads(_array(file, path, members["meta"]).tobytes())
            if wanted and any(meta.get(name) != value for name, value in wanted.items()):
                log.info("%s was made for another model, label file or recipe", path)
                return None
            if not (quick and path.stat().st_size > HALF_PRECISION_BYTES):
                _check_sums(archive, path, note or path.with_name(NOTE))
            arrays = {name: _array(file, path, info) for name, info in members.items() if name != "meta"}
        return _text_vectors(arrays, meta)
    except (FileNotFoundError, DamagedCache):
        raise
    except Exception as error:  # zipfile, json, numpy and tokenize raise various exceptions for damaged bytes
        raise DamagedCache(f"{type(error).__name__}: {error}") from error


def meta_of(path: Path) -> dict[str, Any]:
    """The meta of `path`, or {} if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(json.loads(file["meta"].tobytes()))
    except Exception:  # as of `load`
        return {}


def _text_vectors(arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> TextVectors:
    count, dim = int(meta["count"]), int(meta["dim"])
    vecs = checked(arrays["vecs"], count, dim)
    if "depth" not in arrays:
        return TextVectors(vecs, meta=meta)
    text, offsets, depth = arrays["names"], arrays["offsets"], arrays["depth"]
    if offsets.shape != (count + 1,) or offsets[0] or offsets[-1] != len(text) or (np.diff(offsets) < 0).any():
        raise DamagedCache("the offsets of its names")
    if depth.shape != (count,) or depth.dtype != np.uint8:
        raise DamagedCache(f"depth of shape {depth.shape}")
    return TextVectors(vecs, Names(text, offsets), depth, meta)


def _array(file: IO[bytes], path: Path, info: zipfile.ZipInfo) -> NDArray[Any]:
    """A member as an array, mapped if the file is large."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise DamagedCache(f"{info.filename} is compressed")
    file.seek(info.header_offset)
    header = file.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    begin = info.header_offset + 30 + name_length + extra_length
    file.seek(begin)
    if np.lib.format.read_magic(file) != (1, 0):
        raise DamagedCache(f"{info.filename}: not an npy of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if fortran or dtype.hasobject or file.tell() + size != begin + info.file_size:
        raise DamagedCache(f"{info.filename}: {dtype} of shape {shape}")
    if path.stat().st_size > HALF_PRECISION_BYTES:
        return np.memmap(path, dtype, "r", file.tell(), shape)
    # A small file is not mapped, because truncating a mapped file would end the process.
    return np.frombuffer(file.read(size), dtype).reshape(shape)


def _check_sums(archive: zipfile.ZipFile, path: Path, note: Path) -> None:
    """Verifies the checksums of a file, unless `note` says that this was done since the file was written.

    Reading gigabytes takes long on a small board. Without a note, or if it is damaged, it costs that time again.
    """
    status = path.stat()
    seen = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    large = status.st_size > HALF_PRECISION_BYTES
    with suppress(OSError, ValueError):  # the note may be missing, or emptied by a power cut
        if large and json.loads(note.read_bytes()) == seen:
            return
    if damaged := archive.testzip():
        raise DamagedCache(f"the checksum of {damaged}")
    if large:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            replace_file(note, json.dumps(seen).encode())
        except OSError as error:
            log.debug("cannot note that %s was checked (%s)", path, error)


def checked(vecs: NDArray[Any], count: int, dim: int) -> NDArray[Any]:
    """Returns the vectors if their shape, dtype and lengths are right; of a large set only a sample is checked.

    Raises DamagedCache.
    """
    if vecs.shape != (count, dim) or vecs.dtype not in (np.float16, np.float32):
        raise DamagedCache(f"shape {vecs.shape}, {vecs.dtype}; expected {(count, dim)}")
    every = max(1, count // BLOCK) if is_large(count, dim) else 1
    norms = np.linalg.norm(vecs[::every].astype(np.float32), axis=1)
    if not (np.abs(norms - 1) < 1e-2).all():
        raise DamagedCache("a row is not of unit length")
    return vecs


# --- building ---------------------------------------------------------------------------------------------------


def cached_vectors(
    folder: Path,
    names: Sequence[str],
    recipe: Recipe,
    encode: Encode,
    key: CacheKey,
    older: Sequence[Path] = (),
    progress: Progress = lambda done, total: None,
    depth: NDArray[np.uint8] | None = None,
) -> TextVectors:
    """The text vectors of a label set, from the cache in `folder`, or computed and saved there.

    A cache is used if its key is the same and if a few labels, encoded again, give the same vectors. This detects new
    weights, another tokenizer or another precision without reading gigabytes of weights. `older`: files of earlier
    layouts, which are converted under the same conditions. If the folder cannot be written, a warning is logged.
    `depth`: for lineages; see `species.depths`. The file then contains the names as well.
    """
    found = load_or_none(folder / FILE, key.meta())
    if found and (depth is None or len(found.depth)) and fits(found.vecs, names, recipe, encode):
        return found
    for old in older:
        vecs = _npz_rows(old, "vecs", range(key.count, key.count + 1), key.dim)
        if vecs is not None and fits(vecs, names, recipe, encode):
            log.info("taking over %s", old)
            blocks: Iterable[NDArray[Any]] = [vecs]
            break
    else:
        blocks = _build(names, recipe, encode, key, folder, progress)
    if not is_large(key.count, key.dim):
        blocks = [np.concatenate(list(blocks))]
    lineages: dict[str, Any] = {} if depth is None else {"names": names, "depth": depth}
    try:
        save(folder, key, blocks, **lineages)
        shutil.rmtree(folder / ".building", ignore_errors=True)  # also the parts of other keys, which are obsolete
        if found := load(folder / FILE, key.meta()):  # None if another process has replaced it
            return found
    except OSError as error:
        log.warning("cannot keep the text vectors in %s (%s); the next start computes them again", folder, error)
    if is_large(key.count, key.dim):
        blocks = _build(names, recipe, encode, key, folder, progress)
    return TextVectors(np.concatenate(list(blocks)), **lineages)


def load_or_none(path: Path, wanted: Mapping[str, Any]) -> TextVectors | None:
    """Like `load`, but returns None for a missing or damaged file. A damaged one is logged."""
    try:
        return load(path, wanted)
    except FileNotFoundError:
        return None
    except DamagedCache as error:
        log.warning("%s is damaged (%s); computing it again", path, error)
        return None


def _build(
    names: Sequence[str], recipe: Recipe, encode: Encode, key: CacheKey, folder: Path, progress: Progress
) -> Iterator[NDArray[np.float32]]:
    """Computes the vectors in shards. If the build is killed, a later one uses the shards that are saved.

    `progress` may raise to stop the build. Then the incomplete shard is saved as well.
    """
    from tqdm import tqdm

    log.info("computing the text vectors of %d labels (%s)", len(names), recipe.name)
    digest = hashlib.sha256(json.dumps(key.meta()).encode()).hexdigest()[:16]
    with tqdm(total=len(names), desc="text vectors", unit="label", disable=None) as bar:  # None: on a terminal only
        for start in range(0, len(names), SHARD_LABELS):
            shard, path = names[start : start + SHARD_LABELS], folder / ".building" / f"{digest}-{start}.npz"
            rows, done = np.empty((len(shard), key.dim), np.float32), 0
            kept = _npz_rows(path, "rows", range(1, len(shard) + 1), key.dim)
            if kept is not None and fits(kept, shard[: len(kept)], recipe, encode):
                done = len(kept)
                rows[:done] = kept
                bar.update(done)
                progress(start + done, len(names))
            if done < len(shard):
                try:
                    for at in range(done, len(shard), 64):
                        part = shard[at : at + 64]
                        rows[at : at + len(part)] = label_vectors(part, recipe, encode)
                        done = at + len(part)
                        bar.update(len(part))
                        progress(start + done, len(names))
                finally:  # also if an exception interrupts the shard
                    if done and len(names) > SHARD_LABELS:
                        _save_shard(path, rows[:done])
            yield rows


def _save_shard(path: Path, rows: NDArray[Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, rows=rows)
    except OSError as error:
        log.warning("cannot keep what is computed in %s (%s); if stopped, it begins again", path.parent, error)


def fits(
    vectors: NDArray[Any], names: Sequence[str], recipe: Recipe, encode: Encode, floor: float = PROBE_COSINE
) -> bool:
    """Whether a few labels, encoded again, give the same vectors."""
    rows = np.unique(np.linspace(0, len(names) - 1, PROBE_LABELS).astype(int))
    fresh = label_vectors([names[i] for i in rows], recipe, encode)
    cosines = np.sum(vectors[rows].astype(np.float32) * fresh, axis=1)
    if (cosines > floor).all():
        return True
    log.info("the text vectors at hand belong to another model or recipe (cosine %.4f)", cosines.min())
    return False


def _npz_rows(path: Path, member: str, counts: range, dim: int) -> NDArray[Any] | None:
    """Unit rows of an npz, as many as one of `counts`, or None if it does not have them.

    Nothing is unpickled. The `names` of earlier layouts are pickled objects, which are not read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:  # an npz has checksums, an npy has none
            rows = file[member]
        if len(rows) not in counts:
            raise DamagedCache(f"{len(rows)} rows")
        return checked(rows, len(rows), dim)
    except FileNotFoundError:
        return None
    except Exception as error:  # as of `load`
        log.warning("%s cannot be used (%s); computing it again", path, error)
        return None
