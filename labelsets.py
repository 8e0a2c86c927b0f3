"""Label sets of one's own: the files `labels/NAME.txt` and `NAME.json`, read, watched, encoded and scored.

A file that is new or changed becomes a set on a thread of its own, whose prompts are encoded among everybody's work.
Until then, and when the file is not what it should be, the set of before answers. What requests look at is replaced as
a whole, so they need no lock.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vectorfile
from labels import Encode, LabelError, LabelSet, Recipe, Vectors

log = logging.getLogger("lumen.labelsets")

LOOK_S = 2.0  # between two looks at the folder
SETS_MAX = 64
ROWS_MAX = 20_000  # of a set: labels, or prompts where a label has its own; 2 to 3 KB each
PROMPTS_MAX = 200_000  # of a set, templates counted: an hour's work for two cores
FILE_BYTES_MAX = 4 << 20
TEXT_MAX = 1000  # characters of a label, a prompt or a template
LIST_MAX = 100  # prompts of a label or of `none`, and templates
NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
KEYS = ("labels", "none", "templates", "threshold")
NONE = ""  # the name of "none of these", which no label has

PROMPTS = Recipe("prompts", json.loads)  # a row's text is the JSON of its prompts, so a cache's key tells all of them


# --- labels and their prompts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """What there is to choose from: names, of which each has one or more rows of prompts.

    The vectors of a row's prompts are averaged: one thing in several wordings. The probabilities of a name's rows are
    added: several things under one name.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], ...], ...]  # of each name

    def texts(self) -> list[str]:
        """Of all rows in order, for PROMPTS."""
        return [json.dumps(row) for rows in self.rows for row in rows]


class ChoiceSet(LabelSet):
    """Choices with the vectors of their rows, scored by softmax over all rows."""

    def __init__(self, choices: Choices, vectors: NDArray[Any], logit_scale: float) -> None:
        super().__init__(choices.names, vectors, logit_scale)
        self._starts = np.cumsum([0, *map(len, choices.rows)])[:-1]

    def probabilities(self, queries: Vectors) -> NDArray[np.float32]:
        """float32 `[b, dim]` unit rows -> float32 `[b, names]`, rows that sum to 1."""
        return np.add.reduceat(super().probabilities(queries), self._starts, axis=1)


@dataclass(frozen=True)
class Maker:
    """Makes vectors of prompts, for one model, and keeps them under `folder`."""

    folder: Path
    model_id: str
    dim: int
    logit_scale: float

    def at_hand(self, name: str, choices: Choices, encode: Encode) -> NDArray[Any] | None:
        """float32 `[rows, dim]` from the cache `name`, if it fits."""
        texts, key = self._key(choices)
        found = vectorfile.load_or_none(self.folder / name / vectorfile.FILE, key.meta())
        return found.vecs if found and vectorfile.fits(found.vecs, texts, PROMPTS, encode) else None

    def vectors(self, name: str, choices: Choices, encode: Encode, progress: vectorfile.Progress) -> NDArray[Any]:
        """float32 `[rows, dim]`, from the cache `name` or computed and kept there."""
        texts, key = self._key(choices)
        return vectorfile.cached_vectors(self.folder / name, texts, PROMPTS, encode, key, progress=progress).vecs

    def _key(self, choices: Choices) -> tuple[list[str], vectorfile.CacheKey]:
        texts = choices.texts()
        return texts, vectorfile.CacheKey.of(texts, PROMPTS, self.model_id, self.dim)


# --- files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetFile:
    """What a file says. With `none` prompts the last name is NONE."""

    choices: Choices
    threshold: float


