"""Species: lineages, their ranks, `within`, and scores summed by rank.

A lineage is a text of eight slots, `kingdom/phylum/class/order/family/genus/epithet/common name`, with `*` for a blank.
Lineages are sorted, so the rows of each taxon are contiguous. A rank is therefore a list of first rows, and its scores
are sums between them.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from label_cache import TextVectors
from labels import Cosines, Recipe, Row, top
from model_files import Vectors
from torch_device import DeviceRows

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "species")
LABEL_FORMATS = ("lineage", "scientific", "common")
SPECIES = len(RANKS) - 1
AFTER_SLASH = "0"  # the next character after "/"


def lineage(index: int, row: Any) -> str:
    """The text of a row `[[kingdom, ..., epithet], common name]`. Raises ValueError."""
    match row:
        case [[*ranks], str(common)] if len(ranks) == len(RANKS) and all(isinstance(rank, str) for rank in ranks):
            # A slash inside a name would shift the slots for clients that split the label.
            return "/".join(" ".join(slot.replace("/", "-").split()) or "*" for slot in (*ranks, common))
    raise ValueError(f"row {index} is not [[kingdom, ..., species], common name]")


def render(lineage: str, label_format: str, rank: int = SPECIES) -> str:
    """The text of a lineage down to a rank, in one of LABEL_FORMATS."""
    slots = lineage.split("/")
    if rank < SPECIES:
        slots[rank + 1 :] = ["*"] * (len(RANKS) - rank)
    if label_format == "lineage":
        return "/".join(slots)
    *ranks, common = slots
    if label_format == "common" and common != "*":
        return common
    known = [slot for slot in ranks if slot != "*"]
    binomial = [slot for slot in ranks[-2:] if slot != "*"] if rank == SPECIES else []
    return " ".join(binomial or known[-1:]) or "unknown"


def depths(lineages: Iterable[str]) -> NDArray[np.uint8]:
    """For sorted lineages: the first rank in which each differs from the previous one, or 7. Raises ValueError."""
    found, last, before = [], "", [""] * len(RANKS)
    for text in lineages:
        if text < last:
            raise ValueError("the lineages are not in order")
        slots = text.split("/")[: len(RANKS)]
        found.append(next((i for i, (a, b) in enumerate(zip(slots, before, strict=True)) if a != b), len(RANKS)))
        last, before = text, slots
    return np.array(found, np.uint8)


def species_prompts(lineage: str) -> list[str]:
    """The prompt of a lineage: BioCLIP's training caption of the form `taxon_com`, the ranks and the common name."""
    *ranks, common = lineage.split("/")
    taxon = " ".join(rank for rank in ranks if rank != "*")
    return [f"a photo of {taxon}." if common == "*" else f"a photo of {taxon} with common name {common}."]


RECIPE = Recipe("bioclip-taxon-com", species_prompts)


Resolved = tuple[NDArray[np.int64], tuple[str, ...]]  # sorted rows, read-only; unknown names


class _Memo:
    """A cache of resolved lists of names: the most recently used ones, limited in count and bytes. Thread-safe."""

    LISTS_MAX = 64
    BYTES_MAX = 32 << 20  # of names and rows together; a list of 10,000 names takes about 1 MB

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, ...], tuple[Resolved, int]] = OrderedDict()  # with its bytes
        self._lock = threading.Lock()
        self.bytes = 0

    def get(self, names: tuple[str, ...]) -> Resolved | None:
        with self._lock:
            if names not in self._kept:
                return None
            self._kept.move_to_end(names)
            return self._kept[names][0]

    def put(self, names: tuple[str, ...], resolved: Resolved) -> None:
        """Keeps a new result if it fits into BYTES_MAX, and drops the least recently used ones that no longer fit."""
        size = sys.getsizeof(names) + sum(map(sys.getsizeof, names)) + resolved[0].nbytes
        if size > self.BYTES_MAX:
            return
        with self._lock:
            self._kept[names] = resolved, size
            self.bytes += size
            while len(self._kept) > self.LISTS_MAX or self.bytes > self.BYTES_MAX:
                self.bytes -= self._kept.popitem(last=False)[1][1]


