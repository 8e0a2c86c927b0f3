"""`export.py`."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty
from PIL import Image

import backends
import errors
import export
import model_files
import preprocess
from settings import ModelOptions
from tests.kit import (
    COLOURS,
    GREEN,
    RED,
    SPECIES,
    TINY,
    Node,
    encoded,
    export_immich_from,
    load,
    picture,
    pixels_of,
    reference_vectors,
    write_labels,
)


def test_a_folder_that_is_not_what_its_manifest_says_is_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: vectors of a half-copied or mixed-up model, which look like any others."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_onnx, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == written - {"manifest.json"}
    assert load(folder).model_id == "tiny"
    for name in ("visual/model.onnx", "textual/tokenizer.json", "visual/preprocess_cfg.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b" ")
        with pytest.raises(errors.BackendError, match=f"{name} is not the file that manifest.json names"):
            load(folder)
        (folder / name).unlink()
        with pytest.raises(errors.BackendError, match=f"manifest.json names {name}, which is missing"):
            load(folder)
        (folder / name).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"logit_scale": float("nan")}))
    with pytest.raises(errors.SettingError, match="a logit scale of nan; allowed: above 0"):
        load(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(errors.SettingError, match=r"manifest\.json is of format 2; this version reads 1"):
        load(folder)


def test_a_machine_that_computes_other_vectors_is_refused_at_start(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: a library indexed by a broken runtime, which nobody notices until a search fails."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_onnx, folder)
    backend = load(folder)
    assert backends.self_test(backend) > 0.99999
    manifest = json.loads((folder / "manifest.json").read_text())
    picture = Image.open(io.BytesIO(base64.b64decode(manifest["golden"]["picture"])))
    assert picture.width != picture.height and len(manifest["golden"]["texts"]) == 2
    manifest["golden"]["text_vectors"].reverse()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(errors.BackendError, match=r"CLIP_MODEL=.*: self-test: cosine .* allowed: 0.999"):
        load(folder)


def test_the_space_changes_when_vectors_stop_being_comparable(tiny: Path, tiny_onnx: Path, tiny_immich: Path) -> None:
    """Lost otherwise: the one sign by which an index sees that half of it was made by another model."""
    torch_space, onnx_space, immich_space = load(tiny, "torch").space, load(tiny_onnx).space, load(tiny_immich).space
    assert torch_space == onnx_space and re.fullmatch("[0-9a-f]{12}", onnx_space)
    assert immich_space != onnx_space and immich_space == load(tiny_immich).space  # nothing tells where it came from
    recipe = preprocess.Preprocess()
    assert model_files.space_of("a", recipe, "fp32") == model_files.space_of("a", recipe, "fp16")
    different = [("b", recipe, "fp32"), ("a", recipe, "int8"), ("a", preprocess.Preprocess(size=256), "fp32")]
    assert len({model_files.space_of(*one) for one in [("a", recipe, "fp32"), *different]}) == 4


def test_every_answer_and_the_capability_carry_the_space(node: Node) -> None:
    """Lost otherwise: the same, for clients."""
    extra = node.stub.GetCapabilities(Empty()).extra
    photo = encoded(picture(RED))
    for task, payload in (("clip_embed", b"a dog"), ("clip_image_embed", photo), ("clip_classify", photo)):
        assert node.ask(task, payload).meta["space"] == extra["clip_space"]
    for task, payload in (("bioclip_embed", b"a dog"), ("bioclip_image_embed", photo), ("smart_classify", photo)):
        assert node.ask(task, payload).meta["space"] == extra["bioclip_space"]


def test_an_export_that_falls_short_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lost otherwise: a wrong model, carried to a board and believed."""
    monkeypatch.setitem(export.FLOORS, "fp32", export.Floors(1.1, 0.999))
    to = tmp_path / "models" / "tiny"
    assert export.main(["--model", str(tiny), "--to", str(to)]) == 1
    assert "differs from OpenCLIP" in capsys.readouterr().err
    assert list(to.parent.iterdir()) == []


