"""What each task answers, over a real socket."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

import preprocess
from gen import ml_service_pb2 as pb
from tests.kit import BLUE, COLOURS, GREEN, IMAGENET, RED, SPECIES, Node, encoded, picture, reference_vectors


@pytest.mark.parametrize("prefix", ["clip", "bioclip"])
def test_embeddings_equal_openclips_own(node: Node, reference: Any, prefix: str) -> None:
    """Lost otherwise: vectors that can be compared with anything else that OpenCLIP made."""
    pictures = [picture(RED, (500, 333)), picture(GREEN, (224, 500)), picture(BLUE, (640, 480))]
    for image, expected in zip(pictures, reference_vectors(reference, pictures=pictures), strict=True):
        result = node.result(f"{prefix}_image_embed", encoded(image, "PNG"))
        assert result["dim"] == len(result["vector"]) == 64
        assert np.dot(result["vector"], expected) > 0.9999
        assert abs(np.linalg.norm(result["vector"]) - 1) < 1e-5
    for text in ("a red bicycle", "“It’s” a caf\u00e9 &amp; ☕", "word " * 200):
        vector = node.result(f"{prefix}_embed", text.encode(), "text/plain; charset=utf-8")["vector"]
        assert np.dot(vector, reference_vectors(reference, texts=[text])[0]) > 0.9999


def test_answers_have_the_form_that_clients_compare_by_string(node: Node) -> None:
    """Lost otherwise: every answer; the Go SDK compares result_mime exactly."""
    response = node.ask("clip_classify", encoded(picture(RED)), "image/webp")
    assert (response.result_mime, response.result_schema) == ("application/json;schema=labels_v1", "labels_v1")
    assert response.is_final and (response.seq, response.total, response.offset) == (0, 1, 0)
    assert set(json.loads(response.result)) == {"labels", "model_id"}
    assert dict(response.meta).keys() >= {"labels_count", "source", "lat_ms", "model_id"}
    assert response.meta["lat_ms"].isdigit()
    response = node.ask("clip_embed", b"a dog", "text/plain")
    assert (response.result_mime, response.result_schema) == ("application/json;schema=embedding_v1", "embedding_v1")
    assert set(json.loads(response.result)) == {"vector", "dim", "model_id"}
    assert response.meta["dim"] == "64" and response.meta["model_id"] == json.loads(response.result)["model_id"]


@pytest.mark.parametrize("task", ["clip_embed", "clip_image_embed", "bioclip_embed", "bioclip_image_embed"])
def test_a_vector_comes_as_bytes_on_demand(node: Node, task: str) -> None:
    """Lost otherwise: time and bytes, where a client would only parse the numbers out of JSON again."""
    payload = encoded(picture(RED)) if "image" in task else b"a dog"
    vector = node.result(task, payload)["vector"]
    response = node.ask(task, payload, **{"lumen.output.kind": "tensor"})
    assert np.array_equal(np.frombuffer(response.result, "<f4"), np.array(vector, np.float32))
    assert (response.result_mime, response.result_schema) == ("application/octet-stream", "")
    form = {"dtype": "fp32", "shape": "[1,64]", "layout": "NCHW", "format": "contiguous", "byte_order": "little"}
    assert {"lumen.output.kind": "tensor"}.items() <= dict(response.meta).items()
    assert {f"lumen.output.tensor.{key}": value for key, value in form.items()}.items() <= dict(response.meta).items()
    assert response.meta["model_id"] and response.meta["space"] and response.meta["dim"] == "64"
    assert len(response.result) * 2.5 < len(node.ask(task, payload).result)
    refused = node.ask(task, payload, **{"lumen.output.kind": "xml"}).error
    assert "meta lumen.output.kind: 'xml'; allowed: json, tensor" in refused.message


def test_scores_are_the_models_own_softmax_over_all_labels(node: Node, reference: Any) -> None:
    """Lost otherwise: scores that mean the same as everybody's CLIP scores."""
    image = picture(GREEN)
    prompts = [f"a photo of a {name.split(',')[0]}." for name in IMAGENET.values()]
    logits = reference_vectors(reference, texts=prompts) @ reference_vectors(reference, pictures=[image])[0]
    logits *= reference[0].logit_scale.exp().item()
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = node.result("clip_classify", encoded(image, "PNG"))["labels"]
    assert len(best) == 5
    assert [row["score"] for row in best] == pytest.approx(sorted(expected, reverse=True)[:5], rel=1e-2)
    assert best[0]["label"] == list(IMAGENET.values())[int(expected.argmax())]


