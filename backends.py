"""Image and text towers: OpenCLIP on torch, ONNX Runtime, the Rockchip NPU.

Owns what a picture and a text become before a model sees them, and the models themselves. Knows nothing of gRPC,
threads, settings or label sets. `decode_image`, `pixels_from_tensor` and `tokenize` may run on any thread;
`encode_images` and `encode_text` belong to the inference thread alone.

Between layers a picture is uint8 RGB `[n, size, size, 3]`. Mean and std live behind `encode_images`.
Heavy libraries are imported by the class that needs them, so an edge device never sees torch.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

log = logging.getLogger("lumen.backends")

Pixels = NDArray[np.uint8]  # [n, size, size, 3], RGB
Tokens = NDArray[np.int64]  # [n, context_length], padded with 0
Vectors = NDArray[np.float32]  # [n, dim], rows of unit length

# OpenAI's CLIP statistics; open_clip/constants.py has the same.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# Training clamps the logit scale at 100, and published CLIP models end there (open_clip issue 541).
DEFAULT_LOGIT_SCALE = 100.0
MANIFEST_FORMAT = 1
SCORING_GRAPH = Path(__file__).resolve().parent / "gen" / "scoring.onnx"  # made by `scoring.py` beside it
LONGEST_BATCH_S = 0.35  # what a text query may have to wait for
DRAFT_MARGIN = 2  # a scaled JPEG decode keeps at least this many times the model's side
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP") + (("AVIF",) if features.check("avif") else ())
NPU_FLOOR = 0.999  # the least cosine of what the NPU makes of a golden picture
NPU_FORMAT = 1  # of the model.json beside a .rknn file
NPU_CORES = {"rk3562": 1, "rk3566": 1, "rk3568": 1, "rk3576": 2, "rk3588": 3}
DEVICE_TREE = Path("/proc/device-tree/compatible")
# What the default models were read at; another repository is taken at its main branch.
REVISIONS = {
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "1a25a446712ba5ee05982a381eed697ef9b435cf",
    "imageomics/bioclip-2": "2957b322090f9cb17ae72c71981c7218a28d81e0",
}
TORCH_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


class BackendError(Exception):
    """A model cannot be had or run as configured; the text is one line for the operator."""


class DamagedFile(BackendError):
    """A file of a model is not the one that its manifest names."""

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(text)
        self.path = path


class BadInput(ValueError):
    """A picture or tensor that a client sent cannot be used; the text is for that client."""


# --- pictures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model's input; fields and defaults are OpenCLIP's `PreprocessCfg`."""

    size: int = 224
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], size: int | None = None) -> Preprocess:
        """Reads a `preprocess_cfg`; `size` is the model's own side in pixels and wins over the config's.

        Raises BackendError for a recipe that is not supported.
        """
        side = size if size is not None else config.get("size", cls.size)
        if isinstance(side, Sequence):
            if len(set(side)) != 1:
                raise BackendError(f"preprocess size {list(side)}: only square inputs are supported")
            side = side[0]
        mode = config.get("resize_mode") or cls.resize_mode
        filter_name = config.get("interpolation") or cls.interpolation
        if mode not in ("shortest", "squash"):
            raise BackendError(f"preprocess resize_mode {mode!r}: only 'shortest' and 'squash' are supported")
        if filter_name not in ("bicubic", "bilinear"):
            raise BackendError(f"preprocess interpolation {filter_name!r}: only 'bicubic' and 'bilinear'")
        return cls(
            size=int(side),
            mean=tuple(float(x) for x in config.get("mean") or cls.mean),
            std=tuple(float(x) for x in config.get("std") or cls.std),
            interpolation=filter_name,
            resize_mode=mode,
        )

    @property
    def tensor_id(self) -> str:
        """The name under which clients know this recipe, or "" (PROTOCOL: ids that the Lumen SDK can produce)."""
        return "bioclip2_224_image_v1" if self == Preprocess() else ""


