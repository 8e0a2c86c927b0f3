"""All tests. Each says what a user loses if it fails; they start real servers and use real sockets.

Meaning comes from a small CLIP that is trained here on coloured pictures (red is an animal, green a landscape, ...);
its true-size sisters have seeded random weights, for which shapes and numerical agreement are real.

    pytest -m "not big"    leaves out the true-size models (a minute and 2 GB)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import grpc
import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

import backends
import labels
import lumen_clip
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc

ROOT = Path(__file__).resolve().parent
NOWHERE = "http://127.0.0.1:9"  # no hub answers here: whoever asks it has broken a promise
SERVICE = "home_native.v1.Inference"

# --- models and data that the tests make -------------------------------------------------------------------------

COLOURS = {
    "a photo of an animal": (200, 30, 30),
    "a photo of a bird": (30, 30, 200),
    "a photo of an insect": (200, 200, 30),
    "a photo of a human-made object": (120, 120, 120),
    "a photo of a landscape": (30, 180, 30),
    "an abstract painting": (200, 30, 200),
}
RED, BLUE, GREEN = COLOURS["a photo of an animal"], COLOURS["a photo of a bird"], COLOURS["a photo of a landscape"]
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
SPECIES = [
    [["Animalia", "Chordata", "Mammalia", "Carnivora", "Canidae", "Vulpes", "vulpes"], "red fox"],
    [["Animalia", "Chordata", "", "Cypriniformes", "Cyprinidae", "Carassius", "auratus"], "Goldfish"],
    [["Plantae", "Tracheo/phyta", "Magnoliopsida", "Rosales", "Rosaceae", "Rosa", "canina"], ""],
    *(
        [["Animalia", "Arthropoda", "Insecta", "Diptera", "Muscidae", f"Musca{i}", "domestica"], f"fly {i}"]
        for i in range(30)
    ),
]
IMAGENET = {str(i): f"thing{i}, Res {i}" for i in range(1000)} | {
    "0": "tench, Tinca tinca",
    "134": "crane",
    "517": "crane",
}


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (300, 240), seed: int = 1) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3)) + np.array(colour)
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def train_tiny(folder: Path) -> None:
    """Contrastive training of a two-layer CLIP on the six colours and their captions; seeded, about ten seconds."""
    import open_clip
    import torch

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    recipe = {"mean": backends.OPENAI_MEAN, "std": backends.OPENAI_STD, "interpolation": "bicubic"}
    config = {"model_cfg": TINY, "preprocess_cfg": {**recipe, "resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CLIP(**TINY)
    texts = open_clip.SimpleTokenizer()(list(COLOURS))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    target = torch.arange(len(COLOURS)).repeat_interleave(2)
    for step in range(80):
        pixels = [np.asarray(picture(c, (224, 224), 2 * step + i)) for c in COLOURS.values() for i in range(2)]
        images = torch.from_numpy(backends.normalize(np.stack(pixels), backends.Preprocess()))
        image_vectors, text_vectors = model.encode_image(images, True), model.encode_text(texts, True)
        loss = torch.nn.functional.cross_entropy(model.logit_scale.exp() * image_vectors @ text_vectors.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")


def export_onnx(model: Any, folder: Path, immich: bool) -> None:
    """A folder as immich's exporter makes it (batch 1, float NCHW, int32 ids), or with open batch and length."""
    import open_clip
    import torch

    class Images(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.mean, self.std = (
                torch.tensor(x).view(1, 3, 1, 1) for x in (backends.OPENAI_MEAN, backends.OPENAI_STD)
            )

        def forward(self, image: Any) -> Any:
            if not immich:
                image = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
            return self.model.encode_image(image, normalize=True)

    class Texts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, text: Any) -> Any:
            m, length = self.model, text.shape[1]
            x = m.token_embedding(text) + m.positional_embedding[:length]
            x = m.ln_final(m.transformer(x, attn_mask=m.attn_mask[:length, :length]))
            x = x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ m.text_projection
            return torch.nn.functional.normalize(x, dim=-1)

    torch.backends.mha.set_fastpath_enabled(False)
    auto = torch.export.Dim.AUTO
    samples = (
        (torch.zeros(1, 3, 224, 224), torch.ones(1, 77, dtype=torch.int32))
        if immich
        else (torch.zeros(2, 224, 224, 3, dtype=torch.uint8), torch.ones(2, 9, dtype=torch.int64))
    )
    towers = (("visual", "image", Images(), {0: auto}), ("textual", "text", Texts(), {0: auto, 1: auto}))
    for (part, name, tower, axes), sample in zip(towers, samples, strict=True):
        (folder / part).mkdir(parents=True)
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower.eval(),
                (sample,),
                folder / part / "model.onnx",
                input_names=[name],
                output_names=[f"{name}_embedding"],
                dynamic_shapes=None if immich else {name: axes},
                dynamo=True,
                external_data=immich,
            )
    recipe = {"size": 224, "mean": backends.OPENAI_MEAN, "std": backends.OPENAI_STD, "interpolation": "bicubic"}
    (folder / "visual" / "preprocess_cfg.json").write_text(json.dumps({**recipe, "resize_mode": "shortest"}))
    (folder / "config.json").write_text(json.dumps({"text_cfg": {"context_length": 77}}))
    (folder / "manifest.json").write_text(
        json.dumps({"logit_scale": model.logit_scale.exp().item(), "model_id": "tiny"})
    )
    tokenizer = open_clip.SimpleTokenizer()
    vocab = {re.sub("<(start|end)_of_text>", r"<|\1oftext|>", word): i for word, i in tokenizer.encoder.items()}
    bpe = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": list(tokenizer.bpe_ranks)}
    (folder / "textual" / "tokenizer.json").write_text(json.dumps({"model": bpe}))


