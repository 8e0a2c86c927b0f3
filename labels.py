"""Label sets: names, prompts, text vectors, their cache files, scoring and top-k.

Knows nothing of models or gRPC: whoever builds a label set hands in a function that turns texts into vectors, and may
hand in one that compares vectors faster than numpy does.
Nothing here is unpickled, and every file is written beside its final name and then renamed, so a kill at any moment
leaves the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger("lumen.labels")

Vectors = NDArray[np.float32]  # [n, dim], rows of unit length
Encode = Callable[[list[str]], Vectors]  # texts -> unit rows
Similarities = Callable[[NDArray[Any], Vectors], NDArray[np.float32]]  # rows [n, dim], queries [b, dim] -> [b, n]
Progress = Callable[[int, int], None]  # (labels done, labels in all)

CACHE_FORMAT = 1
ENCODE_BATCH = 32  # prompts a forward
SHARD_LABELS = 2048  # computed labels that are kept together; what a kill may cost
SCORE_BLOCK = 16_384  # rows turned to float32 at a time: 50 MB at 768 dimensions
TOP_BLOCK = 256  # values of which the search for the best looks at the largest first
HALF_PRECISION_BYTES = 256 << 20  # a larger float32 matrix is stored as float16; logits move by 0.0025 at most
PROBE_LABELS = 4  # labels encoded again to see whether a cache still belongs to the model
PROBE_COSINE = 0.9999

# `open_clip/zero_shot_metadata.py` has these as OPENAI_IMAGENET_TEMPLATES and SIMPLE_IMAGENET_TEMPLATES, most of
# them once with "a" and once with "the". "a" before vowels is kept: published accuracy was had with it.
_PAIRS = """a bad photo of|a black and white photo of|a blurry photo of|a bright photo of|a close-up photo of
a cropped photo of|a dark photo of|a doodle of|a drawing of|a good photo of|a jpeg corrupted photo of
a low resolution photo of|a painting of|a photo of|a pixelated photo of|a rendering of|a rendition of|a sculpture of
a sketch of|a tattoo of|art of|graffiti of|itap of"""
_ADJECTIVES = ("clean", "cool", "dirty", "hard to see", "large", "nice", "small", "weird")
_MATERIALS = ("cartoon", "embroidered", "origami", "plastic", "plushie", "toy")
_OPENAI_TEMPLATES = tuple(
    [f"{head} {an} {{}}." for head in _PAIRS.replace("\n", "|").split("|") for an in ("a", "the")]
    + [f"a photo of {an} {adjective} {{}}." for adjective in _ADJECTIVES for an in ("a", "the")]
    + [f"{an} {material} {{}}." for material in _MATERIALS for an in ("a", "the")]
    + [f"{an} {{}} in a video game." for an in ("a", "the")]
    + ["a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."]
)
TEMPLATES = {
    1: ("a photo of a {}.",),
    7: (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    80: _OPENAI_TEMPLATES,
}

SCENES = (
    "a photo of an animal",
    "a photo of a bird",
    "a photo of an insect",
    "a photo of a human-made object",
    "a photo of a landscape",
    "an abstract painting",
)
ANIMAL_SCENES = frozenset(SCENES[:3])

LABEL_FORMATS = ("lineage", "scientific", "common")
RANKS = 7  # kingdom ... species epithet; the eighth slot of a lineage is the common name


class LabelError(Exception):
    """A label file cannot be had or is not what it should be; the text is one line for the operator."""


# --- names ------------------------------------------------------------------------------------------------------


def class_names(data_dir: Path, own: str = "") -> list[str]:
    """What `clip_classify` chooses from: the file `own`, a JSON list of names, or else ImageNet-1k's.

    Those are in the order of the classes, each a WordNet synset ("tench, Tinca tinca"). Raises LabelError.
    """
    if own:
        return _read_names(Path(own), f"CLIP_LABELS={own}: allowed: a JSON list of names", _parse_list)
    path = data_dir / "clip" / "imagenet_class_names.json"
    return _label_file(path, "huggingface/label-files", "imagenet-1k-id2label.json", _parse_imagenet)


def species_names(data_dir: Path, own: str = "") -> list[str]:
    """One eight-slot lineage a row ("Animalia/Chordata/.../Vulpes/vulpes/red fox", "*" for blanks).

    From the file `own`, a JSON list of `[[kingdom, ..., species], common name]`, or else TreeOfLife-10M's, which has
    that form. Raises LabelError.
    """
    if own:
        complaint = f"BIOCLIP_LABELS={own}: allowed: a JSON list of [[kingdom, ..., species], common name]"
        return _read_names(Path(own), complaint, _parse_species)
    path = data_dir / "bioclip" / "txt_emb_species.json"
    return _label_file(path, "imageomics/TreeOfLife-10M", "embeddings/txt_emb_species.json", _parse_species)


def _parse_list(content: Any) -> list[str]:
    if not isinstance(content, list) or not content:
        raise ValueError("not a list of names")
    for index, name in enumerate(content):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"row {index} is not a name")
    return content


def _parse_imagenet(content: Any) -> list[str]:
    if not isinstance(content, dict) or set(content) != {str(i) for i in range(1000)}:
        raise ValueError('not an object with the keys "0" to "999"')
    names = [content[str(i)] for i in range(1000)]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("a label is not a text")
    return names


def _parse_species(content: Any) -> list[str]:
    if not isinstance(content, list) or not content:
        raise ValueError("not a list of rows")
    return [_lineage(index, row) for index, row in enumerate(content)]


def _lineage(index: int, row: Any) -> str:
    match row:
        case [[*ranks], str(common)] if len(ranks) == RANKS and all(isinstance(rank, str) for rank in ranks):
            # A slash inside a name would shift the slots of those who split the label.
            return "/".join(" ".join(slot.replace("/", "-").split()) or "*" for slot in (*ranks, common))
    raise ValueError(f"row {index} is not [[kingdom, ..., species], common name]")


def render_species(lineage: str, label_format: str) -> str:
    """A lineage as the client wants to read it; `label_format` is one of LABEL_FORMATS."""
    if label_format == "lineage":
        return lineage
    slots = lineage.split("/")
    if label_format == "common" and slots[RANKS] != "*":
        return slots[RANKS]
    known = [slot for slot in slots[:RANKS] if slot != "*"]
    return " ".join(slot for slot in slots[RANKS - 2 : RANKS] if slot != "*") or (known[-1] if known else "unknown")


def _label_file(path: Path, repo: str, filename: str, parse: Callable[[Any], list[str]]) -> list[str]:
    """The names in `path`, fetched once from a hub dataset. Raises LabelError."""
    if path.is_file():
        return _read_names(path, f"{path}: not the file {filename} of {repo}", parse)
    from huggingface_hub import hf_hub_download

    staging = path.parent / ".download"
    log.info("downloading %s of %s", filename, repo)
    try:
        staged = Path(hf_hub_download(repo, filename, repo_type="dataset", local_dir=staging))
    except Exception as error:  # the hub's client, its HTTP library and the disk each raise their own kinds
        log.debug("download failed", exc_info=True)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise LabelError(f"cannot download {filename} of the hub dataset {repo} ({reason})") from error
    try:
        names = _read_names(staged, f"the hub's {filename} of {repo} is not what it should be", parse)
    except LabelError:
        staged.unlink()  # a later start shall ask the hub again
        raise
    os.replace(staged, path)
    shutil.rmtree(staging)
    return names


def _read_names(path: Path, complaint: str, parse: Callable[[Any], list[str]]) -> list[str]:
    try:
        return parse(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise LabelError(f"{complaint} ({str(error)[:200]})") from error


# --- prompts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a label becomes prompts; `name` is part of a cache's key."""

    name: str
    prompts: Callable[[str], list[str]]


