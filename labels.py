"""Label sets: names, prompts, scoring and top-k.

This file knows nothing of gRPC. A function that turns texts into vectors is passed in by its callers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errors import DaemonError, LabelError, SettingError
from machine import WORKER_NICE, cache_of_a_core, lower_thread_priority, usable_cores
from model_files import Encode, Say, Vectors, fetch_file
from torch_device import DeviceRow, DeviceRows

ENCODE_BATCH = 32  # prompts per forward pass
SCAN_GRAPH = Path(__file__).resolve().parent / "gen" / "scan.onnx"  # made by `scan.py` beside it
# Rows that are converted to float32 at a time, at least and at most: 0.4 to 1.6 MB at 768 dimensions.
BLOCK_ROWS = (128, 512)
SPAN_ROWS = 8192  # rows per call of the graph
SINGLY = 4  # up to so many queries, one product for each is faster than one product for all
TOP_BLOCK = 256  # values per block in the search for the largest

# OPENAI_IMAGENET_TEMPLATES and SIMPLE_IMAGENET_TEMPLATES of `open_clip/zero_shot_metadata.py`. Most exist once with "a"
# and once with "the". "a" before vowels is kept, because published accuracies were measured with it.
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


# --- names ------------------------------------------------------------------------------------------------------


def class_names(data_dir: Path, own: str, say: Say) -> list[str]:
    """What `clip_classify` chooses from: the file `own`, a JSON list of names, or else ImageNet-1k's.

    Those are in the order of the classes, each a WordNet synset ("tench, Tinca tinca"). Raises SettingError for `own`,
    and LabelError for ImageNet's.
    """
    if own:
        return read_names(Path(own), f"CLIP_LABELS={own}: allowed: a JSON list of names", _parse_list, SettingError)
    path = data_dir / "clip" / "imagenet_class_names.json"
    repo, filename = "huggingface/label-files", "imagenet-1k-id2label.json"
    if path.is_file():
        return read_names(path, f"{path}: not the file {filename} of {repo}", _parse_imagenet)
    wrong = f"the hub's {filename} of {repo} is not what it should be"
    return fetch_file(path, repo, filename, say, check=lambda staged: read_names(staged, wrong, _parse_imagenet))


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
    return _parse_list([content[str(i)] for i in range(1000)])


def read_names(
    path: Path, complaint: str, parse: Callable[[Any], list[str]], kind: type[DaemonError] = LabelError
) -> list[str]:
    """Raises an error of the kind, which begins with the complaint."""
    try:
        return parse(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"{complaint} ({str(error)[:200]})") from error


# --- prompts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a label becomes prompts; `name` is part of a cache's key."""

    name: str
    prompts: Callable[[str], list[str]]


def imagenet_recipe(templates: int) -> Recipe:
    """The first synonym of a label, in 1, 7 or 80 templates."""
    chosen = TEMPLATES[templates]
    return Recipe(f"imagenet-{templates}", lambda label: [t.format(label.split(",")[0].strip()) for t in chosen])


def names_recipe(templates: int) -> Recipe:
    """The complete label, commas included, in the same templates. For names that are not synsets."""
    return Recipe(f"names-{templates}", lambda label: [t.format(label.strip()) for t in TEMPLATES[templates]])


def label_vectors(labels: Sequence[str], recipe: Recipe, encode: Encode) -> Vectors:
    """float32 `[n, dim]`: the vectors of a label's prompts, averaged and normalized to unit length as in OpenCLIP."""
    prompts = [recipe.prompts(label) for label in labels]
    # Prompts of similar length share a forward pass, which runs at the length of the longest.
    texts = sorted((prompt for group in prompts for prompt in group), key=len)
    rows: dict[str, NDArray[np.float32]] = {}
    for start in range(0, len(texts), ENCODE_BATCH):
        part = texts[start : start + ENCODE_BATCH]
        rows.update(zip(part, encode(part), strict=True))
    means = np.stack([np.mean([rows[prompt] for prompt in group], axis=0) for group in prompts])
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), np.float32)


