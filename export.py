"""OpenCLIP -> ONNX on a PC with torch: a folder that a device serves with `requirements-edge.txt` alone.

    python export.py --model ViT-B-32:laion2b_s34b_b79k --to models/vit-b-32

The image tower takes uint8 RGB `[n, size, size, 3]`, the text tower int64 ids `[n, length]` of any length up to the
context's; both return float32 unit rows. What was written is compared with OpenCLIP before the folder appears.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import backends
from backends import BackendError, ModelOptions, ONNXRTBackend, TorchBackend

log = logging.getLogger("lumen.export")

COSINE_FLOOR = 0.99999  # the worst that a fp32 export may show against OpenCLIP
GOLDEN_FLOOR = 0.999  # the worst that a device may show against OpenCLIP at start; runtimes differ by less
TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime")
LARGEST_PROTOBUF = 1_800_000_000  # bytes; a larger tower keeps its weights in a file beside the graph


class ExportError(Exception):
    """What was asked for cannot be exported; the text is one line."""


class ExportOptions(ModelOptions):
    """The backend's options, whose errors name this program's option instead of a variable."""

    def error(self, variable: str, value: str, text: str) -> BackendError:
        return BackendError(f"--{variable.lower()} {value}: {text}")


# --- towers -----------------------------------------------------------------------------------------------------


def write_towers(source: TorchBackend, folder: Path) -> None:
    """`visual/model.onnx` and `textual/model.onnx`, each with an open batch, the text's length open too."""
    import torch

    # The fused attention of torch's inference fast path has no ONNX form.
    torch.backends.mha.set_fastpath_enabled(False)
    auto = torch.export.Dim.AUTO
    side = source.preprocess.size
    pixels = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    tokens = torch.ones(2, 9, dtype=torch.int64)
    _write_tower(source, source.image_tower, ("image", pixels, {0: auto}), folder / "visual")
    _write_tower(source, source.text_tower, ("text", tokens, {0: auto, 1: auto}), folder / "textual")


def _write_tower(
    source: TorchBackend, run: Callable[[Any], Any], given: tuple[str, Any, dict[int, Any]], folder: Path
) -> None:
    import onnx
    import torch

    class Tower(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = source.model

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.normalize(run(x), dim=-1)

    name, sample, axes = given
    folder.mkdir(parents=True)
    # The exporter reports its progress and its own deprecations on both streams.
    with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Tower().eval(),
            (sample,),
            input_names=[name],
            output_names=[f"{name}_embedding"],
            dynamic_shapes={"x": axes},
            opset_version=18,
            dynamo=True,
        )
    model = program.model_proto
    _tidy(model, {f"model.{key}": value for key, value in source.model.state_dict().items()})
    large = model.ByteSize() > LARGEST_PROTOBUF
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=large, location="model.onnx.data")


def _tidy(model: Any, state: dict[str, Any]) -> None:
    """Takes out the exporter's stack traces, and names the weights that it numbered: a transposed `x` is `x.T`."""
    import onnx

    transposed = {_fingerprint(value.numpy().T): f"{key}.T" for key, value in state.items() if value.ndim == 2}
    names: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.name not in state and len(tensor.dims) == 2:
            fingerprint = _fingerprint(onnx.numpy_helper.to_array(tensor))
            names[tensor.name] = transposed.get(fingerprint, tensor.name)
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(value, value) for value in node.input]
        del node.metadata_props[:]
    for part in (model, model.graph):
        del part.metadata_props[:]
    del model.graph.value_info[:]  # shapes of what lies between, which every runtime infers by itself


def _fingerprint(array: NDArray[Any]) -> tuple[tuple[int, ...], str]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# --- the folder -------------------------------------------------------------------------------------------------