def test_smart_classify_goes_to_the_species_for_animals_and_to_the_scene_for_the_rest(node: Node) -> None:
    """Lost otherwise: the fox in the meadow is called a landscape, the meadow a fox."""
    for colour in (RED, BLUE):
        response = node.ask("smart_classify", encoded(picture(colour)), topk="2")
        assert response.meta["source"] == "bioclip_classification"
        rows = json.loads(response.result)["labels"]
        assert len(rows) == 2 and all(row["label"].count("/") == 7 for row in rows)
    response = node.ask("smart_classify", encoded(picture(GREEN)))
    assert response.meta["source"] == "scene_classification"
    assert [row["label"] for row in json.loads(response.result)["labels"]] == ["a photo of a landscape"]
    assert json.loads(response.result)["labels"][0]["score"] > 0.5


def test_a_caller_brings_labels_of_their_own(node: Node) -> None:
    """Lost otherwise: zero-shot classification, the very thing that CLIP is for."""
    own = json.dumps(["an animal", "a landscape", "a landscape", "a bird"])
    for colour, label in ((RED, "an animal"), (GREEN, "a landscape"), (BLUE, "a bird")):
        for _ in range(2):  # the second time from the LRU
            rows = node.result("clip_classify", encoded(picture(colour)), labels=own, prompt_template="a photo of {}")
            assert rows["labels"][0]["label"] == label and len(rows["labels"]) == 3
            assert sum(row["score"] for row in rows["labels"]) == pytest.approx(1, abs=1e-5)
    for bad in ("dog", "[]", '["dog", 3]', '["dog", " "]', json.dumps(["x"] * 257), "[" * 5000, '["\\ud800"]'):
        assert "meta labels" in node.ask("clip_classify", encoded(picture(RED)), labels=bad).error.message


def test_text_finds_the_picture_it_describes(node: Node) -> None:
    """Lost otherwise: search, which is what people keep embeddings for."""
    images = np.array([node.result("clip_image_embed", encoded(picture(c)))["vector"] for c in COLOURS.values()])
    for i, caption in enumerate(COLOURS):
        assert int((images @ node.result("clip_embed", caption.encode())["vector"]).argmax()) == i


def test_a_text_is_embedded_as_sent_and_wrapped_only_on_demand(torch_node: Node, reference: Any) -> None:
    """Lost otherwise: a search for "bird" becomes a search for something that nobody typed."""
    plain = torch_node.result("clip_embed", b"bird")["vector"]
    assert np.dot(plain, reference_vectors(reference, texts=["bird"])[0]) > 0.9999
    wrapped = torch_node.result("clip_embed", b"bird", prompt_template="a photo of a {}")["vector"]
    assert np.dot(wrapped, reference_vectors(reference, texts=["a photo of a bird"])[0]) > 0.9999
    assert "prompt_template" in torch_node.ask("clip_embed", b"bird", prompt_template="{} and {}").error.message


@pytest.mark.parametrize("key", ["topk", "TopK", "topK", "top_k", "top-k", "lumen.top_k"])
def test_every_spelling_of_top_k_is_read(torch_node: Node, key: str) -> None:
    """Lost otherwise: some generation of the app gets five labels when it asked for two."""
    photo = encoded(picture(RED))
    ask = pb.InferRequest(task="clip_classify", payload=photo, meta={key: " 2 "})
    assert len(json.loads(torch_node.infer(ask)[0].result)["labels"]) == 2
    for bad in ("0", "-1", "2.5", "five", "", "1e3", "\u0663"):
        ask.meta[key] = bad
        [response] = torch_node.infer(ask)
        assert response.error.code == pb.ERROR_CODE_INVALID_ARGUMENT and key in response.error.message
        assert not response.result and not response.result_mime
    ask.meta[key] = "9" * 5000
    assert len(json.loads(torch_node.infer(ask)[0].result)["labels"]) in (998, 999)  # "crane" stands once