def test_export_refuses_by_name_what_it_cannot_do(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lost otherwise: an hour of somebody's evening."""
    import open_clip
    import torch

    small = tmp_path / "small"
    shutil.copytree(tiny, small)
    config = json.loads((small / "open_clip_config.json").read_text())
    text: Any = TINY["text_cfg"]
    config["model_cfg"] = {**TINY, "text_cfg": {**text, "vocab_size": 49407}}
    (small / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(open_clip.CLIP(**config["model_cfg"]).state_dict(), small / "open_clip_pytorch_model.bin")
    hugging_face = tmp_path / "hugging-face"
    shutil.copytree(tiny, hugging_face)
    of_hub = {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}
    config["model_cfg"] = {**TINY, "text_cfg": {**text, **of_hub}}
    (hugging_face / "open_clip_config.json").write_text(json.dumps(config))
    for model, to, complaint in (
        (str(small), tmp_path / "new", "its tokenizer has ids up to 49407, and its embedding table 49407 rows"),
        (str(hugging_face), tmp_path / "new", "text towers with hf_model_name ('roberta-base') are not supported"),
        (str(tiny), tiny, "it exists already and is not an empty folder"),
        ("ViT-B-33:laion2b", tmp_path / "new", "--model ViT-B-33:laion2b: OpenCLIP has no architecture 'ViT-B-33'"),
        ("ViT-B-32:laion9b", tmp_path / "new", "'laion9b' is neither a file nor a tag of ViT-B-32"),
        ("nowhere", tmp_path / "new", "--model nowhere: not a folder"),
    ):
        assert export.main(["--model", model, "--to", str(to)]) == 1
        said = capsys.readouterr().err
        assert said.startswith("export: ") and complaint in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_an_export_can_be_one_tower_checked_on_ones_own_photographs(
    tiny: Path, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lost otherwise: half a gigabyte of text tower on a device that has one already."""
    photos, to = tmp_path / "photos", tmp_path / "image"
    photos.mkdir()
    for name, color in (("a.jpg", RED), ("b.jpg", GREEN)):
        picture(color, (2000, 900)).save(photos / name)
    asked = ["--model", str(tiny), "--to", str(to), "--tower", "image", "--photos", str(photos), "--model-id", "tiny"]
    assert export.main(asked) == 0
    assert "image cosine to OpenCLIP, 2 samples: mean" in capsys.readouterr().out
    assert {path.name for path in to.iterdir()} == {"visual", "config.json", "manifest.json"}
    with pytest.raises(SystemExit):
        export.main([*asked, "--labels"])
    assert "--labels: the text tower computes them" in capsys.readouterr().err
    options = ModelOptions("CLIP", "onnxrt", str(to), tmp_path)
    with pytest.raises(errors.SettingError, match=r"has no textual/model.onnx.*CLIP_ONNX_TEXT can name one elsewhere"):
        backends.create_backend(options)
    text = str(tiny_onnx / "textual" / "model.onnx")
    whole = backends.create_backend(dataclasses.replace(options, onnx_text=text))
    assert whole.model_id == "tiny" and whole.self_test_cosine > 0.9999
    shutil.rmtree(photos)
    photos.mkdir()
    assert export.main([*asked[:3], str(tmp_path / "none"), *asked[4:]]) == 1
    assert "no pictures in it" in capsys.readouterr().err


def test_folders_of_immichs_newer_exporter_load_unchanged(
    tiny: Path, tmp_path: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the models that people have on their disks already; the older form is `tiny_immich`."""
    import onnx

    export_immich_from(tiny, tmp_path / "newer", newer=True)
    path = tmp_path / "newer" / "textual" / "model.onnx"
    model = onnx.load(path)
    table = next(tensor for tensor in model.graph.initializer if "token_embedding" in tensor.name)
    half = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(table).astype(np.float16), "half")
    model.graph.initializer.append(half)
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["half"], [table.name], to=onnx.TensorProto.FLOAT))
    model.graph.initializer.remove(table)
    onnx.save_model(model, path, save_as_external_data=True, location="weights.data")
    backend = load(tmp_path / "newer")
    files = [encoded(picture(color, (300, 200)), "PNG") for color in COLOURS.values()]
    found = backend.encode_images(np.stack([pixels_of(file) for file in files]))
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    assert np.sum(found * reference_vectors(reference, pictures=pictures), axis=1).min() > 0.9999
    texts = list(COLOURS)
    found = backend.encode_text(backend.tokenize(texts))
    assert np.sum(found * reference_vectors(reference, texts=texts), axis=1).min() > 0.9999


def test_the_text_tower_of_species_is_not_loaded_until_a_text_comes(tiny_onnx: Path) -> None:
    """Lost otherwise: half a gigabyte for BioCLIP-2's, which only bioclip_embed needs once the labels have vectors."""
    backend = load(tiny_onnx)
    before = backend.encode_text(backend.tokenize(["a dog"]))
    backend.unload_text()

    assert backend.encode_images(pixels_of(encoded(picture(RED)))[None]).shape == (1, backend.dim)
    assert np.array_equal(backend.encode_text(backend.tokenize(["a dog"])), before)


def test_labels_of_ones_own_replace_imagenet_and_the_tree_of_life(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: a daemon for a household that has no need of 118 breeds of dog."""
    data = write_labels(tmp_path / "data")
    (tmp_path / "names.json").write_text(json.dumps([*COLOURS, "one, two"]))
    (tmp_path / "species.json").write_text(json.dumps(SPECIES[:1]))
    models = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_MODEL": tiny_onnx}
    own = {"CLIP_LABELS": tmp_path / "names.json", "BIOCLIP_LABELS": tmp_path / "species.json"}
    node = Node(data, **models, **own).ready()
    try:
        best = node.result("clip_classify", encoded(picture(GREEN)), topk="50")["labels"]
        assert {row["label"] for row in best} == {*COLOURS, "one, two"}
        assert best[0]["label"] == "a photo of a landscape"
        assert len(node.result("bioclip_classify", encoded(picture(RED)), topk="50")["labels"]) == 1
    finally:
        assert node.stop() == 0
    (tmp_path / "names.json").write_text('{"0": "a"}')
    node = Node(data, **models, **own)
    assert node.ended() == 2 and node.stop() == 2
    assert f"lumen-clip: CLIP_LABELS={own['CLIP_LABELS']}: allowed: a JSON list of names" in node.log