# --- scoring ----------------------------------------------------------------------------------------------------


class HostRow:
    """The float32 values of one query, `[n]`: cosines, probabilities, or sums of them."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def probabilities(self, logit_scale: np.float32, inside: NDArray[Any] | None = None) -> HostRow:
        """The softmax of cosines, which it may overwrite. `inside`: the only rows that count."""
        values = self._values if inside is None else self._values[inside]
        return HostRow(to_probabilities(values, logit_scale, None))

    def sums(self, starts: NDArray[Any]) -> HostRow:
        """The sums of spans, each from one of `starts` to the next. The first of them is 0."""
        return HostRow(np.add.reduceat(self._values, starts))

    def best(self, count: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """Positions and values of the `count` largest and possibly some more, best first, of equal ones the first."""
        found = largest(self._values, count)
        found = found[np.lexsort((found, -self._values[found]))]
        return found, self._values[found]

    def at(self, positions: NDArray[Any]) -> NDArray[np.float32]:
        """The values at these positions."""
        return self._values.take(positions)


Row = HostRow | DeviceRow


class Cosines:
    """Cosines of a label set's rows with queries, in float32. All cores read the float16 rows of a large set."""

    def __init__(self, vectors: NDArray[Any]) -> None:
        """`vectors`: float32 or float16 `[n, dim]`."""
        self._vectors = vectors
        self.threads: ThreadPoolExecutor | None = None
        if vectors.dtype == np.float16:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            self._scan = onnxruntime.InferenceSession(str(SCAN_GRAPH), options, ["CPUExecutionProvider"])
            self.threads = ThreadPoolExecutor(usable_cores(), "scan", lambda: lower_thread_priority(WORKER_NICE))
            self._rows = rows_of_a_block(vectors.shape[1], cache_of_a_core())

    def scoring(self) -> AbstractContextManager[None]:
        """A context for `rows` and for the use of what it returns."""
        return nullcontext()

    def rows(self, queries: Vectors) -> list[HostRow]:
        """float32 `[b, dim]` unit rows -> a row of cosines for each."""
        return [HostRow(row) for row in self(queries)]

    def __call__(self, queries: Vectors) -> NDArray[np.float32]:
        """float32 `[b, dim]` unit rows -> float32 `[b, n]`."""
        if self.threads is None:
            return np.asarray(queries @ self._vectors.T, np.float32)
        count = len(self._vectors)
        columns = queries[:, :, None] if len(queries) <= SINGLY else np.ascontiguousarray(queries.T)[None]
        found = np.empty((len(queries), count), np.float32)

        def scan(span: slice, rows: int) -> None:
            blocks = self._vectors[span].reshape(-1, rows, self._vectors.shape[1])
            [part] = self._scan.run(None, {"blocks": blocks, "queries": columns})
            found[:, span] = part.reshape(len(queries), -1)

        whole = count - count % self._rows
        spans = [(slice(at, min(at + SPAN_ROWS, whole)), self._rows) for at in range(0, whole, SPAN_ROWS)]
        if whole < count:
            spans.append((slice(whole, count), count - whole))
        list(self.threads.map(scan, *zip(*spans, strict=True)))
        return found