def write_folder(source: TorchBackend, reference: Reference, model_id: str, notice: str, folder: Path) -> None:
    """The whole layout: towers, tokenizer, configs, and a manifest that says what they are and names every file."""
    write_towers(source, folder)
    _write_json(folder / "visual" / "preprocess_cfg.json", {**asdict(source.preprocess), "mode": "RGB"})
    config = reference.config
    # A path on the machine that exports means nothing elsewhere; tokenizer.json has what lay there.
    config.get("text_cfg", {}).get("tokenizer_kwargs", {}).pop("bpe_path", None)
    _write_json(folder / "config.json", config)
    (folder / "textual" / "tokenizer.json").write_text(source.tokenizer.to_json(), "utf-8")
    manifest = {
        "format": backends.MANIFEST_FORMAT,
        "model_id": model_id,
        "notice": notice,
        "precision": "fp32",
        "dim": source.dim,
        "context_length": source.tokenizer.context_length,
        "logit_scale": source.logit_scale,
        "golden": _golden(reference),
        "source": {"file": source.weights.name, "sha256": backends.sha256_of(source.weights)},
        "tools": {tool: importlib.metadata.version(tool) for tool in TOOLS},
        "files": {
            path.relative_to(folder).as_posix(): backends.sha256_of(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    _write_json(folder / "manifest.json", manifest)


def _golden(reference: Reference) -> dict[str, Any]:
    """What every start of a daemon tries: a picture that is not square, two texts, and OpenCLIP's vectors of them."""
    picture, texts = sample_pictures(2)[1].resize((64, 96)), list(TEXTS[1:3])
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "floor": GOLDEN_FLOOR,
        "picture": base64.b64encode(file.getvalue()).decode(),
        "picture_vector": reference.images([picture])[0].round(7).tolist(),
        "texts": texts,
        "text_vectors": reference.texts(texts).round(7).tolist(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


# --- the check --------------------------------------------------------------------------------------------------

TEXTS = (
    "a",
    "a photo of a red bicycle.",
    "Vulpes vulpes with common name red fox",
    "“curly” &amp; <b>html</b>, café, 山, 🦊, e\u0301",
    "a very long text that runs over the context " * 20,
)


def sample_pictures(count: int) -> list[Image.Image]:
    """Pictures of several shapes with structure at every scale, the same on each run."""
    rng = np.random.default_rng(0)
    shapes = ((480, 640), (640, 427), (224, 224), (300, 900), (1200, 1600))
    pictures = []
    for index in range(count):
        height, width = shapes[index % len(shapes)]
        levels = np.zeros((height, width, 3), np.float32)
        for scale in (4, 16, 64):
            noise = rng.integers(0, 256, (scale, scale, 3), np.uint8)
            grown = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            levels += np.asarray(grown, np.float32) * (2 / scale**0.5)
        pictures.append(Image.fromarray((levels * 255 / levels.max()).astype(np.uint8)))
    return pictures


class Reference:
    """OpenCLIP itself: its own transform, tokenizer and towers, one picture and one text at a time."""

    def __init__(self, source: TorchBackend, model: str) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        name = model.partition(":")[0]
        if Path(model).is_dir():
            name = f"local-dir:{model}"
        elif model.startswith("hf-hub:"):
            name = f"local-dir:{source.weights.parent}"
        self.config: dict[str, Any] = open_clip.get_model_config(name)
        self._model = source.model
        self._tokenizer = open_clip.get_tokenizer(name)
        recipe = {**source.model.visual.preprocess_cfg, "size": source.preprocess.size}
        self._transform = image_transform_v2(PreprocessCfg(**recipe), is_train=False)

    def images(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            rows = [self._model.encode_image(self._transform(p)[None], normalize=True).numpy() for p in pictures]
        return np.concatenate(rows)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            rows = [self._model.encode_text(self._tokenizer([text]), normalize=True).numpy() for text in texts]
        return np.concatenate(rows)


def worst_cosines(reference: Reference, written: ONNXRTBackend) -> tuple[float, float]:
    """(image, text): the least cosine between OpenCLIP and the folder on samples, which the folder takes in batches."""
    pictures, files, recipe = sample_pictures(10), [], written.preprocess
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(file.getvalue())
    pixels = np.stack([backends.decode_image(file, [recipe], 10**7, draft=False)[recipe] for file in files])
    images = np.concatenate([written.encode_images(part) for part in (pixels[:1], pixels[1:3], pixels[3:])])
    parts = TEXTS[:1], TEXTS[1:3], TEXTS[3:]  # each batch runs at its own length
    texts = np.concatenate([written.encode_text(written.tokenize(part)) for part in parts])
    return _worst(images, reference.images(pictures)), _worst(texts, reference.texts(TEXTS))


def _worst(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sum(found * expected, axis=1).min())


# --- main -------------------------------------------------------------------------------------------------------


def export(model: str, to: Path, model_id: str = "", notice: str = "", data_dir: Path = Path("data")) -> None:
    """Raises BackendError or ExportError, each one line; `to` then is as it was."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ExportError(f"--to {to}: it exists already and is not an empty folder")
    source = TorchBackend(ExportOptions("CLIP", "torch", model, data_dir, device="cpu"))
    if not source.causal or not isinstance(source.tokenizer, backends.ClipTokenizer):
        raise ExportError(f"--model {model}: only models with CLIP's causal text tower and tokenizer are supported")
    reference = Reference(source, model)
    staging = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        write_folder(source, reference, model_id or source.model_id, notice, staging)
        written = ONNXRTBackend(ExportOptions("CLIP", "onnxrt", str(staging), data_dir))
        image, text = worst_cosines(reference, written)
        print(f"worst cosine against OpenCLIP: image {image:.7f}, text {text:.7f}")
        if min(image, text) < COSINE_FLOOR:
            raise ExportError(f"the export differs from OpenCLIP by more than cosine {COSINE_FLOOR}; nothing is left")
        if to.exists():
            to.rmdir()
        os.replace(staging, to)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    print(f"{to}: {model_id or source.model_id}, {source.dim} dimensions, {size / 1e6:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("export.py", description="OpenCLIP -> ONNX, checked against its source.")
    parser.add_argument("--model", required=True, help="ARCH:tag, ARCH:weights file, hf-hub:org/name, or a folder")
    parser.add_argument("--to", required=True, type=Path, help="a new folder")
    parser.add_argument("--model-id", default="", help="the name that vectors shall carry (default: the source's)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where downloads go (default: data)")
    options = parser.parse_args(arguments)
    try:
        export(options.model, options.to, options.model_id, data_dir=options.data_dir)
    except (BackendError, ExportError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