def imagenet_recipe(templates: int) -> Recipe:
    """The label's first synonym in 1, 7 or 80 templates."""
    chosen = TEMPLATES[templates]
    return Recipe(f"imagenet-{templates}", lambda label: [t.format(label.split(",")[0].strip()) for t in chosen])


def names_recipe(templates: int) -> Recipe:
    """The label as it stands, commas and all, in the same templates: for names that are not synsets."""
    return Recipe(f"names-{templates}", lambda label: [t.format(label.strip()) for t in TEMPLATES[templates]])


def species_prompts(lineage: str) -> list[str]:
    """BioCLIP's training caption of the `taxon_com` form: the ranks, then the common name; no article."""
    *ranks, common = lineage.split("/")
    taxon = " ".join(rank for rank in ranks if rank != "*")
    return [f"a photo of {taxon}." if common == "*" else f"a photo of {taxon} with common name {common}."]


SPECIES_RECIPE = Recipe("bioclip-taxon-com", species_prompts)
SCENE_RECIPE = Recipe("scenes", lambda label: [label])


def label_vectors(labels: Sequence[str], recipe: Recipe, encode: Encode) -> Vectors:
    """float32 `[n, dim]`: a label's prompt vectors are averaged and brought back to unit length, as OpenCLIP does."""
    prompts = [recipe.prompts(label) for label in labels]
    flat = [prompt for group in prompts for prompt in group]
    # Prompts of one length share a forward, which then runs at that length.
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
    rows: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(order), ENCODE_BATCH):
        part = order[start : start + ENCODE_BATCH]
        rows.update(zip(part, encode([flat[i] for i in part]), strict=True))
    encoded = (rows[i] for i in range(len(flat)))
    means = np.stack([np.mean([next(encoded) for _ in group], axis=0) for group in prompts])
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), np.float32)


