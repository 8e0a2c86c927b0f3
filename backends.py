"""Image and text towers: what a backend is, and OpenCLIP on torch; `onnxrt` and `npu` have the others.

Owns the models, where their files come from, and how this machine runs them best. Knows nothing of gRPC, settings or
label sets. `tokenize` may run on any thread, `encode_images` on as many at once as there are lanes; `encode_text`
belongs to the inference thread alone.

Between layers a picture is uint8 RGB `[n, size, size, 3]`. Mean and std live behind `encode_images`.
Heavy libraries are imported by the class that needs them, so an edge device never sees torch.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from inputs import (
    BackendError,
    ClipTokenizer,
    Pixels,
    Preprocess,
    Tokens,
    decode_image,
    true_length,
)
from machine import replace_file, usable_cores

log = logging.getLogger("lumen.backends")
# From 1.29 on ONNX Runtime tells its maker who runs what, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Vectors = NDArray[np.float32]  # [n, dim], rows of unit length
Watched = Callable[[str, Path, Mapping[str, int]], AbstractContextManager[None]]  # see `model_files.report_download`


# Training clamps the logit scale at 100, and published CLIP models end there (open_clip issue 541).
DEFAULT_LOGIT_SCALE = 100.0
MANIFEST_FORMAT = 1
TUNING = 5  # the way in which it is tried
TURNS = 3  # of the sizes
LONGEST_BATCH_S = 0.35  # what a text query may have to wait for
LONGEST_SPLIT_S = 1.0  # what another picture may have to wait for; a text takes the core from it
# What the default models were read at; another repository is taken at its main branch.
REVISIONS = {
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "1a25a446712ba5ee05982a381eed697ef9b435cf",
    "imageomics/bioclip-2": "2957b322090f9cb17ae72c71981c7218a28d81e0",
}
TORCH_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


class DamagedFile(BackendError):
    """A file of a model is not the one that its manifest names."""

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(text)
        self.path = path


# --- models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """What an operator asked for; `name` ("CLIP" or "BIOCLIP") leads the variables that error lines name."""

    name: str
    backend: str
    model: str
    data_dir: Path
    device: str = ""
    precision: str = "fp32"
    onnx_image: str = ""
    onnx_text: str = ""
    ort_providers: tuple[str, ...] = ()
    rknn_model: str = ""
    rknn_target: str = ""  # "": what the device tree says
    rknn_cores: int = 0  # 0: all of the NPU's for which there is memory
    watched: Watched = lambda *_: nullcontext()  # around each download

    def error(self, variable: str, value: str, text: str) -> BackendError:
        return BackendError(f"{self.name}_{variable}={value}: {text}")


class Backend(Protocol):
    """One model: two towers, and the facts that scoring and capabilities need."""

    model_id: str  # the same for images and texts
    runtime: str  # "torch", "torch-cuda", "onnxrt", "rknn"
    precision: str  # "fp32" or "fp16"; what really runs
    dim: int
    logit_scale: float  # of the model itself; exp() already taken
    preprocess: Preprocess
    notice: str  # what whoever made the model wants its users to know, or ""
    golden: Mapping[str, Any]  # inputs and vectors of the model's export, or {}; see `self_test`
    self_test_cosine: float | None  # what `self_test` found here, or None if there is nothing golden
    npu: str  # what of an NPU runs, for people, or ""
    accelerator: str  # the name of the GPU that runs the images, or "" if a CPU or an NPU does or it is not known
    refusal: str  # why an NPU that was asked for is not used, or ""
    open_length: bool  # texts run at their true length, so that short ones take less than long ones
    lanes: int  # how many `encode_images` may run at once, each on a core of its own; 1: on all that there are
    space: str  # 12 hex digits that two backends share if their vectors may lie in one index; see `space_of`

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """int64 `[n, context_length]`."""

    def encode_images(self, pixels: Pixels) -> Vectors:
        """uint8 `[n, size, size, 3]` -> float32 `[n, dim]`, unit rows. Raises ValueError if a row is not finite."""

    def encode_text(self, tokens: Tokens) -> Vectors:
        """int64 `[n, context_length]` -> float32 `[n, dim]`, unit rows. Raises ValueError if a row is not finite."""

    def arrangements(self) -> Sequence[str]:
        """The ways in which this machine can run a batch of images; the first is the one in use at the start."""

    def arrange(self, arrangement: str) -> None:
        """Takes up one of `arrangements`: "split", a batch on each core, or "whole", one on all of them.

        Split batches do not wait for each other at every operator, nor for a core that decodes. At ViT-B-32 size that
        is worth a tenth, and a third where the batch is fixed at one. A picture that comes alone has one core alone.
        """

    def rest_text(self) -> None:
        """Gives the text tower's memory back until a text comes, where the tower can be had back in a second or two."""


