"""OpenCLIP -> ONNX -> RKNN on a PC: a folder that a device serves with `requirements-edge.txt` alone.

    python export.py --model ViT-B-32:laion2b_s34b_b79k --to models/vit-b-32
    .venv-rknn/bin/python export.py --to models/vit-b-32 --rknn rk3588

The image tower takes uint8 RGB `[n, size, size, 3]`, the text tower int64 ids `[n, length]` of any length up to the
context's, or of the full context if the tower is not causal; both return float32 unit rows. The table of token
embeddings is stored in float16, or in int8 with a scale for each row. What was written is compared with OpenCLIP before
the folder appears.
A program for the NPU takes uint8 RGB `[1, size, size, 3]`; it is run in the toolkit's simulator and compared with the
ONNX tower before it appears. `export_rknn.py` makes it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import backends
import export_rknn
import label_cache
import labels
import machine
import model_files
import tokenizer
from errors import BackendError, LabelError, SettingError
from export_rknn import ExportError, pixels_of, rebuild_graph, write_json
from onnx_backend import FolderBackend, open_onnx
from settings import ModelOptions, Settings
from torch_backend import TorchBackend

log = logging.getLogger("lumen.export")

TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime")
OPSET = 18  # Rockchip's toolkit reads up to 19
# From here on GELU is one operator. Between convolutions, ONNX Runtime then keeps its own layout of the channels: the
# image tower of MobileCLIP2-S0 takes 52 core ms instead of 63.
GELU_OPSET = 20
WEIGHTS = "model.onnx.data"  # the file beside a graph for weights
LARGEST_PROTOBUF = 1_800_000_000  # bytes; a larger tower keeps its weights in a file beside the graph


@dataclass(frozen=True)
class Floors:
    """Minimum cosine similarity to OpenCLIP: of the samples at export, and of the reference inputs on a device."""

    worst: float
    golden: float


PARTS = {"image": ("visual",), "text": ("textual",), "both": ("visual", "textual")}
FLOORS = {"fp32": Floors(0.99999, 0.999), "int8": Floors(0.97, 0.96)}


@dataclass(frozen=True)
class Wanted:
    """What the operator asked for."""

    model_id: str
    precision: str = "fp32"
    notice: str = ""
    tower: str = "both"


class ExportOptions(ModelOptions):
    """The backend's options, whose errors name this program's option instead of a variable."""

    def line(self, variable: str, value: str, text: str) -> str:
        return f"--{variable.lower()} {value}: {text}"


# --- towers -----------------------------------------------------------------------------------------------------


def write_towers(source: TorchBackend, folder: Path) -> None:
    """`visual/model.onnx` and `textual/model.onnx`, each with an open batch, a causal text's length open too."""
    import torch

    # The fused attention of torch's inference fast path has no ONNX form.
    torch.backends.mha.set_fastpath_enabled(False)
    auto = torch.export.Dim.AUTO
    side = source.preprocess.size
    pixels = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    length = 9 if source.open_length else source.tokenizer.context_length
    tokens = torch.ones(2, length, dtype=torch.int64)
    axes = {0: auto, 1: auto} if source.open_length else {0: auto}
    _write_tower(source, source.image_tower, ("image", pixels, {0: auto}), folder / "visual")
    _write_tower(source, source.text_tower, ("text", tokens, axes), folder / "textual")


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
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it reports what it does not fold; we do
        program = torch.onnx.export(
            Tower().eval(),
            (sample,),
            input_names=[name],
            output_names=[f"{name}_embedding"],
            dynamic_shapes={"x": axes},
            opset_version=GELU_OPSET if name == "image" and source.was_reparameterized else OPSET,
            dynamo=True,
        )
    model = program.model_proto
    _fold_constants(model.graph)
    _tidy(model, {f"model.{key}": value for key, value in source.model.state_dict().items()})
    large = model.ByteSize() > LARGEST_PROTOBUF
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=large, location=WEIGHTS)