def shared(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder made once for all test processes of a run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with filelock.FileLock(base / f"{name}.lock"):
        if not (base / name).exists():
            make(base / f"{name}.making")
            (base / f"{name}.making").rename(base / name)
    return base / name


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as an OpenCLIP folder."""
    return shared(tmp_path_factory, "tiny", train_tiny)


def _open(folder: Path) -> Any:
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return shared(tmp_path_factory, "tiny-onnx", lambda folder: export_onnx(_open(tiny), folder, immich=False))


@pytest.fixture(scope="session")
def tiny_immich(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return shared(tmp_path_factory, "tiny-immich", lambda folder: export_onnx(_open(tiny), folder, immich=True))


@pytest.fixture(scope="session")
def reference(tiny: Path) -> Any:
    """OpenCLIP itself: (model, transform, tokenizer)."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{tiny}")


def reference_vectors(reference: Any, pictures: list[Image.Image] = (), texts: list[str] = ()) -> Any:  # type: ignore[assignment]
    import torch

    model, transform, tokenizer = reference
    with torch.no_grad():
        if pictures:
            return model.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True).numpy()
        return model.encode_text(tokenizer(list(texts)), normalize=True).numpy()


def label_files(data: Path) -> Path:
    for name, content in (("clip/imagenet_class_names", IMAGENET), ("bioclip/txt_emb_species", SPECIES)):
        path = data / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), "utf-8")
    return data


# --- a daemon as a user starts it --------------------------------------------------------------------------------


class Node:
    """A daemon process of its own, and a stub to talk to it."""

    def __init__(self, data: Path, arguments: tuple[str, ...] = (), **environment: Any) -> None:
        clean = {
            k: v
            for k, v in os.environ.items()
            if k in lumen_clip.Settings.__annotations__ or not k.isupper() or k in KEPT
        }
        clean |= {"LUMEN_DATA_DIR": str(data), "CLIP_MDNS_TYPE": "off", "HF_ENDPOINT": NOWHERE, "CLIP_TEMPLATES": "1"}
        clean |= {k: str(v) for k, v in environment.items()}
        command = [sys.executable, str(ROOT / "lumen_clip.py"), "--host", "127.0.0.1", "--port", "0", *arguments]
        self.log = ""
        self._lines = threading.Condition()
        self.process = subprocess.Popen(command, env=clean, stderr=subprocess.PIPE, text=True, cwd=data)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._lines:
                self.log += line
                self._lines.notify_all()
        with self._lines:
            self._lines.notify_all()

    def wait_for(self, pattern: str, seconds: float = 90) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        with self._lines:
            while not (match := re.search(pattern, self.log)):
                left = deadline - time.monotonic()
                if left < 0 or (self.process.poll() is not None and not self._reader.is_alive()):
                    pytest.fail(f"the daemon never said {pattern!r}:\n{self.log}")
                self._lines.wait(min(left, 0.5))
        return match

    def bound(self) -> Node:
        port = self.wait_for(r"port (\d+); loading")[1]
        self.address = f"127.0.0.1:{port}"
        self.channel = grpc.insecure_channel(self.address, [("grpc.max_send_message_length", -1)])
        self.stub = pb_grpc.InferenceStub(self.channel)
        return self

    def ready(self) -> Node:
        self.bound()
        self.wait_for("ready: ")
        return self

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        status = self.process.wait(30)
        self._reader.join(5)
        return status

    def infer(self, *requests: pb.InferRequest) -> list[pb.InferResponse]:
        return list(self.stub.Infer(iter(requests), timeout=60))

    def ask(self, task: str, payload: bytes, mime: str = "", **meta: str) -> pb.InferResponse:
        [response] = self.infer(pb.InferRequest(task=task, payload=payload, payload_mime=mime, meta=meta))
        return response

    def result(self, task: str, payload: bytes, mime: str = "", **meta: str) -> Any:
        response = self.ask(task, payload, mime, **meta)
        assert not response.error.message, response.error.message
        return json.loads(response.result)


