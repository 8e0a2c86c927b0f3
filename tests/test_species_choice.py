"""Which species a daemon serves when nobody chose: computed or published, by what the first minute measures."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import errors
import label_cache
import labels
import species
import species_loader
import tree_of_life
from tests.hostile import impatient
from tests.hub import FakeHub
from tests.kit import NOWHERE, RED, Node, Texts, encoded, picture, wait_until, write_labels
from tests.test_labels import MANY, bioclip_labels, published_tree

CHOICE = r"BIOCLIP_LABELS is not set; chosen: (.*); reason: (.*)\. To choose otherwise, set BIOCLIP_LABELS to (.*)"
TEN_M, TWO_HUNDRED_M = tree_of_life.SOURCES
# The tiny model stands for BioCLIP-2. It decides after its first labels, and anything it computes takes too long.
SLOW = {"species_loader.MEASURE_S": 0, "species_loader.QUICK_S": 0, "tree_of_life.MODELS_200M": ["tiny"]}
SLOW |= {"tree_of_life.DISK_200M": 1000, "tree_of_life.MEMORY_200M": 1000}


def start(tiny_onnx: Path, folder: Path, hub: str, constants: dict[str, Any], source: str = "") -> Node:
    data = folder / "data"
    if not data.exists():
        (write_labels(data) / "bioclip" / "txt_emb_species.json").unlink()  # the hub has one
    model = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_MODEL": tiny_onnx}
    return Node(data, **model, BIOCLIP_LABELS=source, HF_ENDPOINT=hub, **impatient(folder, constants)).ready()


def species_are(node: Node, said: str) -> None:
    wait_until(lambda: bioclip_labels(node) == said, 120)
    assert node.result("bioclip_classify", encoded(picture(RED)))["labels"]


def choices(node: Node) -> list[tuple[str, str, str]]:
    return [match.groups() for match in re.finditer(CHOICE, node.log)]  # type: ignore[misc]


def asked_for_200m(hub: FakeHub) -> bool:
    return any("TreeOfLife-200M" in request for request in hub.requests)


@pytest.fixture
def trees(hub: FakeHub, tmp_path: Path, tiny_onnx: Path) -> FakeHub:
    """A hub with both trees in small: 2,100 names, and 2,058 of them with vectors."""
    hub.repos["datasets/imageomics/TreeOfLife-10M"] = {"embeddings/txt_emb_species.json": json.dumps(MANY).encode()}
    hub.repos["datasets/imageomics/TreeOfLife-200M"], _ = published_tree(tmp_path, tiny_onnx)
    return hub


def test_a_slow_board_downloads_published_vectors_and_keeps_what_it_computed(
    tmp_path: Path, trees: FakeHub, tiny_onnx: Path
) -> None:
    """Lost otherwise: species, for the days that a board computes its default; or the labels it has computed already.

    The next start uses what is kept, without a network. An explicit value is obeyed all the same.
    """
    node = start(tiny_onnx, tmp_path, trees.url, SLOW)
    species_are(node, "2,058 species")
    [(chosen, reason, other)] = choices(node)
    assert chosen == f"{TWO_HUNDRED_M}, a download of 2.66 GB (about 4 min at 100 Mbit/s, 36 min at 10 Mbit/s)"
    assert re.fullmatch(rf"computing {TEN_M} would take about \d+ (s|min)", reason) and other == TEN_M
    node.wait_for(f"{TWO_HUNDRED_M}: ready")
    node.stop()
    [shard] = tmp_path.rglob(".building/*")  # nothing of the conversion is left
    with np.load(shard) as kept:
        assert len(kept["rows"]) == 128
    node = start(tiny_onnx, tmp_path, NOWHERE, SLOW)
    assert bioclip_labels(node) == "2,058 species" and not choices(node)
    node.stop()
    trees.requests.clear()
    for source, said in ((TEN_M, "2,100 species"), (TWO_HUNDRED_M, "2,058 species"), (TEN_M, "2,100 species")):
        node = start(tiny_onnx, tmp_path, trees.url, SLOW, source)
        species_are(node, said)
        assert not choices(node) and not trees.requests
        node.stop()
    assert node.log.count("computing the text vectors of 2100") == 0  # but the first time


def test_a_fast_machine_computes_its_species_and_the_next_start_uses_them(
    tmp_path: Path, trees: FakeHub, tiny_onnx: Path
) -> None:
    """Lost otherwise: vectors of the model's own, where they take minutes, and at the next start, if it is slow."""
    node = start(tiny_onnx, tmp_path, trees.url, SLOW | {"species_loader.QUICK_S": 3600})
    species_are(node, "2,100 species")
    [(chosen, reason, other)] = choices(node)
    assert re.fullmatch(rf"{TEN_M}, computed in about \d+ (s|min)", chosen) and reason == "that is less than 60 min"
    assert other == f"{TWO_HUNDRED_M}, a JSON file or a folder" and not asked_for_200m(trees)
    node.stop()
    node = start(tiny_onnx, tmp_path, NOWHERE, SLOW)
    assert bioclip_labels(node) == "2,100 species" and not choices(node)
    node.stop()


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        ({"tree_of_life.DISK_200M": 10**15}, r"it needs 1000000\.0 GB of disk space, and /.* has \d+\.\d GB free"),
        ({"tree_of_life.MEMORY_200M": 10**15}, r"it needs 1000000\.0 GB of memory, and \d+\.\d GB are available"),
        ({"tree_of_life.MODELS_200M": ["bioclip-2"]}, "its vectors are BioCLIP-2's, and not those of tiny"),
    ],
)
def test_a_slow_board_that_cannot_use_published_vectors_says_why_and_computes(
    tmp_path: Path, trees: FakeHub, tiny_onnx: Path, constants: dict[str, Any], said: str
) -> None:
    """Lost otherwise: a full disk, a board that swaps, or gigabytes for nothing; and the reason for days of waiting."""
    node = start(tiny_onnx, tmp_path, trees.url, SLOW | constants)
    species_are(node, "2,100 species")
    [(chosen, reason, other)] = choices(node)
    assert chosen.startswith(f"{TEN_M}, computed in about ") and other.startswith(TWO_HUNDRED_M)
    assert re.fullmatch(f"{TWO_HUNDRED_M} cannot be used, since {said}", reason), reason
    assert not asked_for_200m(trees)
    node.stop()


