"""Families of models beyond CLIP: SigLIP, SigLIP 2 and MobileCLIP."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
from google.protobuf.empty_pb2 import Empty
from PIL import Image

import backends
import client
import errors
import export
import labels
import preprocess
import tokenizer
import torch_backend
from settings import ModelOptions
from tests.families import (
    CONCEPTS,
    ENGLISH,
    RECIPE,
    SCRIPTS,
    SMALL_SIGLIP,
    gemma_files,
    known_drawings,
    seeded,
    squashed,
    t5_files,
    train_siglip,
)
from tests.hub import IMMICH_REPO, FakeHub, folder_content
from tests.kit import (
    NOWHERE,
    RED,
    Node,
    encoded,
    export_immich_from,
    load,
    one_model,
    picture,
    shared,
    wait_until,
    write_labels,
)
from tests.test_inputs import HOSTILE
from tests.test_tasks import TENSOR_META

# The recipes of OpenCLIP's tags: SigLIP, MobileCLIP, MobileCLIP2-S3 and -L-14, CLIP with 256 pixels.
RECIPES = {
    "siglip": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    "mobileclip": {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "resize_mode": "shortest"},
    "bilinear": {"interpolation": "bilinear"},
    "clip": {},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("side", [224, 256, 384, 512])
def test_each_familys_preprocessing_equals_openclips_to_the_last_bit(name: str, side: int) -> None:
    """Lost otherwise: vectors that drift from the model's, because its pictures are squashed or not bicubic."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    recipe = preprocess.Preprocess.from_config(RECIPES[name], side)
    transform = image_transform_v2(PreprocessCfg(size=side, **RECIPES[name]), is_train=False)
    for size in ((300, 240), (240, 301), (side, side), (30, 500), (1999, 1333), (side, 700)):
        data = encoded(picture(RED, size), "PNG")
        [pixels] = preprocess.decode_image(data, [recipe], 40_000_000, draft=False).values()
        expected = transform(Image.open(io.BytesIO(data))).numpy()
        assert np.array_equal(preprocess.normalize(pixels[None], recipe)[0], expected), size


def test_a_mean_may_be_one_number_for_all_channels() -> None:
    """Lost otherwise: a configuration that OpenCLIP takes."""
    assert preprocess.Preprocess.from_config({"mean": 0.5, "std": 0.25}).mean == (0.5, 0.5, 0.5)


@pytest.fixture(scope="session", params=["gemma", "t5", "t5 by transformers 5"])
def tokenizer_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `tokenizer.json` of each kind."""
    makers: dict[str, Any] = {
        "gemma": gemma_files,
        "t5": lambda folder: t5_files(folder, by_its_class=False),
        "t5 by transformers 5": lambda folder: t5_files(folder, by_its_class=True),
    }
    name = request.param
    return shared(tmp_path_factory, f"tokenizer-{name.replace(' ', '-')}", makers[name])


def hard_texts() -> list[str]:
    rng = np.random.default_rng(5)
    ranges = range(32, 0x250), range(0x370, 0x500), range(0x900, 0x1000), range(0x1E00, 0x2100), range(0xFE00, 0xFFE0)
    alphabet = [chr(c) for part in ranges for c in part] + ["😀", "中", "\u0301", "\u200d", "\ufe0f", "𠮷", " ", "\t"]
    controls = ["a <eos> b", "<bos>", "x<pad>", "<0x41>", "</s> end", "one\n\ntwo", "▁▁ ▁", "snake_case_name", "<h1>"]
    long = [" ".join(ENGLISH[:40]), "".join(SCRIPTS.values()), SCRIPTS["Thai"] * 30, "a " * 63, "a " * 64, "a " * 65]
    return [*HOSTILE, *SCRIPTS.values(), *controls, *long, *("".join(rng.choice(alphabet, 20)) for _ in range(2000))]


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace"])
def test_tokens_equal_openclips_for_each_kind_of_tokenizer(tokenizer_folder: Path, clean: str) -> None:
    """Lost otherwise: searches in one's own language that find something else, because their tokens differ."""
    from open_clip.tokenizer import HFTokenizer

    config = {"hf_tokenizer_name": "timm/ViT-B-32-SigLIP2-256", "tokenizer_kwargs": {"clean": clean}}
    ours = tokenizer.read_tokenizer(tokenizer_folder / "tokenizer.json", config, 64)
    texts = hard_texts()
    expected = HFTokenizer(tokenizer_folder, context_length=64, clean=clean)(texts).numpy()
    found = ours(texts)
    assert [t for t, a, b in zip(texts, found, expected, strict=True) if not np.array_equal(a, b)] == []
    assert found.max() <= ours.highest_id and found.shape == (len(texts), 64)
    # Our exports have no tokenizer_config.json.
    again = tokenizer.HubTokenizer(ours.to_json(), {}, 64, tokenizer.CLEANERS[clean])
    assert np.array_equal(again(texts), found)