# --- vectors and their cache ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheKey:
    """All that the text vectors of a label set depend on, apart from the weights, which the probe sees to."""

    model_id: str
    recipe: str
    names_sha256: str
    count: int
    dim: int

    @classmethod
    def of(cls, names: Sequence[str], recipe: Recipe, model_id: str, dim: int) -> CacheKey:
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        return cls(model_id, recipe.name, digest, len(names), dim)


def cached_vectors(
    folder: Path,
    names: Sequence[str],
    recipe: Recipe,
    encode: Encode,
    key: CacheKey,
    older: Sequence[Path] = (),
    progress: Progress = lambda done, total: None,
) -> NDArray[Any]:
    """The text vectors of a label set, float32 or float16 `[n, dim]`, from `folder` or built and kept there.

    A cache is used if its key fits and a few labels, encoded again, give what it holds; so new weights, another
    tokenizer or another precision are seen without reading gigabytes of weights. `older` are files of earlier
    layouts, which are taken over on the same terms. A folder that cannot be written costs a warning, not the start.
    """
    path = folder / "text_vectors.npz"
    vectors = _load_cache(path, key)
    if vectors is not None and _probe(vectors, names, recipe, encode):
        return vectors
    for old in older:
        vectors = _load_older(old, key)
        if vectors is not None and _probe(vectors, names, recipe, encode):
            log.info("taking over %s", old)
            break
    else:
        vectors = _build(names, recipe, encode, key, folder, progress)
    try:
        _save_cache(folder, key, vectors)
        shutil.rmtree(folder / ".building", ignore_errors=True)  # of other keys too, which nobody asks for any more
    except OSError as error:
        log.warning("cannot keep the text vectors in %s (%s); the next start computes them again", folder, error)
    return vectors