def decode_image(data: bytes, recipes: Iterable[Preprocess], max_pixels: int, draft: bool) -> dict[Preprocess, Pixels]:
    """Decodes one picture by its content and prepares it for each recipe: uint8 RGB `[size, size, 3]`.

    Plain RGB files decoded in full equal OpenCLIP's own transform to the last bit. `draft` lets a JPEG be decoded at
    a fraction of its size, at least `DRAFT_MARGIN` times the largest recipe's side. Raises BadInput.
    """
    recipes = list(recipes)
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        log.debug("not an image: %r", error)
        raise BadInput(
            f"payload: not an image that can be read; allowed: whole files of {', '.join(IMAGE_FORMATS)}"
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadInput(f"payload: the image has {width} x {height} pixels; allowed: {max_pixels} in all")
    try:
        if draft and image.format in ("JPEG", "MPO"):
            side = DRAFT_MARGIN * max(recipe.size for recipe in recipes)
            image.draft(None, (side, side))
        image.load()  # before the EXIF, whose reader may load a PNG and so hide that it is damaged
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        return {recipe: _resize(rgb, recipe, orientation, max_pixels) for recipe in recipes}
    except BadInput:
        raise
    except Exception as error:
        log.debug("undecodable %s: %r", image.format, error)
        raise BadInput(f"payload: the {image.format} image is damaged or cut off") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Cameras and editors write broken EXIF; the picture is no worse for it."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception as error:
        log.debug("unreadable EXIF: %r", error)
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB as a viewer would show it: alpha over white, 16 bits scaled, not clipped."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # 16-bit greyscale; Pillow's own conversion clips at 255.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


# EXIF orientation -> the operation that shows the picture upright (as Pillow's ImageOps.exif_transpose has it).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def _resize(image: Image.Image, recipe: Preprocess, orientation: int, max_pixels: int) -> Pixels:
    """torchvision's Resize and CenterCrop on a PIL image, with its truncation and its banker's rounding."""
    side = recipe.size
    width, height = image.size
    if recipe.resize_mode == "squash":
        target = (side, side)
    elif width <= height:
        target = (side, int(side * height / width))
    else:
        target = (int(side * width / height), side)
    if target[0] * target[1] > max_pixels:
        raise BadInput(f"payload: the image is too narrow ({width} x {height} pixels)")
    if target != image.size:
        image = image.resize(target, _FILTERS[recipe.interpolation])
    # Turned after the resize: the picture is small by now.
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    left, top = (round((length - side) / 2.0) for length in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


TENSOR_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}


def pixels_from_tensor(payload: bytes, meta: Mapping[str, str], recipe: Preprocess) -> Pixels:
    """A client's ready-made input `[1, 3, size, size]` back into the pixels it came from: uint8 `[size, size, 3]`.

    Exact for any tensor that was `(pixel / 255 - mean) / std`. Raises BadInput, naming the meta key.
    """
    shape = [1, 3, recipe.size, recipe.size]
    expected = {
        "lumen.tensor.layout": "NCHW",
        "lumen.tensor.format": "contiguous",
        "lumen.tensor.byte_order": "little",
        "lumen.preprocess.id": recipe.tensor_id,
        "lumen.preprocess.skip": "true",
    }
    for key, value in expected.items():
        if meta.get(key) != value:
            raise BadInput(f"meta {key}: {meta.get(key, '')!r}; allowed: {value!r}")
    dtype = TENSOR_DTYPES.get(meta.get("lumen.tensor.dtype", ""))
    if dtype is None:
        raise BadInput(f"meta lumen.tensor.dtype: {meta.get('lumen.tensor.dtype', '')!r}; allowed: fp32, fp16")
    try:
        sent: object = json.loads(meta.get("lumen.tensor.shape", ""))
    except (ValueError, RecursionError):
        sent = None
    if sent != shape:
        raise BadInput(f"meta lumen.tensor.shape: {meta.get('lumen.tensor.shape', '')[:80]!r}; allowed: {shape}")
    if len(payload) != 3 * recipe.size**2 * dtype.itemsize:
        raise BadInput(f"payload: {len(payload)} bytes; a tensor {shape} has {3 * recipe.size**2 * dtype.itemsize}")
    values = np.frombuffer(payload, dtype).reshape(3, recipe.size, recipe.size).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (recipe.mean, recipe.std))
    with np.errstate(all="ignore"):  # the next line judges what overflowed
        levels = np.rint((values * std + mean) * 255)
        valid = bool(np.all((levels >= -1) & (levels <= 256)))  # false for NaN as well
    if not valid:
        raise BadInput("payload: tensor values outside (pixel/255 - mean)/std of an image")
    return np.ascontiguousarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


# --- text -------------------------------------------------------------------------------------------------------


class ClipTokenizer:
    """CLIP's byte-pair tokenizer, equal to OpenCLIP's SimpleTokenizer on any text, at the speed of `tokenizers`.

    A CLIP `tokenizer.json` used as it is shipped differs from OpenCLIP on curly quotes, HTML entities, ligatures,
    control characters and more, because its normalizer lacks ftfy. So only its vocabulary and merges are taken;
    cleaning and splitting are done here, as OpenCLIP does them.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], context_length: int = 77) -> None:
        import regex
        from tokenizers import Tokenizer, models, pre_tokenizers

        self.context_length = context_length
        self._split = regex.compile(
            r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        self.start, self.end = _special_ids(vocab)
        self._specials = {"<start_of_text>": self.start, "<end_of_text>": self.end}
        bpe = models.BPE(vocab=dict(vocab), merges=list(merges), end_of_word_suffix="</w>")
        self._bpe = Tokenizer(bpe)
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    @classmethod
    def from_file(cls, path: Path, context_length: int) -> ClipTokenizer:
        """From a CLIP `tokenizer.json`. Raises BackendError if it is missing or of another kind."""
        try:
            model = json.loads(path.read_text("utf-8"))["model"]
            vocab, merges = model["vocab"], [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
            if model.get("end_of_word_suffix") != "</w>":
                raise BackendError(f"{path}: not a CLIP byte-pair tokenizer, which alone is supported")
            return cls(vocab, merges, context_length)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(f"{path}: no CLIP tokenizer.json ({error})") from error

    def to_json(self) -> str:
        """The content of a `tokenizer.json`, from which `from_file` makes the same tokenizer."""
        return str(self._bpe.to_str())

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """int64 `[n, context_length]`: start, tokens, end, then zeros; what is too long is cut and keeps its end."""
        tokens = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.start, *self._encode(clean_text(text)), self.end][: self.context_length]
            ids[-1] = self.end
            row[: len(ids)] = ids
        return tokens

    def _encode(self, text: str) -> list[int]:
        # A word has one token at least, so more words than the context holds are never read.
        words = (match.group() for match in islice(self._split.finditer(text), self.context_length))
        ids: list[int] = []
        for word in words:
            if word in self._specials:
                ids.append(self._specials[word])
            else:
                ids.extend(self._bpe.encode([word], is_pretokenized=True, add_special_tokens=False).ids)
        return ids


def _special_ids(vocab: Mapping[str, int]) -> tuple[int, int]:
    for start, end in (("<start_of_text>", "<end_of_text>"), ("<|startoftext|>", "<|endoftext|>")):
        if start in vocab and end in vocab:
            return vocab[start], vocab[end]
    raise ValueError("the vocabulary lacks the start and end tokens of CLIP")


def clean_text(text: str) -> str:
    """OpenCLIP's `clean="lower"`: ftfy, HTML entities twice, single spaces, lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def _true_length(tokens: Tokens) -> int:
    """Length of the longest text with its end token, which has the highest id and is the first of its kind.

    A causal tower never looks to the right, so what follows the end token may be cut off exactly.
    """
    return int(tokens.argmax(axis=1).max()) + 1


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
    refusal: str  # why an NPU that was asked for is not used, or ""
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
        """Takes up one of `arrangements`: "split", see `Pieces`, or "whole", all cores on each operator in turn."""

    def rest_text(self) -> None:
        """Gives the text tower's memory back until a text comes, where the tower can be had back in a second or two."""

    def similarities(self, vectors: NDArray[Any], queries: Vectors) -> NDArray[np.float32]:
        """Cosines of unit rows, float16 or float32 `[n, dim]`, with unit queries `[b, dim]`: float32 `[b, n]`."""