KEPT = {"PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH"}


@pytest.fixture(scope="session")
def torch_node(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Node]:
    data = label_files(tmp_path_factory.mktemp("torch-data"))
    node = Node(data, CLIP_MODEL=tiny, BIOCLIP_MODEL=tiny, LUMEN_JPEG_DRAFT=0).ready()
    yield node
    assert node.stop() == 0, node.log


@pytest.fixture(scope="session")
def onnx_node(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path, tiny_immich: Path) -> Iterator[Node]:
    """An edge device: torch and open_clip cannot be imported at all."""
    data = label_files(tmp_path_factory.mktemp("onnx-data"))
    for name in ("torch", "open_clip", "torchvision"):
        (data / f"{name}.py").write_text(f"raise ImportError('{name} does not exist on this device')")
    node = Node(
        data,
        CLIP_BACKEND="onnxrt",
        CLIP_MODEL=tiny_onnx,
        BIOCLIP_MODEL=tiny_immich,
        PYTHONPATH=data,
        LUMEN_JPEG_DRAFT=0,
    ).ready()
    yield node
    assert node.stop() == 0, node.log


@pytest.fixture(params=["torch", "onnxrt"])
def node(request: pytest.FixtureRequest) -> Node:
    return request.getfixturevalue("torch_node" if request.param == "torch" else "onnx_node")  # type: ignore[no-any-return]