def rows_of_a_block(dim: int, cache: int) -> int:
    """How many float32 rows, a power of two, fill at most half of a cache of `cache` bytes; within BLOCK_ROWS.

    Larger blocks are faster as long as they fit into the cache: 1.6 times for one query and 1.35 times for eight, on
    cores with 16 MB each.
    """
    rows = max(1, cache // 2 // (4 * dim))
    return min(max(1 << rows.bit_length() - 1, BLOCK_ROWS[0]), BLOCK_ROWS[1])


class LabelSet:
    """Labels with their text vectors. Scores are the softmax of logit scale x cosine over the whole set."""

    def __init__(
        self, names: Sequence[str], vectors: NDArray[Any], logit_scale: float, held: DeviceRows | None = None
    ) -> None:
        """`held`: the vectors on a GPU, which then computes the scores."""
        self.names = names
        self._held = held
        self._cosines = held or Cosines(vectors)
        self._logit_scale = np.float32(logit_scale)

    def __len__(self) -> int:
        return len(self.names)

    def probabilities(self, queries: Vectors, biases: Sequence[float | None] = ()) -> NDArray[np.float32]:
        """float32 `[b, dim]` unit rows -> float32 `[b, n]`.

        A row sums to 1. With a bias in `biases`, the logit bias of the model, its values are independent of each other.
        """
        scores = self._cosines(queries)
        for row, bias in zip(scores, biases or [None] * len(scores), strict=True):  # a single row stays in the cache
            to_probabilities(row, self._logit_scale, bias)
        return scores

    def answers(self, queries: Vectors, options: Sequence[tuple[int, float | None]]) -> list[list[tuple[str, float]]]:
        """float32 `[b, dim]` unit rows and a (k, bias) for each -> its k best labels; see `probabilities` and `top`."""
        if not self._held:
            rows = self.probabilities(queries, [bias for _, bias in options])
            return [self.top(row, k) for row, (k, _) in zip(rows, options, strict=True)]
        with self._held.scoring():
            return [
                top(row.probabilities(self._logit_scale, bias=bias), k, self.names.__getitem__)
                for row, (k, bias) in zip(self._held.rows(queries), options, strict=True)
            ]

    def top(self, probabilities: NDArray[np.float32], k: int) -> list[tuple[str, float]]:
        """The k best of one row as (label, probability), best first; see `top`."""
        return top(HostRow(probabilities), k, self.names.__getitem__)


def to_probabilities(cosines: NDArray[np.float32], logit_scale: np.float32, bias: float | None) -> NDArray[np.float32]:
    """Softmax of logit scale x cosine, float32 `[n]`, in place.

    With a bias: sigmoid of logit scale x cosine + bias. SigLIP is trained with these probabilities.
    """
    if bias is None:
        cosines *= logit_scale
        cosines -= cosines.max()
        np.exp(cosines, out=cosines)
        cosines /= cosines.sum()
    else:
        cosines *= -logit_scale
        cosines -= np.float32(bias)
        with np.errstate(over="ignore"):  # to infinity, whose reciprocal is 0
            np.exp(cosines, out=cosines)
        cosines += 1
        np.reciprocal(cosines, out=cosines)
    return cosines


def top(probabilities: Row, k: int, label_of: Callable[[int], str]) -> list[tuple[str, float]]:
    """The k best of a row as (label, probability), best first. Each text appears once, with its best score.

    Different rows can have the same text ("crane" is two ImageNet classes), and clients use the text as a key.
    """
    found: dict[str, float] = {}
    candidates = k
    while True:
        candidates = min(2 * candidates + 8, len(probabilities))
        positions, values = probabilities.best(candidates)
        scores = values.clip(0, 1).tolist()  # sums in float32 may be slightly above 1
        for position, score in zip(positions.tolist(), scores, strict=True):
            found.setdefault(label_of(position), score)
            if len(found) == k:
                return list(found.items())
        if candidates == len(probabilities):
            return list(found.items())


def largest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The positions of the `count` largest values and possibly some more, unsorted.

    The `count` largest maxima of blocks are `count` different values. So every value that is below the smallest of them
    can be ignored. This takes two passes over the values instead of a partial sort.
    """
    maxima = np.maximum.reduceat(values, np.arange(0, len(values), TOP_BLOCK))
    if count >= len(maxima):
        return (-values).argpartition(count - 1)[:count]
    return np.flatnonzero(values >= np.partition(maxima, -count)[-count])


if __name__ == "__main__":
    raise SystemExit("labels.py: the commands build, info and verify are those of tree_of_life.py now")
