"""An upgrade: the daemon starts with files that an older version wrote; `make_old_data.py` says which."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import label_cache
import tree_of_life
from model_files import encoder_of
from settings import DEMO, DEMO_DIR
from species import RECIPE
from tests.hostile import impatient
from tests.kit import Node, load
from tests.make_old_data import ARCHIVE, LABEL_SETS, ON_LOOPBACK, SHARD_LABELS, SUSPECT, answers


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The files of the older version."""
    shutil.unpack_archive(ARCHIVE, tmp_path)
    return tmp_path


def state_of(folder: Path) -> dict[Path, tuple[str, int]]:
    """SHA-256 and modification time of each file with text vectors."""
    found = {}
    for path in folder.rglob("*.npz"):
        found[path] = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
    return found


def assert_answers_are_those_of(old: Path, node: Node) -> None:
    expected = json.loads((old / "answers.json").read_text())
    found = answers(node)
    assert found.keys() == expected.keys()
    for question, rows in expected.items():
        assert [row["label"] for row in found[question]] == [row["label"] for row in rows], question
        scores = [row["score"] for row in rows]
        assert [row["score"] for row in found[question]] == pytest.approx(scores, abs=2e-3), question


def assert_nothing_was_computed(node: Node) -> None:
    """Neither during the start nor in the background, and no file was found damaged."""
    assert "computing" not in node.log and "not available yet" not in node.log, node.log


def test_an_old_data_folder_is_used_as_it_is(old: Path) -> None:
    """Lost otherwise: days, in which an upgraded board computes again; the uuid by which apps know the daemon; or the
    daemon itself, to a picture that crashed it before."""
    from zeroconf import Zeroconf

    before, uuid = state_of(old), (old / "data" / "uuid").read_text()
    assert len(before) == 2 + len(LABEL_SETS) + 2 + 2  # data folder: classes, species, sets; folders; parts of a build
    name, kind = f"lumen-upgrade-{os.getpid()}", ON_LOOPBACK["CLIP_MDNS_TYPE"]
    node = Node(old / "data", ("--demo",), LUMEN_TUNE=1, CLIP_MDNS_NAME=name, **ON_LOOPBACK).ready()
    try:
        assert_answers_are_those_of(old, node)  # also with the operator's own label sets, without waiting
        assert "rejected" in node.ask("clip_image_embed", SUSPECT).error.message
        node.wait_for(f"mDNS: {name}")
        with Zeroconf(interfaces=["127.0.0.1"]) as browser:
            info = browser.get_service_info(kind, f"{name}.{kind}", 10_000)
        assert info and info.properties[b"uuid"] == uuid.strip().encode()
    finally:
        assert node.stop() == 0, node.log
    assert_nothing_was_computed(node)
    assert state_of(old) == before and (old / "data" / "uuid").read_text() == uuid


@pytest.mark.parametrize(
    ("labels", "dtype", "constants"),
    [
        ("fp32", np.float32, {}),
        ("fp16", np.float16, {}),
        ("fp16", np.float16, {"label_cache.HALF_PRECISION_BYTES": 0}),  # mapped, as large files are
        ("", np.float32, {}),
    ],
    ids=["fp32", "fp16", "fp16-mapped", "unset"],
)
def test_old_species_are_used_as_they_are(old: Path, labels: str, dtype: type, constants: dict[str, Any]) -> None:
    """Lost otherwise: the same days, where a PC built the vectors for the board, or where BIOCLIP_LABELS is not set."""
    data = old / "data"
    species = old / labels if labels else next((data / "bioclip").rglob("*.npz")).parent
    if labels:
        shutil.rmtree(data / "bioclip")  # so that the species come from the label folder
    else:
        shutil.copy(DEMO_DIR / "species.json", data / "bioclip" / "txt_emb_species.json")  # as downloaded
    with np.load(species / label_cache.FILE, allow_pickle=False) as file:
        assert file["vecs"].dtype == dtype
    before = state_of(old)
    settings = {**DEMO, "CLIP_TEMPLATES": 7, "BIOCLIP_LABELS": old / labels if labels else ""}
    node = Node(data, **settings, **impatient(old, constants)).ready()
    try:
        assert_answers_are_those_of(old, node)
    finally:
        assert node.stop() == 0, node.log
    assert_nothing_was_computed(node)
    assert state_of(old) == before


def test_an_old_build_that_was_interrupted_goes_on(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: the days that a board has computed already, if it is upgraded before it is done."""
    monkeypatch.setattr(label_cache, "SHARD_LABELS", SHARD_LABELS)
    backend, encoded = load(DEMO_DIR), 0
    encode = encoder_of(backend)

    def counting(texts: list[str]) -> Any:
        nonlocal encoded
        encoded += len(texts)
        return encode(texts)

    path = DEMO_DIR / "species.json"
    folder = old / "interrupted"
    found = tree_of_life.computed(folder, path, backend.model_id, backend.dim, counting, lambda *_: None)
    names = list(found.names)
    assert len(RECIPE.prompts(names[0])) == 1
    assert encoded == len(names) - 2 * SHARD_LABELS + 2 * label_cache.PROBE_LABELS
    whole = label_cache.load(old / "fp32" / label_cache.FILE)
    assert whole and whole.names and list(whole.names) == names
    assert np.allclose(found.vecs, whole.vecs, atol=1e-5)