def _fold_constants(graph: Any) -> None:
    """Computes the nodes that depend on weights only, such as a Split, once. The exporter leaves them in the graph."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    known = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if not node.input or not set(node.input) <= set(known):
            kept.append(node)
            continue
        given = {name: onnx.numpy_helper.to_array(known[name]) for name in node.input}
        for name, value in zip(node.output, ReferenceEvaluator(node).run(None, given), strict=True):
            known[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
    rebuild_graph(graph, kept, list(known.values()))


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


def shrink_table(folder: Path, precision: str) -> None:
    """Stores the text tower's table of token embeddings in float16, or for int8 in int8 with a scale for each row.

    A vocabulary of 256,000 tokens is half of a model. The table is in the file beside the graph, which ONNX Runtime
    maps into memory, and only the rows of a text are read and converted to float32.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    table = next(tensor for tensor in graph.initializer if tensor.name.endswith("token_embedding.weight"))
    position, gather = next((i, node) for i, node in enumerate(graph.node) if node.input[:1] == [table.name])
    values, [result] = numpy_helper.to_array(table), gather.output
    gather.output[0] = f"{result}.stored"
    cast = helper.make_node("Cast", [f"{result}.stored"], [result], to=onnx.TensorProto.FLOAT)
    if precision == "int8":
        scales = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-12) / np.float32(127)
        stored = np.rint(values / scales).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(scales, f"{table.name}.scales"))
        cast.output[0] = f"{result}.integers"
        scaled = helper.make_node("Gather", [f"{table.name}.scales", gather.input[1]], [f"{result}.scales"])
        product = helper.make_node("Mul", [f"{result}.integers", f"{result}.scales"], [result])
        added = [cast, scaled, product]
    else:
        stored = values.astype(np.float16)
        added = [cast]
    table.CopyFrom(numpy_helper.from_array(stored, table.name))
    nodes = list(graph.node)
    rebuild_graph(graph, nodes[: position + 1] + added + nodes[position + 1 :], list(graph.initializer))
    (folder / WEIGHTS).unlink(missing_ok=True)
    smallest = 1024 if model.ByteSize() > LARGEST_PROTOBUF else stored.nbytes  # of the tensors in that file
    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location=WEIGHTS, size_threshold=smallest)
    shutil.copymode(path, folder / WEIGHTS)  # onnx makes it readable for its owner alone