def chunks(payload: bytes, count: int, **fields: Any) -> list[pb.InferRequest]:
    """A request in `count` chunks, as the Lumen SDK cuts it."""
    size = -(-len(payload) // count)
    return [
        pb.InferRequest(payload=payload[i * size : (i + 1) * size], seq=i, total=count, offset=i * size, **fields)
        for i in range(count)
    ]


# --- the main job ------------------------------------------------------------------------------------------------


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
    for bad in ("dog", "[]", '["dog", 3]', '["dog", " "]', json.dumps(["x"] * 257), "[" * 5000):
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
    values = backends.normalize(pixels[None], backends.Preprocess())
    expected = node.result("bioclip_image_embed", encoded(Image.fromarray(pixels), "PNG"))["vector"]
    for dtype, name in (("<f4", "fp32"), ("<f2", "fp16")):
        payload, meta = values.astype(dtype).tobytes(), TENSOR_META | {"lumen.tensor.dtype": name}
        request = pb.InferRequest(
            task="bioclip_image_embed", payload=payload, meta=meta, payload_mime="application/octet-stream"
        )
        [response] = node.infer(request)
        assert json.loads(response.result)["vector"] == pytest.approx(expected, abs=1e-6)
        assert np.array_equal(backends.pixels_from_tensor(payload, meta, backends.Preprocess()), pixels)
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
def test_a_tensor_that_lies_is_refused_by_name(torch_node: Node, change: dict[str, str], said: str) -> None:
    """Lost otherwise: a species name made of noise."""
    request = pb.InferRequest(
        task="bioclip_classify", payload=np.full(150528, np.nan, "<f4").tobytes(), meta=TENSOR_META | change
    )
    [response] = torch_node.infer(request)
    assert response.error.code == pb.ERROR_CODE_INVALID_ARGUMENT and said in response.error.message


# --- the wire ----------------------------------------------------------------------------------------------------


def test_chunks_make_a_request_whatever_their_order_and_ids(node: Node) -> None:
    """Lost otherwise: photographs over 1 MiB; the app sends them in chunks, with an empty correlation id."""
    photo = encoded(picture(RED, (900, 700)), "PNG")
    whole = node.result("clip_image_embed", photo)["vector"]
    ordered = chunks(photo, 7, task="clip_image_embed", payload_mime="image/webp", meta={"a": "b"})
    shuffled = chunks(photo, 5, task="clip_image_embed", correlation_id="s")[::-1]
    mixed = [
        m
        for pair in zip(
            chunks(photo, 4, task="clip_image_embed", correlation_id="x"),
            chunks(b"a dog", 4, task="clip_embed", correlation_id="y"),
            strict=True,
        )
        for m in pair
    ]
    plain = chunks(photo, 3, task="clip_image_embed")
    for message in plain:
        message.offset = 0  # some clients leave it out
    responses = node.infer(*ordered, *shuffled, *mixed, *plain)
    assert [r.correlation_id for r in responses] == ["", "s", "x", "y", ""]
    for response in (responses[0], responses[1], responses[2], responses[4]):
        assert json.loads(response.result)["vector"] == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"seq": 1}], "total"),
        ([{"offset": 4}], "total"),
        ([{"total": 1, "seq": 3}], "total"),
        ([{"total": 2, "seq": 2}], "seq"),
        ([{"total": 3}, {"total": 3}], "seq"),
        ([{"total": 2}, {"total": 3, "seq": 1}], "total"),
        ([{"total": 2}, {"total": 2, "seq": 1, "offset": 99}], "offset"),
        ([{"total": 2}, {"total": 2, "seq": 1, "meta": {"a": "b"}}], "meta"),
        ([{"total": 2}, {"total": 2, "seq": 1, "payload_mime": "text/html"}], "payload_mime"),
        ([{"total": 2**63}], "total"),
        ([{"total": 2, "seq": 1}], "total"),  # and never the other one
    ],
)
def test_lying_chunk_fields_are_answered_once_and_the_stream_goes_on(
    torch_node: Node, messages: Any, said: str
) -> None:
    """Lost otherwise: a request that is never answered, or the memory of a small board."""
    lies = [pb.InferRequest(correlation_id="lie", **{"task": "clip_embed", "payload": b"ab"} | m) for m in messages]
    responses = torch_node.infer(*lies, pb.InferRequest(correlation_id="good", task="clip_embed", payload=b"a dog"))
    by_id = {r.correlation_id: r for r in responses}
    assert len(responses) == 2 and by_id["good"].result
    assert by_id["lie"].error.code == pb.ERROR_CODE_INVALID_ARGUMENT and by_id["lie"].error.message.startswith(said)
    assert by_id["lie"].is_final and not by_id["lie"].result_mime


def test_an_id_that_failed_can_be_used_again(torch_node: Node) -> None:
    """Lost otherwise: all requests of a client with empty ids, after its first bad one."""
    bad = chunks(b"a dog", 5, task="clip_embed")
    bad[1].meta["x"] = "y"
    responses = torch_node.infer(*bad, *chunks(b"a cat", 5, task="clip_embed"))
    assert ["meta" in responses[0].error.message, bool(responses[1].result), len(responses)] == [True, True, 2]


def test_unfinished_requests_and_their_bytes_are_bounded() -> None:
    """Lost otherwise: the memory of a board to one client that never ends what it begins."""
    assembler = lumen_clip.Assembler(1000)
    for i in range(lumen_clip.OPEN_IDS_MAX):
        assert assembler.add(pb.InferRequest(correlation_id=str(i), total=2, payload=b"x")) is None
    with pytest.raises(lumen_clip.ChunkError, match="unfinished"):
        assembler.add(pb.InferRequest(correlation_id="one more", total=2, payload=b"x"))
    assert assembler.held() == len(assembler.unfinished()) == lumen_clip.OPEN_IDS_MAX
    with pytest.raises(lumen_clip.ChunkError, match="1000 bytes"):
        assembler.add(pb.InferRequest(correlation_id="0", seq=1, total=2, payload=b"x" * 1000))
    assert assembler.held() == lumen_clip.OPEN_IDS_MAX - 1


def test_a_complete_request_is_answered_before_half_close(node: Node) -> None:
    """Lost otherwise: old clients, which keep their stream open and wait."""
    release = threading.Event()

    def requests() -> Iterator[pb.InferRequest]:
        yield pb.InferRequest(correlation_id="1", task="clip_embed", payload=b"a dog")
        release.wait(30)

    call = node.stub.Infer(requests(), timeout=30)
    assert next(call).correlation_id == "1"
    release.set()
    assert list(call) == []


