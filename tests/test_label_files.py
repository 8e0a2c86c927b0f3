"""A user's own label sets and scenes."""

from __future__ import annotations

import concurrent.futures
import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty

import errors
import label_cache
import label_files
import labels
from gen import ml_service_pb2 as pb
from tests.kit import (
    BLUE,
    COLOURS,
    GREEN,
    LIMIT_S,
    RED,
    UPSTREAM_SCENES,
    Node,
    Texts,
    Turnstile,
    code_of,
    encoded,
    in_time,
    one,
    picture,
    queued,
    save,
    wait_until,
    write_labels,
)

# --- label sets of one's own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"dog\n\xff", "it is not UTF-8"),
        ("a.txt", b"# nothing\n\n", "labels: allowed: 1 to 20000 texts"),
        ("a.txt", b"x" * 1001, "is not a text of 1 to 1000 characters"),
        ("a.txt", b"dog\n" * 1_100_000, "over 4 MB"),
        ("a.txt", b"\n".join(b"%d" % i for i in range(20_001)), "labels: allowed: 1 to 20000 texts"),
        ("a.json", b"{", "it is not JSON"),
        ("a.json", b"[" * 5000, "it is not JSON"),
        ("a.json", b'["dog"]', "allowed: an object with labels, and optionally none, templates, threshold"),
        ("a.json", b'{"labels": ["dog"], "treshold": 1}', "'treshold' is not a key; allowed: an object with labels"),
        ("a.json", b'{"labels": ["dog", 3]}', "labels: '3' is not a text"),
        ("a.json", b'{"labels": ["\\ud800"]}', "is not a text"),
        ("a.json", b'{"labels": {"dog": "a dog"}}', "labels: 'dog': allowed: 1 to 100 texts"),
        ("a.json", b'{"labels": {"dog": [], "dog": ["x"]}}', "'dog' appears twice"),
        ("a.json", b'{"labels": {"dog": [], " dog": ["x"]}}', "labels: one of them appears twice"),
        ("a.json", b'{"labels": ["dog"], "none": []}', "none: allowed: 1 to 100 texts"),
        ("a.json", b'{"labels": ["dog"], "threshold": 50}', "threshold: 50; allowed: a number from 0 to 1"),
        ("a.json", b'{"labels": ["dog"], "threshold": true}', "threshold: True; allowed"),
        ("a.json", b'{"labels": ["dog"], "threshold": NaN}', "threshold: nan; allowed"),
        ("a.json", b'{"labels": ["dog"], "templates": ["a photo"]}', "templates: 'a photo' needs exactly one {}"),
    ],
)
def test_a_label_set_that_is_wrong_is_told_what_is(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """Lost otherwise: a typing error that silently changes what a set does."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.LabelError, match=re.escape(said)) as error:
        label_files.read_set(tmp_path / name, ["{}"])
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_wordings_of_a_label_are_averaged_and_things_under_it_added(tmp_path: Path) -> None:
    """Lost otherwise: the meaning of a score."""
    content = {
        "labels": {"pet": ["a dog", "a cat"], "car": []},
        "none": ["a tree", "a sea"],
        "templates": ["{}", "my {}"],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    file = label_files.read_set(tmp_path / "a.json", ["unused {}"])
    texts = file.texts()
    own = label_files.OperatorSet("a", file, labels.label_vectors(texts, label_files.PROMPTS, Texts()), 5.0)
    dog, cat, car, my_car, tree, sea = Texts()(["a dog", "a cat", "car", "my car", "a tree", "a sea"])
    rows = np.array([dog, cat, (car + my_car) / np.linalg.norm(car + my_car), tree, sea])
    for query in Texts()([f"picture {i}" for i in range(20)]):
        expected = np.exp(5 * rows @ query) / np.exp(5 * rows @ query).sum()
        scores = {"pet": expected[:2].sum(), "car": expected[2]}
        none = expected[3:].sum()
        found, none_score = own.answer(query, 5, 0.0)
        assert none_score == pytest.approx(none, abs=1e-5)
        assert dict(found) == pytest.approx({k: v for k, v in scores.items() if v > none}, abs=1e-5)
        assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
        assert own.answer(query, 5, 0.99)[0] == []


class Folder:
    """Label sets in a folder, read when the test says so."""

    def __init__(self, folder: Path, texts: Texts | None = None) -> None:
        self.files, self.texts = folder / "labels", texts or Texts()
        self.files.mkdir(exist_ok=True)
        model: Any = SimpleNamespace(model_id="model", dim=16, logit_scale=5.0)
        self.sets = label_files.OperatorSets(self.files, folder / "cache", model, ["a {}."])

    def write(self, name: str, content: str) -> None:
        save(self.files / name, content)

    def read(self, compute: bool = True) -> Folder:
        self.sets.read(self.texts, compute)
        return self

    def labels(self, name: str) -> list[str]:
        return list(self.sets.get(name).names)


def test_a_label_set_follows_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lost otherwise: a restart for every word; or, at a typing error, the set that worked."""
    folder = Folder(tmp_path).read()
    assert folder.sets.facts() == {"clip_label_sets": ""}
    with pytest.raises(
        errors.LabelError, match=r"'pets' is unknown; allowed: none so far; make a file labels/NAME.txt"
    ):
        folder.labels("pets")
    folder.write("pets.txt", "\ufeff# mine\ndog\n\n cat \ndog\n")
    folder.write("no set.txt", "dog")
    assert folder.read().labels("pets") == ["dog", "cat"]
    assert folder.sets.facts() == {"clip_label_sets": "pets", "clip_label_set.pets": "2 labels"}

    folder.write("pets.txt", "dog\ncat\nhamster")
    assert folder.read().labels("pets") == ["dog", "cat", "hamster"]
    calls = folder.texts.calls
    assert folder.read().texts.calls == calls  # nothing changes, nothing is computed

    caplog.clear()
    folder.write("pets.txt", "dog\n" + "x" * 2000)
    folder.write("birds.json", "{")
    assert folder.read().labels("pets") == ["dog", "cat", "hamster"]
    pets, birds, _ = sorted((record.getMessage() for record in caplog.records), reverse=True)
    assert "label set birds: it is not JSON" in birds
    assert "label set pets: labels: 'xxxx" in pets and pets.endswith("; the previous version is used")
    facts = folder.sets.facts()
    assert facts["clip_label_sets"] == "pets" and facts["clip_label_set.birds"].startswith("it is not JSON")
    assert facts["clip_label_set.pets"].startswith("3 labels; its file is not used: labels: 'xxx")
    with pytest.raises(errors.LabelError, match="'birds' cannot be used: it is not JSON"):
        folder.labels("birds")
    with pytest.raises(errors.LabelError, match="'none' is unknown; allowed: pets"):
        folder.labels("none")
    folder.write("pets.txt", "dog\ncat\nhamster")
    assert folder.read().sets.facts()["clip_label_set.pets"] == "3 labels"  # mended

    (folder.files / "birds.json").unlink()
    (folder.files / "pets.txt").unlink()
    assert folder.read().sets.facts() == {"clip_label_sets": ""}


def test_a_restart_computes_no_label_set_again_and_waits_for_none(tmp_path: Path) -> None:
    """Lost otherwise: a start that takes as long as the largest set, every time."""
    first = Folder(tmp_path)
    first.write("pets.json", '{"labels": ["dog", "cat"], "none": ["a tree"]}')
    first.read()
    restarted = Folder(tmp_path)
    restarted.write("new.txt", "bus\ntrain")
    restarted.read(compute=False)
    assert restarted.labels("pets") == ["dog", "cat", label_files.NONE]
    assert restarted.texts.calls <= label_cache.PROBE_LABELS
    with pytest.raises(errors.LabelError, match="'new' cannot be used: its text vectors are being computed"):
        restarted.labels("new")
    assert restarted.read().labels("new") == ["bus", "train"]
    other = Folder(tmp_path, Texts(seed=1)).read(compute=False)  # another model: its vectors must not be the first's
    with pytest.raises(errors.LabelError, match="being computed"):
        other.labels("pets")


class HeldTexts(Texts):
    """Encodes nothing until the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.release = threading.Event(), threading.Event()

    def __call__(self, texts: list[str]) -> Any:
        self.begun.set()
        assert self.release.wait(LIMIT_S)
        return super().__call__(texts)


def test_a_reload_while_a_set_is_computed_begins_with_the_new_file(tmp_path: Path) -> None:
    """Lost otherwise: an hour, when somebody notices a mistake in a long list after a minute."""
    texts = HeldTexts()
    folder = Folder(tmp_path, texts)
    folder.write("many.txt", "\n".join(f"word {i}" for i in range(5000)))
    folder.sets.start(folder.texts)
    assert texts.begun.wait(LIMIT_S)
    folder.write("many.txt", "\n".join(f"better {i}" for i in range(10)))
    folder.sets.reload()
    texts.release.set()
    wait_until(lambda: folder.sets.facts()["clip_label_sets"] == "many")
    assert folder.labels("many") == [f"better {i}" for i in range(10)]
    assert folder.texts.calls < 200  # texts, and not 5,000


def test_a_reload_for_another_set_does_not_begin_a_computed_one_anew(tmp_path: Path) -> None:
    """Lost otherwise: a set that is never ready, where something reloads the daemon again and again."""
    texts = HeldTexts()
    folder = Folder(tmp_path, texts)
    folder.write("many.txt", "\n".join(f"word {i}" for i in range(300)))
    folder.sets.start(folder.texts)
    assert texts.begun.wait(LIMIT_S)
    folder.write("other.txt", "dog")
    folder.sets.reload()
    texts.release.set()
    wait_until(lambda: folder.sets.facts()["clip_label_sets"] == "many,other")
    assert folder.texts.calls == 301


def test_what_a_folder_may_hold_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: memory, to a folder that somebody fills."""
    monkeypatch.setattr(label_files, "SETS_MAX", 2)
    monkeypatch.setattr(label_files, "PROMPTS_MAX", 5)
    folder = Folder(tmp_path)
    for name in ("b.txt", "c.txt"):
        folder.write(name, "dog\ncat")
    folder.read()
    folder.write("a.txt", "dog")
    assert folder.read().sets.facts()["clip_label_sets"] == "b,c"
    assert folder.sets.facts()["clip_label_set.a"] == "there are 2 label sets already, as many as are allowed"
    (folder.files / "b.txt").unlink()
    assert folder.read().labels("a") == ["dog"]
    folder.write("c.txt", "1\n2\n3\n4\n5\n6")
    assert "it has 6 texts; allowed: 5" in folder.read().sets.facts()["clip_label_set.c"]
    folder.write("c.json", '{"labels": ["dog"]}')
    assert "c.json and c.txt are both there" in folder.read().sets.facts()["clip_label_set.c"]
    assert folder.labels("c") == ["dog", "cat"]


def test_clients_ask_for_a_label_set_by_its_name(onnx_node: Node) -> None:
    """Lost otherwise: albums by one's own words, without every client knowing them."""
    photo = encoded(picture(GREEN))
    place = {"labels": {"place": ["a photo of a landscape"], "art": ["an abstract painting"]}}
    save(
        onnx_node.data / "labels" / "places.json",
        json.dumps(place | {"none": ["a photo of an animal", "a photo of a bird"]}),
    )
    onnx_node.reload()
    response = in_time(lambda: onnx_node.ask("clip_classify", photo, label_set="places"))
    [best, *_] = json.loads(response.result)["labels"]
    assert best["label"] == "place" and best["score"] > 0.5 and float(response.meta["none_score"]) < 0.5
    assert (response.result_schema, response.meta["label_set"]) == ("labels_v1", "places")
    for colour in (RED, BLUE):
        response = onnx_node.ask("clip_classify", encoded(picture(colour)), label_set="places")
        assert json.loads(response.result)["labels"] == [] and response.meta["labels_count"] == "0"
        assert float(response.meta["none_score"]) > 0.5
    assert onnx_node.result("clip_classify", photo, label_set="places", min_score="1")["labels"] == []
    assert len(onnx_node.result("clip_classify", photo, min_score="0.9")["labels"]) <= 1  # of ImageNet's too
    for meta, said in (
        ({"label_set": "place"}, "meta label_set: 'place' is unknown; allowed: places"),
        ({"label_set": "../clip"}, "meta label_set: '../clip' is unknown; allowed: places"),
        (
            {"label_set": "places", "labels": '["dog"]'},
            "meta label_set: it is given with labels; allowed: one of the two",
        ),
        ({"label_set": "places", "min_score": "2"}, "meta min_score: '2'; allowed: a number from 0 to 1"),
    ):
        response = onnx_node.ask("clip_classify", photo, **meta)
        assert response.error.code == pb.ERROR_CODE_INVALID_ARGUMENT and response.error.message == said
    extra = onnx_node.stub.GetCapabilities(Empty()).extra
    assert (extra["clip_label_sets"], extra["clip_label_set.places"]) == ("places", "2 labels")

    save(onnx_node.data / "labels" / "places.json", "{")  # a typing error costs no answer
    onnx_node.reload()
    wait_until(
        lambda: "its file is not used" in onnx_node.stub.GetCapabilities(Empty()).extra["clip_label_set.places"], 20
    )
    assert onnx_node.result("clip_classify", photo, label_set="places")["labels"][0]["label"] == "place"
    save(onnx_node.data / "labels" / "places.json", json.dumps({"labels": {"somewhere": ["a photo of a landscape"]}}))
    onnx_node.reload()
    wait_until(lambda: onnx_node.stub.GetCapabilities(Empty()).extra["clip_label_set.places"] == "1 label")
    assert onnx_node.result("clip_classify", photo, label_set="places")["labels"][0]["label"] == "somewhere"
    (onnx_node.data / "labels" / "places.json").unlink()
    onnx_node.reload()
    wait_until(lambda: not onnx_node.stub.GetCapabilities(Empty()).extra["clip_label_sets"])
    assert "is unknown" in onnx_node.ask("clip_classify", photo, label_set="places").error.message


def test_a_long_label_set_is_computed_without_anybody_waiting(watched: Any, tmp_path: Path) -> None:
    """Lost otherwise: search and import, for the hour that a new set of thousands takes."""
    backend, stub = watched
    clip = backend.daemon._models.clip
    folder = Folder(tmp_path)
    model: Any = SimpleNamespace(model_id="tiny", dim=64, logit_scale=100.0)
    folder.sets = label_files.OperatorSets(folder.files, tmp_path / "c", model, ["a {}."])
    folder.write("many.txt", "\n".join(f"thing {i}" for i in range(320)))
    with concurrent.futures.ThreadPoolExecutor(3) as clients:
        backend.gate = backend.text_gate = turnstile = Turnstile()
        reading = clients.submit(folder.sets.read, clip.encoder(backend.daemon.engine))
        assert backend.busy.wait(LIMIT_S)
        query = clients.submit(one, stub, "clip_embed", b"a red bicycle")
        photo = clients.submit(one, stub, "clip_image_embed", encoded(picture(RED)))
        wait_until(lambda: queued(backend.daemon, " text") == queued(backend.daemon, " image") == 1)
        turnstile.release(8)  # of more than forty batches
        assert query.result(LIMIT_S).result and photo.result(LIMIT_S).result
        turnstile.set()
        reading.result()
    assert sum(count for kind, count in backend.batches if kind == "text") == 321 and len(backend.batches) > 40
    assert folder.labels("many") == [f"thing {i}" for i in range(320)]


# --- scenes --------------------------------------------------------------------------------------------------------


def test_scenes_that_go_to_the_species_are_weighed_together() -> None:
    """Lost otherwise: a photograph that is a bit of a bird and a bit of an animal, and so called an object."""
    table = label_files.parse_scenes(
        {"cat": {"species": True}, "dog": {"species": True}, "car": {}, "bus": {"prompts": ["a", "b"]}}
    )
    found = label_files.SceneSet(table, np.eye(5, 16, dtype=np.float32), 1.0)
    assert found.resolve([("car", 0.4), ("cat", 0.35), ("dog", 0.25), ("bus", 0.0)]) is None
    assert found.resolve([("cat", 0.45), ("car", 0.3), ("bus", 0.25), ("dog", 0.0)]) == ("car", 0.3)
    assert set(UPSTREAM_SCENES) <= set(label_files.SCENES) and label_files.read_scenes("").choices.names == tuple(
        label_files.SCENES
    )
    assert {name for name in UPSTREAM_SCENES if label_files.SCENES[name].get("species")} == set(UPSTREAM_SCENES[:3])


def test_an_operators_own_scenes_decide_what_goes_to_the_species(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: routing that fits one's own library. The first table is that of the documents."""
    [block] = code_of("docs/species-and-labels.md", "Scenes", "json")
    assert label_files.parse_scenes(json.loads(block)).species == {"wildlife", "a photo of a plant"}
    own = {
        "paint": {"prompts": ["an abstract painting"], "species": True},
        "a beast": {"prompts": ["a photo of an animal"]},
    }
    (tmp_path / "scenes.json").write_text(json.dumps(own))
    node = Node(
        write_labels(tmp_path / "data"),
        CLIP_BACKEND="onnxrt",
        CLIP_MODEL=tiny_onnx,
        BIOCLIP_MODEL=tiny_onnx,
        LUMEN_SCENES=tmp_path / "scenes.json",
    ).ready()
    response = node.ask("smart_classify", encoded(picture(RED)))
    assert [row["label"] for row in json.loads(response.result)["labels"]] == ["a beast"]
    painting = node.ask("smart_classify", encoded(picture(COLOURS["an abstract painting"])))
    assert painting.meta["source"] == "bioclip_classification"
    assert node.stop() == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        ("[", "it is not JSON"),
        ("[]", "allowed: an object with 2 to 256 scenes"),
        ('{"a": {}}', "allowed: an object with 2 to 256 scenes"),
        ('{"a": {}, "b": []}', "'b': allowed: an object with prompts and species, if wanted"),
        ('{"a": {}, "b": {"specis": true}}', "'b': allowed: an object with prompts and species, if wanted"),
        ('{"a": {}, "b": {"species": 1}}', "'b': species: 1; allowed: true, false"),
        ('{"a": {}, "b": {"prompts": "x"}}', "'b': prompts: allowed: 1 to 100 texts"),
        ('{"a": {}, "a": {}}', "'a' appears twice"),
    ],
)
def test_a_bad_scenes_file_is_one_line_that_names_it(tmp_path: Path, content: str | None, said: str) -> None:
    """Lost otherwise: an operator's evening, or routing by a table that is not the one they wrote."""
    path = tmp_path / "scenes.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(errors.SettingError) as error:
        label_files.read_scenes(str(path))
    assert str(error.value) == f"LUMEN_SCENES={path}: {said}" or str(error.value).startswith(
        f"LUMEN_SCENES={path}: {said} ("
    )
    if content == "[]":
        node = Node(tmp_path, LUMEN_SCENES=path)
        assert node.ended() == 2
        node.stop()
        assert node.log.splitlines()[-1] == f"lumen-clip: LUMEN_SCENES={path}: {said}" and "Traceback" not in node.log