def create_backend(options: ModelOptions) -> Backend:
    """Loads a model and runs both towers once, so that the first request is as fast as the rest.

    Raises BackendError with one line that names the variable to change.
    """
    classes: dict[str, Callable[[ModelOptions], Backend]] = {
        "torch": TorchBackend,
        "onnxrt": ONNXRTBackend,
        "rknn": RKNNBackend,
    }
    backend = classes[options.backend](options)
    try:
        side = backend.preprocess.size
        images = backend.encode_images(np.full((1, side, side, 3), 127, np.uint8))
        texts = backend.encode_text(backend.tokenize(["a photo"]))
    except Exception as error:
        log.debug("first run failed", exc_info=True)
        raise options.error("MODEL", options.model, f"the model does not run ({_line(error)})") from error
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
    key = json.dumps([_processor(), usable_cores(), backend.runtime, backend.space, most, *_versions()])
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
    log.info("%s: %s, up to %d images at once, %.1f images/s", backend.model_id, *asdict(found).values())
    return found


def _try_out(backend: Backend, most: int) -> Tuning:
    """The fastest that takes no longer than LONGEST_BATCH_S; of nearly equal ones the smallest batch.

    Another arrangement than the first has to be a tenth faster: the trial runs alone, and where decoding competes for
    the cores, threads that wait for each other at every operator lose up to half (measured with torch).
    """
    sizes = sorted({size for size in (1, 2, 4, usable_cores(), 8, 2 * usable_cores(), 16, 32) if size < most} | {most})
    found: list[Tuning] = []
    for arrangement in reversed(backend.arrangements()):  # ends with the first, so that it is in use
        backend.arrange(arrangement)
        for size in sizes:
            seconds = _seconds_of_a_batch(backend, size)
            if size == 1 or seconds <= LONGEST_BATCH_S:
                found.append(Tuning(arrangement, size, round(size / seconds, 2)))
            if seconds > LONGEST_BATCH_S:
                break
    best = max(found, key=lambda t: t.images_per_s * (1.1 if t.arrangement == backend.arrangements()[0] else 1))
    equal = [t for t in found if t.arrangement == best.arrangement and t.images_per_s >= 0.96 * best.images_per_s]
    return min(equal, key=lambda t: t.batch_size)


def _seconds_of_a_batch(backend: Backend, size: int) -> float:
    side = backend.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    backend.encode_images(pixels)
    taken: list[float] = []
    while not taken or sum(taken) < 0.4:
        started = time.perf_counter()
        backend.encode_images(pixels)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _processor() -> str:
    """What kind of cores these are; `platform` alone knows no more than the instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    parts = {line for line in lines if line.startswith(("model name", "CPU part", "CPU implementer"))}
    return " ".join(" ".join(sorted(parts)).split()) or platform.machine()


def _versions() -> list[str]:
    versions = []
    for name in ("onnxruntime", "torch", "rknn-toolkit-lite2"):
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


def _line(error: BaseException) -> str:
    """An exception as a part of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _needs(modules: Iterable[str], options: ModelOptions) -> None:
    # find_spec, not import: importing torch raises SIGILL on some boards' CPUs.
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise options.error("BACKEND", options.backend, f"{', '.join(missing)} is not installed here")


def _split_model(options: ModelOptions) -> tuple[str, str]:
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
        found = HfApi().repo_info(repo, revision=revision, timeout=30).siblings or []
        files = choose([file.rfilename for file in found])
        snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=files)
        sizes = {name: (folder / name).stat().st_size for name in files}
        replace_file(marker, json.dumps(sizes).encode())
    except Exception as error:  # the hub's client, its HTTP library and the disk each raise their own kinds
        log.debug("download failed", exc_info=True)
        text = f"cannot download the model from the hub repository {repo} ({_line(error)})"
        raise options.error("MODEL", options.model, text) from error
    return folder


