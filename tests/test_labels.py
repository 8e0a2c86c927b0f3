"""Label sets, the tree of life, and the files of their vectors."""

from __future__ import annotations

import concurrent.futures
import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty

import backends
import errors
import label_cache
import labels
import machine
import model_files
import species
import torch_device
import tree_of_life
from gen import ml_service_pb2 as pb
from settings import ModelOptions
from tests.hub import FakeHub
from tests.kit import (
    IMAGENET,
    RED,
    ROOT,
    SPECIES,
    Node,
    Texts,
    encoded,
    load,
    picture,
    wait_until,
    write_labels,
)


def test_templates_are_openclips_own() -> None:
    """Lost otherwise: scores that can be compared with published ones."""
    import open_clip

    assert {t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES} == set(labels.TEMPLATES[80])
    assert [t("{}") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES] == list(labels.TEMPLATES[7])
    assert len(labels.TEMPLATES[80]) == 80


def test_label_vectors_equal_openclips_classifier(reference: Any, tiny: Path, tmp_path: Path) -> None:
    """Lost otherwise: the accuracy that averaged templates bring."""
    import open_clip

    backend = backends.create_backend(ModelOptions("CLIP", "torch", str(tiny), tmp_path))
    names = ["tench", "great white shark", "toilet tissue, toilet paper"]
    ours = labels.label_vectors(
        names, labels.imagenet_recipe(7), lambda texts: backend.encode_text(backend.tokenize(texts))
    )
    expected = open_clip.build_zero_shot_classifier(
        reference[0], reference[2], ["tench", "great white shark", "toilet tissue"], open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    assert np.allclose(ours, expected.numpy().T, atol=1e-5)


def test_species_prompts_are_bioclips_captions() -> None:
    """Lost otherwise: species accuracy; BioCLIP never saw an article or a Python list in training."""
    fox, fish, rose = (species.species_prompts(species.lineage(0, row)) for row in SPECIES[:3])
    assert fox == ["a photo of Animalia Chordata Mammalia Carnivora Canidae Vulpes vulpes with common name red fox."]
    assert fish == [
        "a photo of Animalia Chordata Cypriniformes Cyprinidae Carassius auratus with common name Goldfish."
    ]
    assert rose == ["a photo of Plantae Tracheo-phyta Magnoliopsida Rosales Rosaceae Rosa canina."]


@pytest.mark.parametrize("held", [False, True], ids=["CPU", "device"])
def test_top_k_equals_a_full_sort_and_names_no_text_twice(
    device: torch_device.Device, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the right answer, or the app's insert, which wants each label once."""
    rng = np.random.default_rng(0)
    vectors = model_files.unit_rows(rng.normal(size=(5000, 16)))
    names = [f"label {i // 2}" for i in range(5000)]
    rows = vectors.astype(np.float16)
    labelset = labels.LabelSet(names, rows, 20.0, device.hold(rows) if held else None)
    for query, row in zip(vectors[:20], labelset.probabilities(vectors[:20]), strict=True):
        assert row.sum() == pytest.approx(1, abs=1e-4)
        expected: dict[str, float] = {}
        for i in np.argsort(-row, kind="stable"):
            expected.setdefault(names[i], float(row[i]))
        for k, block in itertools.product((1, 7, 100, 2500), (16, 256)):
            monkeypatch.setattr(labels, "TOP_BLOCK", block)
            assert labelset.top(row, k) == list(expected.items())[:k]
            [found] = labelset.answers(query[None], [(k, None)])
            # Alone, a query is multiplied in another order, so that nearly equal scores may change places.
            assert len(dict(found)) == k and [p for _, p in found] == sorted((p for _, p in found), reverse=True)
            assert [p for _, p in found] == pytest.approx(list(expected.values())[:k], abs=1e-5)
            assert [p for _, p in found] == pytest.approx([expected[name] for name, _ in found], abs=1e-5)
    same = labels.LabelSet(["same"] * 100, vectors[:100], 1.0, device.hold(vectors[:100]) if held else None)
    assert len(same.answers(vectors[:1], [(5, None)])[0]) == 1


def test_a_device_scores_with_a_bias_as_the_cpu_does(device: torch_device.Device) -> None:
    """Lost otherwise: the probabilities of SigLIP, which do not depend on each other."""
    rng = np.random.default_rng(1)
    vectors, names = model_files.unit_rows(rng.normal(size=(3000, 16))), [f"label {i}" for i in range(3000)]
    options: list[tuple[int, float | None]] = [(5, -20.0), (3, None), (5000, -22.5)]
    expected = labels.LabelSet(names, vectors, 20.0).answers(vectors[:3], options)
    found = labels.LabelSet(names, vectors, 20.0, device.hold(vectors)).answers(vectors[:3], options)
    for here, there in zip(expected, found, strict=True):
        assert dict(there) == pytest.approx(dict(here), abs=1e-6) and there[0][0] == here[0][0]


def test_what_float16_changes(device: torch_device.Device) -> None:
    """Lost otherwise: the scores, if a device rounded its products as it stores its rows."""
    rng, scale = np.random.default_rng(0), 100
    rows = model_files.unit_rows(rng.normal(size=(20_000, 768)))
    queries = model_files.unit_rows(0.35 * rows[:200] + 0.9 * model_files.unit_rows(rng.normal(size=(200, 768))))
    stored = rows.astype(np.float16)
    exact, expected = queries @ rows.T, queries @ stored.astype(np.float32).T
    held = device.hold(stored)
    assert held is not None
    found = held(queries)
    of_rows, of_products = np.abs(exact - found).max(), np.abs(found - found.astype(np.float16)).max()
    print(f"\nlogits change: {scale * of_rows:.4f} with float16 rows, {scale * of_products:.4f} with float16 products")
    assert np.abs(found - expected).max() < 1e-6 and scale * of_rows < 0.01 and of_products > 2 * of_rows


def test_rows_that_take_more_than_a_tenth_of_a_cards_memory_stay_on_the_cpu(
    device: torch_device.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the memory of the batches, for which the card is there."""
    rows = np.ones((100, 16), np.float16)
    for free, held in ((10 * rows.nbytes, True), (10 * rows.nbytes - 1, False)):
        monkeypatch.setattr(torch_device.Device, "free_memory", lambda _, free=free: free)
        assert (device.hold(rows) is not None) == held
    monkeypatch.undo()
    assert torch_device.Device("cpu").hold(rows) is None  # no GPU


def test_lists_of_positions_on_a_device_are_kept_but_do_not_pile_up(device: torch_device.Device) -> None:
    """Lost otherwise: 7 MB that are sent to the card with each picture, or its memory, list by list."""
    held = device.hold(np.ones((100, 16), np.float32))
    assert held is not None
    lists = [np.arange(i, 50) for i in range(40)]
    first = held.positions(lists[0])
    for positions in lists:
        assert held.positions(positions).tolist() == positions.tolist()
        assert held.positions(lists[0]) is first
    assert len(held._positions) <= torch_device.POSITIONS_KEPT


class TreeOfLife:
    """A tree of twelve thousand species whose vectors are alike within a genus, and float32 brute force on them."""

    SCALE = 100.0

    def __init__(self, folder: Path, device: torch_device.Device | None = None) -> None:
        """`device`: holds the vectors and computes the scores."""
        rng = np.random.default_rng(4)
        count, dim = 12_000, 96
        rows = []
        for i in range(count):
            genus, family, order = i // 6, i // 60, i // 600
            ranks = [
                "Animalia" if i < 9000 else "Plantae",
                f"P{order // 5}",
                f"C{order // 2}",
                f"O{order}",
                f"F{family}",
            ]
            if i % 97 == 0:
                ranks[2] = ""  # as in thousands of fish
            epithet = f"e{i % 6}" if i % 1000 else "e1"  # twelve species stand twice
            rows.append([[*ranks, f"G{genus}", epithet], f"name {i}" if i % 3 else ""])
        self.names = sorted(species.lineage(i, row) for i, row in enumerate(rows))
        tops = rng.normal(size=(count // 6, dim)) + 0.7 * rng.normal(size=dim)
        self.rows = model_files.unit_rows(np.repeat(tops, 6, axis=0) + 0.7 * rng.normal(size=(count, dim)))
        self.rows[:, 7] += 2  # as CLIP has: one dimension that is larger than the rest
        self.rows = model_files.unit_rows(self.rows)
        key = label_cache.CacheKey("model", "recipe", "sha", count, dim)
        blocks = [self.rows[start : start + 5000] for start in range(0, count, 5000)]
        label_cache.save(folder, key, blocks, self.names, species.depths(self.names))
        self.path = folder / label_cache.FILE
        self.stored = label_cache.load(self.path, key.meta())
        assert self.stored and self.stored.names
        held = device.hold(self.stored.vecs) if device else None
        assert (held is None) == (device is None)
        self.species = species.Species(self.stored, self.SCALE, held)

    def queries(self, count: int) -> Any:
        rng = np.random.default_rng(5)
        near = self.rows[rng.integers(0, len(self.rows), count)]
        return model_files.unit_rows(near + rng.uniform(0.02, 0.25, (count, 1)) * rng.normal(size=near.shape))

    def brute_force(self, queries: Any) -> tuple[Any, Any]:
        """Cosines and probabilities in float32 of the rows that are stored."""
        assert self.stored
        cosines = queries @ self.stored.vecs.astype(np.float32).T
        weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) * np.float32(self.SCALE))
        return cosines, weights / weights.sum(axis=1, keepdims=True)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch_device.Device:
    """torch's CPU in the place of a GPU, which takes the rows in several blocks."""
    monkeypatch.setattr(torch_device, "GPUS", ("cpu",))
    monkeypatch.setattr(torch_device, "BLOCK_ROWS", 1000)
    return torch_device.Device("cpu")


@pytest.fixture(params=["scanned", "small", "scanned on a device", "small on a device"])
def stored_tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TreeOfLife:
    scanned = request.param.startswith("scanned")
    if scanned:  # as of 100,000 species on
        monkeypatch.setattr(label_cache, "HALF_PRECISION_BYTES", 1 << 20)
        monkeypatch.setattr(labels, "SPAN_ROWS", 1024)
        monkeypatch.setattr(labels, "cache_of_a_core", lambda: 0)
    tree = TreeOfLife(tmp_path, request.getfixturevalue("device") if "device" in request.param else None)
    assert tree.stored and tree.stored.vecs.dtype == (np.float16 if scanned else np.float32)
    return tree


def test_a_large_set_is_answered_as_by_brute_force_in_float32(
    stored_tree: TreeOfLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the right species, for speed. 400 queries; blocks, spans and what is left over make one set."""
    known = stored_tree.species
    monkeypatch.setattr(known, "_twins", 0)  # row by row
    queries, worst = stored_tree.queries(400), 0.0
    for part in np.array_split(queries, np.cumsum([8, 1, 4, 5, 2] * 20)[:-1]):  # few are multiplied one by one
        cosines, probabilities = stored_tree.brute_force(part)
        for k, found, row, p in zip(
            (1, 5, 100) * 3,
            known.answers(part, [species.SpeciesOptions(k) for k in (1, 5, 100, 1, 5, 100, 1, 5)]),
            cosines,
            probabilities,
            strict=False,
        ):
            expected: dict[str, int] = {}
            for i in np.argsort(-row, kind="stable")[: k + 10]:
                expected.setdefault(stored_tree.names[i], i)
            assert len(found.labels) == k
            for (label, score), (name, at) in zip(found.labels, expected.items(), strict=False):
                # float32 adds up in no fixed order: what it cannot tell apart may stand either way round.
                assert label == name or abs(row[expected[label]] - row[at]) < 1e-6
                worst = max(worst, abs(score - float(p[at])))
    assert worst < 1e-4, worst


def test_rows_are_scanned_in_blocks_that_a_core_can_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: two fifths of the speed where caches are large, or more where they are small; never an answer."""
    big, part, small = tmp_path / "big", tmp_path / "part", tmp_path / "small"
    for caches, kinds in (
        (big, [("32K", "1"), ("1024K", "00000000,00000001"), ("32768K", "3")]),  # AMD EPYC, two cores of it
        (part, [("48K", "3"), ("2048K", "3"), ("24576K", "ffff")]),  # 1.5 MB each
        (small, [("32K", "1"), ("128K", "1"), ("3072K", "ff")]),  # RK3588
    ):
        for number, (size, cores) in enumerate(kinds):
            (caches / f"index{number}").mkdir(parents=True)
            (caches / f"index{number}" / "size").write_text(size + "\n")
            (caches / f"index{number}" / "shared_cpu_map").write_text(cores + "\n")
    (small / "index3").mkdir()  # says nothing
    found = [machine.cache_of_a_core(caches) for caches in (big, part, small, tmp_path / "none")]
    assert found == [16 << 20, 1536 << 10, 384 << 10, 0]

    def denied(*_: Any) -> Any:
        raise PermissionError

    with monkeypatch.context() as hardened:  # /sys is closed to us
        hardened.setattr(Path, "glob", denied)
        assert machine.cache_of_a_core(big) == 0
    assert [labels.rows_of_a_block(768, cache) for cache in found] == [512, 256, 128, 128]
    rng = np.random.default_rng(3)
    rows, queries = rng.normal(size=(2000, 32)).astype(np.float16), rng.normal(size=(3, 32)).astype(np.float32)
    for cache in found:
        monkeypatch.setattr(labels, "cache_of_a_core", lambda cache=cache: cache)
        scanned = labels.Cosines(rows)
        assert scanned(queries) == pytest.approx(queries @ rows.T.astype(np.float32), abs=1e-4)


def test_ranks_are_summed_as_pybioclip_does(stored_tree: TreeOfLife) -> None:
    """Lost otherwise: "some finch" where no single finch is certain, and agreement with BioCLIP's own library."""
    from bioclip.predict import Rank, TreeOfLifeClassifier
    from torch import from_numpy

    pybioclip = TreeOfLifeClassifier.__new__(TreeOfLifeClassifier)
    rows = [name.replace("*", "").split("/") for name in stored_tree.names]
    vars(pybioclip).update(txt_names=[[slots[:7], slots[7]] for slots in rows], _subset_txt_names=None)
    queries = stored_tree.queries(4)
    _, probabilities = stored_tree.brute_force(queries)
    for rank in species.RANKS[:-1]:
        options = [species.SpeciesOptions(5, rank=rank)] * len(queries)
        for found, p in zip(stored_tree.species.answers(queries, options), probabilities, strict=True):
            theirs = pybioclip.format_grouped_probs("picture", from_numpy(p), Rank[rank.upper()], k=5)
            assert [score for _, score in found.labels] == pytest.approx([row["score"] for row in theirs], abs=1e-3)
            known = {}
            for row in theirs:
                slots = [row[name] or "*" for name in species.RANKS[: species.RANKS.index(rank) + 1]]
                known["/".join(slots + ["*"] * (8 - len(slots)))] = row["score"]
            for label, score in found.labels:  # the fifth and the sixth may be as likely as each other
                assert score == pytest.approx(known.get(label, min(known.values())), abs=1e-3)
    for found, p in zip(
        stored_tree.species.answers(queries, [species.SpeciesOptions(3)] * 4), probabilities, strict=True
    ):
        theirs = pybioclip.format_species_probs("picture", from_numpy(p), k=3)
        assert found.labels[0][1] >= theirs[0]["score"] - 1e-3  # ours adds up rows of one species


def test_the_deepest_rank_that_is_certain_enough_is_answered(stored_tree: TreeOfLife) -> None:
    """Lost otherwise: a wrong species where the right genus was known."""
    queries = stored_tree.queries(60)
    certain = [species.SpeciesOptions(3, rank="auto", min_score=0.35)] * len(queries)
    found = stored_tree.species.answers(queries, certain)
    assert len({answer.rank for answer in found}) > 2
    for query, answer in zip(queries, found, strict=True):
        assert answer.labels[0][1] >= 0.35 and len(answer.labels) > 1  # with runners-up
        for deeper in species.RANKS[species.RANKS.index(answer.rank) + 1 :]:
            [best] = stored_tree.species.answers(query[None], [species.SpeciesOptions(1, rank=deeper)])
            assert best.labels[0][1] < 0.351 or best.labels[0][0].split("/")[species.RANKS.index(deeper)] == "*"
    assert (
        stored_tree.species.answers(queries[:1], [species.SpeciesOptions(3, rank="auto", min_score=1.0)])[0].rank
        != "species"
    )


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (("Plantae",), lambda slots: slots[0] == "Plantae"),
        (("animalia",), lambda slots: slots[0] == "Animalia"),
        (("Animalia/P0/C1",), lambda slots: slots[:3] == ["Animalia", "P0", "C1"]),
        (("G700", "F3", "g35", "f3"), lambda slots: slots[5] in ("G700", "G35") or slots[4] == "F3"),
        (("Animalia/P0/C1/*/*/*/*/*",), lambda slots: slots[:3] == ["Animalia", "P0", "C1"]),
        (("G700 e3", "G701 e9", "G7"), lambda slots: slots[5:7] == ["G700", "e3"] or slots[5] == "G7"),
    ],
)
def test_a_taxon_or_a_list_of_names_is_all_that_is_chosen_from(
    stored_tree: TreeOfLife, names: tuple[str, ...], rows: Callable[[list[str]], bool]
) -> None:
    """Lost otherwise: a garden in Europe is offered kangaroos. As if the other species were not in the set at all."""
    inside, unknown = stored_tree.species.tree.within(names)
    assert unknown == [name for name in names if name == "G701 e9"]
    assert inside.tolist() == [i for i, name in enumerate(stored_tree.names) if rows(name.split("/"))]
    queries = stored_tree.queries(16)
    cosines, _ = stored_tree.brute_force(queries)
    for rank in ("species", "family", "auto"):
        found = stored_tree.species.answers(queries, [species.SpeciesOptions(3, rank=rank, within=inside)] * 16)
        for answer, row in zip(found, cosines[:, inside], strict=True):
            assert all(rows(label.split("/")) or rank != "species" for label, _ in answer.labels)
            if rank == "species" and len(answer.labels) == 3:
                weights = np.exp((row - row.max()) * 100)
                assert answer.labels[0][1] == pytest.approx(weights.max() / weights.sum(), abs=1e-3) or answer.labels[
                    0
                ][1] > (weights.max() / weights.sum())


def test_a_long_list_of_names_is_resolved_once(stored_tree: TreeOfLife) -> None:
    """Lost otherwise: seconds of the interpreter for each picture of an import with a list of 10,000 names."""
    tree = species.Tree(stored_tree.stored.names, stored_tree.stored.depth)  # type: ignore[union-attr]
    tree.within(["Animalia"])  # makes the index of names, which is made once
    names = [" ".join(name.split("/")[5:7]) for name in stored_tree.names[:9000]] + [f"none {i}" for i in range(1000)]

    def resolved(names: list[str]) -> tuple[Any, list[str], float]:
        began = time.thread_time()
        rows, unknown = tree.within(["".join(name) for name in names])  # each request brings strings of its own
        return rows, unknown, time.thread_time() - began

    rows, unknown, first = resolved(names)
    others = [resolved(names) for _ in range(5)]  # the fastest counts: other programs use the machine as well
    assert min(seconds for *_, seconds in others) < first / 20
    for again, still_unknown, _ in others:
        assert np.array_equal(again, rows) and still_unknown == unknown == names[9000:]
    assert others[0][0] is others[1][0] and not rows.flags.writeable  # shared between requests
    others[0][1].clear()  # what a caller does to its list of unknown names stays with the caller
    assert resolved(names)[1] == unknown


def test_lists_of_names_are_not_confused_and_do_not_pile_up(
    stored_tree: TreeOfLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the species of another client's garden, or the memory of a board, list by list."""
    tree = species.Tree(stored_tree.stored.names, stored_tree.stored.depth)  # type: ignore[union-attr]
    lists = [[f"G{i}", f"F{i % 7}"] for i in range(200)] + [["G1 e1"], ["G1", "e1"], ["G1", " e1"]]
    fresh = [species.Tree(tree._names, tree._depth).within(names) for names in lists[-3:]]
    for _ in range(2):
        for names in lists[:-3]:
            rows, _ = tree.within(names)
            genus, family = names
            assert all(f"/{genus}/" in name or f"/{family}/" in name for name in map(tree._names.__getitem__, rows))
        for names, (rows, unknown) in zip(lists[-3:], fresh, strict=True):
            again = tree.within(names)
            assert np.array_equal(again[0], rows) and again[1] == unknown
    assert len(tree._resolved._kept) <= tree._resolved.LISTS_MAX
    monkeypatch.setattr(species._Memo, "BYTES_MAX", 200_000)
    for kingdom in ("Animalia", "Plantae", "animalia", "plantae", "PLANTAE"):  # 72 or 24 kB of rows each
        tree.within([kingdom])
        assert tree._resolved.bytes <= 200_000
    kept = [rows.nbytes for (rows, _), _ in tree._resolved._kept.values()]
    assert kept and sum(kept) < tree._resolved.bytes
    other = species.Tree(sorted(["A/B/C/D/E/G1/x/*", "A/B/C/D/E/G2/x/*"]), np.array([0, 5], np.uint8))
    assert other.within(["G2"])[0].tolist() == [1]  # another set has a memo of its own


def test_threads_that_bring_one_list_get_one_result(stored_tree: TreeOfLife) -> None:
    """Lost otherwise: the same second of work in each decode thread at once, or a wrong row among them."""
    tree = species.Tree(stored_tree.stored.names, stored_tree.stored.depth)  # type: ignore[union-attr]
    names = [f"G{i}" for i in range(500)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: tree.within(names if i % 2 else names[:250])[0], range(64)))
    assert len({id(rows) for rows in found[1::2]}) == 1 == len({id(rows) for rows in found[::2]})
    assert len(found[1]) == 3000 and len(found[0]) == 1500


def test_a_large_set_stays_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: gigabytes of a small board's memory, and the seconds of reading them at every start."""
    monkeypatch.setattr(label_cache, "HALF_PRECISION_BYTES", 1 << 20)
    tree = TreeOfLife(tmp_path)
    assert tree.stored
    rows = tree.stored.vecs
    assert isinstance(rows, np.memmap) and rows.offset % 64 == 0 and rows.ctypes.data % 64 == 0
    with np.load(tree.path, allow_pickle=False) as plain:  # and is an npz like any other
        assert np.array_equal(plain["vecs"], rows)
    note = tmp_path / "text_vectors.checked.json"
    assert note.exists()
    whole = tree.path.read_bytes()
    for at in (len(whole) // 3, len(whole) // 2, len(whole) * 4 // 5):
        garbled = bytearray(whole)
        garbled[at] ^= 1
        tree.path.write_bytes(garbled)
        with pytest.raises(errors.DamagedCache):
            label_cache.load(tree.path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", None])
def test_a_damaged_checksum_note_does_not_make_a_good_file_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """Lost otherwise: days of computed vectors, after a power cut that emptied the small note beside them."""
    monkeypatch.setattr(label_cache, "HALF_PRECISION_BYTES", 1 << 20)
    tree = TreeOfLife(tmp_path)
    note = tmp_path / label_cache.NOTE
    good = note.read_bytes()
    note.unlink()
    if content is None:
        note.mkdir()  # cannot be read or replaced
    else:
        note.write_bytes(content)
    found = label_cache.load(tree.path)
    assert found and np.array_equal(found.vecs, tree.stored.vecs)  # type: ignore[union-attr]
    assert content is None or note.read_bytes() == good  # the checksums have been compared again
    whole = bytearray(tree.path.read_bytes())
    whole[len(whole) // 2] ^= 1
    tree.path.write_bytes(whole)
    if content is not None:
        note.write_bytes(content)
    with pytest.raises(errors.DamagedCache):  # such a note does not hide a damaged file either
        label_cache.load(tree.path)


def test_the_note_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: a note that a power cut or a full disk leaves empty."""
    monkeypatch.setattr(label_cache, "HALF_PRECISION_BYTES", 1 << 20)
    tree = TreeOfLife(tmp_path)
    note = tmp_path / label_cache.NOTE
    before = note.read_bytes()
    os.utime(tree.path)  # so that the note is out of date

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert label_cache.load(tree.path)
    assert note.read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    assert label_cache.load(tree.path) and note.read_bytes() != before


MANY = [  # more than are computed before the daemon is ready
    [["Animalia", "Chordata", "Aves", "Passeriformes", f"Family{i // 30}", f"Genus{i // 5}", f"e{i % 5}"], f"bird {i}"]
    for i in range(2100)
]


def species_of(tiny_onnx: Path, data: Path, source: Any = "", **more: Any) -> Node:
    write_labels(data)
    model = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_MODEL": tiny_onnx}
    return Node(data, **model, BIOCLIP_LABELS=source, **more)


def bioclip_labels(node: Node) -> str:
    return str(node.stub.GetCapabilities(Empty()).extra["bioclip_labels"])


def test_species_come_while_the_rest_is_served_and_a_kill_costs_little(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: everything, for the days that a board computes the tree of life; and then all of it again."""
    (tmp_path / "many.json").write_text(json.dumps(MANY))
    photo = encoded(picture(RED))

    def start() -> Node:
        return species_of(tiny_onnx, tmp_path / "data", tmp_path / "many.json").ready()

    node = start()
    try:
        said = bioclip_labels(node)
        answer = node.ask("bioclip_classify", photo)
        if "species" not in said:  # a fast machine may have them by now
            assert ("many.json: " in said and " of 2,100 labels" in said) or "beginning" in said
            assert (
                answer.error.code == pb.ERROR_CODE_UNAVAILABLE
                and "species are not available yet: " in answer.error.message
            )
            assert "bioclip_classify" not in {task.name for task in node.stub.GetCapabilities(Empty()).tasks}
        assert node.result("clip_classify", photo)["labels"] and node.result("bioclip_embed", b"a bird")["vector"]
        wait_until(
            lambda: bool(list((tmp_path / "data").rglob(".building/*.npz"))) or bioclip_labels(node) == "2,100 species"
        )
        node.process.kill()
        node.process.wait()
        node = start()
        wait_until(lambda: bioclip_labels(node) == "2,100 species")
        assert node.result("bioclip_classify", photo)["labels"][0]["label"].startswith("Animalia/Chordata/Aves/")
        assert "bioclip_classify" in {task.name for task in node.stub.GetCapabilities(Empty()).tasks}
    finally:
        node.stop()
    (tmp_path / "many.json").write_text(
        "[" + json.dumps(MANY)[1:]
    )  # the same bytes: nothing is computed or parsed again
    node = start()
    assert bioclip_labels(node) == "2,100 species" and "computing the text vectors of 2100" not in node.log
    node.stop()


def test_a_tree_that_is_made_on_a_pc_is_copied_to_the_board(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: the one way to the tree of life that does not take a board days."""
    (tmp_path / "many.json").write_text(json.dumps(MANY))
    made = tmp_path / "made"

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tree_of_life.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    model = ("--model", tiny_onnx, "--backend", "onnxrt")
    built = run("build", "--labels", tmp_path / "many.json", *model, "--to", made)
    assert built.returncode == 0 and "2,100 species" in built.stdout, built.stderr
    assert {path.name for path in made.iterdir()} == {"text_vectors.npz", "text_vectors.meta.json"}
    told = run("info", made).stdout
    assert "model_id: tiny" in told and "70 family, 420 genus, 2,100 species" in told
    assert run("verify", made).returncode == 0
    node = species_of(tiny_onnx, tmp_path / "data", made).ready()
    assert bioclip_labels(node) == "2,100 species"
    assert node.result("bioclip_classify", encoded(picture(RED)))["labels"]
    node.stop()
    whole = bytearray((made / "text_vectors.npz").read_bytes())
    whole[len(whole) // 2] ^= 1
    (made / "text_vectors.npz").write_bytes(whole)
    for wrong in (
        run("verify", made),
        run("info", tmp_path),
        run("build", "--labels", "nowhere", *model, "--to", made),
    ):
        assert wrong.returncode == 1 and len(wrong.stderr.splitlines()) == 1 and "Traceback" not in wrong.stderr
    node = species_of(tiny_onnx, tmp_path / "data", made)
    assert node.ended() == 2 and f"BIOCLIP_LABELS={made}: text_vectors.npz cannot be used" in node.log


def published_tree(folder: Path, tiny_onnx: Path, count: int = 2100) -> tuple[dict[str, bytes], Any]:
    """What the hub has of TreeOfLife-200M, in small: vectors by dimension, some all zero, in no order."""
    rng = np.random.default_rng(0)
    rows = [MANY[i] for i in rng.permutation(count)]
    backend = load(tiny_onnx)
    texts = [species.species_prompts(species.lineage(0, row))[0] for row in rows]
    vectors = np.concatenate([backend.encode_text(backend.tokenize(texts[i : i + 50])) for i in range(0, count, 50)])
    vectors[::50] = 0
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(vectors.T))
    names = {"embeddings/txt_emb_bioclip-2.json": json.dumps(rows).encode()}
    return names | {"embeddings/txt_emb_bioclip-2.npy": file.getvalue()}, vectors


def test_published_vectors_are_put_into_rows_while_they_stream_in(
    tmp_path: Path, hub: FakeHub, tiny_onnx: Path
) -> None:
    """Lost otherwise: 867,455 species, on any device that cannot hold 2.66 GB twice; or ferns that beat every bird."""
    hub.repos["datasets/imageomics/TreeOfLife-200M"], vectors = published_tree(tmp_path, tiny_onnx)
    hub.cut_after["embeddings/txt_emb_bioclip-2.npy"] = 5000  # and the connection breaks once
    node = species_of(tiny_onnx, tmp_path / "data", "TreeOfLife-200M", HF_ENDPOINT=hub.url).ready()
    try:
        wait_until(lambda: bioclip_labels(node) == "2,058 species")
        names = {
            species.lineage(0, row): vector
            for row, vector in zip(
                json.loads(hub.repos["datasets/imageomics/TreeOfLife-200M"]["embeddings/txt_emb_bioclip-2.json"]),
                vectors,
                strict=True,
            )
        }
        stored = label_cache.load(next((tmp_path / "data" / "bioclip").rglob("text_vectors.npz")))
        assert stored and stored.names and stored.meta and stored.meta["zero_rows_dropped"] == 42
        assert list(stored.names) == sorted(name for name, vector in names.items() if vector.any())
        for name, row in zip(stored.names, stored.vecs, strict=True):
            assert np.abs(row - names[name]).max() < 1e-3
        assert node.result("bioclip_classify", encoded(picture(RED)))["labels"]
        assert not list((tmp_path / "data").rglob(".building"))
    finally:
        node.stop()
    hub.requests.clear()
    node = species_of(tiny_onnx, tmp_path / "data", "TreeOfLife-200M", HF_ENDPOINT=hub.url).ready()
    assert bioclip_labels(node) == "2,058 species" and not hub.requests
    node.stop()


def test_a_conversion_that_is_killed_fetches_the_rest_alone(tmp_path: Path, hub: FakeHub, tiny_onnx: Path) -> None:
    """Lost otherwise: gigabytes of somebody's line, at every power cut."""
    hub.repos["datasets/imageomics/TreeOfLife-200M"], _ = published_tree(tmp_path, tiny_onnx)
    script = """
import os, signal, sys
from pathlib import Path
import tree_of_life

left = int(sys.argv[2])
def progress(done, total):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

print(len(tree_of_life.published(Path(sys.argv[1]), "model", progress).vecs))
"""
    for panels in (1, 2, 3, 9):
        hub.requests.clear()
        command = [sys.executable, "-c", script, str(tmp_path / "made"), str(panels)]
        run = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "HF_ENDPOINT": hub.url}, capture_output=True, text=True
        )
        assert run.returncode == (-signal.SIGKILL if panels < 9 else 0), run.stderr
        parts = [request for request in hub.requests if request.startswith("GET") and request.endswith("-2.npy")]
        assert len(parts) == 3 + 1  # the header, in three steps, and one of four panels
        assert any(request.endswith("-2.json") for request in hub.requests) == (panels == 1)
    assert run.stdout.strip() == "2058"


def test_a_label_that_was_answered_is_a_taxon(node: Node) -> None:
    """Lost otherwise: whoever takes an answer's labels for `within`, as an app does that narrows a search down."""
    fox = encoded(picture(RED))
    labels = [row["label"] for row in node.result("bioclip_classify", fox, topk="3")["labels"]]
    again = node.ask("bioclip_classify", fox, within=json.dumps(labels), topk="100")
    assert {row["label"] for row in json.loads(again.result)["labels"]} == set(labels)
    assert "within_unknown" not in again.meta


def test_species_are_asked_by_rank_and_place(node: Node) -> None:
    """Lost otherwise: everything of the above, for everybody who is not Python."""
    fox = encoded(picture(RED))
    answer = node.ask("bioclip_classify", fox, rank="genus")
    [first, *_] = json.loads(answer.result)["labels"]
    assert answer.meta["rank"] == "genus" and first["label"].endswith("/*/*") and first["label"].count("/") == 7
    everything = node.result("bioclip_classify", fox, topk="100")["labels"]
    kingdoms = {row["label"].split("/")[0] for row in everything}
    assert len(kingdoms) > 1
    for kingdom in kingdoms:
        answer = node.ask("bioclip_classify", fox, within=f"{kingdom}, Nessiteras rhombopteryx", topk="100")
        rows = json.loads(answer.result)["labels"]
        assert {row["label"].split("/")[0] for row in rows} == {kingdom} and answer.meta["within_unknown"] == "1"
        assert sum(row["score"] for row in rows) == pytest.approx(1, abs=1e-3)
    assert node.ask("bioclip_classify", fox, rank="auto").meta["rank"] in (*species.RANKS, "none")
    assert node.result("bioclip_classify", fox, min_score="1")["labels"] == []
    for meta, said in (
        ({"rank": "tribe"}, "meta rank: 'tribe'; allowed: kingdom, "),
        ({"min_score": "1.5"}, "meta min_score: '1.5'; allowed: a number from 0 to 1"),
        ({"within": "Nessie"}, "meta within: none of these names is in the species list: Nessie"),
        ({"within": "[1]"}, "meta within: allowed: 1 to 10000 taxa"),
    ):
        assert said in node.ask("bioclip_classify", fox, **meta).error.message


def test_the_scan_graph_is_what_its_script_makes() -> None:
    """Lost otherwise: a binary file that nobody can read."""
    from gen import scan

    made = scan.build().SerializeToString(deterministic=True)
    assert (ROOT / "gen" / "scan.onnx").read_bytes() == made


NAMES = [f"label {i}" for i in range(100)]


def cached(
    folder: Path, texts: Texts, names: list[str] = NAMES, templates: int = 1, older: tuple[Path, ...] = ()
) -> Any:
    recipe = labels.imagenet_recipe(templates)
    key = label_cache.CacheKey.of(names, recipe, "model", 16)
    return label_cache.cached_vectors(folder, names, recipe, texts, key, older).vecs


def test_a_cache_is_used_while_it_fits_and_rebuilt_when_anything_changed(tmp_path: Path) -> None:
    """Lost otherwise: minutes at each start, or answers from another model's vectors."""
    first = cached(tmp_path, Texts())
    again = Texts()
    assert np.array_equal(cached(tmp_path, again), first) and again.calls == label_cache.PROBE_LABELS
    meta = json.loads((tmp_path / "text_vectors.meta.json").read_text())
    assert (meta["model_id"], meta["count"], meta["dim"], meta["recipe"]) == ("model", 100, 16, "imagenet-1")
    other = [*NAMES[:-1], "other"]
    for seed, templates, names in ((1, 1, NAMES), (0, 7, NAMES), (0, 1, other), (0, 1, NAMES[:50])):
        texts = Texts(seed)
        expected = labels.label_vectors(names, labels.imagenet_recipe(templates), Texts(seed))
        assert np.array_equal(cached(tmp_path, texts, names, templates), expected) and texts.calls >= len(names)
        cached(tmp_path, Texts())  # back again


def test_a_damaged_cache_is_rebuilt_and_never_unpickled(tmp_path: Path) -> None:
    """Lost otherwise: a daemon that does not start, or one that runs what somebody put in the data folder."""
    good = cached(tmp_path, Texts())
    path = tmp_path / "text_vectors.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for data in (b"", whole[:5], whole[:50], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        path.write_bytes(data)
        assert np.array_equal(cached(tmp_path, Texts()), good)

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "trapped",))

    np.savez(path, vecs=np.array([Trap()], dtype=object), meta=np.array([Trap()], dtype=object))
    assert np.array_equal(cached(tmp_path, Texts()), good)
    assert not (tmp_path / "trapped").exists()


def test_caches_of_older_layouts_are_taken_over_when_they_fit(tmp_path: Path) -> None:
    """Lost otherwise: hours of encoding that were already done; or upstream's wrong vectors live on."""
    good = labels.label_vectors(NAMES, labels.imagenet_recipe(1), Texts())
    names = np.array(NAMES, dtype=object)
    fitting, wrong = tmp_path / "a_imagenet_vectors.npz", tmp_path / "b_imagenet_vectors.npz"
    np.savez(fitting, names=names, vecs=good)
    np.savez(
        wrong, names=names, vecs=labels.label_vectors([str(i) for i in range(100)], labels.imagenet_recipe(1), Texts())
    )
    texts = Texts()
    assert np.array_equal(cached(tmp_path / "x", texts, older=(tmp_path / "missing.npz", wrong, fitting)), good)
    assert texts.calls == 2 * label_cache.PROBE_LABELS
    texts = Texts()
    assert np.array_equal(cached(tmp_path / "y", texts, older=(wrong,)), good)
    assert texts.calls > 100


def test_a_build_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Lost otherwise: a night of a board's work at every power cut. 30 kills, then the end, and the right vectors."""
    script = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
import tqdm  # here, so that no child spends its short life on it
import errors
import label_cache
import labels

label_cache.SHARD_LABELS = 40
folder, random_, made = Path(sys.argv[1]), random.Random(3), [0]
names = [f"label {i}" for i in range(6000)]
recipe = labels.names_recipe(1)
key = label_cache.CacheKey.of(names, recipe, "model", 8)

def encode(texts):
    made[0] += len(texts)
    time.sleep(0.0002 * len(texts) / 8)
    rows = np.array([[ord(c) for c in text[-9:-1].rjust(8)] for text in texts], np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

def shards():
    return {p.name for p in (folder / ".building").glob("*.npz")}

seen = set()
for number in range(30):
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        label_cache.cached_vectors(folder, names, recipe, encode, key)
        os._exit(0)
    for _ in range(60_000):  # until it has come a little further
        time.sleep(0.001)
        if shards() - seen:
            break
    time.sleep(random_.uniform(0, 0.004))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert seen <= shards(), "a shard that was there is gone"
    seen = shards()
    if number == 15:  # a disk that garbles one
        path = folder / ".building" / sorted(seen)[0]
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
whole = (folder / "text_vectors.npz").exists()
made[0] = 0
vectors = label_cache.cached_vectors(folder, names, recipe, encode, key).vecs
found = made[0]
assert np.allclose(vectors, labels.label_vectors(names, recipe, encode), atol=1e-6)
print(len(seen), found, int(whole), len(shards()))
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    kept, computed_again, whole, left = map(int, run.stdout.split())
    assert not whole and kept > 20 and left == 0
    # What was kept is not computed again, but for the four labels of each shard by which it is known.
    assert computed_again <= 6000 - 40 * kept + (4 + 1) * kept + 40


def test_a_kill_while_a_cache_is_written_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """Lost otherwise: the next start, after a power cut. Kills, each at a moment of its own, until it was hit."""
    script = """
import itertools, os, random, signal, sys, time
from pathlib import Path
import numpy as np
import errors
import label_cache
import labels

folder, random_ = Path(sys.argv[1]), random.Random(7)
key = label_cache.CacheKey("model", "recipe", "sha", 20000, 16)
rows = np.zeros((16, 20000, 16), np.float32)
for i in range(16):
    rows[i, :, i] = 1
label_cache.save(folder, key, [rows[0]])
seen = set()
for number in range(5000):
    if number >= 100 and len(seen) > 1 and list(folder.glob(".*.tmp")):
        break
    if (child := os.fork()) == 0:
        for i in itertools.count():
            label_cache.save(folder, key, [rows[i % 16]])
    time.sleep(random_.uniform(0, 0.03 + number / 1000))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    vectors = label_cache.load(folder / "text_vectors.npz", key.meta()).vecs
    assert vectors is not None and (vectors.sum(axis=0) == 20000).sum() == 1, "a torn cache"
    seen.add(int(vectors[0].argmax()))
left = len(list(folder.glob(".*.tmp")))
for path in folder.glob(".*.tmp"):
    os.utime(path, (0, 0))
label_cache.save(folder, key, [rows[0]])
print(len(seen), left, len(list(folder.glob(".*.tmp"))))
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    caches_seen, left, left_after_a_day = map(int, run.stdout.split())
    assert caches_seen > 1 and left > 0 and left_after_a_day == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clip/imagenet_class_names.json", {"0": "tench"}),
        ("clip/imagenet_class_names.json", list(IMAGENET.values())),
        ("clip/imagenet_class_names.json", IMAGENET | {"5": ""}),
        ("bioclip/txt_emb_species.json", []),
        ("bioclip/txt_emb_species.json", [[["Animalia"], "x"]]),
        ("bioclip/txt_emb_species.json", {"a": 1}),
    ],
)
def test_a_label_file_of_another_form_is_refused_by_name(tmp_path: Path, name: str, content: Any) -> None:
    """Lost otherwise: labels that stand one row beside their vectors."""
    path = write_labels(tmp_path) / name
    path.write_text(json.dumps(content))
    with pytest.raises(errors.LabelError, match=path.name):
        labels.class_names(tmp_path, "", model_files.quiet) if "imagenet" in name else tree_of_life.lineages_of(path)