def create_backend(options: ModelOptions) -> Backend:
    """Loads a model and runs both towers once, so that the first request is as fast as the rest.

    Raises BackendError with one line that names the variable to change.
    """
    classes: dict[str, Callable[[ModelOptions], Backend]] = {
        "torch": TorchBackend,
        "onnxrt": _onnxrt_backend,
        "rknn": _rknn_backend,
    }
    backend = classes[options.backend](options)
    try:
        side = backend.preprocess.size
        images = backend.encode_images(np.full((1, side, side, 3), 127, np.uint8))
        texts = backend.encode_text(backend.tokenize(["a photo"]))
    except Exception as error:
        log.debug("first run failed", exc_info=True)
        raise options.error("MODEL", options.model, f"the model does not run ({one_line(error)})") from error
    if not (math.isfinite(backend.logit_scale) and backend.logit_scale > 0):
        raise options.error("MODEL", options.model, f"a logit scale of {backend.logit_scale}; allowed: above 0")
    if images.shape[1] != texts.shape[1]:
        text = f"image vectors have {images.shape[1]} dimensions and text vectors {texts.shape[1]}: not one model"
        raise options.error("MODEL", options.model, text)
    if backend.golden:
        cosine, floor = self_test(backend), float(backend.golden["floor"])
        if not cosine >= floor:
            text = f"self-test: cosine {cosine:.6f} to the vectors of its export; allowed: {floor} and more"
            raise options.error("MODEL", options.model, text)
        backend.self_test_cosine = cosine
        log.info("%s: self-test: worst cosine %.7f", backend.model_id, cosine)
    return backend


def _onnxrt_backend(options: ModelOptions) -> Backend:
    from onnxrt import ONNXRTBackend  # which is built on this module

    return ONNXRTBackend(options)


def _rknn_backend(options: ModelOptions) -> Backend:
    from npu import RKNNBackend  # which is built on `onnxrt`

    return RKNNBackend(options)


def self_test(backend: Backend) -> float:
    """The worst cosine of what this machine makes of an export's golden picture and texts to OpenCLIP's vectors."""
    golden = backend.golden
    picture = decode_image(base64.b64decode(golden["picture"]), [backend.preprocess], 1 << 20, draft=False)
    found = [
        backend.encode_images(picture[backend.preprocess][None]),
        backend.encode_text(backend.tokenize(golden["texts"])),
    ]
    expected = np.array([golden["picture_vector"], *golden["text_vectors"]], np.float32)
    return float(np.sum(np.concatenate(found) * expected, axis=1).min())


@dataclass(frozen=True)
class Tuning:
    """How a machine runs a model's images best, and how fast that is on ready pixels."""

    arrangement: str
    batch_size: int
    images_per_s: float


def tuned(backend: Backend, most: int, folder: Path) -> Tuning:
    """Arranges the backend as is best here, trying for a few seconds once for a machine, a model and its versions.

    `most` bounds the batch. What was found is kept as `tuning.json` in `folder`.
    """
    key = _tuning_key(backend, most)
    path = folder / "tuning.json"
    try:
        kept = json.loads(path.read_text())
        found = Tuning(**kept["tuning"]) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or not ours
        found = None
    if found is None:
        found = _try_out(backend, most)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"key": key, "tuning": asdict(found)}).encode())
        except OSError as error:
            log.warning("cannot keep the tuning in %s (%s); the next start tries again", folder, error)
    if found.arrangement in backend.arrangements() and found.arrangement != backend.arrangements()[0]:
        backend.arrange(found.arrangement)
    log.info("%s: images run %s, up to %d at once, %.1f a second", backend.model_id, *asdict(found).values())
    return found