def test_answers_keep_the_order_of_requests_and_one_bad_one_fails_alone(node: Node) -> None:
    """Lost otherwise: with empty ids a client can only go by order."""
    photo = encoded(picture(RED))
    requests = []
    for i in range(40):
        task, payload = [("clip_image_embed", photo), ("clip_embed", b"a dog"), ("clip_image_embed", b"rubbish")][i % 3]
        requests.append(pb.InferRequest(correlation_id=str(i), task=task, payload=payload))
    responses = node.infer(*requests)
    assert [r.correlation_id for r in responses] == [str(i) for i in range(40)]
    assert [r.error.code for r in responses] == [[0, 0, pb.ERROR_CODE_INVALID_ARGUMENT][i % 3] for i in range(40)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task": "ocr", "payload": b"x"}, "task: 'ocr' is unknown; allowed: clip_classify"),
        ({"task": "", "payload": b"x"}, "task: ''"),
        ({"task": "__class__\0", "payload": b"x"}, "task: "),
        ({"task": "clip_embed", "payload": b""}, "payload: it is empty"),
        ({"task": "clip_embed", "payload": b" \n"}, "payload: the text is blank"),
        ({"task": "clip_embed", "payload": b"\xff\xfe"}, "payload: the text is not UTF-8"),
        ({"task": "clip_embed", "payload": b"a" * 70_000}, "payload: a text of 70000 bytes; allowed: 65536"),
        (
            {"task": "clip_embed", "payload": b"x", "payload_mime": "image/png"},
            "payload_mime: 'image/png'; clip_embed takes text/plain",
        ),
        (
            {"task": "clip_classify", "payload": b"x", "payload_mime": "text/plain"},
            "payload_mime: 'text/plain'; clip_classify takes image/jpeg",
        ),
        (
            {"task": "clip_classify", "payload": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"},
            "payload: not an image",
        ),
    ],
)
def test_bad_input_is_told_the_field_and_what_is_allowed(node: Node, fields: Any, said: str) -> None:
    """Lost otherwise: an evening of guessing."""
    [response] = node.infer(pb.InferRequest(correlation_id="c", **fields))
    assert response.error.code == pb.ERROR_CODE_INVALID_ARGUMENT and response.error.message.startswith(said)
    assert (response.correlation_id, response.is_final, response.result, response.result_mime) == ("c", True, b"", "")


def test_a_stream_without_a_request_is_refused(torch_node: Node) -> None:
    """Lost otherwise: the SDK sees the end of a stream and no reason."""
    with pytest.raises(grpc.RpcError) as error:
        torch_node.infer()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_capabilities_satisfy_the_sdk(node: Node) -> None:
    """Lost otherwise: the node is never routable; the SDK reads these once."""
    streamed = list(node.stub.StreamCapabilities(Empty(), timeout=3))
    assert [c.service_name for c in streamed] == ["clip", "bioclip"]
    whole = node.stub.GetCapabilities(Empty())
    assert {t.name for t in whole.tasks} == set(lumen_clip.TASKS) == {t.name for c in streamed for t in c.tasks}
    for capability in (*streamed, whole):
        assert capability.protocol_version == "1.0" and capability.service_name
        assert list(capability.precisions) == ["fp32"] and capability.max_concurrency == 64
        assert capability.runtime in ("torch", "onnxrt")
    tensors = {t.name for c in streamed for t in c.tasks if t.tensor_preprocess_id == "bioclip2_224_image_v1"}
    assert tensors == {"bioclip_classify", "bioclip_image_embed"}
    assert not any(t.name.startswith("semantic") for t in whole.tasks)


def test_health_and_reflection_speak_the_standard_protocols(node: Node) -> None:
    """Lost otherwise: Docker's and Kubernetes' health checks, and grpcurl."""
    node.stub.Health(Empty(), timeout=2)
    check = health_pb2_grpc.HealthStub(node.channel).Check
    for name in ("", SERVICE):
        assert check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = reflection_pb2_grpc.ServerReflectionStub(node.channel).ServerReflectionInfo(iter([request]))
    assert SERVICE in [s.name for s in answer.list_services_response.service]