def test_species_come_as_the_lineage_that_the_photo_app_parses(node: Node) -> None:
    """Lost otherwise: the app's field guide, which splits the label in eight slots, and its unique label table."""
    photo = encoded(picture(RED))
    rows = node.result("bioclip_classify", photo, "image/webp", topk="100", service="bioclip")["labels"]
    assert len(rows) == len(SPECIES) and len({row["label"] for row in rows}) == len(rows)
    assert all(0 <= row["score"] <= 1 for row in rows) and sum(row["score"] for row in rows) == pytest.approx(
        1, abs=1e-4
    )
    names = {row["label"] for row in rows}
    assert "Animalia/Chordata/Mammalia/Carnivora/Canidae/Vulpes/vulpes/red fox" in names
    assert "Animalia/Chordata/*/Cypriniformes/Cyprinidae/Carassius/auratus/Goldfish" in names
    assert "Plantae/Tracheo-phyta/Magnoliopsida/Rosales/Rosaceae/Rosa/canina/*" in names
    for label_format, expected in (("scientific", "Rosa canina"), ("common", "red fox"), ("common", "Rosa canina")):
        rows = node.result("bioclip_classify", photo, topk="100", label_format=label_format)["labels"]
        assert expected in {row["label"] for row in rows}
    assert len(node.result("bioclip_classify", photo)["labels"]) == 3
    assert "label_format" in node.ask("bioclip_classify", photo, label_format="latin").error.message


TENSOR_META = {
    "lumen.input.kind": "tensor",
    "lumen.tensor.dtype": "fp32",
    "lumen.tensor.shape": "[1,3,224,224]",
    "lumen.tensor.layout": "NCHW",
    "lumen.tensor.format": "contiguous",
    "lumen.tensor.byte_order": "little",
    "lumen.preprocess.id": "bioclip2_224_image_v1",
    "lumen.preprocess.skip": "true",
    "service": "bioclip",
}


def test_a_ready_made_tensor_gives_the_answer_of_its_picture(node: Node) -> None:
    """Lost otherwise: the photo app's fast path, which has no way back once a tensor is sent."""
    pixels = np.asarray(picture(RED, (224, 224)))
    values = preprocess.normalize(pixels[None], preprocess.Preprocess())
    expected = node.result("bioclip_image_embed", encoded(Image.fromarray(pixels), "PNG"))["vector"]
    for dtype, name in (("<f4", "fp32"), ("<f2", "fp16")):
        payload, meta = values.astype(dtype).tobytes(), TENSOR_META | {"lumen.tensor.dtype": name}
        request = pb.InferRequest(
            task="bioclip_image_embed", payload=payload, meta=meta, payload_mime="application/octet-stream"
        )
        [response] = node.infer(request)
        assert json.loads(response.result)["vector"] == pytest.approx(expected, abs=1e-6)
        assert np.array_equal(preprocess.pixels_from_tensor(payload, meta, preprocess.Preprocess()), pixels)
        request.task = "bioclip_classify"
        assert len(json.loads(node.infer(request)[0].result)["labels"]) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lumen.tensor.dtype": "int64"}, "lumen.tensor.dtype"),
        ({"lumen.tensor.shape": "[2,3,224,224]"}, "lumen.tensor.shape"),
        ({"lumen.tensor.shape": "[" * 3000}, "lumen.tensor.shape"),
        ({"lumen.tensor.layout": "NHWC"}, "lumen.tensor.layout"),
        ({"lumen.preprocess.id": "siglip2_base_patch16_224_image_v1"}, "lumen.preprocess.id"),
        ({"lumen.preprocess.skip": ""}, "lumen.preprocess.skip"),
        ({"lumen.input.kind": "video"}, "lumen.input.kind"),
        ({}, "payload"),  # NaN
        ({"lumen.tensor.dtype": "fp16"}, "payload"),  # twice as many bytes as it has
    ],
)
def test_a_tensor_with_wrong_meta_is_refused_by_name(torch_node: Node, change: dict[str, str], said: str) -> None:
    """Lost otherwise: a species name made of noise."""
    request = pb.InferRequest(
        task="bioclip_classify", payload=np.full(150528, np.nan, "<f4").tobytes(), meta=TENSOR_META | change
    )
    [response] = torch_node.infer(request)
    assert response.error.code == pb.ERROR_CODE_INVALID_ARGUMENT and said in response.error.message