def _tuning_key(backend: Backend, most: int) -> str:
    """Everything that a tuning depends on; if any of it changes, the next start tunes again."""
    hardware = [_processor(), usable_cores(), backend.accelerator]
    model = [backend.runtime, backend.precision, backend.space]
    return json.dumps([TUNING, *hardware, *model, most, *_versions()])


def _try_out(backend: Backend, most: int) -> Tuning:
    """The fastest that takes no longer than others may have to wait; of nearly equal ones the smallest batch.

    Sizes take turns, for a machine is seldom as fast now as it was a second ago. Another arrangement than the first
    has to be a tenth faster: the trial runs alone, and where decoding competes for the cores, threads that wait for
    each other at every operator lose up to half (measured with torch).
    """
    sizes = sorted({size for size in (1, 2, 4, usable_cores(), 8, 2 * usable_cores(), 16, 32) if size < most} | {most})
    found: list[Tuning] = []
    for arrangement in reversed(backend.arrangements()):  # ends with the first, so that it is in use
        backend.arrange(arrangement)
        longest = LONGEST_BATCH_S if backend.lanes == 1 else LONGEST_SPLIT_S
        taken: dict[int, list[float]] = {}
        for size in sizes:
            seconds = min(seconds_of_a_batch(backend, size) for _ in range(2))  # the first makes room
            if seconds <= longest or size == 1:
                taken[size] = [seconds]
            if seconds > longest:
                break
        for _ in range(TURNS if len(taken) > 1 else 0):
            for size, times in taken.items():
                times.append(seconds_of_a_batch(backend, size))
        for size, times in taken.items():
            seconds = statistics.median(times)
            if seconds <= longest or size == 1:
                found.append(Tuning(arrangement, size, round(backend.lanes * size / seconds, 2)))
    best = max(found, key=lambda t: t.images_per_s * (1.1 if t.arrangement == backend.arrangements()[0] else 1))
    equal = [t for t in found if t.arrangement == best.arrangement and t.images_per_s >= 0.985 * best.images_per_s]
    return min(equal, key=lambda t: t.batch_size)


def seconds_of_a_batch(backend: Backend, size: int) -> float:
    """The mean, with a batch in each lane. On a core of its own core time is what counts: other programs, which
    are busy while a machine boots, take none of it."""
    side = backend.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    clock = time.perf_counter if backend.lanes == 1 else time.thread_time

    def run(_: int) -> float:
        started = clock()
        backend.encode_images(pixels)
        return clock() - started

    with ThreadPoolExecutor(backend.lanes) as lanes:
        return statistics.mean(lanes.map(run, range(backend.lanes)))


def _processor() -> str:
    """What kind of cores these are; `platform` alone knows no more than the instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    parts = {line for line in lines if line.startswith(("model name", "CPU part", "CPU implementer"))}
    return " ".join(" ".join(sorted(parts)).split()) or platform.machine()


def _versions() -> list[str]:
    """Names and versions of the installed runtimes; ONNX Runtime has a package of its own for CUDA."""
    versions = []
    for name in ("onnxruntime", "onnxruntime-gpu", "torch", "rknn-toolkit-lite2"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def space_of(weights: str, recipe: Preprocess, precision: str) -> str:
    """A short name that vectors share if they may be compared: same weights, preprocessing and class of precision.

    float32 and float16 are one class, for their vectors agree to a cosine of 0.9999; int8's do not. `weights` is the
    sha-256 of the file that the model was trained into, whatever was made of it since.
    """
    kind = "int8" if precision == "int8" else "float"
    return hashlib.sha256(json.dumps([weights, asdict(recipe), kind]).encode()).hexdigest()[:12]


def sha256_of(*paths: Path) -> str:
    """Of one file its sha-256; of several, or of a folder's, that of theirs in the order of their names."""
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def read_manifest(folder: Path, options: ModelOptions) -> dict[str, Any]:
    """`manifest.json` of an export, or {} if the folder has none.

    Raises BackendError if it is of a later format, or if a file is missing or not the one that it names.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format", MANIFEST_FORMAT) != MANIFEST_FORMAT:
        text = f"manifest.json is of format {manifest['format']}; this version reads {MANIFEST_FORMAT}"
        raise options.error("MODEL", options.model, text)
    for name, digest in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise options.error("MODEL", options.model, f"manifest.json names {name}, which is missing")
        if sha256_of(path) != digest:
            text = f"{name} is not the file that manifest.json names; copy the folder again"
            raise DamagedFile(str(options.error("MODEL", options.model, text)), path)
    return manifest


def unit_rows(vectors: NDArray[Any]) -> Vectors:
    vectors = np.array(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 1e-6).all()):
        raise ValueError("the model returned a vector that is not finite or has no length")
    return np.asarray(vectors / norms, np.float32)


def one_line(error: BaseException) -> str:
    """An exception as a part of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def needs_modules(modules: Iterable[str], options: ModelOptions) -> None:
    # find_spec, not import: importing torch raises SIGILL on some boards' CPUs.
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise options.error("BACKEND", options.backend, f"{', '.join(missing)} is not installed here")


