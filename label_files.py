"""The operator's label sets, `labels/NAME.txt` and `NAME.json`, and the scenes between which `smart_classify` chooses.

Until the vectors of a new or changed file are computed, or if it is invalid, the previous version of its set is used.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import label_cache
from errors import LabelError, SettingError
from label_cache import CacheKey
from labels import LabelSet, Recipe
from model_files import Backend, Encode, Vectors

log = logging.getLogger("lumen.label_files")

SETS_MAX = 64
ROWS_MAX = 20_000  # vectors of a set, 2 to 3 KB each: one for a label, or one for each prompt of a label
PROMPTS_MAX = 200_000  # texts of a set, templates counted: an hour's work for two cores
FILE_BYTES_MAX = 4 << 20
TEXT_MAX = 1000  # characters of a label, a prompt or a template
LIST_MAX = 100  # prompts of a label or of `none`; templates
NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
KEYS = ("labels", "none", "templates", "threshold")
SCENES_MAX = 256
SURROGATE = re.compile(r"[\ud800-\udfff]")  # half of a character: JSON allows it, and UTF-8 does not
NONE = ""  # stands for "none of these"; a label cannot be empty

# The text of a row is the JSON list of its prompts, so the key of a cache changes with each prompt.
PROMPTS = Recipe("prompts", json.loads)


# --- labels and their prompts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """The labels of a set. Each has a name and one or more rows of prompts.

    The prompts of a row describe one thing in several ways, so their vectors are averaged. The rows of a name describe
    several things under one name, so their probabilities are added: "flower" may have the rows "a photo of a tulip" and
    "a photo of a rose".
    """

    names: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], ...], ...]  # the rows of each name, in the order of `names`
    threshold: float = 0.0  # labels with a lower score are left out, unless the request has its own limit

    def texts(self) -> list[str]:
        """One text for each row, in order, in the form that PROMPTS reads."""
        return [json.dumps(row) for rows in self.rows for row in rows]


class ChoiceSet(LabelSet):
    """Choices with the vectors of their rows, scored by softmax over all rows."""

    def __init__(self, choices: Choices, vectors: NDArray[Any], logit_scale: float) -> None:
        super().__init__(choices.names, vectors, logit_scale)
        self._starts = np.cumsum([0, *map(len, choices.rows)])[:-1]

    def probabilities(self, queries: Vectors, biases: Sequence[float | None] = ()) -> NDArray[np.float32]:
        """float32 `[b, dim]` unit rows -> float32 `[b, names]`.

        A row sums to 1. With a bias, a name's value is that of its best row instead; see `LabelSet.probabilities`.
        """
        rows = super().probabilities(queries, biases)
        found = np.add.reduceat(rows, self._starts, axis=1)
        for at, bias in enumerate(biases):
            if bias is not None:
                found[at] = np.maximum.reduceat(rows[at], self._starts)
        return found


# --- files ------------------------------------------------------------------------------------------------------


def read_set(path: Path, templates: Sequence[str]) -> Choices:
    """Reads a label set. With `none` prompts, its last name is NONE. Raises LabelError, whose text contains no path.

    `templates`: for labels without prompts, if the file has no templates.
    """
    text = _text_of(path)
    if path.suffix != ".txt":
        return _checked(parse_json(text), templates)
    lines = [line.strip() for line in text.splitlines()]
    return _checked({"labels": [line for line in lines if line and not line.startswith("#")]}, templates)


def _text_of(path: Path) -> str:
    """The content of a file. Raises LabelError, as `read_set` does."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise LabelError(f"over {FILE_BYTES_MAX >> 20} MB")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LabelError("it is not UTF-8") from None
    except OSError as error:
        raise LabelError(error.strerror or str(error)) from None