class Tree:
    """Finds the rows of taxa in sorted lineages."""

    def __init__(self, names: Sequence[str], depth: NDArray[np.uint8]) -> None:
        """`depth`: see `depths`."""
        self._names, self._depth = names, depth
        self._resolved = _Memo()
        # Only one thread resolves, so that concurrent requests with the same new list resolve it once.
        self._resolving = threading.Lock()
        self._starts: dict[int, NDArray[np.intp]] = {}

    def starts(self, rank: int) -> NDArray[np.intp]:
        """The first row of each taxon of a rank."""
        if rank not in self._starts:
            self._starts[rank] = np.flatnonzero(self._depth <= rank)
        return self._starts[rank]

    def within(self, taxa: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
        """The rows of any of the taxa, sorted int64, and the names that are no taxon of this set. Thread-safe.

        A taxon is a lineage from the kingdom down ("Animalia/Chordata/Aves"), a label of eight slots as in responses,
        the name of a genus or a higher rank ("Aves"), or a binomial ("Vulpes vulpes"). Case matters in lineages only.

        Results are cached, because clients send the same long list with every picture. The rows are therefore shared
        between callers and read-only.
        """
        key = tuple(taxa)
        found = self._resolved.get(key)
        if found is None:
            with self._resolving:
                found = self._resolved.get(key)  # another thread may have resolved it meanwhile
                if found is None:
                    found = self._resolve(key)
                    self._resolved.put(key, found)
        rows, unknown = found
        return rows, list(unknown)

    def _resolve(self, taxa: Sequence[str]) -> Resolved:
        spans: set[tuple[int, int]] = set()
        unknown = []
        for name in taxa:
            found = self._spans(name.strip())
            spans.update(found)
            if not found:
                unknown.append(name)
        inside = np.zeros(len(self._names), bool)
        for start, end in spans:  # which may overlap
            inside[start:end] = True
        rows = np.flatnonzero(inside)
        rows.setflags(write=False)
        return rows, tuple(unknown)

    def _spans(self, name: str) -> list[tuple[int, int]]:
        if "/" in name:
            *ranks, common = name.split("/")
            whole = len(ranks) == len(RANKS) and common != "*"  # a label as in responses: only this species
            return self._under("/".join(ranks) if whole else name.rstrip("/*"), 0, len(self._names))
        if found := self._named(name):
            return [(first, self._end(rank, first)) for rank, first in found]
        genus, _, epithet = name.partition(" ")
        spans = []
        for rank, first in self._named(genus) if epithet else ():
            if rank == RANKS.index("genus"):
                parent = "/".join(self._names[first].split("/")[: rank + 1])
                # A genus has few species, so this search is much shorter than one in the whole set.
                spans += self._under(f"{parent}/{epithet.strip()}", first, self._end(rank, first))
        return spans

    def _under(self, prefix: str, low: int, high: int) -> list[tuple[int, int]]:
        """The rows below a lineage, searched from row `low` to row `high`."""
        first = bisect_left(self._names, prefix + "/", low, high)
        end = bisect_left(self._names, prefix + AFTER_SLASH, first, high)
        return [(first, end)] if first < end else []

    def _end(self, rank: int, first: int) -> int:
        starts = self.starts(rank)
        following = int(np.searchsorted(starts, first, "right"))
        return int(starts[following]) if following < len(starts) else len(self._names)

    def _named(self, name: str) -> list[tuple[int, int]]:
        """(rank, first row) of the taxa with that name, from kingdom to genus. There are several for homonyms."""
        hashes, places = self._index
        folded = name.casefold()
        at, end = (int(np.searchsorted(hashes, hash(folded), side)) for side in ("left", "right"))
        found = [(int(rank), int(first)) for rank, first in places[at:end]]
        return [(rank, first) for rank, first in found if self._names[first].split("/")[rank].casefold() == folded]

    @cached_property
    def _index(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hashes of names in order, and `[n, 2]`: rank, first row. A dictionary would take four times the memory."""
        hashes: list[int] = []
        places: list[tuple[int, int]] = []
        for first in self.starts(RANKS.index("genus")):
            slots = self._names[first].split("/")
            for rank in range(int(self._depth[first]), SPECIES):
                if slots[rank] != "*":
                    hashes.append(hash(slots[rank].casefold()))
                    places.append((rank, int(first)))
        order = np.argsort(np.array(hashes, np.int64), kind="stable")
        return np.array(hashes, np.int64)[order], np.array(places, np.int64).reshape(-1, 2)[order]


@dataclass(frozen=True)
class SpeciesOptions:
    """The options of one request."""

    k: int
    label_format: str = "lineage"
    rank: str = "species"  # one of RANKS, or "auto": the deepest rank in which one taxon has `min_score`
    min_score: float = 0.0
    within: NDArray[np.int64] | None = None  # sorted rows, the only ones that count; None: all


@dataclass(frozen=True)
class Found:
    labels: list[tuple[str, float]]  # best first
    rank: str


class Species:
    """Species with their text vectors. Scores are the softmax of logit scale x cosine over all rows that count."""

    def __init__(self, vectors: TextVectors, logit_scale: float, held: DeviceRows | None = None) -> None:
        """`vectors`: of sorted lineages. `held`: the same on a GPU, which then computes the scores."""
        self.names, self.tree = vectors.names, Tree(vectors.names, vectors.depth)
        self._cosines, self._logit_scale = held or Cosines(vectors.vecs), np.float32(logit_scale)
        self._twins = int((vectors.depth > SPECIES).sum())  # rows of species that have another row

    def __len__(self) -> int:
        return len(self.names)

    def answers(self, queries: Vectors, options: Sequence[SpeciesOptions]) -> list[Found]:
        """float32 `[b, dim]` unit rows and their options -> one result each."""
        threads = self._cosines.threads
        with self._cosines.scoring():
            return list((threads.map if threads else map)(self._answer, self._cosines.rows(queries), options))

    def _answer(self, row: Row, options: SpeciesOptions) -> Found:
        probabilities = row.probabilities(self._logit_scale, options.within)
        if options.rank == "auto":
            for rank in range(SPECIES, -1, -1):
                found = self._taxa(probabilities, rank, options)
                if found and found[0][1] >= options.min_score:
                    return Found(found, RANKS[rank])
            return Found([], "none")
        if options.rank == "species" and not self._twins:
            found = top(probabilities, options.k, lambda at: render(self._name(at, options), options.label_format))
        else:
            found = self._taxa(probabilities, RANKS.index(options.rank), options)
        return Found([(label, p) for label, p in found if p >= options.min_score], options.rank)

    def _name(self, at: int, options: SpeciesOptions) -> str:
        return self.names[at if options.within is None else int(options.within[at])]

    def _taxa(self, probabilities: Row, rank: int, options: SpeciesOptions) -> list[tuple[str, float]]:
        """The k best taxa of a rank: sums over the rows that share the path down to this rank, as in pybioclip."""
        starts = self.tree.starts(rank)
        if options.within is not None:
            taxon = np.searchsorted(starts, options.within, "right")
            starts = np.flatnonzero(np.diff(taxon, prepend=0))

        def label_of(taxon: int) -> str:
            row = int(starts[taxon])
            if rank == SPECIES:  # rows of one species differ in their common names: the most probable one
                end = starts[taxon + 1] if taxon + 1 < len(starts) else len(probabilities)
                if end - row > 1:
                    row += int(probabilities.at(np.arange(row, end)).argmax())
            name = self._name(row, options)
            if options.rank == "auto" and name.split("/")[rank] == "*":
                return ""  # a blank has no name
            return render(name, options.label_format, rank)

        found = top(probabilities.sums(starts), options.k + 1, label_of)
        return [(label, p) for label, p in found if label][: options.k]