def split_model(options: ModelOptions) -> tuple[str, str]:
    """`ARCH:weights` -> (arch, weights)."""
    arch, _, weights = options.model.partition(":")
    if not arch or not weights:
        text = "not a folder; allowed: ARCH:pretrained-tag, ARCH:path/to/weights, hf-hub:org/name, or a folder"
        raise options.error("MODEL", options.model, text)
    return arch, weights


def fetch_repository(
    options: ModelOptions, repo: str, choose: Callable[[list[str]], list[str]], form: str = ""
) -> Path:
    """The files that `choose` takes from a hub repository's list, downloaded once to `data/models/`.

    A marker with every file's size says that the folder is whole; with it there is no network call at all. A
    download that was cut off goes on where it stopped. `form` (default: the backend) names what `choose` takes.
    Raises BackendError.
    """
    folder = options.data_dir / "models" / repo.replace("/", "--")
    marker = folder / f".complete-{form or options.backend}.json"
    if _is_whole(folder, marker):
        return folder
    from huggingface_hub import HfApi, snapshot_download

    revision = REVISIONS.get(repo, "main")
    log.info("downloading %s@%s to %s", repo, revision[:12], folder)
    try:
        # list_repo_files waits for ever on a hub that takes the connection and says nothing.
        found = HfApi().repo_info(repo, revision=revision, timeout=30, files_metadata=True).siblings or []
        files = choose([file.rfilename for file in found])
        expected = {file.rfilename: file.size or 0 for file in found if file.rfilename in files}
        with options.watched(repo, folder, expected):
            snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=files)
        sizes = {name: (folder / name).stat().st_size for name in files}
        replace_file(marker, json.dumps(sizes).encode())
    except Exception as error:  # the hub's client, its HTTP library and the disk each raise their own kinds
        log.debug("download failed", exc_info=True)
        text = f"cannot download the model from the hub repository {repo} ({one_line(error)})"
        raise options.error("MODEL", options.model, text) from error
    return folder