def _is_whole(folder: Path, marker: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads(marker.read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The cores that this process may use: those of its affinity, or fewer by the quota of its control groups (v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        group = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::")).strip("/")
    except (OSError, StopIteration):  # no Linux, or control groups of version 1
        return cores
    folder = cgroups / group
    for path in (folder, *folder.parents):
        if cgroups not in (path, *path.parents):
            break
        try:
            quota, period = (path / "cpu.max").read_text().split()
        except (OSError, ValueError):  # the root has none
            continue
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def step_back(steps: int) -> None:
    """Lowers the calling thread's priority by so many steps of `nice`, where a thread has one of its own.

    Whoever waits for a short answer (Health, a text) then need not wait for a core as well; pictures that are decoded
    ahead come last.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + steps)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a small file so that a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Pieces:
    """The arrangement `split`: a batch of images in equal pieces, each on a core of its own.

    Pieces do not wait for each other at every operator, nor for a core that decodes. At ViT-B-32 size that is worth a
    tenth, and a third where the batch is fixed at one. A picture that comes alone has one core alone.
    """

    def __init__(self, begin: Callable[[], object] = lambda: None) -> None:
        """`begin` is called on each of the threads first."""

        def start() -> None:
            step_back(5)
            begin()

        self._cores = usable_cores()
        self._threads = ThreadPoolExecutor(self._cores, "piece", start)

    def run(self, encode: Callable[[Pixels], Vectors], pixels: Pixels) -> Vectors:
        size = -(-len(pixels) // self._cores)
        pieces = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        return np.concatenate(list(self._threads.map(encode, pieces)))


class Scorer:
    """Compares rows with queries in float32; half-precision ones at about the speed of a plain copy of them.

    Each core goes through a span of its own, in blocks small enough that their float32 form stays in its cache.
    """

    BLOCK = 1024  # rows; of 128 to 2048, those of 512 to 2048 are about equal

    def __init__(self, dot: Callable[[NDArray[Any], Vectors], Any]) -> None:
        """`dot`: float16 `[m, dim]`, float32 `[dim, b]` -> float32 `[m, b]`, on the thread that calls it."""
        self._dot = dot
        self._cores = usable_cores()
        self._threads = ThreadPoolExecutor(self._cores, "score", lambda: step_back(5))

    def __call__(self, vectors: NDArray[Any], queries: Vectors) -> NDArray[np.float32]:
        if vectors.dtype != np.float16:
            return np.asarray(queries @ vectors.T, np.float32)
        columns = np.ascontiguousarray(queries.T)
        found = np.empty((len(queries), len(vectors)), np.float32)

        def score(span: range) -> None:
            for start in span:
                block = slice(start, min(start + self.BLOCK, len(vectors)))
                found[:, block] = self._dot(vectors[block], columns).T

        starts = range(0, len(vectors), self.BLOCK)
        share = -(-len(starts) // self._cores)
        list(self._threads.map(score, [starts[i : i + share] for i in range(0, len(starts), share)]))
        return found


class TorchBackend:
    """OpenCLIP on torch: CUDA (ROCm shows as CUDA), then MPS, then CPU, unless the device is given."""

    npu = refusal = ""

    def __init__(self, options: ModelOptions) -> None:
        _needs(("torch", "open_clip"), options)
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
            text = f"OpenCLIP cannot load it on {device} ({_line(error)})"
            raise options.error("MODEL", options.model, text) from error
        self._torch, self.model, self._device = torch, model.eval(), torch.device(device)
        self._cores = usable_cores()
        self._scorer = Scorer(self._dot_half)
        self._dtype = torch.float16 if options.precision == "fp16" else torch.float32
        self.precision, self.notice = options.precision, ""
        self.golden: Mapping[str, Any] = {}
        self.self_test_cosine: float | None = None
        self.runtime = "torch" if self._device.type == "cpu" else f"torch-{self._device.type}"
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
        self.causal = type(model) is open_clip.CLIP and model.attn_mask is not None and model.text_pool_type == "argmax"
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
        arch, tag = _split_model(options)
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
                path = Path(open_clip.download_pretrained(config, cache_dir=str(options.data_dir / "models")))
            except Exception as error:
                raise options.error("MODEL", value, f"cannot download the weights ({_line(error)})") from error
        # OpenCLIP ties these to the tag; with a path they have to be said.
        recipe = {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config}
        quick_gelu = bool(config.get("quick_gelu", False))
        arguments = {"pretrained": str(path), "force_quick_gelu": quick_gelu, "force_preprocess_cfg": recipe}
        return arch, arguments, value, path

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        tokens: Tokens = self.tokenizer(texts)
        return tokens

    def encode_images(self, pixels: Pixels) -> Vectors:
        if self._pieces:
            return self._pieces.run(self._encode_piece, pixels)
        self._take_all_cores()
        return self._encode_piece(pixels)

    def _encode_piece(self, pixels: Pixels) -> Vectors:
        with self._torch.inference_mode():
            x = self.image_tower(self._torch.from_numpy(pixels).to(self._device))
            return unit_rows(x.float().cpu().numpy())

    def encode_text(self, tokens: Tokens) -> Vectors:
        self._take_all_cores()
        with self._torch.inference_mode():
            if self.causal:
                tokens = tokens[:, : _true_length(tokens)]
            x = self.text_tower(self._torch.from_numpy(tokens).to(self._device))
            return unit_rows(x.float().cpu().numpy())

    def arrangements(self) -> Sequence[str]:
        # On a CPU `whole` is never worth trying: its threads spin while they wait, and pictures are decoded meanwhile.
        return ("split",) if self._device.type == "cpu" and usable_cores() > 1 else ("whole",)

    def arrange(self, arrangement: str) -> None:
        self._pieces = Pieces(lambda: self._torch.set_num_threads(1)) if arrangement == "split" else None

    def rest_text(self) -> None:
        """Keeps it: both towers are one model here, and OpenCLIP takes long to build it again."""

    def similarities(self, vectors: NDArray[Any], queries: Vectors) -> NDArray[np.float32]:
        return self._scorer(vectors, queries)

    def _dot_half(self, rows: NDArray[Any], columns: Vectors) -> NDArray[np.float32]:
        torch = self._torch
        if torch.get_num_threads() != 1:  # counted for each thread; here each core has a span of its own
            torch.set_num_threads(1)
        with torch.inference_mode():
            return np.asarray((torch.from_numpy(rows).float() @ torch.from_numpy(columns)).numpy())

    def _take_all_cores(self) -> None:
        """torch counts threads for each thread that calls it; a new one begins with what another set last."""
        if self._torch.get_num_threads() != self._cores:
            self._torch.set_num_threads(self._cores)

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
        if not self.causal:
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


class ONNXRTBackend:
    """ONNX Runtime on towers in the `visual/` + `textual/` folder layout (RKNN.md section 6).

    Takes image towers with uint8 `[n, h, w, 3]` or float32 `[n, 3, h, w]` input, text towers with int32 or int64 ids,
    each with a fixed or an open batch; the first output is the embedding, whatever its name.
    """

    npu = refusal = ""
    _form = "onnxrt"  # of a download; see `fetch_repository`

    def __init__(self, options: ModelOptions) -> None:
        _needs(("onnxruntime", "tokenizers", "ftfy", "regex"), options)
        self._options = options
        self._folder, self.model_id = self._resolve()
        config = read_json(self._folder / "config.json") if self._folder else {}
        manifest = self._manifest()
        self.model_id = manifest.get("model_id", self.model_id)
        self.logit_scale = float(manifest.get("logit_scale", config.get("logit_scale", DEFAULT_LOGIT_SCALE)))
        self.precision = str(manifest.get("precision", "fp32"))
        self.notice = str(manifest.get("notice", ""))
        self.golden = manifest.get("golden", {})
        self.self_test_cosine: float | None = None
        self._scorer = Scorer(_half_dot())
        self._weights: list[Path] = []
        self._load_image_tower()
        self._load_text_tower(config)
        source = "" if options.onnx_image or options.onnx_text else manifest.get("source", {}).get("sha256", "")
        self.space = space_of(source or sha256_of(*self._weights), self.preprocess, self.precision)
        self.dim = int(self.encode_text(self.tokenize(["a photo"])).shape[1])

    def _resolve(self) -> tuple[Path | None, str]:
        """(folder, model_id); no folder when both towers are given as files."""
        options, value = self._options, self._options.model
        if Path(value).is_dir():
            return Path(value), Path(value).resolve().name
        if self._image_file() and options.onnx_text:
            return None, value.removeprefix("hf-hub:")
        if value.startswith("hf-hub:"):
            repo = value.removeprefix("hf-hub:")
            return fetch_repository(options, repo, self._wanted_files, self._form), repo
        arch, tag = _split_model(options)
        if Path(tag).exists():
            raise options.error("MODEL", value, "these are torch weights; onnxrt takes a visual/ + textual/ folder")
        # immich publishes OpenCLIP models in this layout, under names made of the architecture and the tag.
        repo = f"immich-app/{arch}__{tag.replace('_', '-')}"
        return fetch_repository(options, repo, self._wanted_files, self._form), value

    def _manifest(self) -> dict[str, Any]:
        """That of the folder. A file of a download that is damaged is fetched once more. Raises BackendError."""
        if self._folder is None:
            return {}
        try:
            return read_manifest(self._folder, self._options)
        except DamagedFile as error:
            markers = list(self._folder.glob(".complete-*.json"))
            if not markers:  # no download
                raise
            log.warning("%s is damaged; fetching it once more", error.path)
            for path in (error.path, *markers):
                path.unlink()
            self._folder, _ = self._resolve()
            assert self._folder is not None
            return read_manifest(self._folder, self._options)

    def _wanted_files(self, files: list[str]) -> list[str]:
        """Both towers and their configs; what belongs to other runtimes stays on the hub."""
        if "visual/model.onnx" not in files or "textual/model.onnx" not in files:
            raise ValueError("it has no visual/model.onnx and textual/model.onnx, so it has no form for ONNX Runtime")
        return [
            name
            for name in files
            if name in ("config.json", "manifest.json")
            or (name.startswith(("visual/", "textual/")) and "/rknpu/" not in name and not name.endswith(".armnn"))
        ]

    def _image_file(self) -> str:
        return self._options.onnx_image

    def _load_image_tower(self) -> None:
        path = self.image_path = self._tower_path("ONNX_IMAGE", self._options.onnx_image, "visual")
        self.arrange(self.arrangements()[0])
        tower = self._image.get_inputs()[0]
        self._takes_uint8 = tower.type == "tensor(uint8)"
        side = tower.shape[1] if self._takes_uint8 else tower.shape[2]
        recipe = read_json(path.parent / "preprocess_cfg.json")
        self.preprocess = Preprocess.from_config(recipe, side if isinstance(side, int) else None)
        used = self._image.get_providers()[0]
        short = used.removesuffix("ExecutionProvider").lower()
        self.runtime = "onnxrt" if short == "cpu" else f"onnxrt-{short}"

    def _load_text_tower(self, config: Mapping[str, Any]) -> None:
        path = self._text_path = self._tower_path("ONNX_TEXT", self._options.onnx_text, "textual")
        self._text: Any = self._session(path, "ONNX_TEXT", usable_cores())
        inputs = self._text.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(x.name for x in inputs)
            raise self._options.error("ONNX_TEXT", str(path), f"takes {names}; only towers fed by token ids alone")
        length = inputs[0].shape[1]
        self._open_length = not isinstance(length, int)
        context = config.get("text_cfg", {}).get("context_length", 77) if self._open_length else length
        self._tokenizer = ClipTokenizer.from_file(path.parent / "tokenizer.json", int(context))

    def _tower_path(self, variable: str, value: str, part: str) -> Path:
        path = Path(value) if value or self._folder is None else self._folder / part / "model.onnx"
        if not path.is_file():
            if value:
                raise self._options.error(variable, value, "no such file")
            text = f"the folder has no {part}/model.onnx; a model needs both towers, {self._options.name}_{variable}"
            raise self._options.error("MODEL", self._options.model, f"{text} can name one elsewhere")
        self._weights.append(path if value else path.parent)
        return path

    def arrangements(self) -> Sequence[str]:
        on_cpu = self._options.ort_providers in ((), ("CPUExecutionProvider",))
        return ("split", "whole") if on_cpu and usable_cores() > 1 else ("whole",)

    def arrange(self, arrangement: str) -> None:
        threads = 1 if arrangement == "split" else usable_cores()
        self._image: Any = None  # not two at a time
        self._image = self._session(self.image_path, "ONNX_IMAGE", threads)
        self._pieces = Pieces() if arrangement == "split" else None

    def _session(self, path: Path, variable: str, threads: int) -> Any:
        import onnxruntime

        wanted = list(self._options.ort_providers) or ["CPUExecutionProvider"]
        missing = [name for name in wanted if name not in onnxruntime.get_available_providers()]
        if missing:
            have = ", ".join(onnxruntime.get_available_providers())
            raise self._options.error("ORT_PROVIDERS", ",".join(wanted), f"{missing[0]} is not available; here: {have}")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        # Threads that spin while they wait take the cores that decode the next pictures.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(str(path), settings, providers=wanted)
        except Exception as error:
            raise self._options.error(variable, str(path), f"ONNX Runtime cannot load it ({_line(error)})") from error
        if session.get_providers()[0] != wanted[0]:  # never a silent fall-back
            text = f"ONNX Runtime fell back to {session.get_providers()[0]}"
            raise self._options.error("ORT_PROVIDERS", ",".join(wanted), text)
        return session

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return self._tokenizer(texts)

    def encode_images(self, pixels: Pixels) -> Vectors:
        return self._pieces.run(self._encode_piece, pixels) if self._pieces else self._encode_piece(pixels)

    def _encode_piece(self, pixels: Pixels) -> Vectors:
        return self._run(self._image, pixels if self._takes_uint8 else normalize(pixels, self.preprocess))

    def rest_text(self) -> None:
        self._text = None

    def similarities(self, vectors: NDArray[Any], queries: Vectors) -> NDArray[np.float32]:
        return self._scorer(vectors, queries)

    def encode_text(self, tokens: Tokens) -> Vectors:
        if self._text is None:
            self._text = self._session(self._text_path, "ONNX_TEXT", usable_cores())
        integers = np.int32 if self._text.get_inputs()[0].type == "tensor(int32)" else np.int64
        return self._run(self._text, tokens.astype(integers), cut=self._open_length)

    @staticmethod
    def _run(session: Any, batch: NDArray[Any], cut: bool = False) -> Vectors:
        """Runs a batch, in pieces of the size that the graph has fixed, if it has; `cut`: token ids, at true length."""
        tower = session.get_inputs()[0]
        size = tower.shape[0] if isinstance(tower.shape[0], int) else len(batch)
        rows = []
        for start in range(0, len(batch), size):
            piece = batch[start : start + size]
            if cut:
                piece = piece[:, : _true_length(piece)]
            padding = [(0, size - len(piece))] + [(0, 0)] * (batch.ndim - 1)
            whole = np.pad(piece, padding, mode="edge") if len(piece) < size else piece
            rows.append(session.run(None, {tower.name: whole})[0][: len(piece)])
        return unit_rows(np.concatenate(rows))


def _half_dot() -> Callable[[NDArray[Any], Vectors], Any]:
    """float16 `[m, dim]`, float32 `[dim, b]` -> float32 `[m, b]`."""
    import onnxruntime

    alone = onnxruntime.SessionOptions()
    alone.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(SCORING_GRAPH), alone, providers=["CPUExecutionProvider"])
    return lambda rows, queries: session.run(None, {"rows": rows, "queries": queries})[0]


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
        raise BackendError(f"{path}: not readable as JSON ({_line(error)})") from error
    if not isinstance(content, dict):
        raise BackendError(f"{path}: not a JSON object")
    return content


# --- the NPU ----------------------------------------------------------------------------------------------------


class NPURefused(Exception):
    """The NPU of this board cannot be used, or not be trusted; the text is a part of one line.

    `detail` is what its library said, for the operator alone.
    """

    def __init__(self, text: str, detail: str = "") -> None:
        super().__init__(text)
        self.detail = f" ({detail[:300]})" if detail else ""


def board_target() -> str:
    """The target in `NPU_CORES` whose programs this board runs, or "" if it is no Rockchip board that we know."""
    try:
        return npu_target(DEVICE_TREE.read_bytes().decode("ascii", "replace"))
    except OSError:  # no device tree, or a container that hides it
        return ""


def npu_target(names: str) -> str:
    """Of the names that a device tree lists, such as `rockchip,rk3588s`; see `board_target`."""
    if "rk3582" in names:  # sold with a part of an RK3588's cores
        return "rk3588"
    return next((target for target in NPU_CORES if target in names), "")


def available_memory() -> int:
    """Bytes that the system could give to a program now, or 0 if it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


class NPUContext:
    """One program on one core of the NPU, with a thread of its own.

    Nobody promises that two threads may share a context, and cores that work on one picture together hardly gain
    (RKNN.md 3.2): each core gets a context, and each context its thread, on which alone it is made and used.
    """

    def __init__(self, path: Path, core: int, choose_core: bool) -> None:
        """`choose_core` only where a core may be named: elsewhere that is an error. Raises NPURefused."""
        self.runtime_version = ""
        self._thread = ThreadPoolExecutor(1, f"npu-{core}")
        try:
            self._thread.submit(self._load, path, core, choose_core).result()
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path, core: int, choose_core: bool) -> None:
        from rknnlite.api import RKNNLite

        self._npu = RKNNLite()
        for level in (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG):
            logging.addLevelName(level, _LEVEL_NAMES[level])  # it renames everybody's to one letter
        with _overheard(self._npu.rknn_log.logger) as reason:
            if self._npu.load_rknn(str(path)) != 0:
                raise NPURefused("the NPU's library cannot read the program", reason())
            mask = {"core_mask": (RKNNLite.NPU_CORE_0, RKNNLite.NPU_CORE_1, RKNNLite.NPU_CORE_2)[core]}
            if self._npu.init_runtime(**(mask if choose_core else {})) != 0:
                raise NPURefused(f"the NPU's core {core} does not start", reason())
            self.runtime_version = " ".join(str(self._npu.get_sdk_version()).split())
        self._npu.rknn_data = None  # the file's bytes, which the runtime has copied by now

    def run(self, pictures: NDArray[Any], layout: str) -> Future[list[NDArray[np.float32]]]:
        """`[n, ...]`, which go through the fixed batch of one -> n rows, float32. Raises RuntimeError."""
        return self._thread.submit(self._run, pictures, layout)

    def _run(self, pictures: NDArray[Any], layout: str) -> list[NDArray[np.float32]]:
        rows = []
        for index in range(len(pictures)):
            picture = np.ascontiguousarray(pictures[index : index + 1])
            outputs = self._npu.inference(inputs=[picture], data_format=layout)
            if outputs is None:  # it logs its failures and raises nothing
                raise RuntimeError("the NPU failed on an image; its library's messages in the log say more")
            rows.append(np.array(outputs[0], np.float32).ravel())  # a copy: the library may use its buffer again
        return rows

    def close(self) -> None:
        if npu := getattr(self, "_npu", None):
            self._thread.submit(npu.release)
        self._thread.shutdown()


_LEVEL_NAMES = {level: logging.getLevelName(level) for level in (10, 20, 30, 40)}


@contextmanager
def _overheard(library: logging.Logger) -> Iterator[Callable[[], str]]:
    """Keeps a library's tracebacks off the screen; gives a function that names the last error among them."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.debug("the NPU's library: %s", record.getMessage())
            if record.levelno >= logging.ERROR:
                heard.append(record.getMessage())

    def reason() -> str:
        lines = heard[-1].strip().splitlines() if heard else []
        start = max(
            (i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): |Exception: ", line)), default=0
        )
        return " ".join(" ".join(lines[start:]).split())

    handlers, library.handlers = library.handlers, [Listener()]
    try:
        yield reason
    finally:
        library.handlers = handlers


class RKNNBackend(ONNXRTBackend):
    """The image tower on a Rockchip NPU, the text tower on the CPU by ONNX Runtime.

    An NPU that does not start, or whose vectors are not those of its program's golden picture, is refused: `refusal`
    says why, and the folder's ONNX tower runs instead. Nothing short of running it proves a program right on a board.
    """

    def __init__(self, options: ModelOptions) -> None:
        if importlib.util.find_spec("rknnlite") is None:
            text = "needs a Rockchip board with rknn-toolkit-lite2, which is not installed here; elsewhere: onnxrt"
            raise options.error("BACKEND", options.backend, text)
        self.target = options.rknn_target or board_target()
        self._form = f"rknn-{self.target}" if self.target else "rknn"  # another board wants another program
        self._contexts: list[NPUContext] = []
        super().__init__(options)
        if self._contexts:
            self.precision = "fp16"

    def _wanted_files(self, files: list[str]) -> list[str]:
        npu = f"visual/rknpu/{self.target}/"
        return super()._wanted_files(files) + [name for name in files if self.target and name.startswith(npu)]

    def _image_file(self) -> str:
        return self._options.rknn_model

    def arrangements(self) -> Sequence[str]:
        return ("whole",) if self._contexts else super().arrangements()

    def arrange(self, arrangement: str) -> None:
        if not self._contexts:
            super().arrange(arrangement)

    def _load_image_tower(self) -> None:
        if self._options.rknn_model and not Path(self._options.rknn_model).is_file():
            raise self._options.error("RKNN_MODEL", self._options.rknn_model, "no such file")
        try:
            self._start_npu()
        except NPURefused as refusal:
            for context in self._contexts:
                context.close()
            self._contexts = []
            self.refusal = " ".join(str(refusal).split())
            self._take_the_cpu(refusal.detail)

    def _take_the_cpu(self, detail: str) -> None:
        text = f"the NPU is not used: {self.refusal}{detail}"
        if self._onnx_tower() is None:
            text += "; and there is no visual/model.onnx that could run on the CPU instead"
            raise self._options.error("BACKEND", self._options.backend, text)
        log.error("%s: %s; images run on the CPU instead, by ONNX Runtime", self._options.name, text)
        super()._load_image_tower()

    def _onnx_tower(self) -> Path | None:
        given = self._options.onnx_image
        path = Path(given) if given else self._folder / "visual" / "model.onnx" if self._folder else None
        return path if path and path.is_file() else None

    def _start_npu(self) -> None:
        """Raises NPURefused; contexts that were started by then are in `_contexts`."""
        path = self._program()
        contract = read_json(path.with_name("model.json"))
        self._check_contract(contract)
        # Without a model.json it is immich's, which takes what has been normalised. The file itself does not say.
        self._takes_uint8 = bool(contract)
        recipes = (folder / "preprocess_cfg.json" for folder in (path.parent, *path.parents[:3]))
        recipe = contract.get("preprocess") or next(filter(None, map(read_json, recipes)), {})
        self.preprocess = Preprocess.from_config(recipe)
        for core in range(self._cores_to_use(path)):
            try:
                self._contexts.append(NPUContext(path, core, NPU_CORES[self.target] > 1))
            except NPURefused as refusal:
                if not self._contexts:
                    raise
                text = "%s: %s%s; the NPU goes on with %d cores"
                log.warning(text, self._options.name, refusal, refusal.detail, core)
                break
        cosine = self._worst_cosine(contract)
        if cosine is not None and not cosine >= NPU_FLOOR:
            raise NPURefused(f"self-test: cosine {cosine:.6f} to the golden vector; allowed: {NPU_FLOOR} and more")
        self.npu = f"{self.target}, {len(self._contexts)} of {NPU_CORES[self.target]} cores"
        self.npu += f", self-test {cosine:.6f}" if cosine is not None else ", not verified"
        runtime = self._contexts[0].runtime_version
        toolkit = contract.get("toolkit", "an unknown version")
        log.info("%s: NPU: %s; runtime %s, program of toolkit %s", self._options.name, self.npu, runtime, toolkit)
        # Vectors of the NPU and of its ONNX tower may lie in one index, so they are of the same weights.
        self._weights.append(tower.parent if (tower := self._onnx_tower()) else path)
        self.runtime = "rknn"

    def _program(self) -> Path:
        if not self.target:
            known = ", ".join(NPU_CORES)
            text = f"{DEVICE_TREE} names no Rockchip NPU that we know ({known}); in a container it may be hidden"
            raise NPURefused(f"{text}; {self._options.name}_RKNN_TARGET says it by hand")
        if self._options.rknn_model:
            return Path(self._options.rknn_model)
        assert self._folder is not None  # without one both towers were given as files
        path = self._folder / "visual" / "rknpu" / self.target / "model.rknn"
        if not path.is_file():
            raise NPURefused(
                f"the folder has no {path.relative_to(self._folder).as_posix()}; export.py --rknn makes it"
            )
        return path

    def _check_contract(self, contract: Mapping[str, Any]) -> None:
        if contract.get("format", NPU_FORMAT) != NPU_FORMAT:
            raise NPURefused(f"model.json is of format {contract['format']}; this version reads {NPU_FORMAT}")
        soc = contract.get("soc", self.target)
        if soc != self.target:
            raise NPURefused(f"the program is for {soc}, the board is a {self.target}")
        files = read_json(self._folder / "manifest.json").get("files", {}) if self._folder else {}
        onnx = files.get("visual/model.onnx")
        if onnx and contract.get("onnx_sha256", onnx) != onnx:
            raise NPURefused("the program was made of another visual/model.onnx than the one beside it")

    def _cores_to_use(self, path: Path) -> int:
        """Each context holds the weights, and the file besides while it loads."""
        wanted = self._options.rknn_cores or NPU_CORES[self.target]
        have, each = available_memory(), 3 * path.stat().st_size
        fit = max(1, have // each) if have else wanted
        if fit < wanted:
            log.warning("%s: memory for %d of %d NPU cores alone", self._options.name, fit, wanted)
        return min(wanted, fit, NPU_CORES[self.target])

    def _worst_cosine(self, contract: Mapping[str, Any]) -> float | None:
        """Of the golden picture on each core, or of a picture to what the ONNX tower makes of it; None without both."""
        golden = contract.get("golden") or self.golden
        if golden:
            file = base64.b64decode(golden["picture"])
            picture = decode_image(file, [self.preprocess], 1 << 20, draft=False)[self.preprocess]
            expected = np.array(golden["picture_vector"], np.float32)
        elif tower := self._onnx_tower():
            ramp = np.add.outer(np.arange(self.preprocess.size), np.arange(self.preprocess.size))
            picture = np.stack([ramp % 251, ramp // 2 % 241, 255 - ramp % 239], axis=-1).astype(np.uint8)
            session = self._session(tower, "ONNX_IMAGE", usable_cores())
            takes_uint8 = session.get_inputs()[0].type == "tensor(uint8)"
            given = picture[None] if takes_uint8 else normalize(picture[None], self.preprocess)
            expected = self._run(session, given)[0]
        else:
            log.warning("%s: nothing to compare the NPU's vectors with; they are not verified", self._options.name)
            return None
        try:
            runs = [context.run(*self._as_input(picture[None])) for context in self._contexts]
            return float(min(unit_rows(np.stack(run.result()))[0] @ expected for run in runs))
        except (RuntimeError, ValueError) as error:
            raise NPURefused(f"self-test: {error}") from error

    def _as_input(self, pixels: Pixels) -> tuple[NDArray[Any], str]:
        return (pixels, "nhwc") if self._takes_uint8 else (normalize(pixels, self.preprocess), "nchw")

    def encode_images(self, pixels: Pixels) -> Vectors:
        if not self._contexts:
            return super().encode_images(pixels)
        batch, layout = self._as_input(pixels)
        step = len(self._contexts)
        shares = [context.run(batch[i::step], layout) for i, context in enumerate(self._contexts)]
        rows: list[Any] = [None] * len(batch)
        for i, share in enumerate(shares):
            rows[i::step] = share.result()
        # float16 inside: what it made a unit is one to three digits.
        return unit_rows(np.stack(rows))