def test_eager_pings_do_not_cost_the_connection(torch_node: Node) -> None:
    """Lost otherwise: every slow request of the Go SDK, which pings each 10 s, ends in too_many_pings."""
    options = [
        ("grpc.keepalive_time_ms", 300),
        ("grpc.http2.min_time_between_pings_ms", 300),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    release = threading.Event()

    def requests() -> Iterator[pb.InferRequest]:
        release.wait(6)
        yield pb.InferRequest(task="clip_embed", payload=b"a dog")

    with grpc.insecure_channel(torch_node.address, options) as channel:
        [response] = pb_grpc.InferenceStub(channel).Infer(requests(), timeout=20)
    assert response.result


def test_gen_is_what_the_proto_generates(tmp_path: Path) -> None:
    """Lost otherwise: the wire drifts from its contract."""
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-Igen=.",
        f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}",
    ]
    subprocess.run([*command, f"--grpc_python_out={tmp_path}", "gen/ml_service.proto"], cwd=ROOT, check=True)
    for name in ("ml_service_pb2.py", "ml_service_pb2.pyi", "ml_service_pb2_grpc.py"):
        assert (ROOT / "gen" / name).read_text() == (tmp_path / "gen" / name).read_text(), name


# --- limits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_node(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> Iterator[Node]:
    """A daemon with small limits and one model."""
    node = Node(
        label_files(tmp_path_factory.mktemp("small-data")),
        CLIP_BACKEND="onnxrt",
        BIOCLIP_BACKEND="none",
        CLIP_MODEL=tiny_onnx,
        LUMEN_MAX_STREAMS=3,
        LUMEN_MAX_REQUEST_MB=1,
        LUMEN_MAX_MEGAPIXELS=1,
    ).ready()
    yield node
    assert node.stop() == 0, node.log


def test_more_streams_than_allowed_are_told_so_while_health_answers(small_node: Node) -> None:
    """Lost otherwise: silence under load, and a supervisor that thinks the daemon is dead."""
    release = threading.Event()

    def held() -> Iterator[pb.InferRequest]:
        yield pb.InferRequest(task="clip_embed", payload=b"a dog")
        release.wait(30)

    calls = [small_node.stub.Infer(held(), timeout=30) for _ in range(3)]
    for call in calls:
        assert next(call).result
    with pytest.raises(grpc.RpcError) as error:
        small_node.infer(pb.InferRequest(task="clip_embed", payload=b"a dog"))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "3 Infer streams" in error.value.details()
    small_node.stub.Health(Empty(), timeout=1)
    calls[0].cancel()  # one leaves without a word, and its place is free
    deadline = time.monotonic() + 5
    while True:
        try:
            assert small_node.infer(pb.InferRequest(task="clip_embed", payload=b"a dog"))[0].result
            break
        except grpc.RpcError:
            assert time.monotonic() < deadline, "the place of a client that left is never free"
            time.sleep(0.05)
    release.set()


def test_what_is_too_large_is_refused_and_the_stream_goes_on(small_node: Node) -> None:
    """Lost otherwise: one panorama costs all other photographs on the stream."""
    noise = np.random.default_rng(0).bytes(1_500_000)
    wide = encoded(Image.new("RGB", (2000, 1000)), "PNG")
    narrow = encoded(Image.new("RGB", (1, 60_000)), "PNG")
    requests = [
        pb.InferRequest(correlation_id="single", task="clip_image_embed", payload=noise),
        *chunks(noise, 6, correlation_id="chunked", task="clip_image_embed"),
        pb.InferRequest(correlation_id="wide", task="clip_image_embed", payload=wide),
        pb.InferRequest(correlation_id="narrow", task="clip_image_embed", payload=narrow),
        pb.InferRequest(correlation_id="good", task="clip_embed", payload=b"a dog"),
    ]
    found = {r.correlation_id: r.error.message for r in small_node.infer(*requests)}
    assert found.pop("good") == ""
    assert {k: re.sub(r" \(.*", "", v) for k, v in found.items()} == {
        "single": "payload: over 1048576 bytes, the most that a request may have",
        "chunked": "payload: over 1048576 bytes, the most that a request may have",
        "wide": "payload: the image has 2000 x 1000 pixels; allowed: 1000000 in all",
        "narrow": "payload: the image is too narrow",
    }


def test_a_model_that_is_left_out_is_not_offered(small_node: Node) -> None:
    """Lost otherwise: clients route species to a node that has none."""
    assert [c.service_name for c in small_node.stub.StreamCapabilities(Empty())] == ["clip"]
    assert {t.name for t in small_node.stub.GetCapabilities(Empty()).tasks} == {
        "clip_classify",
        "clip_embed",
        "clip_image_embed",
    }
    assert "switched off" in small_node.ask("smart_classify", encoded(picture(RED))).error.message