def _build(
    names: Sequence[str], recipe: Recipe, encode: Encode, key: CacheKey, folder: Path, progress: Progress
) -> NDArray[Any]:
    """Computes the vectors in shards, which a later start takes over if this one is stopped: a kill costs the last."""
    from tqdm import tqdm

    log.info("computing the text vectors of %d labels (%s)", len(names), recipe.name)
    half = len(names) * key.dim * 4 > HALF_PRECISION_BYTES
    vectors = np.empty((len(names), key.dim), np.float16 if half else np.float32)
    shards = _Shards(folder / ".building", key)
    # A journal gets a line now and then, a terminal a bar.
    interval = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=len(names), desc="text vectors", unit="label", mininterval=interval) as bar:
        for start in range(0, len(names), SHARD_LABELS):
            shard = names[start : start + SHARD_LABELS]
            rows = shards.load(start, len(shard))
            if rows is not None and _probe(rows, shard, recipe, encode):
                bar.update(len(shard))
            else:
                rows = np.empty((len(shard), key.dim), np.float32)
                for at in range(0, len(shard), 64):
                    part = shard[at : at + 64]
                    rows[at : at + len(part)] = label_vectors(part, recipe, encode)
                    bar.update(len(part))
                    progress(start + at + len(part), len(names))
                if len(names) > SHARD_LABELS:
                    shards.save(start, rows)
            vectors[start : start + len(shard)] = rows
    return vectors


class _Shards:
    """Parts of a cache that is being built, each a file that is whole or not there; see `_save_cache`."""

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self._folder, self._dim = folder, key.dim
        self._name = hashlib.sha256(json.dumps(_meta(key)).encode()).hexdigest()[:16]
        self._warned = False

    def load(self, start: int, count: int) -> NDArray[Any] | None:
        path = self._folder / f"{self._name}-{start}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:  # whose members have checksums, as an npy has not
                rows: NDArray[Any] = file["rows"]
        except FileNotFoundError:
            return None
        except Exception as error:  # as of `_load_cache`
            log.warning("%s is damaged (%s); computing it again", path, error)
            return None
        return rows if rows.shape == (count, self._dim) else None

    def save(self, start: int, rows: NDArray[Any]) -> None:
        path = self._folder / f"{self._name}-{start}.npz"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, rows=rows)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if not self._warned:
                log.warning("cannot keep what is computed in %s (%s); if stopped, it begins again", self._folder, error)
            self._warned = True


def _probe(vectors: NDArray[Any], names: Sequence[str], recipe: Recipe, encode: Encode) -> bool:
    rows = np.unique(np.linspace(0, len(names) - 1, PROBE_LABELS).astype(int))
    fresh = label_vectors([names[i] for i in rows], recipe, encode)
    cosines = np.sum(vectors[rows].astype(np.float32) * fresh, axis=1)
    fits = bool((cosines > PROBE_COSINE).all())
    if not fits:
        log.info("the text vectors at hand belong to another model or recipe (cosine %.4f)", cosines.min())
    return fits


def _load_cache(path: Path, key: CacheKey) -> NDArray[Any] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            if any(meta.get(name) != value for name, value in _meta(key).items()):
                log.info("%s was made for another model, label file or recipe", path)
                return None
            return _checked(file["vecs"], key)
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib, numpy and tokenize each raise their own kinds on damaged bytes
        log.warning("%s is damaged (%s); computing it again", path, error)
        return None