def test_tokens_of_mobileclip_equal_openclips_with_each_cleaning(tiny_onnx: Path) -> None:
    """Lost otherwise: the same, for models with CLIP's vocabulary."""
    texts = hard_texts()
    for clean in ("canonicalize", "lower", "whitespace"):
        config = {"context_length": 77, "tokenizer_kwargs": {"clean": clean}}
        ours = tokenizer.read_tokenizer(tiny_onnx / "textual" / "tokenizer.json", config, 77)
        assert np.array_equal(ours(texts), open_clip.SimpleTokenizer(clean=clean)(texts).numpy()), clean


def test_cleaning_equals_openclips() -> None:
    """Lost otherwise: the same, before the tokenizer."""
    from open_clip.tokenizer import get_clean_fn

    for name, clean in tokenizer.CLEANERS.items():
        theirs = get_clean_fn(name)
        assert [text for text in hard_texts() if clean(text) != theirs(text)] == [], name


def test_a_tokenizer_that_is_not_the_models_is_refused_by_name(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: a library that is searched with the wrong tokens, where every text finds something."""
    gemma_files(tmp_path)
    siglip = {"hf_tokenizer_name": "timm/ViT-B-32-SigLIP2-256", "tokenizer_kwargs": {"clean": "canonicalize"}}
    of_clip, of_gemma = tiny_onnx / "textual" / "tokenizer.json", tmp_path / "tokenizer.json"
    content = json.loads(of_gemma.read_text())
    unpadded = tmp_path / "unpadded" / "tokenizer.json"
    unpadded.parent.mkdir()
    unpadded.write_text(json.dumps(content))
    unpadded.with_name("tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content | {"model": {"type": "BPE", "vocab": []}}))
    for path, config, complaint in (
        (of_clip, siglip, "it is CLIP's tokenizer, and the model needs timm/ViT-B-32-SigLIP2-256"),
        (of_gemma, {"context_length": 64}, "it is not CLIP's tokenizer, and the model needs CLIP's"),
        (tmp_path / "none.json", siglip, "no tokenizer.json that can be used (FileNotFoundError"),
        (damaged, siglip, "no tokenizer.json that can be used"),
        (unpadded, siglip, "the vocabulary lacks the padding token '[PAD]'"),
        (of_gemma, siglip | {"tokenizer_kwargs": {"clean": "upper"}}, "allowed: canonicalize, lower, whitespace"),
        (of_gemma, siglip | {"tokenizer_mode": "clips"}, "text towers with tokenizer_mode ('clips') are not supported"),
        (of_gemma, siglip | {"hf_model_name": "roberta-base"}, "text towers with hf_model_name ('roberta-base')"),
    ):
        with pytest.raises(errors.BackendError) as caught:
            tokenizer.read_tokenizer(path, config, 64)
        assert complaint in str(caught.value) and str(path.parent) in str(caught.value)
        assert "\n" not in str(caught.value)


# --- a SigLIP that was trained here --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "siglip", train_siglip)


@pytest.fixture(scope="session")
def siglip_onnx(tmp_path_factory: pytest.TempPathFactory, siglip: Path) -> Path:
    return shared(tmp_path_factory, "siglip-onnx", lambda folder: export.export(str(siglip), folder))


@pytest.fixture(scope="session")
def siglip_folders(tmp_path_factory: pytest.TempPathFactory, siglip: Path, siglip_onnx: Path) -> dict[str, Path]:
    """The same model for each backend: OpenCLIP's folder, our exports, and a folder as immich makes it."""
    int8 = shared(tmp_path_factory, "siglip-int8", lambda folder: export.export(str(siglip), folder, "int8"))
    immich = shared(tmp_path_factory, "siglip-immich", lambda folder: export_immich_from(siglip, folder))
    return {"torch": siglip, "fp32": siglip_onnx, "int8": int8, "immich": immich}


def opened(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: load(folder, "torch" if name == "torch" else "onnxrt") for name, folder in folders.items()}


def test_every_backend_recognises_held_out_drawings_in_three_languages(siglip_folders: dict[str, Path]) -> None:
    """Lost otherwise: meaning. Vectors can agree with each other and all be wrong."""
    _, held_out = known_drawings()
    pixels, truth = squashed(held_out), np.array([concept for _, concept in held_out])
    most_common = np.bincount(truth).max() / len(truth)
    shares: dict[str, list[float]] = {}
    for name, backend in opened(siglip_folders).items():
        assert backend.preprocess == RECIPE and not backend.open_length
        images = backend.encode_images(pixels)
        for language in range(3):
            texts = backend.encode_text(backend.tokenize([names[language] for names in CONCEPTS.values()]))
            shares.setdefault(name, []).append(float(np.mean((images @ texts.T).argmax(axis=1) == truth)))
    print(f"\ntop-1 of {len(truth)} drawings, {len(CONCEPTS)} concepts: {shares}; the commonest: {most_common:.2f}")
    assert shares["torch"] == shares["fp32"] == shares["immich"]
    assert np.allclose(shares["int8"], shares["torch"], atol=0.03)
    assert min(map(min, shares.values())) > 2 * most_common


def test_every_backend_agrees_with_openclip(siglip: Path, siglip_folders: dict[str, Path]) -> None:
    """Lost otherwise: a model that is nearly the one that its name says."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{siglip}")
    pictures = [Image.open(io.BytesIO(drawing.file(200))) for drawing, _ in known_drawings()[1][:8]]
    texts = ["ein Vogel", "", "a dog " * 80, SCRIPTS["Thai"], SCRIPTS["Emoji"], "Don't_stop!"]
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([transform(one) for one in pictures]), True).numpy()
        words = model.encode_text(open_clip.get_tokenizer(f"local-dir:{siglip}")(texts), True).numpy()
    pixels = np.stack([preprocess.decode_image(encoded(p, "PNG"), [RECIPE], 10**6, False)[RECIPE] for p in pictures])
    spaces = {}
    for name, backend in opened(siglip_folders).items():
        floor = 0.98 if name == "int8" else 0.9999
        assert np.sum(backend.encode_images(pixels) * images, axis=1).min() > floor, name
        for part in (slice(0, 1), slice(0, 6), slice(1, 3)):
            found = backend.encode_text(backend.tokenize(texts[part]))
            assert np.sum(found * words[part], axis=1).min() > floor, name
        spaces[name] = backend.space, backend.model_id
    assert spaces["torch"][0] == spaces["fp32"][0]
    assert len({space for space, _ in spaces.values()}) == 3 and spaces["int8"][1] == "siglip-int8"


def test_the_table_of_a_large_vocabulary_is_stored_small(siglip_folders: dict[str, Path]) -> None:
    """Lost otherwise: 800 MB of memory for the words of a hundred languages."""
    for name, kind in (("fp32", onnx.TensorProto.FLOAT16), ("int8", onnx.TensorProto.INT8)):
        graph = onnx.load(siglip_folders[name] / "textual" / "model.onnx").graph
        [table] = [tensor for tensor in graph.initializer if tensor.name.endswith("token_embedding.weight")]
        [reader] = [node for node in graph.node if table.name in node.input]
        assert (table.data_type, reader.op_type) == (kind, "Gather")


@pytest.fixture(scope="session")
def siglip_node(tmp_path_factory: pytest.TempPathFactory, siglip_onnx: Path) -> Iterator[Node]:
    data = tmp_path_factory.mktemp("siglip-data")
    (data / "labels").mkdir()
    content = {"labels": {names[0]: list(names) for names in CONCEPTS.values()}}
    (data / "labels" / "things.json").write_text(json.dumps(content))
    (data / "names.json").write_text(json.dumps([names[0] for names in CONCEPTS.values()]))
    for name in ("torch", "open_clip", "torchvision", "transformers"):
        (data / f"{name}.py").write_text(f"raise ImportError('{name} does not exist on this device')")
    settings = one_model(siglip_onnx, PYTHONPATH=data, CLIP_LABELS=data / "names.json", LUMEN_SEMANTIC="clip")
    node = Node(data, **settings).ready()
    yield node
    assert node.stop() == 0, node.log


def test_scores_are_a_softmax_or_the_models_own_probabilities(siglip_node: Node, siglip_onnx: Path) -> None:
    """Lost otherwise: "none of these" for models that can say so, or scores that other models do not have."""
    backend = load(siglip_onnx)
    assert backend.logit_bias is not None and backend.logit_bias < -1 and backend.logit_scale > 5
    drawing, concept = next(pair for pair in known_drawings()[1] if pair[1] == 0)
    names = [row[0] for row in CONCEPTS.values()]
    image = backend.encode_images(squashed([(drawing, concept)]))[0]
    file, given = drawing.file(96), json.dumps(names)
    vectors = labels.label_vectors(
        names, labels.names_recipe(1), lambda texts: backend.encode_text(backend.tokenize(texts))
    )
    logits = backend.logit_scale * vectors @ image
    softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    sigmoid = 1 / (1 + np.exp(-logits - backend.logit_bias))
    for meta in ({}, {"labels": given}):
        for score, expected in (("softmax", softmax), ("sigmoid", sigmoid)):
            answer = siglip_node.ask("clip_classify", file, topk="10", score=score, **meta)
            found = {row["label"]: row["score"] for row in json.loads(answer.result)["labels"]}
            assert np.allclose([found[name] for name in names], expected, atol=1e-4), (meta, score)
            assert answer.meta["score"] == score
    assert siglip_node.ask("clip_classify", file).meta["score"] == "softmax"
    assert abs(sum(softmax) - 1) < 1e-5 and abs(sum(sigmoid) - 1) > 0.01
    refused = siglip_node.ask("clip_classify", file, score="cosine").error.message
    assert refused == "meta score: 'cosine'; allowed: softmax, sigmoid"
    with client.LumenClient(siglip_node.address) as daemon:
        [capability] = [one for one in daemon.capabilities() if one.service_name == "clip"]
    assert capability.extra["clip_scores"] == "softmax,sigmoid"


def test_scores_of_an_operators_set_may_be_independent(siglip_node: Node) -> None:
    """Lost otherwise: the same, for a label set of the household."""
    drawing, _ = next(pair for pair in known_drawings()[1] if pair[1] == 0)
    wait_until(lambda: "things" in siglip_node.stub.GetCapabilities(Empty()).extra["clip_label_sets"])
    both = [
        siglip_node.result("clip_classify", drawing.file(96), topk="10", label_set="things", score=score, min_score="0")
        for score in ("softmax", "sigmoid")
    ]
    sums = [sum(row["score"] for row in answer["labels"]) for answer in both]
    assert abs(sums[0] - 1) < 1e-4 and abs(sums[1] - 1) > 0.01
    assert both[0]["labels"][0]["label"] == both[1]["labels"][0]["label"]


def test_a_model_without_a_bias_has_no_sigmoid(onnx_node: Node) -> None:
    """Lost otherwise: numbers that look like probabilities and are none."""
    message = onnx_node.ask("clip_classify", encoded(picture(RED)), score="sigmoid").error.message
    assert message == "meta score: 'sigmoid'; tiny has no bias; allowed: softmax"


def test_a_wrong_tokenizer_ends_the_start_with_one_line(siglip_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: an evening, or a library that nobody finds anything in."""

    def broken(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(siglip_onnx, folder)
        (folder / "manifest.json").unlink()
        return folder

    missing, cleaned, large = broken("missing"), broken("cleaned"), broken("large")
    (missing / "textual" / "tokenizer.json").unlink()
    config = json.loads((cleaned / "config.json").read_text())
    config["text_cfg"]["tokenizer_kwargs"]["clean"] = "none"
    (cleaned / "config.json").write_text(json.dumps(config))
    content = json.loads((large / "textual" / "tokenizer.json").read_text())
    content["model"]["vocab"]["onemore"] = highest = len(content["model"]["vocab"])
    (large / "textual" / "tokenizer.json").write_text(json.dumps(content))
    for folder, complaint, status in (
        (missing, f"lumen-clip: {missing}/textual/tokenizer.json: no tokenizer.json that can be used", 1),
        (cleaned, "clean='none' in tokenizer_kwargs; allowed: canonicalize, lower, whitespace", 1),
        (large, f"lumen-clip: CLIP_MODEL={large}: its tokenizer.json has ids up to {highest}, which its text", 2),
    ):
        node = Node(tmp_path / "data", **one_model(folder))
        assert node.ended() == status, node.log
        assert complaint in node.log and "Traceback" not in node.log, node.log


# --- MobileCLIP ----------------------------------------------------------------------------------------------------


def test_branches_for_training_are_merged_and_change_nothing(tmp_path: Path) -> None:
    """Lost otherwise: half of the speed of MobileCLIP, or its vectors."""
    text = {"width": 64, "heads": 2, "layers": 2}
    model = seeded("MobileCLIP2-S0", tmp_path / "s0", text_cfg=text)
    backend = torch_backend.TorchBackend(ModelOptions("CLIP", "torch", str(tmp_path / "s0"), tmp_path))
    assert backend.was_reparameterized and not backend.open_length
    assert backend.preprocess == preprocess.Preprocess.from_config(RECIPES["mobileclip"], 256)
    count = sum(1 for _ in backend.model.visual.parameters())
    assert count < sum(1 for _ in model.visual.parameters()) / 1.5
    pixels = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
    with torch.no_grad():
        expected = model.encode_image(torch.from_numpy(preprocess.normalize(pixels, backend.preprocess)), True)
        words = model.encode_text(torch.from_numpy(backend.tokenize(["a dog", "a photo of a cat on a beach"])), True)
    assert np.sum(backend.encode_images(pixels) * expected.numpy(), axis=1).min() > 0.99999
    found = backend.encode_text(backend.tokenize(["a dog", "a photo of a cat on a beach"]))
    assert np.sum(found * words.numpy(), axis=1).min() > 0.99999
    export.export(str(tmp_path / "s0"), tmp_path / "onnx", tower="image")
    kinds = {node.op_type for node in onnx.load(tmp_path / "onnx" / "visual" / "model.onnx").graph.node}
    assert "Gelu" in kinds and "Erf" not in kinds


@pytest.mark.parametrize("no_causal_mask", [False, True])
def test_text_towers_run_at_the_length_that_is_right_for_them(tmp_path: Path, no_causal_mask: bool) -> None:
    """Lost otherwise: vectors of towers that also read the padding, or six times the time for those that do not."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    config = {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": SMALL_SIGLIP["vision_cfg"],
        "text_cfg": {**text, "no_causal_mask": no_causal_mask},
    }
    folder = tmp_path / "mobile"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": RECIPES["mobileclip"]})
    )
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    assert export.main(["--model", str(folder), "--to", str(tmp_path / "onnx")]) == 0
    texts = ["a", "a dog on the beach", "word " * 100]
    with torch.no_grad():
        expected = model.encode_text(open_clip.SimpleTokenizer()(texts), True).numpy()
    for backend in (load(folder, "torch"), load(tmp_path / "onnx")):
        assert backend.open_length is not no_causal_mask
        for at, text_of in enumerate(texts):
            found = backend.encode_text(backend.tokenize([text_of]))[0]
            assert found @ expected[at] > 0.99999
        assert np.sum(backend.encode_text(backend.tokenize(texts)) * expected, axis=1).min() > 0.99999
        assert backend.logit_bias is None
    assert json.loads((tmp_path / "onnx" / "manifest.json").read_text())["logit_bias"] is None
    assert backends.self_test(load(tmp_path / "onnx")) > 0.9999


def test_a_file_of_weights_is_read_by_the_recipe_of_its_architecture() -> None:
    """Lost otherwise: OpenCLIP knows the recipe of a tag, but takes CLIP's for the same weights in a file."""
    assert torch_backend._recipe_of("ViT-B-16-SigLIP2")["resize_mode"] == "squash"
    assert torch_backend._recipe_of("MobileCLIP2-S0")["mean"] == (0.0, 0.0, 0.0)
    assert torch_backend._recipe_of("ViT-B-32")["mean"] == preprocess.OPENAI_MEAN


# --- the photo app's search space ----------------------------------------------------------------------------------


def test_the_apps_tensors_are_taken_as_its_hub_takes_them(tmp_path: Path) -> None:
    """Lost otherwise: the app's search with SigLIP 2, whose app sends tensors to a service of that name alone."""
    folder = tmp_path / "siglip2"
    vision = {**SMALL_SIGLIP["vision_cfg"], "image_size": 224, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    config = {"embed_dim": 64, "init_logit_bias": -10, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": RECIPES["siglip"]})
    )
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    names = tmp_path / "names.json"
    names.write_text('["a dog", "a cat"]')
    settings = {"CLIP_MODEL": folder, "BIOCLIP_BACKEND": "none", "CLIP_LABELS": names, "LUMEN_SEMANTIC": "clip"}
    node = Node(tmp_path / "data", **settings, LUMEN_JPEG_DRAFT=0).ready()
    try:
        with client.LumenClient(node.address) as daemon:
            services = {one.service_name: {task.name: task for task in one.tasks} for one in daemon.capabilities()}
        assert set(services["siglip"]) == {"semantic_image_embed", "semantic_text_embed"}
        assert not any("semantic" in name for name in services["clip"])
        assert services["siglip"]["semantic_image_embed"].tensor_preprocess_id == preprocess.SIGLIP_TENSOR
        assert services["clip"]["clip_image_embed"].tensor_preprocess_id == ""
        meta = TENSOR_META | {"lumen.preprocess.id": preprocess.SIGLIP_TENSOR, "service": "siglip"}
        answers = []
        for number, photo in enumerate(export.sample_pictures(5)):
            small = photo.resize((224, 224), Image.Resampling.BILINEAR)
            tensor = ((np.asarray(small, np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)
            by_tensor = node.result("semantic_image_embed", tensor.tobytes(), "application/octet-stream", **meta)
            raw = node.result("semantic_image_embed", encoded(photo, "PNG"))
            assert np.dot(by_tensor["vector"], raw["vector"]) >= 0.995, number
            exact = node.result("semantic_image_embed", encoded(small, "PNG"))
            assert np.dot(by_tensor["vector"], exact["vector"]) > 0.99999
            answers.append((by_tensor["model_id"], raw["model_id"]))
        assert {name for pair in answers for name in pair} == {"siglip2"}
        other = {**meta, "lumen.preprocess.id": preprocess.BIOCLIP_TENSOR}
        refused = node.ask("semantic_image_embed", tensor.tobytes(), "application/octet-stream", **other)
        assert "lumen.preprocess.id" in refused.error.message
        assert "takes raw" in node.ask("clip_image_embed", tensor.tobytes(), "", **meta).error.message
    finally:
        assert node.stop() == 0, node.log


# --- several models on one data folder ------------------------------------------------------------------------------


def test_a_daemon_changes_its_model_and_back(
    tmp_path: Path, hub: FakeHub, siglip: Path, siglip_onnx: Path, tiny_onnx: Path
) -> None:
    """Lost otherwise: labels and vectors of the model before, or hours of computing after each change."""
    hub.repos["immich-app/ViT-B-32-SigLIP2-256__webli"] = folder_content(siglip_onnx)
    hub.repos["timm/ViT-B-32-SigLIP2-256"] = folder_content(siglip)
    hub.repos[IMMICH_REPO] = folder_content(tiny_onnx)
    names = [row[0] for row in CONCEPTS.values()]
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "scenes.json").write_text(json.dumps({"a clock": {"species": True}, "a heart": {}}))
    clock, heart = (
        next(drawing.file(96) for drawing, concept in known_drawings()[1] if names[concept] == name)
        for name in ("a clock", "a heart")
    )
    laion, siglip2 = "ViT-B-32:laion2b_s34b_b79k", "ViT-B-32-SigLIP2-256:webli"
    first: dict[str, list[Any]] = {}
    for model, species_model, backend, endpoint in (
        (siglip2, tiny_onnx, "onnxrt", hub.url),
        (laion, siglip_onnx, "onnxrt", hub.url),
        ("hf-hub:timm/ViT-B-32-SigLIP2-256", tiny_onnx, "torch", hub.url),
        (siglip2, tiny_onnx, "onnxrt", NOWHERE),
    ):
        node = Node(
            write_labels(tmp_path / "data"),
            CLIP_BACKEND=backend,
            CLIP_MODEL=model,
            CLIP_LABELS=tmp_path / "names.json",
            BIOCLIP_BACKEND="onnxrt",
            BIOCLIP_MODEL=species_model,
            LUMEN_SCENES=tmp_path / "scenes.json",
            HF_ENDPOINT=endpoint,
        ).ready()
        answers = [node.ask("clip_classify", photo) for photo in (clock, heart)]
        answers += [node.ask("smart_classify", photo) for photo in (clock, heart)]
        answers += [node.ask("clip_image_embed", clock), node.ask("clip_embed", b"eine Uhr")]
        assert node.stop() == 0
        assert not any(answer.error.message for answer in answers), answers
        if model != laion:
            best = [json.loads(answer.result)["labels"][0]["label"] for answer in answers[:4]]
            assert best[:2] == ["a clock", "a heart"] and best[3] == "a heart"
            assert [answer.meta["source"] for answer in answers[2:4]] == [
                "bioclip_classification",
                "scene_classification",
            ]
        found = [(answer.result, answer.meta.get("space")) for answer in answers]
        assert first.setdefault(model, found) == found
    assert "computing the text vectors" not in node.log
    spaces = {model: found[-1][1] for model, found in first.items()}
    assert spaces[siglip2] == spaces["hf-hub:timm/ViT-B-32-SigLIP2-256"] != spaces[laion]