def _is_whole(folder: Path, marker: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads(marker.read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


class TorchBackend:
    """OpenCLIP on torch: CUDA (ROCm shows as CUDA), then MPS, then CPU, unless the device is given."""

    npu = refusal = ""

    def __init__(self, options: ModelOptions) -> None:
        needs_modules(("torch", "open_clip"), options)
        # Threads that spin while they wait for each other take the cores from what they wait for: a text among
        # other work cost up to ten times its core time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import open_clip
        import torch

        device = options.device or self._best_device()
        if options.precision != "fp32" and device.split(":")[0] == "cpu":
            raise options.error("PRECISION", options.precision, "half precision runs on a GPU only; here: fp32")
        name, arguments, self.model_id, self.weights = self._resolve(options)
        try:
            model: Any = open_clip.create_model(
                name, device=device, precision=options.precision, require_pretrained=True, **arguments
            )
            tokenizer: Any = open_clip.get_tokenizer(name)
        except Exception as error:
            log.debug("OpenCLIP could not build %s", name, exc_info=True)
            text = f"OpenCLIP cannot load it on {device} ({one_line(error)})"
            raise options.error("MODEL", options.model, text) from error
        self._torch, self.model, self._device = torch, model.eval(), torch.device(device)
        self._cores = usable_cores()
        self._dtype = torch.float16 if options.precision == "fp16" else torch.float32
        self.precision, self.notice = options.precision, ""
        self.golden: Mapping[str, Any] = {}
        self.self_test_cosine: float | None = None
        self.runtime = "torch" if self._device.type == "cpu" else f"torch-{self._device.type}"
        self.accelerator = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else ""
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.preprocess = Preprocess.from_config(model.visual.preprocess_cfg, model.visual.image_size)
        self._mean, self._std = (
            torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (self.preprocess.mean, self.preprocess.std)
        )
        self.space = space_of(sha256_of(self.weights), self.preprocess, self.precision)
        # OpenCLIP's own tokenizer remembers every word it ever saw; a daemon that runs for months must not.
        if type(tokenizer) is open_clip.SimpleTokenizer:
            self.tokenizer: Any = ClipTokenizer(
                tokenizer.encoder, list(tokenizer.bpe_ranks), tokenizer.context_length or 77
            )
        else:
            self.tokenizer = lambda texts: tokenizer(list(texts)).numpy()
        self.arrange(self.arrangements()[0])
        # Cutting at the end token is exact for a causal tower that is pooled there, and for no other.
        causal = type(model) is open_clip.CLIP and model.attn_mask is not None
        self.open_length = causal and model.text_pool_type == "argmax"
        visual = model.visual
        self._pools_one_token = (
            type(visual) is open_clip.transformer.VisionTransformer
            and (visual.pool_type, visual.attn_pool, visual.transformer.batch_first) == ("tok", None, True)
            and type(visual.transformer.resblocks[-1]) is open_clip.transformer.ResidualAttentionBlock
        )
        self.dim = int(self.encode_text(self.tokenize(["a photo"])).shape[1])

    @staticmethod
    def _best_device() -> str:
        import torch

        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    @staticmethod
    def _resolve(options: ModelOptions) -> tuple[str, dict[str, Any], str, Path]:
        """What to ask OpenCLIP for: (name, arguments, model_id, weights), with every file on disk already."""
        import open_clip

        value = options.model
        if Path(value).is_dir() or value.startswith("hf-hub:"):
            repo = value.removeprefix("hf-hub:")
            local = Path(value).is_dir()
            folder = Path(value) if local else fetch_repository(options, repo, _torch_files)
            weights = next((folder / name for name in TORCH_WEIGHTS if (folder / name).is_file()), folder)
            return f"local-dir:{folder}", {}, folder.resolve().name if local else repo, weights
        arch, tag = split_model(options)
        if arch not in open_clip.list_models():
            raise options.error("MODEL", value, f"OpenCLIP has no architecture {arch!r}")
        if Path(tag).is_file():
            return arch, {"pretrained": tag}, f"{arch}:{Path(tag).stem}", Path(tag)
        config = open_clip.get_pretrained_cfg(arch, tag)
        if not config:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
            raise options.error("MODEL", value, f"{tag!r} is neither a file nor a tag of {arch}; tags: {tags}")
        if config.get("hf_hub"):
            repo, file = os.path.split(config["hf_hub"])
            folder = fetch_repository(options, repo, (lambda files: [file]) if file else _torch_files)
            path = folder / (file or next(name for name in TORCH_WEIGHTS if (folder / name).is_file()))
        else:  # a plain URL, which OpenCLIP fetches once and checks by its sha-256
            try:
                folder = options.data_dir / "models"
                with options.watched(value, folder, {Path(config["url"]).name: 0}):
                    path = Path(open_clip.download_pretrained(config, cache_dir=str(folder)))
            except Exception as error:
                raise options.error("MODEL", value, f"cannot download the weights ({one_line(error)})") from error
        # OpenCLIP ties these to the tag; with a path they have to be said.
        recipe = {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config}
        quick_gelu = bool(config.get("quick_gelu", False))
        arguments = {"pretrained": str(path), "force_quick_gelu": quick_gelu, "force_preprocess_cfg": recipe}
        return arch, arguments, value, path

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        tokens: Tokens = self.tokenizer(texts)
        return tokens

    def encode_images(self, pixels: Pixels) -> Vectors:
        self._use_cores(self._cores if self.lanes == 1 else 1)
        with self._torch.inference_mode():
            x = self.image_tower(self._torch.from_numpy(pixels).to(self._device))
            return unit_rows(x.float().cpu().numpy())

    def encode_text(self, tokens: Tokens) -> Vectors:
        self._use_cores(self._cores)
        with self._torch.inference_mode():
            if self.open_length:
                tokens = tokens[:, : true_length(tokens)]
            x = self.text_tower(self._torch.from_numpy(tokens).to(self._device))
            return unit_rows(x.float().cpu().numpy())

    def arrangements(self) -> Sequence[str]:
        # On a CPU `whole` is never worth trying: its threads spin while they wait, and pictures are decoded meanwhile.
        return ("split",) if self._device.type == "cpu" and usable_cores() > 1 else ("whole",)

    def arrange(self, arrangement: str) -> None:
        self.lanes = self._cores if arrangement == "split" else 1

    def rest_text(self) -> None:
        """Keeps it: both towers are one model here, and OpenCLIP takes long to build it again."""

    def _use_cores(self, count: int) -> None:
        """torch counts threads for each thread that calls it; a new one begins with what another set last."""
        if self._torch.get_num_threads() != count:
            self._torch.set_num_threads(count)

    def image_tower(self, pixels: Any) -> Any:
        """uint8 tensor `[n, size, size, 3]` -> `[n, dim]`, not of unit length yet. `export.py` traces it."""
        x = pixels.permute(0, 3, 1, 2).contiguous().float()
        x = ((x / 255 - self._mean) / self._std).to(self._dtype)
        if not self._pools_one_token:
            return self.model.encode_image(x)
        # What the last block makes of the other tokens is never read. Leaving that out saves most of a block.
        visual = self.model.visual
        x = visual._embeds(x)
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            x = block(x)
        seen = last.ln_1(x)
        x = x[:, :1] + last.ls_1(last.attention(seen[:, :1], seen, seen))
        x = x + last.ls_2(last.mlp(last.ln_2(x)))
        pooled = visual._pool(x)[0]
        return pooled if visual.proj is None else pooled @ visual.proj

    def text_tower(self, tokens: Any) -> Any:
        """int64 tensor `[n, length]` -> `[n, dim]`; a causal tower takes any length up to its context's.

        For such a tower this is `CLIP.encode_text` without its demand for the full context.
        """
        model, length = self.model, tokens.shape[1]
        if not self.open_length:
            return model.encode_text(tokens)
        x = model.token_embedding(tokens).to(self._dtype) + model.positional_embedding[:length].to(self._dtype)
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        x = x[self._torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=-1)]
        projection = model.text_projection
        if projection is None:
            return x
        return projection(x) if callable(projection) else x @ projection


def _torch_files(files: list[str]) -> list[str]:
    """The weights (safetensors first, nothing twice), the config, and what a tokenizer may need."""
    weights = next((name for name in TORCH_WEIGHTS if name in files), None)
    if weights is None:
        raise ValueError(f"it has none of {', '.join(TORCH_WEIGHTS)}")
    return [weights] + [name for name in files if "/" not in name and name.endswith((".json", ".txt", ".model"))]


def normalize(pixels: Pixels, recipe: Preprocess) -> NDArray[np.float32]:
    """uint8 `[n, h, w, 3]` -> float32 `[n, 3, h, w]`, `(x / 255 - mean) / std` in OpenCLIP's order of operations."""
    x = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    x /= np.float32(255)
    x -= np.array(recipe.mean, np.float32)[:, None, None]
    x /= np.array(recipe.std, np.float32)[:, None, None]
    return x


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file. Raises BackendError if it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BackendError(f"{path}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise BackendError(f"{path}: not a JSON object")
    return content
