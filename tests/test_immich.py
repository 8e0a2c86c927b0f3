"""The port for immich: what its server sends is answered as its own machine-learning service answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import numpy as np
import pytest
import yaml
from PIL import Image

from immich import immich_name
from settings import Settings
from tests.hub import FakeHub
from tests.immich import (
    FACES,
    MODEL,
    VISUAL,
    form,
    image_form,
    other_activation,
    predict,
    recipe_image,
    recipe_text,
    send,
    text_form,
    textual,
    vector,
)
from tests.kit import (
    BLUE,
    COLOURS,
    GREEN,
    LIMIT_S,
    RED,
    ROOT,
    Node,
    code_of,
    encoded,
    one_model,
    picture,
    write_labels,
)
from tests.test_metrics import free_port


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, openai: Path) -> Iterator[int]:
    """The port for immich of a daemon that serves that folder."""
    port = free_port()
    data = write_labels(tmp_path_factory.mktemp("immich-data"), openai)
    node = Node(data, **one_model(openai), LUMEN_IMMICH_PORT=port).ready()
    yield port
    assert node.stop() == 0 and "Traceback" not in node.log, node.log


def cosine(a: Any, b: Any) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


# What follows is how immich's server sends its requests: `fetch`, `FormData` and `Blob`, an image without a type.
NODE_SERVER = """
const [url, photo] = process.argv.slice(2), fs = require("fs");
const model = "ViT-B-32__openai";
async function predict(fields) {
  const data = new FormData();
  for (const [name, value] of fields) data.append(name, value);
  const response = await fetch(new URL("/predict", url), { method: "POST", body: data });
  return { status: response.status, reason: response.statusText, body: response.ok ? await response.json() : null };
}
const visual = JSON.stringify({ clip: { visual: { modelName: model } } });
const textual = (language) => JSON.stringify({ clip: { textual: { modelName: model, options: { language } } } });
(async () => {
  const ping = await fetch(new URL("/ping", url)), root = await fetch(url);
  const image = () => new Blob([new Uint8Array(fs.readFileSync(photo))]);
  const out = { ping: await ping.text(), root: await root.json(), texts: {} };
  out.image = await predict([["entries", visual], ["image", image()]]);
  for (const [language, text] of [["en", "a photo of a bird"], ["de", "Zwei Füchse im Schnee"], ["zh-CN", "一只狗"]])
    out.texts[text] = await predict([["entries", textual(language)], ["text", text]]);
  out.burst = await Promise.all(Array.from({ length: 8 }, () => predict([["entries", visual], ["image", image()]])));
  const ocr = JSON.stringify({ ocr: { detection: { modelName: "x" } } });
  out.faces = await predict([["entries", ocr], ["image", image()]]);
  console.log(JSON.stringify(out));
})().catch((error) => { console.error(error); process.exit(1); });
"""


@pytest.mark.node
def test_what_immichs_server_sends_is_answered_as_its_own_service_does(port: int, openai: Path, tmp_path: Path) -> None:
    """Lost otherwise: the search of everybody who runs immich. Node.js itself makes the requests."""
    if not shutil.which("node"):
        pytest.skip("Node.js is not installed, whose fetch immich's server uses")
    (tmp_path / "server.js").write_text(NODE_SERVER)
    photo = tmp_path / "preview.jpg"
    photo.write_bytes(encoded(picture(BLUE, (1440, 1080)), quality=80))
    command = ["node", "server.js", f"http://127.0.0.1:{port}", str(photo)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["ping"], found["root"]) == ("pong", {"message": "Immich ML"})
    expected = recipe_image(openai, photo.read_bytes())
    for answer in (found["image"], *found["burst"]):
        assert (answer["body"]["imageWidth"], answer["body"]["imageHeight"]) == (1440, 1080)
        assert cosine(json.loads(answer["body"]["clip"]), expected) > 0.9999
    for text, answer in found["texts"].items():
        assert list(answer["body"]) == ["clip"] and isinstance(answer["body"]["clip"], str)
        assert cosine(json.loads(answer["body"]["clip"]), recipe_text(openai, text)) > 0.9999
    assert found["faces"]["status"] == 501 and "LUMEN_IMMICH_FALLBACK" in found["faces"]["reason"]


def test_vectors_are_those_of_immichs_recipe(port: int, openai: Path) -> None:
    """Lost otherwise: a library whose vectors are of two services, and a search that finds the wrong pictures."""
    lowest = 1.0
    for seed, (colour, size) in enumerate(
        zip(COLOURS.values(), ((1440, 960), (1080, 1440), (224, 224), (500, 333), (1440, 810), (640, 640)), strict=True)
    ):
        for kind in ("JPEG", "WEBP"):
            photo = encoded(picture(colour, size, seed), kind, quality=80)
            got = predict(port, image_form(photo))
            assert (got["imageWidth"], got["imageHeight"]) == size
            lowest = min(lowest, cosine(json.loads(got["clip"]), recipe_image(openai, photo)))
    texts = ("A red bicycle, by the sea", "Zwei Füchse im Schnee – ganz nah", "雪の中の二匹の狐", "dog " * 200)
    for text in texts:
        lowest = min(lowest, cosine(vector(port, text_form(text)), recipe_text(openai, text)))
    print(f"\nlowest cosine: {lowest:.7f}")
    assert lowest > 0.9999
    photo = encoded(picture(RED), "PNG")
    expected = recipe_image(openai, photo)
    assert np.abs(vector(port, image_form(photo)) - expected).max() < 1e-5
    assert np.abs(other_activation(openai, photo) - expected).max() > 5e-4


def test_the_language_is_ignored_and_the_size_is_as_stored(port: int) -> None:
    """immich sends a language with every text, and takes the sizes for the pixels of the file."""
    assert np.array_equal(vector(port, text_form("ein Hund", textual("de"))), vector(port, text_form("ein Hund")))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    answer = predict(port, image_form(encoded(picture(RED, (300, 200)), exif=rotated)))
    assert (answer["imageWidth"], answer["imageHeight"]) == (300, 200)


def test_a_model_that_is_not_served_is_named_with_its_remedy(tmp_path: Path, openai: Path) -> None:
    """Lost otherwise: vectors of one model in an index of another, or an evening of guessing."""
    port = free_port()
    node = Node(write_labels(tmp_path, openai), **one_model(openai), LUMEN_IMMICH_PORT=port).ready()
    try:
        status, reason, _, body = send(port, text_form("a dog", textual(model="ViT-L-14__openai\n")))
        assert status == 400 and "'ViT-B-32__openai'" in reason and json.loads(body)["detail"] == reason
        line = node.wait_for(r"immich asks for the model .*")[0]
        assert line.endswith(
            r"'ViT-L-14__openai\n', and this daemon serves 'ViT-B-32__openai': set the CLIP model to "
            r"'ViT-B-32__openai' in immich's settings of smart search, or CLIP_MODEL to a form of "
            r"'ViT-L-14__openai\n' here"
        )
    finally:
        assert node.stop() == 0


def test_http_and_grpc_requests_are_the_same_requests(tmp_path: Path, openai: Path) -> None:
    """They share the metrics and the caches, and give the same vectors."""
    ports = {"LUMEN_IMMICH_PORT": free_port(), "LUMEN_METRICS_PORT": free_port()}
    node = Node(write_labels(tmp_path, openai), **one_model(openai), **ports).ready()
    photo, port = encoded(picture(GREEN, (1440, 1080))), ports["LUMEN_IMMICH_PORT"]
    try:
        assert vector(port, image_form(photo)) == pytest.approx(node.result("clip_image_embed", photo)["vector"])
        assert vector(port, text_form("a dog")) == pytest.approx(node.result("clip_embed", b"a dog")["vector"])
        assert send(port, image_form(b"rubbish"))[0] == 400
        metrics = send(ports["LUMEN_METRICS_PORT"], b"", "/metrics")[3].decode()
        assert 'lumen_requests_total{outcome="ok",task="clip_image_embed"} 2.0' in metrics
        assert 'lumen_requests_total{outcome="ok",task="clip_embed"} 2.0' in metrics
        assert 'lumen_requests_total{outcome="invalid_argument",task="clip_image_embed"} 1.0' in metrics
    finally:
        assert node.stop() == 0


# A daemon whose models are loaded when somebody says so.
SLOW = """
import sys
sys.path.insert(0, "@ROOT@")
import lumen_clip
load = lumen_clip.load_models
def slowly(*arguments):
    open("@FIFO@").read()
    return load(*arguments)