def test_computing_goes_on_while_the_hub_does_not_have_the_vectors(
    tmp_path: Path, trees: FakeHub, tiny_onnx: Path
) -> None:
    """Lost otherwise: the days in which a board could compute, or the download once the hub is there again."""
    many = [[[*ranks[:-1], f"{ranks[-1]}x{i}"], common] for i in range(40) for ranks, common in MANY]
    trees.repos["datasets/imageomics/TreeOfLife-10M"]["embeddings/txt_emb_species.json"] = json.dumps(many).encode()
    published = trees.repos.pop("datasets/imageomics/TreeOfLife-200M")
    node = start(tiny_onnx, tmp_path, trees.url, SLOW | {"species_loader.RETRY_S": 1})
    try:
        node.wait_for(f"{TWO_HUNDRED_M}: .* cannot be fetched .*; computing {TEN_M} goes on, the next attempt is in ")
        wait_until(lambda: bioclip_labels(node).startswith(f"{TEN_M}: "), 60)
        trees.repos["datasets/imageomics/TreeOfLife-200M"] = published
        species_are(node, "2,058 species")
    finally:
        node.stop()


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: the reason, in a traceback of the HTTP library at each attempt without a network."""
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with pytest.raises(errors.LabelError, match=r"^TreeOfLife-200M cannot be fetched and kept in \S+ \(.*refused"):
        tree_of_life.published(tmp_path, "model", lambda done, total: None)


def test_published_vectors_of_another_model_are_downloaded_once(
    tmp_path: Path, trees: FakeHub, tiny_onnx: Path
) -> None:
    """Lost otherwise: wrong species, or 2.66 GB at each start of a model that is BioCLIP-2 by name only."""
    rng = np.random.default_rng(1)
    file = io.BytesIO()
    np.save(file, rng.normal(size=(64, 2100)).astype(np.float32))
    trees.repos["datasets/imageomics/TreeOfLife-200M"]["embeddings/txt_emb_bioclip-2.npy"] = file.getvalue()
    node = start(tiny_onnx, tmp_path, trees.url, SLOW | {"species_loader.RETRY_S": 0})
    species_are(node, "2,100 species")
    first, second = choices(node)
    assert first[0].startswith(TWO_HUNDRED_M) and second[0].startswith(TEN_M)
    assert second[1] == f"{TWO_HUNDRED_M} cannot be used, since its vectors were tried, and are not those of tiny"
    node.stop()


@pytest.mark.parametrize("place", [".", "published"])  # the first is an earlier version's
def test_published_vectors_that_are_kept_are_used_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Lost otherwise: gigabytes that were downloaded once, after an update or when the variable is no longer set."""
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    names = sorted(species.lineage(i, row) for i, row in enumerate(MANY))
    key = label_cache.CacheKey("tiny", tree_of_life.PUBLISHED, tree_of_life.REVISION_200M, len(names), 16)
    rows = labels.label_vectors(names, species.RECIPE, Texts())
    label_cache.save(tmp_path / "model" / place, key, [rows], names, species.depths(names))

    def at_once(source: str) -> species.Species | None:
        backend = SimpleNamespace(model_id="tiny", dim=16, logit_scale=1.0, tokenize=list, encode_text=Texts())
        backend.hold_rows = lambda rows: None
        model: Any = SimpleNamespace(backend=backend, encoder=lambda engine: None)
        engine: Any = SimpleNamespace(add=lambda line: line)
        loader = species_loader.SpeciesLoader(source, model, tmp_path / "model", tmp_path / "data", engine)
        return loader.at_once(lambda text: None)

    for source in ("", TWO_HUNDRED_M):
        found = at_once(source)
        assert found and len(found) == 2100
    names_10m = write_labels(tmp_path / "data") / "bioclip" / "txt_emb_species.json"
    names_10m.write_text(json.dumps(MANY))
    assert at_once(TEN_M) is None  # an explicit value still means what it says: these are to be computed