def read_set(path: Path, templates: Sequence[str]) -> SetFile:
    """`templates` make the prompts of labels that have none, unless the file brings its own.

    Raises LabelError, whose text names neither the file nor its folder.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise LabelError(f"over {FILE_BYTES_MAX >> 20} MB")
        text = data.decode("utf-8-sig")
        content = {"labels": lines_of(text)} if path.suffix == ".txt" else parse_json(text)
    except UnicodeDecodeError:
        raise LabelError("it is not UTF-8") from None
    except OSError as error:
        raise LabelError(error.strerror or str(error)) from None
    return _checked(content, templates)


def lines_of(text: str) -> list[str]:
    """One label a line; blank lines and those that begin with # count for nothing."""
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def parse_json(text: str) -> Any:
    """Raises LabelError; also when a key stands twice, of which Python would drop one without a word."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise LabelError(f"{twice[:80]!r} stands twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"it is not JSON ({str(error)[:100]})") from None


def _checked(content: Any, templates: Sequence[str]) -> SetFile:
    if not isinstance(content, dict) or "labels" not in content or not content.keys() <= set(KEYS):
        raise LabelError(f"allowed: an object with labels, and with {', '.join(KEYS[1:])} if wanted")
    if "templates" in content:
        templates = texts_in(content["templates"], "templates", LIST_MAX)
        if bad := next((template for template in templates if template.count("{}") != 1), None):
            raise LabelError(f"templates: {bad[:80]!r} does not have one {{}} in it")
    threshold = content.get("threshold", 0.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise LabelError(f"threshold: {str(threshold)[:80]}; allowed: a number from 0 to 1")
    own = content["labels"]
    names = texts_in(list(own) if isinstance(own, dict) else own, "labels", ROWS_MAX)
    rows = [[tuple(template.replace("{}", name) for template in templates)] for name in names]
    if isinstance(own, dict):
        if len(names) < len(own):
            raise LabelError("labels: one of them stands twice")
        for at, (name, prompts) in enumerate(zip(names, own.values(), strict=True)):
            if prompts != []:
                rows[at] = [(prompt,) for prompt in texts_in(prompts, f"labels: {name[:80]!r}", LIST_MAX)]
    if "none" in content:
        names = (*names, NONE)
        rows.append([(prompt,) for prompt in texts_in(content["none"], "none", LIST_MAX)])
    choices = Choices(names, tuple(map(tuple, rows)))
    check_size(choices)
    return SetFile(choices, float(threshold))


def texts_in(content: Any, key: str, most: int) -> tuple[str, ...]:
    """A list of texts, each once. Raises LabelError, which names `key`."""
    if not isinstance(content, list) or not 1 <= len(content) <= most:
        raise LabelError(f"{key}: allowed: 1 to {most} texts")
    for item in content:
        if not isinstance(item, str) or not item.strip() or len(item) > TEXT_MAX or not _is_text(item):
            raise LabelError(f"{key}: {str(item)[:80]!r} is not a text of 1 to {TEXT_MAX} characters")
    return tuple(dict.fromkeys(item.strip() for item in content))


def _is_text(item: str) -> bool:
    """A lone surrogate is JSON, but no text."""
    try:
        return bool(item.encode())
    except UnicodeEncodeError:
        return False


def check_size(choices: Choices) -> None:
    """Raises LabelError."""
    rows = [row for rows in choices.rows for row in rows]
    for count, what, most in ((len(rows), "labels and prompts", ROWS_MAX), (sum(map(len, rows)), "texts", PROMPTS_MAX)):
        if count > most:
            raise LabelError(f"it makes {count} {what} to compare with; allowed: {most}")


# --- the folder -------------------------------------------------------------------------------------------------


class OwnSet(ChoiceSet):
    """A label set of the operator's own."""

    def __init__(self, name: str, file: SetFile, vectors: NDArray[Any], logit_scale: float) -> None:
        super().__init__(file.choices, vectors, logit_scale)
        self.name, self.threshold = name, file.threshold
        self.size = len(self.names) - (self.names[-1] == NONE)

    def answer(self, query: NDArray[np.float32], k: int, min_score: float) -> tuple[list[tuple[str, float]], float]:
        """(the k best labels that have `min_score` and are likelier than none of these, what that has)."""
        row = self.probabilities(query[None])[0]
        best = self.top(row, min(k + 1, len(self)))
        found = itertools.takewhile(lambda pair: pair[0] != NONE and pair[1] >= min_score, best)
        return list(found)[:k], float(row[-1]) if self.names[-1] == NONE else 0.0


class Changed(Exception):
    """A file changed while its vectors were computed."""


@dataclass(frozen=True)
class State:
    """Of one name: the set that answers, if any, and what there is to be said of its file."""

    own: OwnSet | None = None
    note: str = ""