def parse_json(text: str) -> Any:
    """Parses JSON. Raises LabelError, also if a key appears twice. Python's parser would silently drop one of them."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise LabelError(f"{key[:80]!r} appears twice")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"it is not JSON ({str(error)[:100]})") from None


def _checked(content: Any, templates: Sequence[str]) -> Choices:
    if not isinstance(content, dict) or "labels" not in content or not content.keys() <= set(KEYS):
        odd = sorted(content.keys() - set(KEYS)) if isinstance(content, dict) else []
        text = f"{odd[0][:80]!r} is not a key; " if odd else ""
        raise LabelError(f"{text}allowed: an object with labels, and optionally {', '.join(KEYS[1:])}")
    if "templates" in content:
        templates = texts_in(content["templates"], "templates", LIST_MAX)
        if bad := next((template for template in templates if template.count("{}") != 1), None):
            raise LabelError(f"templates: {bad[:80]!r} needs exactly one {{}} in it")
    threshold = content.get("threshold", 0.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise LabelError(f"threshold: {str(threshold)[:80]}; allowed: a number from 0 to 1")
    given = content["labels"]
    names = texts_in(list(given) if isinstance(given, dict) else given, "labels", ROWS_MAX)
    rows = [[tuple(template.replace("{}", name) for template in templates)] for name in names]
    if isinstance(given, dict):
        if len(names) < len(given):
            raise LabelError("labels: one of them appears twice")
        for at, (name, prompts) in enumerate(zip(names, given.values(), strict=True)):
            if prompts != []:
                rows[at] = [(prompt,) for prompt in texts_in(prompts, f"labels: {name[:80]!r}", LIST_MAX)]
    if "none" in content:
        names = (*names, NONE)
        rows.append([(prompt,) for prompt in texts_in(content["none"], "none", LIST_MAX)])
    all_rows = [row for rows_of_name in rows for row in rows_of_name]
    if len(all_rows) > ROWS_MAX:
        raise LabelError(f"it has {len(all_rows)} labels and prompts; allowed: {ROWS_MAX}")
    if (count := sum(map(len, all_rows))) > PROMPTS_MAX:
        raise LabelError(f"it has {count} texts; allowed: {PROMPTS_MAX}")
    return Choices(names, tuple(map(tuple, rows)), float(threshold))


def texts_in(content: Any, key: str, most: int) -> tuple[str, ...]:
    """Checks a list of texts and returns it without duplicates. Raises LabelError, which names `key`."""
    if not isinstance(content, list) or not 1 <= len(content) <= most:
        raise LabelError(f"{key}: allowed: 1 to {most} texts")
    for item in content:
        if not isinstance(item, str) or not item.strip() or len(item) > TEXT_MAX or SURROGATE.search(item):
            raise LabelError(f"{key}: {str(item)[:80]!r} is not a text of 1 to {TEXT_MAX} characters")
    return tuple(dict.fromkeys(item.strip() for item in content))


# --- the folder -------------------------------------------------------------------------------------------------


class OperatorSet(ChoiceSet):
    """A label set of the operator."""

    def __init__(self, name: str, choices: Choices, vectors: NDArray[Any], logit_scale: float) -> None:
        super().__init__(choices, vectors, logit_scale)
        self.name, self.threshold = name, choices.threshold
        self.content = hash(choices)  # takes less memory than the texts
        self.size = len(self.names) - (self.names[-1] == NONE)

    def answer(
        self, query: NDArray[np.float32], k: int, min_score: float, bias: float | None = None
    ) -> tuple[list[tuple[str, float]], float]:
        """(the k best labels with at least `min_score` and a better score than NONE, the score of NONE).

        `bias`: see `LabelSet.probabilities`.
        """
        row = self.probabilities(query[None], [bias])[0]
        best = self.top(row, k + 1)
        found = itertools.takewhile(lambda pair: pair[0] != NONE and pair[1] >= min_score, best)
        return list(found)[:k], float(row[-1]) if self.names[-1] == NONE else 0.0


class _Reloaded(Exception):
    """Interrupts the computation of a set whose file has changed, so that all files are read again."""


@dataclass(frozen=True)
class State:
    """The state of one name: the set that is used, if any, and a note about its file."""

    current: OperatorSet | None = None
    note: str = ""


class OperatorSets:
    """The sets that a folder's files make: read at the start, and again when `reload` is called."""

    def __init__(self, folder: Path, cache: Path, backend: Backend, templates: Sequence[str]) -> None:
        """`cache`: the folder that keeps the vectors of the backend's model."""
        self._folder, self._cache, self._backend, self._templates = folder, cache, backend, templates
        self._states: Mapping[str, State] = {}  # replaced and never changed, so requests read it without a lock
        self._reload = threading.Event()

    def get(self, name: str) -> OperatorSet:
        """Raises LabelError, for the client."""
        states = self._states
        if name not in states:
            ready = sorted(name for name, state in states.items() if state.current)
            allowed = ", ".join(ready) or "none so far; make a file labels/NAME.txt or NAME.json, and reload the daemon"
            raise LabelError(f"{name[:80]!r} is unknown; allowed: {allowed}")
        state = states[name]
        if state.current is None:
            raise LabelError(f"{name!r} cannot be used: {state.note}")
        return state.current

    def facts(self) -> dict[str, str]:
        """For the capability."""
        states = sorted(self._states.items())
        facts = {"clip_label_sets": ",".join(name for name, state in states if state.current)}
        for name, state in states:
            count = [f"{state.current.size} label{'s' * (state.current.size != 1)}"] if state.current else []
            facts[f"clip_label_set.{name}"] = "; ".join(count + [state.note] * bool(state.note))
        return facts

    def start(self, encode: Encode) -> None:
        """Reads the files on a thread of its own, now and after each `reload`, and computes what is missing."""

        def run() -> None:
            while True:
                self._reload.clear()
                try:
                    self.read(encode)
                except Exception:
                    log.exception("reading the label sets failed")
                self._reload.wait()

        threading.Thread(target=run, name="label sets", daemon=True).start()

    def reload(self) -> None:
        """Makes the thread read the files again. A set in progress is completed first, unless its file has changed."""
        self._reload.set()

    def read(self, encode: Encode, compute: bool = True) -> None:
        """Reads the files and updates the sets. If `compute` is false, only sets with cached vectors are updated.

        If the new file of a set is invalid, the set does not change.
        """
        try:
            files = self._files()
        except OSError as error:
            log.warning("the label sets' folder cannot be read (%s); they stay as they are", error)
            return
        for name in sorted(self._states.keys() - files.keys()):
            log.info("label set %s is gone", name)
        self._states = {name: state for name, state in self._states.items() if name in files}
        # Existing sets come first, so a new file cannot displace one of them.
        for at, name in enumerate(sorted(files, key=lambda name: (name not in self._states, name))):
            try:
                if at >= SETS_MAX:
                    raise LabelError(f"there are {SETS_MAX} label sets already, as many as are allowed")
                if made := self._made(name, files[name], encode, compute):
                    self._states = {**self._states, name: State(made)}
            except _Reloaded:
                return
            except LabelError as error:
                self._reject(name, str(error))
            except Exception:
                log.exception("label set %s", name)
                self._reject(name, "its text vectors cannot be computed; the daemon's log says more")

    def _files(self) -> dict[str, list[Path]]:
        """Name -> its files, of which there should be one. Raises OSError."""
        found: dict[str, list[Path]] = {}
        try:
            paths = sorted(self._folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            paths = []
        for path in paths:
            if path.suffix not in (".txt", ".json") or path.name.startswith(".") or not path.is_file():
                continue
            if NAME.fullmatch(path.stem):
                found.setdefault(path.stem, []).append(path)
            else:
                log.warning("label set %r: its name is not allowed: letters, digits, - and _, at most 64", path.name)
        return found

    def _made(self, name: str, paths: list[Path], encode: Encode, compute: bool) -> OperatorSet | None:
        """The set that a file makes, or None if its vectors are not computed. Raises LabelError and _Reloaded."""
        if len(paths) > 1:
            raise LabelError(f"{name}.json and {name}.txt are both there; allowed: one of them")
        begun = _signature(paths[0])

        def progress(done: int, total: int) -> None:
            if self._reload.is_set() and _signature(paths[0]) != begun:
                raise _Reloaded
            self._note(name, f"its text vectors are being computed: {done} of {total}")

        choices = read_set(paths[0], self._templates)
        current = self._current(name)
        if current and current.content == hash(choices):
            return current
        texts, cache = choices.texts(), self._cache / name
        key = CacheKey.of(texts, PROMPTS, self._backend.model_id, self._backend.dim)
        found = label_cache.load_or_none(cache / label_cache.FILE, key.meta())
        if not found or not label_cache.fits(found.vecs, texts, PROMPTS, encode):
            self._note(name, "its text vectors are being computed")
            if not compute:
                return None
            found = label_cache.cached_vectors(cache, texts, PROMPTS, encode, key, progress=progress)
        made = OperatorSet(name, choices, found.vecs, self._backend.logit_scale)
        log.info("label set %s: %d labels", name, made.size)
        return made

    def _current(self, name: str) -> OperatorSet | None:
        return self._states.get(name, State()).current

    def _note(self, name: str, note: str) -> None:
        self._states = {**self._states, name: State(self._current(name), note)}

    def _reject(self, name: str, reason: str) -> None:
        stays = self._current(name) is not None
        log.warning("label set %s: %s%s", name, reason, "; the previous version is used" if stays else "")
        self._note(name, f"its file is not used: {reason}" if stays else reason)


def _signature(path: Path) -> tuple[int, int] | None:
    """Changes when the file is changed or replaced. None if it cannot be found."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


# --- scenes -----------------------------------------------------------------------------------------------------

# The first six names are those of upstream Lumen. Old clients compare them as strings. The prompts are worded like the
# captions of CLIP's training data. docs/species-and-labels.md says how they were chosen and what they improve.
SCENES: dict[str, Any] = {
    "a photo of an animal": {"prompts": ["a photo of an animal", "a photo of a wild animal"], "species": True},
    "a photo of a bird": {"species": True},
    "a photo of an insect": {"prompts": ["a photo of an insect", "a photo of a bug"], "species": True},
    "a photo of a human-made object": {
        "prompts": ["a photo of a human-made object", "a close-up photo of a human-made object", "a photo of a tool"]
    },
    "a photo of a landscape": {},
    "an abstract painting": {},
    "a photo of a plant": {
        "prompts": ["a photo of a plant", "a photo of a flower", "a photo of a tree"],
        "species": True,
    },
    "a photo of a mushroom": {"species": True},
    "a photo of a person": {},
    "a photo of food": {},
    "a photo of a document": {"prompts": ["a photo of a page of text"]},
    "a photo of a room": {"prompts": ["a photo of the interior of a room"]},
}


@dataclass(frozen=True)
class Scenes:
    """A table that has been read."""

    choices: Choices
    species: frozenset[str]  # the names that go to BioCLIP


class SceneSet(ChoiceSet):
    """Scenes with their vectors."""

    def __init__(self, scenes: Scenes, vectors: Any, logit_scale: float) -> None:
        super().__init__(scenes.choices, vectors, logit_scale)
        self._species = scenes.species

    def resolve(self, ranked: list[tuple[str, float]]) -> tuple[str, float] | None:
        """The scene of a picture, or None if it goes to BioCLIP. `ranked`: all scenes with their scores, best first.

        It goes to BioCLIP if the scenes of BioCLIP have more than half of the probability together, even if another
        scene is the most likely one.
        """
        rest = [(name, score) for name, score in ranked if name not in self._species]
        return rest[0] if sum(score for _, score in rest) >= 0.5 else None


def read_scenes(own: str) -> Scenes:
    """The table in the file `own`, or SCENES. Raises SettingError."""
    try:
        return parse_scenes(parse_json(_text_of(Path(own))) if own else SCENES)
    except LabelError as error:
        raise SettingError(f"LUMEN_SCENES={own}: {error}") from None


def parse_scenes(content: Any) -> Scenes:
    """Raises LabelError."""
    if not isinstance(content, dict) or not 2 <= len(content) <= SCENES_MAX:
        raise LabelError(f"allowed: an object with 2 to {SCENES_MAX} scenes")
    rows, species = [], set()
    for name, scene in content.items():
        texts_in([name], "a scene's name", 1)
        if not isinstance(scene, dict) or not scene.keys() <= {"prompts", "species"}:
            raise LabelError(f"{name[:80]!r}: allowed: an object with prompts and species, if wanted")
        goes = scene.get("species", False)
        if not isinstance(goes, bool):
            raise LabelError(f"{name[:80]!r}: species: {str(goes)[:80]}; allowed: true, false")
        if goes:
            species.add(name)
        prompts = texts_in(scene.get("prompts", [name]), f"{name[:80]!r}: prompts", LIST_MAX)
        rows.append(tuple((prompt,) for prompt in prompts))
    return Scenes(Choices(tuple(content), tuple(rows)), frozenset(species))