@pytest.mark.parametrize(
    ("alone", "estimate"),
    [
        (1.0, 3.0 / 64),  # nobody asks for anything: what passes
        (0.5, 0.5 / 32),  # the batches that ran while no request was in progress
        (0.0, 2.0 / 64),  # there are none: the batches that ran
    ],
)
def test_the_estimate_counts_neither_requests_nor_labels_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: float, estimate: float
) -> None:
    """Lost otherwise: the right choice on a board that is importing photographs, or that has computed for days."""
    line = SimpleNamespace(ran_items=500, ran_s=50.0, alone_items=100, alone_s=7.0)
    model: Any = SimpleNamespace(background=line, encoder=lambda engine: None)
    engine: Any = SimpleNamespace(add=lambda line: line)
    loader = species_loader.SpeciesLoader("", model, tmp_path, tmp_path, engine)
    estimates: list[float] = []
    monkeypatch.setattr(loader, "_is_slow", estimates.append)  # which returns None: computing goes on
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    report = loader._until_slow(lambda done, total: None, 60)

    def ran(items: int, done: int, passed: float) -> None:
        line.ran_items += items
        line.ran_s += items * 2 / 64
        line.alone_items += int(items * alone)
        line.alone_s += items * alone * (2 / 64 if alone == 1 else 0.5 / 32)
        now[0] += passed
        report(done, 10_000)

    ran(4, 2048, 100)  # two shards that are kept: four labels of each are encoded again
    ran(4, 4096, 100)
    assert not estimates
    done = 4096
    while not estimates:
        done += 64
        ran(64, done, 3 if alone == 1 else 20)
    assert done == 4096 + 64 * (20 if alone == 1 else 3)
    assert estimates == [pytest.approx((10_000 - done) * estimate)]
    ran(64, done + 64, 1000)
    assert len(estimates) == 1


def test_a_build_that_is_interrupted_keeps_what_it_computed(tmp_path: Path) -> None:
    """Lost otherwise: ten minutes of a board's work, each time that it looks whether it can have published vectors."""
    names = [f"label {i}" for i in range(3000)]
    recipe = labels.names_recipe(1)
    key = label_cache.CacheKey.of(names, recipe, "model", 16)

    class Interrupted(Exception):
        pass

    def until(most: int) -> label_cache.Progress:
        def progress(done: int, total: int) -> None:
            if done >= most:
                raise Interrupted

        return progress

    counted = Texts()
    for most in (128, 1024, 2048 + 320):
        with pytest.raises(Interrupted):
            label_cache.cached_vectors(tmp_path, names, recipe, counted, key, progress=until(most))
    found = label_cache.cached_vectors(tmp_path, names, recipe, counted, key).vecs
    assert np.array_equal(found, labels.label_vectors(names, recipe, Texts()))
    assert counted.calls == 3000 + label_cache.PROBE_LABELS * 4  # the shards that were found: one, one, and two


def test_what_stands_in_a_folder_is_read_without_its_vectors(tmp_path: Path) -> None:
    """Lost otherwise: a start that trips over a damaged file instead of making a new one."""
    path = tmp_path / label_cache.FILE
    assert label_cache.meta_of(path) == {}
    key = label_cache.CacheKey("model", species.RECIPE.name, "sha", 1, 16)
    label_cache.save(tmp_path, key, [np.eye(16, dtype=np.float32)[:1]])
    assert label_cache.meta_of(path)["recipe"] == species.RECIPE.name
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert label_cache.meta_of(path) == {}
