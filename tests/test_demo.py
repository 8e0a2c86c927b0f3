"""The demo, whose answers mean something."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty

import backends
import export
import label_files
import labels
import model_files
import tasks
from gen import ml_service_pb2 as pb
from settings import ModelOptions, Settings, demo_environment
from tests.kit import (
    AS_IT_IS,
    DEMO,
    ROOT,
    UPSTREAM_SCENES,
    Drawing,
    Node,
    code_of,
    export_immich_from,
    in_time,
    load,
    resident_mb,
    run_client,
    save,
    shared,
    vectors_of,
    wait_until,
)


def openclip_of_demo(folder: Path) -> None:
    """The demo as an OpenCLIP folder: its towers hold OpenCLIP's parameters under their own names."""
    import onnx
    import torch

    state = {}
    for part in ("visual", "textual"):
        for tensor in onnx.load(DEMO / part / "model.onnx").graph.initializer:
            name = tensor.name.removesuffix(".T")
            value = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            if value.ndim == 3 and name != "model.attn_mask":  # the one that the exporter gave two more axes
                state["visual.class_embedding"] = value.flatten()
            elif name.startswith("model.") and name != "model.attn_mask":
                state[name.removeprefix("model.")] = value if name == tensor.name else value.T.contiguous()
    manifest = json.loads((DEMO / "manifest.json").read_text())
    state["logit_scale"] = torch.tensor(manifest["logit_scale"]).log()
    merges = json.loads((DEMO / "textual" / "tokenizer.json").read_text())["model"]["merges"]
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    folder.mkdir()
    path = folder.with_name("merges.txt.gz")
    path.write_bytes(gzip.compress("\n".join(["merges", *lines]).encode()))
    config = json.loads((DEMO / "config.json").read_text())
    config["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(path)}
    recipe = json.loads((DEMO / "visual" / "preprocess_cfg.json").read_text())
    content = {"model_cfg": config, "preprocess_cfg": {k: v for k, v in recipe.items() if k not in ("size", "mode")}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(state, folder / "open_clip_pytorch_model.bin")


@pytest.fixture(scope="session")
def demo_openclip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "demo-openclip", openclip_of_demo)


@pytest.fixture(scope="session", params=["onnxrt", "torch", "immich"])
def demo_backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> model_files.Backend:
    """The same model on each path: our towers, OpenCLIP's own code, and towers as immich makes them."""
    folder, runtime = DEMO, "onnxrt"
    if request.param != "onnxrt":
        folder, runtime = request.getfixturevalue("demo_openclip"), "torch"
    if request.param == "immich":
        openclip = folder
        folder = shared(tmp_path_factory, "demo-immich", lambda made: export_immich_from(openclip, made))
        runtime = "onnxrt"
    return backends.create_backend(ModelOptions("CLIP", runtime, str(folder), folder))


def ranking(backend: model_files.Backend, images: Any, names: list[str], recipe: labels.Recipe) -> Any:
    """int `[images, names]`: for each image the names, best first, as the daemon scores them."""
    texts = labels.label_vectors(names, recipe, lambda part: backend.encode_text(backend.tokenize(part)))
    return np.argsort(-images @ texts.T, axis=1)


def demo_names() -> list[str]:
    return json.loads((DEMO / "names.json").read_text())  # type: ignore[no-any-return]


def top1(backend: model_files.Backend, drawings: list[Drawing], files: list[bytes], draft: bool = False) -> float:
    names = demo_names()
    best = ranking(backend, vectors_of(backend, files, draft), names, labels.names_recipe(7))[:, 0]
    return float(np.mean([names[i] == drawing.name for i, drawing in zip(best, drawings, strict=True)]))


def test_every_backend_recognises_held_out_drawings(demo_backend: model_files.Backend, drawings: list[Drawing]) -> None:
    """Lost otherwise: meaning. Vectors can agree with each other and all be wrong."""
    names = demo_names()
    assert len(names) >= 800 and len(drawings) >= 800
    images = vectors_of(demo_backend, [drawing.file() for drawing in drawings])
    best = ranking(demo_backend, images, names, labels.names_recipe(7))[:, :5]
    hits = best == np.array([names.index(drawing.name) for drawing in drawings])[:, None]
    scenes = ranking(demo_backend, images, list(UPSTREAM_SCENES), AS_IT_IS)[:, 0]
    truths = [(UPSTREAM_SCENES[i], d.scene) for i, d in zip(scenes, drawings, strict=True) if d.scene]
    right = np.mean([found == truth for found, truth in truths])
    print(f"\ntop-1 {hits[:, 0].mean():.3f}, top-5 {hits.any(axis=1).mean():.3f}, scenes {right:.3f}")
    assert hits[:, 0].mean() >= 0.5
    assert hits.any(axis=1).mean() >= 0.75
    assert right >= 0.8


def test_scaled_decode_keeps_the_accuracy(drawings: list[Drawing]) -> None:
    """Lost otherwise: a faster import of a library in which less is found."""
    backend = backends.create_backend(ModelOptions("CLIP", "onnxrt", str(DEMO), DEMO))
    shown = drawings[::6]
    files = [drawing.file(640, "JPEG", quality=85) for drawing in shown]
    full, scaled = top1(backend, shown, files), top1(backend, shown, files, draft=True)
    print(f"\ntop-1 of {len(shown)}: full decode {full:.3f}, scaled {scaled:.3f}")
    assert scaled >= full - 0.02


def test_int8_keeps_the_accuracy_and_names_its_precision(
    demo_openclip: Path, drawings: list[Drawing], tmp_path: Path
) -> None:
    """Lost otherwise: a smaller, faster model in which less is found, or whose vectors get mixed with others."""
    export.export(str(demo_openclip), tmp_path / "int8", "int8", model_id="demo")
    exact, small = load(DEMO), load(tmp_path / "int8")
    assert (small.model_id, small.precision) == ("demo-int8", "int8") and small.space != exact.space
    size = sum((tmp_path / "int8" / part / "model.onnx").stat().st_size for part in ("visual", "textual"))
    assert size < 0.4 * sum((DEMO / part / "model.onnx").stat().st_size for part in ("visual", "textual"))
    shown = drawings[::2]
    files = [drawing.file() for drawing in shown]
    full, quantized = top1(exact, shown, files), top1(small, shown, files)
    print(f"\ntop-1 of {len(shown)}: fp32 {full:.3f}, int8 {quantized:.3f}")
    assert quantized >= full - 0.02
    together = vectors_of(small, files[:5])
    alone = np.concatenate([vectors_of(small, [file]) for file in files[:5]])
    assert np.array_equal(together, alone)  # a vector must not depend on who else asked


@pytest.fixture(scope="session")
def demo_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """`--demo` on a device without torch and without a network, by a user who has set up real models."""
    data = tmp_path_factory.mktemp("demo-data")
    for name in ("torch", "open_clip", "torchvision"):
        (data / f"{name}.py").write_text(f"raise ImportError('{name} does not exist on this device')")
    node = Node(data, ("--demo",), PYTHONPATH=data, CLIP_MODEL="hf-hub:of/mine", CLIP_BACKEND="torch").ready()
    yield node
    assert node.stop() == 0, node.log


def test_the_demo_answers_all_seven_tasks(demo_node: Node, drawings: list[Drawing]) -> None:
    """Lost otherwise: the first minute, in which people decide whether to go on."""
    capability = demo_node.stub.GetCapabilities(Empty())
    assert {task.name for task in capability.tasks} == {name for name in tasks.TASKS if "semantic" not in name}
    fox = (DEMO / "pictures" / "fox.png").read_bytes()
    assert demo_node.result("clip_classify", fox, topk="1")["labels"][0]["label"] == "fox"
    image, text = demo_node.result("clip_image_embed", fox), demo_node.result("clip_embed", b"a photo of a fox.")
    assert image["dim"] == text["dim"] == 128 and "demo" in image["model_id"]
    image, text = demo_node.result("bioclip_image_embed", fox), demo_node.result("bioclip_embed", b"Vulpes vulpes")
    house = demo_node.result("bioclip_embed", b"house")
    assert np.dot(image["vector"], text["vector"]) > np.dot(image["vector"], house["vector"])


def test_the_demo_says_what_it_is(demo_node: Node) -> None:
    """Lost otherwise: a real library filled with vectors of a toy."""
    said = [line for line in demo_node.log.splitlines() if "demo" in line and "must not be stored" in line]
    assert len(said) == 1 and "emoji" in said[0] and "WARNING" in said[0]
    extra = demo_node.stub.GetCapabilities(Empty()).extra
    assert 0.9999 < float(extra["clip_self_test"]) < 1.0001 and extra["bioclip_self_test"]
    settings = Settings.from_environment(demo_environment({"CLIP_BACKEND": "rknn"}))
    assert settings.clip_mdns_type == () and settings.clip.backend == "onnxrt"
    named = demo_environment({"CLIP_MDNS_TYPE": "_lumen._tcp.local."})
    assert Settings.from_environment(named).clip_mdns_type == ("_lumen._tcp.local.",)


def test_without_a_model_the_daemon_does_not_fall_back_to_the_demo(tmp_path: Path) -> None:
    """Lost otherwise: a week of photographs embedded by a toy because the network was down that morning."""
    node = Node(tmp_path).bound()
    assert node.ended() == 1
    assert node.stop() == 1
    assert "cannot download" in node.log and "demo" not in node.log


def test_smart_classify_names_the_drawn_fox_and_not_the_drawn_house(demo_node: Node) -> None:
    """Lost otherwise: the two halves of the daemon, or the way between them."""
    fox = demo_node.ask("smart_classify", (DEMO / "pictures" / "fox.png").read_bytes())
    assert fox.meta["source"] == "bioclip_classification"
    best = json.loads(fox.result)["labels"][0]["label"]
    assert best == "Animalia/Chordata/Mammalia/Carnivora/Canidae/Vulpes/vulpes/red fox"
    house = demo_node.ask("smart_classify", (DEMO / "pictures" / "house.png").read_bytes())
    assert house.meta["source"] == "scene_classification"
    assert json.loads(house.result)["labels"][0]["label"] == "a photo of a landscape"


def test_smart_classify_takes_the_right_way_for_most_drawings(demo_node: Node, drawings: list[Drawing]) -> None:
    """Lost otherwise: routing that works for the fox of the documents alone."""
    known = [drawing for drawing in drawings if drawing.scene][::2]
    asked = [
        pb.InferRequest(correlation_id=d.name, task="smart_classify", payload=d.file(), meta={"topk": "1"})
        for d in known
    ]
    right = 0
    for drawing, response in zip(known, demo_node.infer(*asked), strict=True):
        assert response.correlation_id == drawing.name and not response.error.message
        living = drawing.scene in UPSTREAM_SCENES[:3]
        right += response.meta["source"] == ("bioclip_classification" if living else "scene_classification")
    assert right / len(known) >= 0.85


def test_smart_classify_sends_plants_too_and_loses_nothing(drawings: list[Drawing]) -> None:
    """Lost otherwise: the flowers of a library, which upstream calls landscapes; or what it did tell right."""
    names = [drawing.name for drawing in drawings]  # in CLDR's order, which has like beside like

    def between(first: str, last: str, *without: str) -> set[str]:
        return set(names[names.index(first) : names.index(last) + 1]) - set(without)

    kingdom = {drawing.name: (drawing.species or "").split("/")[0] for drawing in drawings}
    groups = {
        "animals": {d.name for d in drawings if kingdom[d.name] == "Animalia" or d.scene in UPSTREAM_SCENES[:3]},
        "fungi": {name for name in names if kingdom[name] == "Fungi"},
        "plants": between("bouquet", "leafless tree", "rosette", "empty nest", "nest with eggs", "mushroom"),
        "others": between("baby", "family: woman, girl, girl") | between("bread", "ice"),
    }
    groups["others"] |= {drawing.name for drawing in drawings if drawing.scene in UPSTREAM_SCENES[3:]}
    assert {group: len(members) for group, members in groups.items()} == {
        **{"animals": 121, "fungi": 2, "plants": 25, "others": 912}
    }

    backend = load(DEMO)
    shown = [drawing for drawing in drawings if any(drawing.name in members for members in groups.values())]
    images = vectors_of(backend, [drawing.file() for drawing in shown])
    six = ranking(backend, images, list(UPSTREAM_SCENES), AS_IT_IS)[:, 0]
    before = [UPSTREAM_SCENES[i] if i >= 3 else None for i in six]  # None: to the species
    table = label_files.read_scenes("")
    vectors = labels.label_vectors(
        table.choices.texts(), label_files.PROMPTS, lambda part: backend.encode_text(backend.tokenize(part))
    )
    found = label_files.SceneSet(table, vectors, backend.logit_scale)
    resolved = [found.resolve(found.top(row, len(found))) for row in found.probabilities(images)]
    after = [scene and scene[0] for scene in resolved]

    def sent(answers: list[str | None], group: str) -> float:
        return float(np.mean([a is None for a, d in zip(answers, shown, strict=True) if d.name in groups[group]]))

    def right(answers: list[str | None]) -> float:
        expected = [
            (a, None if d.scene in UPSTREAM_SCENES[:3] else d.scene)
            for a, d in zip(answers, shown, strict=True)
            if d.scene
        ]
        return float(np.mean([answer == truth for answer, truth in expected]))

    for group in groups:
        print(f"\n{group}: {sent(before, group):.3f} to the species before, {sent(after, group):.3f} now", end="")
    print(f"\nthe documented scene or way: {right(before):.3f} before, {right(after):.3f} now")
    assert sent(after, "animals") >= sent(before, "animals")
    assert sent(after, "plants") >= 0.9 > 0.6 > sent(before, "plants")
    assert sent(after, "fungi") > sent(before, "fungi")
    assert sent(after, "others") <= 0.06 < 0.13 < sent(before, "others")
    assert right(after) >= right(before)


def add_garden(demo_node: Node) -> None:
    """The label set of the documents."""
    [block] = code_of("docs/species-and-labels.md", "Label sets of your own", "json")
    save(demo_node.data / "labels" / "garden.json", block)
    demo_node.reload()


def test_the_documented_label_set_answers_as_the_document_says(demo_node: Node) -> None:
    """Lost otherwise: the first set that somebody copies; and "none of these" that is a guess all the same."""
    add_garden(demo_node)
    answers = {}
    for name in ("lady-beetle", "bicycle", "house"):
        picture = (DEMO / "pictures" / f"{name}.png").read_bytes()
        response = in_time(lambda: demo_node.ask("clip_classify", picture, label_set="garden"))  # noqa: B023
        answers[name] = json.loads(response.result)["labels"]
        none = float(response.meta["none_score"])
        assert response.meta["label_set"] == "garden" and (none > 0.5) == (name == "house")
    assert [row["label"] for row in answers["lady-beetle"]] == ["small animal"]
    assert [row["label"] for row in answers["bicycle"]] == ["bicycle"] and answers["house"] == []


EXAMPLE = re.compile(r"^\$ (?:\.venv/bin/)?python client\.py (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
SCORE = re.compile(r"^ *([\d.]+)%  (.+)$", re.MULTILINE)


@pytest.mark.parametrize(
    ("document", "count"), [("README.md", 1), ("docs/species-and-labels.md", 6)], ids=["README", "species and labels"]
)
def test_the_client_prints_what_the_examples_of_the_documents_show(demo_node: Node, document: str, count: int) -> None:
    """A reader who repeats an example gets its answer."""
    add_garden(demo_node)
    fox = (DEMO / "pictures" / "fox.png").read_bytes()
    in_time(lambda: demo_node.ask("clip_classify", fox, label_set="garden"))
    blocks = re.findall(r"^```console\n(.*?)^```$", (ROOT / document).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    examples = [example for block in blocks for example in EXAMPLE.findall(block)]
    assert len(examples) == count
    for command, shown in examples:
        arguments = [str(ROOT / part) if part.endswith(".png") else part for part in shlex.split(command)]
        run = run_client(*arguments, address=demo_node.address)
        assert run.returncode == 0, run.stderr
        found, expected = SCORE.findall(run.stdout), SCORE.findall(shown)
        assert SCORE.sub("", run.stdout) == SCORE.sub("", shown), command  # nothing but scores and line breaks
        assert [label for _, label in found] == [label for _, label in expected], command
        scores = [float(score) for score, _ in expected]
        assert [float(score) for score, _ in found] == pytest.approx(scores, abs=0.05), command


def test_the_search_prints_what_the_example_of_the_readme_shows(
    demo_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer who repeats the example gets its answer, with the first search and with the next one."""
    [block] = [block for block in code_of("README.md", "Try the demo", "console") if "search.py" in block]
    command, _, shown = block.partition("\n")
    program, *arguments = shlex.split(command.removeprefix("$ .venv/bin/python "))
    assert (program, arguments) == ("search.py", ["gen/demo/pictures", "a bird"])
    monkeypatch.chdir(ROOT)
    for _ in range(2):
        run = run_client(*arguments, address=demo_node.address, program=program, XDG_CACHE_HOME=str(tmp_path))
        assert run.returncode == 0, run.stderr
        found, expected = ([line.split() for line in text.splitlines()] for text in (run.stdout, shown))
        assert [name for _, name in found] == [name for _, name in expected]
        scores = [float(score) for score, _ in expected]
        assert [float(score) for score, _ in found] == pytest.approx(scores, abs=0.0011)


def test_species_are_told_from_drawings(demo_node: Node, drawings: list[Drawing]) -> None:
    """Lost otherwise: the names of animals and plants, the half of the daemon that BioCLIP is there for."""
    rows = json.loads((DEMO / "species.json").read_text())
    assert len(rows) >= 100 and all(len(ranks) == 7 and all(ranks) and common for ranks, common in rows)
    shown = [drawing for drawing in drawings if drawing.species]
    asked = [pb.InferRequest(task="bioclip_classify", payload=d.file(), meta={"topk": "5"}) for d in shown]
    found = [{row["label"] for row in json.loads(r.result)["labels"]} for r in demo_node.infer(*asked)]
    assert np.mean([d.species in best for d, best in zip(shown, found, strict=True)]) >= 0.75


def test_a_text_finds_its_drawing_among_all(demo_node: Node, drawings: list[Drawing]) -> None:
    """Lost otherwise: search by words, which is what people keep embeddings for."""
    shown = drawings[::4]
    pictures = [pb.InferRequest(task="clip_image_embed", payload=d.file()) for d in shown]
    texts = [pb.InferRequest(task="clip_embed", payload=f"a photo of a {d.name}.".encode()) for d in shown]
    images = np.array([json.loads(r.result)["vector"] for r in demo_node.infer(*pictures)])
    queries = np.array([json.loads(r.result)["vector"] for r in demo_node.infer(*texts)])
    best = np.argsort(-queries @ images.T, axis=1)[:, :5]
    assert np.mean([i in row for i, row in enumerate(best)]) >= 0.75


def test_memory_stays_flat_over_3000_mixed_requests(demo_node: Node, drawings: list[Drawing]) -> None:
    """Lost otherwise: a board that has to be restarted every week of an import."""
    pictures = [d.file(96 * (1 + i % 9), ("PNG", "JPEG", "WEBP")[i % 3]) for i, d in enumerate(drawings[:90])]

    def ask(count: int, start: int) -> None:
        requests = []
        for i in range(start, start + count):
            if i % 3 == 0:
                text = f"a photo of a {drawings[i % 300].name} number {i % 300} " * (1 + i % 20)
                requests.append(pb.InferRequest(task=("clip_embed", "bioclip_embed")[i % 2], payload=text.encode()))
            else:
                payload = b"no image" if i % 50 == 1 else pictures[i % len(pictures)]
                task = ("clip_classify", "clip_image_embed", "bioclip_classify", "smart_classify")[i % 4]
                own = {"labels": json.dumps([f"{i} things", "a fox"])} if task == "clip_classify" and i % 8 == 0 else {}
                requests.append(pb.InferRequest(task=task, payload=payload, meta=own))
        responses = demo_node.infer(*requests)
        assert len(responses) == count and sum(bool(r.error.message) for r in responses) <= count // 40

    for start in (0, 400, 800):
        ask(400, start)  # what is kept on purpose fills up: buffers of every size, and the latest texts' vectors
    time.sleep(6)  # freed memory goes back to the system every five seconds
    settled = resident_mb(demo_node)
    for start in range(1200, 3200, 400):
        ask(400, start)
    wait_until(lambda: resident_mb(demo_node) < settled * 1.05)
    print(f"\nresident: {settled:.0f} MB after 1,200 requests, {resident_mb(demo_node):.0f} MB after 3,200")


def test_a_callers_own_labels_are_understood(demo_node: Node, drawings: list[Drawing]) -> None:
    """Lost otherwise: albums by one's own words."""
    own = ["fox", "house", "penguin", "lady beetle", "sunflower", "bicycle", "koala"]
    for name in own:
        photo = (DEMO / "pictures" / f"{name.replace(' ', '-')}.png").read_bytes()
        best = demo_node.result("clip_classify", photo, labels=json.dumps(own))["labels"]
        assert best[0]["label"] == name and best[0]["score"] > 0.5


def test_the_demo_is_small_and_its_pictures_have_licences() -> None:
    """Lost otherwise: a repository that nobody wants to clone, or may."""
    parts = ("visual", "textual", "config.json", "manifest.json", "names.json", "species.json", "README.md")
    files = [f for part in parts for f in ([DEMO / part] if (DEMO / part).is_file() else (DEMO / part).rglob("*.*"))]
    assert len(files) >= 9 and sum(file.stat().st_size for file in files) <= 12_000_000
    card = (DEMO / "README.md").read_text()
    train = (DEMO / "train.py").read_text()
    styles = re.findall('"([a-z0-9-]+)"', train.partition("TRAINED = (")[2].partition(")")[0])
    assert len(styles) >= 5
    for style in styles:
        row = rf"^\| `@iconify-json/{style}` [\d.]+ \| [^|]+ \| (Apache-2.0|MIT|CC-BY-4.0) \|"
        assert re.search(row, card, re.MULTILINE)
    section = card.partition("## Pictures")[2]
    assert "CC-BY-SA-4.0" in section and "CC-BY-4.0" in section
