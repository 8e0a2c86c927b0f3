"""A daemon as a user starts it, and the models and data that the tests make."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import filelock
import grpc
import numpy as np
import pytest
from PIL import Image

import backends
import client
import engine
import model_files
import preprocess
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from labels import Recipe
from settings import DEMO_DIR, ModelOptions, Settings

ROOT = Path(__file__).resolve().parent.parent


TOOLS = {  # what a device does not need
    *("bench.py", "bench_load.py", "bench_simulation.py", "export.py", "export_rknn.py", "test_lumen.py"),
    *("contact_sheet.py", "photo_index.py", "ray_embed.py", "search.py"),
}
RUNTIME = sorted({path.name for path in ROOT.glob("*.py")} - TOOLS)  # what a device copies, besides gen/


NOWHERE = "http://127.0.0.1:9"  # no hub answers here: whoever asks it has broken a promise


SERVICE = "home_native.v1.Inference"


LIMIT_S = 120  # for what should happen soon; a test that waits for a condition has no opinion of a machine's speed


# --- documents -----------------------------------------------------------------------------------------------------


def code_of(document: str, section: str, language: str = "sh") -> list[str]:
    """The code blocks of one language in a section of a document, in order. `section`: a heading with ##."""
    text = (ROOT / document).read_text("utf-8")
    [body] = re.findall(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)


# --- models and data that the tests make ---------------------------------------------------------------------------


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


UPSTREAM_SCENES = (
    "a photo of an animal",
    "a photo of a bird",
    "a photo of an insect",
    "a photo of a human-made object",
    "a photo of a landscape",
    "an abstract painting",
)


def settings_of(**values: object) -> Settings:
    """Settings as the environment would give them; the names are those of the variables, in lower case."""
    return Settings.from_environment({name.upper(): str(value) for name, value in values.items()})