lumen_clip.load_models = slowly
sys.exit(lumen_clip.main())
"""


def test_ping_says_whether_the_models_answer(tmp_path: Path, openai: Path) -> None:
    """Lost otherwise: photographs that immich sends to a daemon that cannot answer yet."""
    port, reading = free_port(), tmp_path / "fifo"
    os.mkfifo(reading)
    (tmp_path / "slow.py").write_text(SLOW.replace("@ROOT@", str(ROOT)).replace("@FIFO@", str(reading)))
    program = (sys.executable, str(tmp_path / "slow.py"))
    node = Node(write_labels(tmp_path / "data", openai), program=program, **one_model(openai), LUMEN_IMMICH_PORT=port)
    node.wait_for("immich's requests on")
    with reading.open("w") as gate:
        node.bound()
        for path, body in (("/ping", b""), ("/predict", text_form("a dog"))):
            status, _, headers, _ = send(port, body, path)
            assert (status, headers["retry-after"]) == (503, "5")
        gate.write("\n")
    node.wait_for("ready: ")
    assert send(port, b"", "/ping")[3] == b"pong"
    assert node.stop() == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LUMEN_IMMICH_PORT": "x"}, "LUMEN_IMMICH_PORT=x: allowed: a whole number from 0 to 65535"),
        (
            {"LUMEN_IMMICH_PORT": "3003", "CLIP_BACKEND": "none", "BIOCLIP_BACKEND": "onnxrt"},
            "LUMEN_IMMICH_PORT=3003: CLIP_BACKEND=none; immich's smart search needs CLIP",
        ),
        *(
            (
                {"LUMEN_IMMICH_PORT": "3003", "LUMEN_IMMICH_FALLBACK": value},
                f"LUMEN_IMMICH_FALLBACK={value}: allowed: the address of a server, such as http://192.168.1.5:3003",
            )
            for value in ("192.168.1.5:3003", "http://", "http://a:b", "ftp://x", "http://me:secret@x", "http://x/?a")
        ),
    ],
)
def test_a_setting_that_is_not_allowed_is_one_line(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    """Lost otherwise: an operator before a traceback."""
    node = Node(tmp_path, **{"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", **environment})
    assert node.ended() == 2
    node.stop()
    assert node.log == f"lumen-clip: {said}\n"


def test_a_token_or_tls_is_not_bypassed(tmp_path: Path, certificates: Path) -> None:
    """Lost otherwise: a door without a lock beside the one that the operator has locked."""
    tls = {"LUMEN_TLS_CERT": certificates / "server.pem", "LUMEN_TLS_KEY": certificates / "server.key"}
    both = {**tls, "LUMEN_TOKEN_FILE": certificates / "token"}
    for settings, name in (
        (both, "LUMEN_TLS_CERT"),
        ({"LUMEN_TOKEN_FILE": both["LUMEN_TOKEN_FILE"]}, "LUMEN_TOKEN_FILE"),
    ):
        port = free_port()
        environment = {"LUMEN_IMMICH_PORT": port, **settings}
        node = Node(tmp_path, ("--demo", "--host", "0.0.0.0"), **environment)
        assert node.ended() == 2
        node.stop()
        said = f"LUMEN_IMMICH_PORT={port}: {name} is set, and the port for immich has neither TLS nor a token; allowed"
        assert node.log == f"lumen-clip: {said} then: --host 127.0.0.1\n"
        on_loopback = Node(tmp_path / "data", ("--demo",), **environment)
        on_loopback.wait_for("ready: ")
        assert send(port, b"", "/ping")[3] == b"pong"
        assert on_loopback.stop() == 0


def test_a_port_that_is_taken_and_a_library_that_is_missing_are_one_line(tmp_path: Path, port: int) -> None:
    """Lost otherwise: a traceback instead of the remedy."""
    (tmp_path / "aiohttp.py").write_text("raise ModuleNotFoundError('no', name='aiohttp')")
    for more, said in (
        ({}, "Address already in use"),
        ({"PYTHONPATH": tmp_path}, "aiohttp is not installed here; pip install -r requirements-immich.txt"),
    ):
        node = Node(tmp_path, ("--demo",), LUMEN_IMMICH_PORT=port, **more)
        assert node.ended() == 2
        node.stop()
        assert node.log == f"lumen-clip: LUMEN_IMMICH_PORT={port}: {said}\n"


REFUSED: list[tuple[str, bytes, int, str]] = [
    ("no form", b"{}", 422, "entries: missing"),
    ("no entries", form(("text", "a dog")), 422, "entries: missing"),
    ("cut off", image_form(b"x" * 100)[:-60], 400, "image: missing, or the form is cut off"),
    ("not JSON", form(("entries", "{"), ("text", "a")), 422, "entries: not JSON"),
    ("nested", form(("entries", "[" * 60_000), ("text", "a")), 422, "entries: not JSON"),
    ("a list", form(("entries", "[]"), ("text", "a")), 422, "entries: allowed"),
    ("nothing", form(("entries", "{}"), ("text", "a")), 422, "entries: allowed"),
    ("no type", form(("entries", '{"clip": {}}'), ("text", "a")), 422, "entries: allowed"),
    ("no model", form(("entries", '{"clip": {"visual": {}}}'), ("text", "a")), 422, "entries: allowed"),
    ("other type", form(("entries", '{"clip": {"audio": {"modelName": "x"}}}')), 422, "entries: allowed"),
    ("model as number", form(("entries", '{"clip": {"visual": {"modelName": 1}}}')), 422, "entries: allowed"),
    ("no image", form(("entries", json.dumps(VISUAL)), ("text", "a")), 400, "image: missing"),
    ("no text", form(("entries", json.dumps(textual())), ("image", b"a")), 400, "text: missing"),
    ("blank text", text_form(" "), 400, "text: the text is blank"),
    ("empty image", image_form(b""), 400, "image: it is empty"),
    ("long text", text_form("a" * 70_000), 400, "text: a text of 70000 bytes; allowed: 65536"),
    ("no picture", image_form(b"rubbish"), 400, "image: not an image that can be read; allowed: whole files of JPEG"),
    ("two tasks", text_form("a", {**textual(), **FACES}), 501, "entries: several tasks in one request; allowed: one"),
    ("two types", text_form("a", {"clip": {**textual()["clip"], **VISUAL["clip"]}}), 501, "entries: several tasks"),
    (
        "faces",
        image_form(b"x", FACES),
        501,
        "entries: 'facial-recognition' is not done here; set LUMEN_IMMICH_FALLBACK",
    ),
]


@pytest.mark.parametrize(("body", "status", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_form_that_is_not_allowed_is_told_the_field(port: int, body: bytes, status: int, said: str) -> None:
    """Lost otherwise: an evening of guessing. immich writes the status line into its log."""
    answer = send(port, body)
    assert (answer[0], answer[1][: len(said)]) == (status, said)
    assert re.fullmatch(r'\{"detail":".*"\}', answer[3].decode()) and "Traceback" not in answer[3].decode()
    assert vector(port, text_form("a dog")).shape == (64,)


def test_other_paths_methods_and_types_are_refused(port: int) -> None:
    """Lost otherwise: a library that answers for us, with a page of its own or a traceback."""
    assert send(port, b"", "/etc/passwd")[0] == 404 and send(port, b"", "/predict")[0] == 405
    assert send(port, text_form("a"), Content_Type="application/json")[0] == 422
    assert send(port, text_form("a"), Content_Type="multipart/form-data")[0] == 422
    assert send(port, text_form("a"), Content_Encoding="gzip")[0] == 415


def test_the_compose_example_is_right(caplog: pytest.LogCaptureFixture) -> None:
    """Lost otherwise: an evening with a file that was copied from the documentation."""
    [example] = code_of("docs/immich.md", "With Docker", "yaml")
    content = yaml.safe_load(example)
    compose_spec.PyCompose.from_json(json.dumps(content)).validate()
    ours, immichs = content["services"]["lumen-clip"], content["services"]["immich-server"]
    settings = Settings.from_environment({"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none"} | ours["environment"])
    url = urllib.parse.urlsplit(immichs["environment"]["IMMICH_MACHINE_LEARNING_URL"])
    assert (url.hostname, url.port) == ("lumen-clip", settings.lumen_immich_port)
    assert settings.lumen_immich_fallback == "http://immich-machine-learning:3003" and not caplog.records
    assert immich_name(settings.clip.model) == MODEL


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("ViT-B-32:openai", "ViT-B-32__openai"),
        ("ViT-B-32__openai", "ViT-B-32__openai"),
        ("immich-app/ViT-B-32__openai", "ViT-B-32__openai"),
        ("ViT-B-32:laion2b_s34b_b79k", "ViT-B-32__laion2b-s34b-b79k"),
        ("ViT-B-32:laion2b_s34b_b79k-int8", "ViT-B-32__laion2b-s34b-b79k"),
        ("M-CLIP/XLM-Roberta-Large-Vit-B-32", "XLM-Roberta-Large-Vit-B-32"),
    ],
)
def test_a_model_has_the_name_that_immich_gives_it(model: str, name: str) -> None:
    """Lost otherwise: the right model, refused for its spelling."""
    assert immich_name(model) == name


@pytest.mark.parametrize("model", ["ViT-B-32:openai", "ViT-B-32__openai", "hf-hub:immich-app/ViT-B-32__openai"])
def test_immichs_default_model_is_fetched_from_its_repository(tmp_path: Path, openai: Path, model: str) -> None:
    """Lost otherwise: the name that people copy from immich's settings."""
    files = {path.relative_to(openai).as_posix(): path.read_bytes() for path in openai.rglob("*") if path.is_file()}
    hub, port = FakeHub({"immich-app/ViT-B-32__openai": files}), free_port()
    (tmp_path / "names.json").write_text('["a dog", "a cat"]')
    settings = {**one_model(openai), "CLIP_MODEL": model, "CLIP_LABELS": tmp_path / "names.json"}
    node = Node(tmp_path, **settings, HF_ENDPOINT=hub.url, LUMEN_IMMICH_PORT=port).ready()
    try:
        assert cosine(vector(port, text_form("a dog")), recipe_text(openai, "a dog")) > 0.9999
    finally:
        assert node.stop() == 0
        hub.close()