def _load_older(path: Path, key: CacheKey) -> NDArray[Any] | None:
    """`vecs` of an older npz; its `names` are pickled objects and are never looked at."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return _checked(file["vecs"], key)
    except FileNotFoundError:
        return None
    except Exception as error:  # as above
        log.info("%s does not fit (%s)", path, error)
        return None


def _checked(vectors: NDArray[Any], key: CacheKey) -> NDArray[Any]:
    if vectors.shape != (key.count, key.dim) or vectors.dtype not in (np.float16, np.float32):
        raise ValueError(f"shape {vectors.shape}, {vectors.dtype}; expected {(key.count, key.dim)}")
    for start in range(0, len(vectors), SCORE_BLOCK):
        norms = np.linalg.norm(vectors[start : start + SCORE_BLOCK].astype(np.float32), axis=1)
        if not (np.abs(norms - 1) < 1e-2).all():
            raise ValueError("a row is not of unit length")
    return vectors


def _meta(key: CacheKey) -> dict[str, Any]:
    return {"format": CACHE_FORMAT, **vars(key)}


def _save_cache(folder: Path, key: CacheKey, vectors: NDArray[Any]) -> None:
    """The npz holds its own key, so that one rename makes the whole cache true; the JSON beside it is for people."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = json.dumps({**_meta(key), "dtype": str(vectors.dtype)}, indent=2).encode()
    path = folder / "text_vectors.npz"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    for left in folder.glob(f".{path.name}.*.tmp"):  # by a process that was killed; another may be at work
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    try:
        with temporary.open("wb") as file:
            np.savez(file, vecs=vectors, meta=np.frombuffer(meta, np.uint8))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with temporary.open("wb") as file:
            file.write(meta)
        os.replace(temporary, folder / "text_vectors.meta.json")
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


# --- scoring ----------------------------------------------------------------------------------------------------


def cosines(vectors: NDArray[Any], queries: Vectors) -> NDArray[np.float32]:
    """Of rows `[n, dim]` with queries `[b, dim]`, all of unit length: float32 `[b, n]`.

    For small sets: numpy turns float16 into float32 at a tenth of the memory's speed, and a backend does better.
    """
    found = np.empty((len(queries), len(vectors)), np.float32)
    for start in range(0, len(vectors), SCORE_BLOCK):
        block = vectors[start : start + SCORE_BLOCK].astype(np.float32, copy=False)
        np.matmul(queries, block.T, out=found[:, start : start + SCORE_BLOCK])
    return found


class LabelSet:
    """Labels with their text vectors, scored by softmax of logit scale times cosine over the whole set."""

    def __init__(
        self, names: Sequence[str], vectors: NDArray[Any], logit_scale: float, similarities: Similarities = cosines
    ) -> None:
        self.names = names
        self._vectors = vectors
        self._logit_scale = np.float32(logit_scale)
        self._similarities = similarities

    def __len__(self) -> int:
        return len(self.names)

    def probabilities(self, queries: Vectors) -> NDArray[np.float32]:
        """float32 `[b, dim]` unit rows -> float32 `[b, n]`, rows that sum to 1."""
        scores = self._similarities(self._vectors, queries)
        for row in scores:  # one at a time stays in the cache
            row *= self._logit_scale
            row -= row.max()
            np.exp(row, out=row)
            row /= row.sum()
        return scores

    def top(
        self, probabilities: NDArray[np.float32], k: int, render: Callable[[str], str] = str
    ) -> list[tuple[str, float]]:
        """The k best of one row as (label, probability), best first. A text stands once, with its best score.

        Distinct rows can read the same ("crane" is two ImageNet classes), and clients key their tables by the text.
        """
        found: dict[str, float] = {}
        candidates = k
        while True:
            candidates = min(2 * candidates + 8, len(self.names))
            best = _largest(probabilities, candidates)
            for i in best[np.lexsort((best, -probabilities[best]))]:
                found.setdefault(render(self.names[i]), min(max(float(probabilities[i]), 0.0), 1.0))
            if len(found) >= k or candidates == len(self.names):
                return list(found.items())[:k]


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The positions of the `count` largest values, and of some more; unsorted.

    Blocks have `count` different values among their maxima, so the least of the `count` largest maxima bounds the rest
    away: two passes over the values, of which the second finds hardly any.
    """
    maxima = np.maximum.reduceat(values, np.arange(0, len(values), TOP_BLOCK))
    if count >= len(maxima):
        return np.argpartition(-values, count - 1)[:count]
    return np.flatnonzero(values >= np.partition(maxima, -count)[-count])