def quantize_tower(folder: Path) -> None:
    """A tower to int8: weights per channel, activations by the range that each input turns out to have.

    Convolution, the products inside attention, LayerNorm and softmax stay in float, and so does a convolutional image
    tower as a whole. Only seven of the eight bits are used, because x86 without VNNI adds pairs of products in 16 bits.
    The range is that of the whole input, and a vector must not depend on other requests. So a tower takes one picture
    or text at a time. For ViT-B-32 this is as fast as a batch of eight.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(folder / "model.onnx")
    if sum(node.op_type == "Conv" for node in model.graph.node) > 1:  # a vision transformer has one
        return
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it reports every operator that it leaves alone
    try:
        quantize_dynamic(
            model,
            folder / "model.onnx",
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.root.setLevel(level)


# --- the folder -------------------------------------------------------------------------------------------------


def write_folder(source: TorchBackend, reference: Reference, folder: Path, wanted: Wanted) -> None:
    """The whole layout but the manifest: towers, tokenizer, configs."""
    write_towers(source, folder)
    if wanted.precision == "int8":
        for part in PARTS["both"]:
            quantize_tower(folder / part)
    shrink_table(folder / "textual", wanted.precision)
    write_json(folder / "visual" / "preprocess_cfg.json", {**asdict(source.preprocess), "mode": "RGB"})
    config = reference.config
    # A path on the machine that exports means nothing elsewhere; tokenizer.json has what lay there.
    config.get("text_cfg", {}).get("tokenizer_kwargs", {}).pop("bpe_path", None)
    write_json(folder / "config.json", config)
    (folder / "textual" / "tokenizer.json").write_text(source.tokenizer.to_json(), "utf-8")


def write_labels(written: FolderBackend, folder: Path, wanted: Wanted, data_dir: Path) -> None:
    """The text vectors of ImageNet-1k's labels, which the daemon would otherwise compute at its first start.

    Raises LabelError if the names of the labels cannot be downloaded.
    """
    names, recipe = labels.class_names(data_dir, "", model_files.quiet), labels.imagenet_recipe(Settings.clip_templates)
    key = label_cache.CacheKey.of(names, recipe, wanted.model_id, written.dim)
    label_cache.cached_vectors(
        folder / model_files.EXPORTED_LABELS, names, recipe, model_files.encoder_of(written), key
    )


def write_manifest(source: TorchBackend, reference: Reference, folder: Path, wanted: Wanted) -> None:
    """What the towers are, what they should answer, and the sha-256 of every file that is there."""
    manifest = {
        "format": model_files.MANIFEST_FORMAT,
        "model_id": wanted.model_id,
        "notice": wanted.notice,
        "precision": wanted.precision,
        "dim": source.dim,
        "context_length": source.tokenizer.context_length,
        "logit_scale": source.logit_scale,
        "logit_bias": source.logit_bias,  # null for CLIP, which has none
        "preprocess": asdict(source.preprocess),
        "golden": _golden(reference, FLOORS[wanted.precision].golden),
        "source": {"file": source.weights.name, "sha256": machine.sha256_of(source.weights)},
        "tools": {tool: importlib.metadata.version(tool) for tool in TOOLS},
        "files": {
            path.relative_to(folder).as_posix(): machine.sha256_of(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    write_json(folder / "manifest.json", manifest)


def _golden(reference: Reference, floor: float) -> dict[str, Any]:
    """What every start of a daemon tries: a picture that is not square, two texts, and OpenCLIP's vectors of them."""
    picture, texts = sample_pictures(2)[1].resize((64, 96)), list(TEXTS[1:3])
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "floor": floor,
        "picture": base64.b64encode(file.getvalue()).decode(),
        "picture_vector": reference.images([picture])[0].round(7).tolist(),
        "texts": texts,
        "text_vectors": reference.texts(texts).round(7).tolist(),
    }


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
    """OpenCLIP itself: its own transform, tokenizer and towers, one picture and one text at a time.

    Its tokenizers of the hub need `transformers`, so `tokenizer.py` stands in for them; the tests compare the two.
    """

    def __init__(self, source: TorchBackend, model: str) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        name = model.partition(":")[0]
        if Path(model).is_dir():
            name = f"local-dir:{model}"
        elif model.startswith("hf-hub:"):
            name = f"local-dir:{source.weights.parent}"
        self.config: dict[str, Any] = open_clip.get_model_config(name)
        # The towers are made of merged branches, if there are some. The reference is the model as it was trained.
        self._model = source.build().eval() if source.was_reparameterized else source.model
        of_hub = isinstance(source.tokenizer, tokenizer.HubTokenizer)
        self._tokenizer = source.tokenizer if of_hub else open_clip.get_tokenizer(name)
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
            tokens = [torch.as_tensor(self._tokenizer([text])) for text in texts]
            rows = [self._model.encode_text(row, normalize=True).numpy() for row in tokens]
        return np.concatenate(rows)