class OwnSets:
    """The sets that a folder's files make."""

    def __init__(self, folder: Path, maker: Maker, templates: Sequence[str]) -> None:
        self._folder, self._maker, self._templates = folder, maker, templates
        self._states: Mapping[str, State] = {}  # replaced, never changed
        self._seen: dict[str, Any] | None = None  # what the last look saw of each name's files
        self._read: dict[str, Any] = {}  # and of those that were read
        self._refused: set[str] = set()  # files whose names are no set's
        self._said = ""  # of the folder

    def get(self, name: str) -> OwnSet:
        """Raises LabelError, for the client."""
        states = self._states
        if name not in states:
            ready = sorted(name for name, state in states.items() if state.own)
            allowed = ", ".join(ready) or "none so far; a file labels/NAME.txt or NAME.json makes one"
            raise LabelError(f"{name[:80]!r} is unknown; allowed: {allowed}")
        state = states[name]
        if state.own is None:
            raise LabelError(f"{name!r} is not ready: {state.note}")
        return state.own

    def facts(self) -> dict[str, str]:
        """For the capability."""
        states = sorted(self._states.items())
        facts = {"clip_label_sets": ",".join(name for name, state in states if state.own)}
        for name, state in states:
            count = [f"{state.own.size} label{'s' * (state.own.size != 1)}"] if state.own else []
            facts[f"clip_label_set.{name}"] = "; ".join(count + [state.note] * bool(state.note))
        return facts

    def watch(self, encode: Encode) -> None:
        """Looks at the folder from now on, on a thread of its own."""
        threading.Thread(target=self._watch, args=(encode,), name="label sets", daemon=True).start()

    def _watch(self, encode: Encode) -> None:
        while True:
            time.sleep(LOOK_S)
            try:
                self.look(encode)
            except Exception:
                log.exception("looking at the label sets failed")

    def look(self, encode: Encode, compute: bool = True) -> None:
        """Takes up what is new, and lets go of what is gone. Without `compute` only sets whose vectors are at hand.

        Both take two looks that see the same, for an editor may be writing; what the first look of all sees is read.
        """
        try:
            files = self._files()
        except OSError as error:
            if self._said != str(error):
                self._said = str(error)
                log.warning("the label sets' folder cannot be read (%s); they stay as they are", error)
            return
        self._said = ""
        seen = {name: _signature(paths) for name, paths in files.items()}
        for name in sorted(self._states.keys() - files.keys() - (self._seen or {}).keys()):
            self._states = {other: state for other, state in self._states.items() if other != name}
            self._read.pop(name, None)
            log.info("label set %s is gone", name)
        # A name that is there already keeps its place.
        for at, name in enumerate(sorted(files, key=lambda name: (name not in self._states, name))):
            rests = self._seen is None or self._seen.get(name) == seen[name]
            if not rests or self._read.get(name) == seen[name]:
                continue
            if at >= SETS_MAX:
                self._trouble(name, f"there are {SETS_MAX} label sets already, as many as are allowed")
            elif self._take_up(name, files[name], encode, compute):
                self._read[name] = seen[name]
        self._seen = seen

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
            elif path.name not in self._refused:
                self._refused.add(path.name)
                log.warning("label set %r: its name is not allowed: letters, digits, - and _, at most 64", path.name)
        return found

    def _take_up(self, name: str, paths: list[Path], encode: Encode, compute: bool) -> bool:
        """-> whether this is settled, for better or worse."""
        begun = _signature(paths)

        def progress(done: int, total: int) -> None:
            if _signature(paths) != begun:
                raise Changed
            self._say(name, f"its text vectors are being computed: {done} of {total}")

        try:
            if len(paths) > 1:
                raise LabelError(f"{name}.json and {name}.txt are both there; allowed: one of them")
            file = read_set(paths[0], self._templates)
            vectors = self._maker.at_hand(name, file.choices, encode)
            if vectors is None:
                self._say(name, "its text vectors are being computed")
                if not compute:
                    return False
                vectors = self._maker.vectors(name, file.choices, encode, progress)
        except Changed:
            return False
        except LabelError as error:
            self._trouble(name, str(error))
        except Exception:
            log.exception("label set %s", name)
            self._trouble(name, "its text vectors cannot be computed; the daemon's log says more")
        else:
            own = OwnSet(name, file, vectors, self._maker.logit_scale)
            self._states = {**self._states, name: State(own)}
            log.info("label set %s: %d labels", name, own.size)
        return True

    def _say(self, name: str, note: str) -> None:
        own = self._states[name].own if name in self._states else None
        self._states = {**self._states, name: State(own, note)}

    def _trouble(self, name: str, reason: str) -> None:
        stays = name in self._states and self._states[name].own is not None
        note = f"not as its file says: {reason}" if stays else reason
        if name not in self._states or self._states[name].note != note:
            log.warning("label set %s: %s%s", name, reason, "; the set of before stays" if stays else "")
        self._say(name, note)


def _signature(paths: Sequence[Path]) -> Any:
    """Changes with the files' content."""
    found = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # gone since the folder was read
            continue
        found.append((path.name, status.st_mtime_ns, status.st_ctime_ns, status.st_size))
    return found