AS_IT_IS = Recipe("as it is", lambda label: [label])

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
    recipe = {"mean": preprocess.OPENAI_MEAN, "std": preprocess.OPENAI_STD, "interpolation": "bicubic"}
    config = {"model_cfg": TINY, "preprocess_cfg": {**recipe, "resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CLIP(**TINY)
    texts = open_clip.SimpleTokenizer()(list(COLOURS))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    target = torch.arange(len(COLOURS)).repeat_interleave(2)
    for step in range(80):
        pixels = [np.asarray(picture(c, (224, 224), 2 * step + i)) for c in COLOURS.values() for i in range(2)]
        images = torch.from_numpy(preprocess.normalize(np.stack(pixels), preprocess.Preprocess()))
        image_vectors, text_vectors = model.encode_image(images, True), model.encode_text(texts, True)
        loss = torch.nn.functional.cross_entropy(model.logit_scale.exp() * image_vectors @ text_vectors.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")


def export_immich(model: Any, tokenizer: Any, folder: Path, newer: bool = False) -> None:
    """A folder as immich's exporter makes it: int32 ids of the full context, the weights beside the graph.

    The older form has a fixed batch of 1 and float NCHW pixels; the newer one an open batch, uint8 NHWC pixels,
    operators of opset 23, and token embeddings stored in half precision.
    """
    import torch

    class Images(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Any) -> Any:
            if newer:
                mean, std = (torch.tensor(recipe[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
                image = (image.permute(0, 3, 1, 2).float() / 255 - mean) / std
            return self.model.encode_image(image, normalize=True)

    class Texts(Images):
        def forward(self, text: Any) -> Any:
            return self.model.encode_text(text, normalize=True)

    torch.backends.mha.set_fastpath_enabled(False)
    recipe = model.visual.preprocess_cfg
    side = preprocess.Preprocess.from_config({}, model.visual.image_size).size
    count = 2 if newer else 1
    pixels = torch.zeros(2, side, side, 3, dtype=torch.uint8) if newer else torch.zeros(1, 3, side, side)
    towers = (
        ("visual", "image", Images(), pixels),
        ("textual", "text", Texts(), torch.ones(count, tokenizer.context_length, dtype=torch.int32)),
    )
    for part, name, tower, sample in towers:
        (folder / part).mkdir(parents=True)
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower.eval(),
                (sample,),
                folder / part / "model.onnx",
                input_names=[name],
                output_names=["embedding" if part == "visual" and not newer else f"{name}_embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},) if newer else None,
                opset_version=23 if newer else 19,
                dynamo=True,
                external_data=True,
            )
    (folder / "visual" / "preprocess_cfg.json").write_text(json.dumps({**recipe, "size": side}))
    if not hasattr(tokenizer, "encoder"):  # not CLIP's
        return
    (folder / "config.json").write_text(json.dumps({"text_cfg": {"context_length": 77}}))
    vocab = {re.sub("<(start|end)_of_text>", r"<|\1oftext|>", word): i for word, i in tokenizer.encoder.items()}
    bpe = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": list(tokenizer.bpe_ranks)}
    (folder / "textual" / "tokenizer.json").write_text(json.dumps({"model": bpe}))


def shared(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder made once for all test processes of a run."""
    base = tmp_path_factory.getbasetemp()
    return made_once(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base, name, make)


def made_once(base: Path, name: str, make: Callable[[Path], None]) -> Path:
    with filelock.FileLock(base / f"{name}.lock"):
        if not (base / name).exists():
            make(base / f"{name}.making")
            (base / f"{name}.making").rename(base / name)
    return base / name


def export_immich_from(openclip: Path, folder: Path, newer: bool = False) -> None:
    import open_clip

    name = f"local-dir:{openclip}"
    export_immich(open_clip.create_model(name).eval(), open_clip.get_tokenizer(name), folder, newer)
    if (openclip / "tokenizer.json").is_file():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(openclip / file, folder / "textual")
        config = json.loads((openclip / "open_clip_config.json").read_text())["model_cfg"]
        (folder / "config.json").write_text(json.dumps(config))


def reference_vectors(reference: Any, pictures: list[Image.Image] = (), texts: list[str] = ()) -> Any:  # type: ignore[assignment]
    import torch

    model, transform, tokenizer = reference
    with torch.no_grad():
        if pictures:
            return model.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True).numpy()
        return model.encode_text(tokenizer(list(texts)), normalize=True).numpy()


def write_labels(data: Path, model: Path | None = None) -> Path:
    """A data folder with label files; with `model`, an ONNX folder of the tests, also with the text vectors of its
    labels, which a first start computes for seconds."""
    if model:
        made = made_once(model.parent, f"{model.name}-labels", lambda folder: _start_and_stop(folder, model))
        shutil.copytree(made / "clip", data / "clip", dirs_exist_ok=True)
    for name, content in (("clip/imagenet_class_names", IMAGENET), ("bioclip/txt_emb_species", SPECIES)):
        path = data / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), "utf-8")
    return data


def _start_and_stop(folder: Path, model: Path) -> None:
    assert Node(write_labels(folder), **one_model(model)).ready().stop() == 0


# --- a daemon as a user starts it ----------------------------------------------------------------------------------


class Node:
    """A daemon process of its own, and a stub to talk to it."""

    PROGRAM = sys.executable, str(ROOT / "lumen_clip.py")

    def __init__(
        self, data: Path, arguments: tuple[str, ...] = (), program: tuple[str, ...] = PROGRAM, **environment: Any
    ) -> None:
        clean = {k: v for k, v in os.environ.items() if k in Settings.__annotations__ or not k.isupper() or k in KEPT}
        clean |= {"LUMEN_DATA_DIR": str(data), "CLIP_MDNS_TYPE": "off", "HF_ENDPOINT": NOWHERE, "CLIP_TEMPLATES": "1"}
        clean |= {"LUMEN_TUNE": "0", "OMP_WAIT_POLICY": "PASSIVE"}
        clean |= {k: str(v) for k, v in environment.items()}
        command = [*program, "--host", "127.0.0.1", "--port", "0", *arguments]
        self.log, self.data = "", data
        self._lines = threading.Condition()
        self.process = subprocess.Popen(
            command, env=clean, stderr=subprocess.PIPE, text=True, cwd=data if data.is_dir() else ROOT
        )
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

    def wait_for(self, pattern: str, seconds: float = LIMIT_S) -> re.Match[str]:
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

    def ended(self) -> int:
        """The status that it leaves with, once all that it wrote is in the log."""
        status = self.process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        return status

    def reload(self) -> None:
        """Has the label sets read again."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.ended()

    def infer(self, *requests: pb.InferRequest) -> list[pb.InferResponse]:
        return list(self.stub.Infer(iter(requests), timeout=LIMIT_S))

    def ask(self, task: str, payload: bytes, mime: str = "", **meta: str) -> pb.InferResponse:
        [response] = self.infer(pb.InferRequest(task=task, payload=payload, payload_mime=mime, meta=meta))
        return response

    def result(self, task: str, payload: bytes, mime: str = "", **meta: str) -> Any:
        response = self.ask(task, payload, mime, **meta)
        assert not response.error.message, response.error.message
        return json.loads(response.result)


KEPT = {"PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH"}


def in_chunks(payload: bytes, count: int, **fields: Any) -> list[pb.InferRequest]:
    """A request in `count` chunks, as the Lumen SDK cuts it."""
    size = -(-len(payload) // count)
    return [
        pb.InferRequest(payload=payload[i * size : (i + 1) * size], seq=i, total=count, offset=i * size, **fields)
        for i in range(count)
    ]


# --- batching ------------------------------------------------------------------------------------------------------


class Watched:
    """A real backend that notes its batches, waits at a gate, and chokes on pictures of pure white."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.daemon: Any = None
        self.batches: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.busy = threading.Event()
        self.text_gate = self.gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def _note(self, kind: str, count: int) -> None:
        self.batches.append((kind, count))
        self.busy.set()
        assert (self.text_gate if kind == "text" else self.gate).wait(LIMIT_S)

    def encode_images(self, pixels: Any) -> Any:
        self._note("image", len(pixels))
        if (pixels == 255).all(axis=(1, 2, 3)).any():
            raise RuntimeError("a secret path /etc/lumen")
        return self._backend.encode_images(pixels)

    encode_single = encode_images

    def encode_text(self, tokens: Any) -> Any:
        self._note("text", len(tokens))
        return self._backend.encode_text(tokens)


class Turnstile:
    """In the place of a gate: lets one batch through for each `release`, as a slow model does."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)

    def wait(self, timeout: float) -> bool:
        return self._permits.acquire(timeout=timeout)

    def release(self, count: int = 1) -> None:
        self._permits.release(count)

    def set(self) -> None:
        self._permits.release(10_000)


def one(stub: Any, task: str, payload: bytes, **meta: str) -> pb.InferResponse:
    [response] = stub.Infer(iter([pb.InferRequest(task=task, payload=payload, meta=meta)]), timeout=LIMIT_S)
    return response


def submitted(to: engine.Engine, stage: engine.Stage, job: engine.Job | None = None) -> engine.Job:
    """A request of one item, without a daemon; an engine that gives items back answers "1"."""

    def steps() -> engine.Steps:
        return engine.Answer("", str((yield stage, [1])[0]).encode(), {})

    job = job or engine.Job("", "", 0)
    job.steps = steps()
    to.submit(job)
    return job


def wait_until(condition: Callable[[], bool], seconds: float = LIMIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def queued(daemon: Any, name: str = "") -> int:
    """Items that wait for a batch, in all stages or in those whose name ends so."""
    return sum(stage.queue.length for stage in daemon.engine._stages if stage.name.endswith(name))


# --- pictures and text ---------------------------------------------------------------------------------------------


FULL = 40_000_000


def pixels_of(data: bytes, draft: bool = False) -> Any:
    [pixels] = preprocess.decode_image(data, [preprocess.Preprocess()], FULL, draft).values()
    return pixels


# --- label sets and their caches -----------------------------------------------------------------------------------


class Texts:
    """A text tower by hash: other texts, other vectors; `seed` stands for the weights."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.calls = seed, 0

    def __call__(self, texts: list[str]) -> Any:
        self.calls += len(texts)
        return model_files.unit_rows([np.random.default_rng([self.seed, *t.encode()]).normal(size=16) for t in texts])


# --- label sets of one's own ---------------------------------------------------------------------------------------


def save(path: Path, content: str) -> None:
    """As an editor does that is careful: whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(content, "utf-8")
    path.with_suffix(".new").rename(path)


def in_time(ask: Callable[[], pb.InferResponse], seconds: float = LIMIT_S) -> pb.InferResponse:
    """The first answer that is no error."""
    deadline = time.monotonic() + seconds
    while (response := ask()).error.message:
        assert time.monotonic() < deadline, response.error.message
        time.sleep(0.2)
    return response


# --- guests who mean harm ------------------------------------------------------------------------------------------


def one_model(folder: Path, **more: Any) -> dict[str, Any]:
    """Settings of a Node."""
    return {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": folder, "BIOCLIP_BACKEND": "none", **more}


# --- the client, and being found -----------------------------------------------------------------------------------


def run_client(
    *arguments: str, address: str = "", stdin: bytes = b"", program: str = "client.py", **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / program), *arguments, *(("--address", address) if address else ())]
    run = subprocess.run(command, capture_output=True, input=stdin, env={**os.environ, **environment}, timeout=LIMIT_S)
    return subprocess.CompletedProcess(command, run.returncode, run.stdout.decode(), run.stderr.decode())


# --- exports -------------------------------------------------------------------------------------------------------


def load(folder: Path, runtime: str = "onnxrt", **options: Any) -> model_files.Backend:
    return backends.create_backend(ModelOptions("CLIP", runtime, str(folder), folder, **options))


# --- the demo, whose answers mean something ------------------------------------------------------------------------


DEMO = DEMO_DIR


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A picture in the style that the demo was never trained on, and what is true of it."""

    name: str
    svg: str
    scene: str | None  # None: no scene is plainly right
    species: str | None

    @functools.cache  # noqa: B019 - there is one set of drawings, and most of them are used by several tests
    def file(self, side: int = 256, kind: str = "PNG", **options: Any) -> bytes:
        import resvg_py

        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=self.svg, width=side)))).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return encoded(Image.alpha_composite(white, image).convert("RGB"), kind, **options)


def vectors_of(backend: model_files.Backend, files: list[bytes], draft: bool = False) -> Any:
    recipe = backend.preprocess
    pixels = np.stack([preprocess.decode_image(file, [recipe], 10**7, draft)[recipe] for file in files])
    return np.concatenate([backend.encode_images(pixels[i : i + 64]) for i in range(0, len(pixels), 64)])


# --- several daemons -----------------------------------------------------------------------------------------------


def pictures(count: int) -> list[client.Request]:
    files = [path.read_bytes() for path in sorted((DEMO / "pictures").glob("*.png"))]
    return [client.Request("clip_image_embed", files[i % len(files)], "", client.AS_TENSOR) for i in range(count)]


def vectors(answers: Iterable[client.Result | client.LumenError]) -> list[list[float]]:
    found = []
    for answer in answers:
        assert isinstance(answer, client.Result), answer
        found.append(answer.data["vector"])
    return found


# --- true size -----------------------------------------------------------------------------------------------------


def resident_mb(node: Node) -> float:
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]