def read_photos(folder: Path | None) -> list[Image.Image]:
    """Up to 200 photographs of a folder, the same at each call, or pictures of our own making without one."""
    if folder is None:
        return sample_pictures(20)
    kinds = {".jpg", ".jpeg", ".png", ".webp"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)
    if not paths:
        raise ExportError(f"--photos {folder}: no pictures in it")
    pictures = []
    for path in paths[:: -(-len(paths) // 200)]:
        with Image.open(path) as picture:
            picture.thumbnail((1600, 1600))
            pictures.append(picture.convert("RGB"))
    return pictures


def cosines(
    reference: Reference, written: FolderBackend, pictures: Sequence[Image.Image]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(pictures, texts): the cosine of each sample between OpenCLIP and the folder, which takes them in batches."""
    pixels = pixels_of(pictures, written.preprocess)
    batches = pixels[:1], pixels[1:3], *(pixels[i : i + 17] for i in range(3, len(pixels), 17))
    images = np.concatenate([written.encode_images(batch) for batch in batches if len(batch)])
    parts = TEXTS[:1], TEXTS[1:3], TEXTS[3:]  # each batch runs at its own length
    texts = np.concatenate([written.encode_text(written.tokenize(part)) for part in parts])
    return np.sum(images * reference.images(pictures), axis=1), np.sum(texts * reference.texts(TEXTS), axis=1)


# --- main -------------------------------------------------------------------------------------------------------


def export(
    model: str,
    to: Path,
    precision: str = "fp32",
    model_id: str = "",
    notice: str = "",
    tower: str = "both",
    photos: Path | None = None,
    data_dir: Path = Path("data"),
    with_labels: bool = False,
) -> None:
    """Raises SettingError, BackendError, LabelError or ExportError, each one line; `to` then is as it was."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ExportError(f"--to {to}: it exists already and is not an empty folder")
    pictures = read_photos(photos)
    staging = to.with_name(f".{to.name}.{os.getpid()}")
    before = ExportOptions("CLIP", "torch", model, data_dir, device="cpu")
    after = ExportOptions("CLIP", "onnxrt", str(staging), data_dir)
    for options in (before, after):
        backends.check_modules(options)
    source = TorchBackend(before)
    # Vectors of two precisions must not be mixed in one index unseen, so the name says which these are.
    name = (model_id or source.model_id) + ("" if precision == "fp32" else f"-{precision}")
    wanted, reference = Wanted(name, precision, notice, tower), Reference(source, model)
    try:
        write_folder(source, reference, staging, wanted)
        written = open_onnx(after)
        check(cosines(reference, written, pictures), FLOORS[precision].worst)
        for part in set(PARTS["both"]) - set(PARTS[tower]):
            shutil.rmtree(staging / part)
        if with_labels:
            write_labels(written, staging, wanted, data_dir)
        write_manifest(source, reference, staging, wanted)
        if to.exists():
            to.rmdir()
        os.replace(staging, to)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    print(f"{to}: {wanted.model_id}, {source.dim} dimensions, {size / 1e6:.1f} MB")


def check(found: tuple[NDArray[Any], NDArray[Any]], floor: float) -> None:
    for part, values in zip(("image", "text"), found, strict=True):
        low, worst = np.percentile(values, 1), values.min()
        print(f"{part} cosine to OpenCLIP, {len(values)} samples: ", end="")
        print(f"mean {values.mean():.7f}, 1st percentile {low:.7f}, worst {worst:.7f}")
    if min(values.min() for values in found) < floor:
        raise ExportError(f"the export differs from OpenCLIP, allowed: cosine {floor} and more; nothing is left")


def _socs(text: str) -> list[str]:
    socs = text.split(",")
    if unknown := [soc for soc in socs if soc not in machine.NPU_CORES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}; allowed: {', '.join(machine.NPU_CORES)}")
    return socs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("export.py", description="OpenCLIP -> ONNX -> RKNN, checked against its source.")
    parser.add_argument("--model", help="ARCH:tag, ARCH:weights file, hf-hub:org/name, or a folder")
    parser.add_argument("--to", required=True, type=Path, help="a new folder; with --rknn alone, an export")
    parser.add_argument("--precision", choices=list(FLOORS), default="fp32", help="default: fp32")
    parser.add_argument("--tower", choices=list(PARTS), default="both", help="default: both")
    parser.add_argument("--photos", type=Path, help="a folder of pictures to check with (default: made-up ones)")
    parser.add_argument("--model-id", default="", help="the name that vectors shall carry (default: the source's)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where downloads go (default: data)")
    parser.add_argument(
        "--labels", action="store_true", dest="with_labels", help="add the text vectors of ImageNet-1k's labels"
    )
    parser.add_argument("--rknn", type=_socs, default=[], metavar="SOC,...", help="NPU programs: rk3588,rk3576, ...")
    parser.add_argument("--no-sdpa", action="store_true", help="no fused attention on the NPU (RK3576 never has it)")
    options = vars(parser.parse_args(arguments))
    socs, sdpa = options.pop("rknn"), not options.pop("no_sdpa")
    if not options["model"] and not socs:
        parser.error("--model, --rknn or both are needed")
    if options["with_labels"] and options["tower"] == "image":
        parser.error("--labels: the text tower computes them; allowed: --tower both or text")
    try:
        if options["model"]:
            export(**options)
        if socs and importlib.util.find_spec("rknn"):
            export_rknn.convert(options["to"], socs, read_photos(options["photos"]), sdpa)
        elif socs:
            given = ["--to", str(options["to"]), "--rknn", ",".join(socs)] + ["--no-sdpa"] * (not sdpa)
            given += ["--photos", str(options["photos"])] if options["photos"] else []
            export_rknn.convert_elsewhere(given)
    except (SettingError, BackendError, LabelError, ExportError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
