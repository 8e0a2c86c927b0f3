"""OpenCLIP -> ONNX -> RKNN on a PC: a folder that a device serves with `requirements-edge.txt` alone.

    python export.py --model ViT-B-32:laion2b_s34b_b79k --to models/vit-b-32
    .venv-rknn/bin/python export.py --to models/vit-b-32 --rknn rk3588

The image tower takes uint8 RGB `[n, size, size, 3]`, the text tower int64 ids `[n, length]` of any length up to the
context's; both return float32 unit rows. What was written is compared with OpenCLIP before the folder appears.
A program for the NPU takes uint8 RGB `[1, size, size, 3]`; it is run in the toolkit's simulator and compared with the
ONNX tower before it appears.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import machine
import model_files
import preprocess
import rknn_backend
import tokenizer
from errors import BackendError, SettingError
from onnx_backend import FolderBackend, open_onnx
from preprocess import Preprocess
from settings import ModelOptions
from torch_backend import TorchBackend

log = logging.getLogger("lumen.export")

TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime")
LARGEST_PROTOBUF = 1_800_000_000  # bytes; a larger tower keeps its weights in a file beside the graph


@dataclass(frozen=True)
class Floors:
    """The least cosine to OpenCLIP's vectors, of samples at export and of the golden inputs on a device."""

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


class ExportError(Exception):
    """What was asked for cannot be exported; the text is one line."""


class ExportOptions(ModelOptions):
    """The backend's options, whose errors name this program's option instead of a variable."""

    def line(self, variable: str, value: str, text: str) -> str:
        return f"--{variable.lower()} {value}: {text}"


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
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it reports what it does not fold; we do
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
    _fold_constants(model.graph)
    _tidy(model, {f"model.{key}": value for key, value in source.model.state_dict().items()})
    large = model.ByteSize() > LARGEST_PROTOBUF
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=large, location="model.onnx.data")


def _fold_constants(graph: Any) -> None:
    """Computes what hangs on weights alone and the exporter left to be computed for each picture, such as a Split."""
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
    _rebuild(graph, kept, list(known.values()))


def _rebuild(graph: Any, nodes: Sequence[Any], weights: Sequence[Any]) -> None:
    """Gives a graph these nodes, and of the weights and nodes those alone that its output hangs on."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(type(node).FromString(node.SerializeToString()))  # a graph frees its own when it is emptied
            needed |= set(node.input)
    tensors = [type(x).FromString(x.SerializeToString()) for x in weights if x.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(tensors)


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


def quantize_towers(folder: Path) -> None:
    """Both towers to int8: weights per channel, activations by the range that each input turns out to have.

    Convolution, attention's own products, LayerNorm and softmax stay in float. Seven bits of the eight are used,
    because x86 without VNNI adds pairs of products in 16 bits. A range is taken over the whole input, and a vector
    must not depend on who else asked, so a tower then takes one picture or text at a time; at true ViT-B-32 size that
    is as fast as eight at once.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for part in ("visual", "textual"):
        path = folder / part / "model.onnx"
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # it reports every operator that it leaves alone
        try:
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul", "Gather"],
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
        quantize_towers(folder)
    _write_json(folder / "visual" / "preprocess_cfg.json", {**asdict(source.preprocess), "mode": "RGB"})
    config = reference.config
    # A path on the machine that exports means nothing elsewhere; tokenizer.json has what lay there.
    config.get("text_cfg", {}).get("tokenizer_kwargs", {}).pop("bpe_path", None)
    _write_json(folder / "config.json", config)
    (folder / "textual" / "tokenizer.json").write_text(source.tokenizer.to_json(), "utf-8")


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
        "logit_bias": 0.0,  # CLIP has none; the models that have one are refused
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
    _write_json(folder / "manifest.json", manifest)


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
    files, recipe = [], written.preprocess
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(file.getvalue())
    pixels = np.stack([preprocess.decode_image(file, [recipe], 10**7, draft=False)[recipe] for file in files])
    batches = pixels[:1], pixels[1:3], *(pixels[i : i + 17] for i in range(3, len(pixels), 17))
    images = np.concatenate([written.encode_images(batch) for batch in batches if len(batch)])
    parts = TEXTS[:1], TEXTS[1:3], TEXTS[3:]  # each batch runs at its own length
    texts = np.concatenate([written.encode_text(written.tokenize(part)) for part in parts])
    return np.sum(images * reference.images(pictures), axis=1), np.sum(texts * reference.texts(TEXTS), axis=1)


# --- the NPU ----------------------------------------------------------------------------------------------------

TOOLKIT = "2.5.0"
NPU_ENVIRONMENT = Path(__file__).resolve().parent / ".venv-rknn"
SIMULATOR_FLOOR = 0.9999  # the least cosine to the fp32 ONNX tower
NPU_PICTURES = 8  # a ViT-L takes half a minute for each in the simulator
# Attention as one operator. Disabling one of the two alone crashes toolkit 2.5.0.
ATTENTION_RULES = ["fuse_matmul_softmax_matmul_to_sdpa", "fuse_exmatmul_add_mul_exsoftmax13_exmatmul_to_sdpa"]
# On RK3576 the fused operator returned zeros without a word (rknn-toolkit2 issue 574).
WITHOUT_FUSED_ATTENTION = ("rk3576",)


@dataclass(frozen=True)
class Operator:
    """A row of the compiler's cost table."""

    kind: str
    on_cpu: bool
    cycles: int


def convert(folder: Path, socs: Sequence[str], sdpa: bool = True, photos: Path | None = None) -> None:
    """`visual/rknpu/<soc>/model.rknn` and `model.json` in a folder that `export` made, for each of `socs`.

    Raises ExportError; a program that misses the floor is not left behind.
    """
    folder = folder.resolve()  # the toolkit is run elsewhere
    path = folder / "visual" / "model.onnx"
    manifest = model_files.read_json(folder / "manifest.json")
    if not path.is_file() or manifest.get("precision") != "fp32":
        raise ExportError(
            f"--to {folder}: --rknn needs the fp32 image tower of an export there, with its manifest.json"
        )
    recipe = Preprocess.from_config(model_files.read_json(path.with_name("preprocess_cfg.json")))
    pixels = _pixels(read_photos(photos)[:NPU_PICTURES], recipe)
    golden = manifest["golden"]["picture"]
    inputs = np.concatenate([pixels, _pixels([Image.open(io.BytesIO(base64.b64decode(golden)))], recipe)])
    expected = _run_onnx(path, inputs)
    for soc in socs:
        fused = sdpa and soc not in WITHOUT_FUSED_ATTENTION
        home = folder / "visual" / "rknpu" / soc
        staging = home.with_name(f".{soc}.{os.getpid()}")
        staging.mkdir(parents=True)
        try:
            found, said = _compile(path, soc, recipe, fused, staging / "model.rknn", inputs)
            table = cost_table(said)
            cosine = float(np.sum(model_files.unit_rows(found) * expected, axis=1).min())
            print(f"{soc}: cosine to ONNX Runtime in the simulator, {len(inputs)} pictures: worst {cosine:.7f}")
            print(f"{soc}: {summary(table)}")
            if "out of the float16" in said:
                raise ExportError(f"{soc}: a value leaves the range of float16; nothing is left")
            if not cosine >= SIMULATOR_FLOOR:
                raise ExportError(f"{soc}: allowed: cosine {SIMULATOR_FLOOR} and more; nothing is left")
            contract = {
                "format": rknn_backend.NPU_FORMAT,
                "soc": soc,
                "toolkit": TOOLKIT,
                "input": {"dtype": "uint8", "layout": "NHWC", "shape": [1, recipe.size, recipe.size, 3]},
                "baked": {"mean": recipe.mean, "std": recipe.std},
                "preprocess": asdict(recipe),
                "batch_sizes": [1],
                "fused_attention": fused,
                "model_id": manifest["model_id"],
                "onnx_sha256": machine.sha256_of(path),
                "rknn_sha256": machine.sha256_of(staging / "model.rknn"),
                "compiler_cycles": sum(op.cycles for op in table),
                "simulator_cosine": round(cosine, 7),
                "golden": {
                    "floor": rknn_backend.NPU_FLOOR,
                    "picture": golden,
                    "picture_vector": expected[-1].round(7).tolist(),
                },
            }
            _write_json(staging / "model.json", contract)
            shutil.rmtree(home, ignore_errors=True)
            os.replace(staging, home)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        print(f"{home}: {(home / 'model.rknn').stat().st_size / 1e6:.1f} MB")


def _pixels(pictures: Sequence[Image.Image], recipe: Preprocess) -> preprocess.Pixels:
    rows = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        rows.append(preprocess.decode_image(file.getvalue(), [recipe], 10**8, draft=False)[recipe])
    return np.stack(rows)


def _run_onnx(path: Path, pixels: preprocess.Pixels) -> model_files.Vectors:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: pixels[i : i + 1]})[0] for i in range(len(pixels))])


def npu_graph(path: Path) -> Any:
    """An exported image tower as the NPU wants it: float32 NCHW `image`, batch 1, the patches by a matrix product.

    The compiler makes its own uint8 NHWC input with mean and std in front of such a graph. It splits a large patch
    convolution into smaller ones of a finer stride, most of whose output is thrown away: nine tenths of ViT-B/32's
    cycles. As reshape, transpose and matrix product the same costs next to nothing.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = list(graph.node)
    image = graph.input[0].name
    side = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    convolution = next(node for node in nodes if node.op_type == "Conv")
    kernel = numpy_helper.to_array(weights[convolution.input[1]])
    width, channels, patch, _ = kernel.shape
    # The export flattens the convolution's map into a row of tokens.
    flatten = next(node for node in nodes if convolution.output[0] in node.input)
    tokens = next(node for node in nodes if flatten.output[0] in node.input)
    if (flatten.op_type, tokens.op_type, len(convolution.input)) != ("Reshape", "Transpose", 2):
        raise ExportError(f"{path}: not the image tower of a CLIP as export.py writes it")
    across = side // patch
    constants = {
        "patch.rows": np.array([channels * across, patch, across, patch]),
        "patch.squares": np.array([1, channels, across * across, patch * patch]),
        "patch.tokens": np.array([1, across * across, channels * patch * patch]),
        "patch.weight": np.ascontiguousarray(kernel.reshape(width, -1).T),
        **{node.output[0]: np.array([1]) for node in nodes if node.op_type == "Shape" and node.input[0] == image},
    }
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Reshape", ["patch.rows"], {}),
        ("Transpose", [], {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["patch.squares"], {}),
        ("Transpose", [], {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["patch.tokens"], {}),
        ("MatMul", ["patch.weight"], {}),
    ]
    cut, last = [], "image"
    for number, (kind, given, attributes) in enumerate(steps, 1):
        output = tokens.output[0] if number == len(steps) else f"patch.{number}"
        cut.append(helper.make_node(kind, [last, *given], [output], **attributes))
        last = output
    rest = [node for node in nodes if node is not tokens and not set(node.output) & set(constants)]
    added = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    _rebuild(graph, cut + rest, [*graph.initializer, *added])
    del graph.input[:]
    shape = [1, channels, side, side]
    graph.input.append(helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape))
    graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.checker.check_model(model)
    return model


def _compile(
    path: Path, soc: str, recipe: Preprocess, fused: bool, to: Path, pixels: preprocess.Pixels
) -> tuple[NDArray[np.float32], str]:
    """Builds the program and runs it in the simulator; -> (its rows for `pixels`, all that the toolkit said)."""
    import onnx

    mean, std = ([255 * value for value in values] for values in (recipe.mean, recipe.std))
    with tempfile.TemporaryDirectory() as scratch, _captured(Path(scratch)) as said:
        graph = Path(scratch) / "model.onnx"
        onnx.save_model(npu_graph(path), graph)
        from rknn.api import RKNN

        rknn = RKNN(verbose=True)

        def done(step: str, status: int) -> None:
            if status != 0:
                errors = [line for line in said().splitlines() if line.startswith("E RKNN")]
                raise ExportError(f"{soc}: the toolkit failed at {step} ({' '.join(errors[-2:])[:400]})")

        try:
            done(
                "config",
                rknn.config(
                    target_platform=soc,
                    mean_values=[mean],
                    std_values=[std],
                    disable_rules=[] if fused else ATTENTION_RULES,
                    # By this string immich's loader knows a program that takes plain uint8 pixels.
                    custom_string=json.dumps({"dims": [{}], "input": "uint8 NHWC"}),
                ),
            )
            size = [1, 3, recipe.size, recipe.size]
            done("load_onnx", rknn.load_onnx(str(graph), inputs=["image"], input_size_list=[size]))
            done("build", rknn.build(do_quantization=False))
            done("export_rknn", rknn.export_rknn(str(to)))
            done("init_runtime", rknn.init_runtime())
            rows = []
            for index in range(len(pixels)):
                outputs = rknn.inference(inputs=[pixels[index : index + 1]], data_format=["nhwc"])
                if outputs is None:
                    done("inference", -1)
                rows.append(np.asarray(outputs[0], np.float32).reshape(1, -1))
        finally:
            rknn.release()
        return np.concatenate(rows), said()


@contextmanager
def _captured(scratch: Path) -> Iterator[Callable[[], str]]:
    """Sends both streams of this process, native code's too, to a file; gives a function that reads it."""
    path = scratch / "said.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    here = Path.cwd()
    os.chdir(scratch)  # the toolkit drops its intermediate graphs where it runs

    def read() -> str:
        sys.stdout.flush()
        sys.stderr.flush()
        return path.read_text("utf-8", "replace")

    try:
        yield read
    finally:
        os.chdir(here)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)


# D RKNN: [02:11:05.123] 7     exMatMul   FLOAT16   NPU   (1,50,768),...   (1,50,768)   9984/3744/9984   1234   ...
_COST_ROW = re.compile(r"^D RKNN: \[[\d:.]+\] \d+\s+(\S+)\s+\S+\s+(CPU|NPU)\s.*?\d+/\d+/(\d+)\s+\d+", re.MULTILINE)


def cost_table(said: str) -> list[Operator]:
    """The compiler's table of estimated cycles. Raises ExportError if there is none."""
    table = [Operator(kind, target == "CPU", int(cycles)) for kind, target, cycles in _COST_ROW.findall(said)]
    if not table:
        raise ExportError("the toolkit printed no table of cycles; is it another version?")
    return table


def summary(table: Sequence[Operator]) -> str:
    """The table in short: total, the five dearest kinds of operators, and what runs on the CPU between them."""
    sums: dict[str, int] = {}
    for op in table:
        sums[op.kind] = sums.get(op.kind, 0) + op.cycles
    dearest = sorted(sums, key=lambda kind: -sums[kind])[:5]
    parts = ", ".join(f"{kind} {sums[kind] / 1e6:.2f}" for kind in dearest)
    on_cpu = [op.kind for op in table if op.on_cpu and op.kind not in ("InputOperator", "OutputOperator")]
    counts = ", ".join(f"{on_cpu.count(kind)} {kind}" for kind in dict.fromkeys(on_cpu)) or "nothing"
    return f"{sum(sums.values()) / 1e6:.2f} M cycles by the compiler's estimate ({parts}); on the CPU: {counts}"


def convert_elsewhere(arguments: Sequence[str]) -> None:
    """Runs the conversion in the toolkit's environment. Raises ExportError with what makes one, if there is none."""
    program = NPU_ENVIRONMENT / "bin" / "python"
    if not program.exists():
        raise ExportError(
            "--rknn needs Rockchip's toolkit (x86-64, Python 3.11) in an environment of its own; run\n"
            "  python3.11 -m venv .venv-rknn\n"
            "  .venv-rknn/bin/pip install -r requirements-rknn.txt\n"
            f"  .venv-rknn/bin/pip install --no-deps rknn-toolkit2=={TOOLKIT}\n"
            f"  .venv-rknn/bin/python export.py {' '.join(arguments)}"
        )
    sys.stdout.flush()
    if status := subprocess.run([program, Path(__file__).resolve(), *arguments]).returncode:
        raise ExportError(f"the conversion ended with status {status}")


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
) -> None:
    """Raises SettingError, BackendError or ExportError, each one line; `to` then is as it was."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ExportError(f"--to {to}: it exists already and is not an empty folder")
    pictures = read_photos(photos)
    source = TorchBackend(ExportOptions("CLIP", "torch", model, data_dir, device="cpu"))
    refuse_what_is_not_clip(source, model)
    # Vectors of two precisions must not be mixed in one index unseen, so the name says which these are.
    name = (model_id or source.model_id) + ("" if precision == "fp32" else f"-{precision}")
    wanted, reference = Wanted(name, precision, notice, tower), Reference(source, model)
    staging = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        write_folder(source, reference, staging, wanted)
        written = open_onnx(ExportOptions("CLIP", "onnxrt", str(staging), data_dir))
        check(cosines(reference, written, pictures), FLOORS[precision].worst)
        for part in set(PARTS["both"]) - set(PARTS[tower]):
            shutil.rmtree(staging / part)
        write_manifest(source, reference, staging, wanted)
        if to.exists():
            to.rmdir()
        os.replace(staging, to)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    print(f"{to}: {wanted.model_id}, {source.dim} dimensions, {size / 1e6:.1f} MB")


def refuse_what_is_not_clip(source: TorchBackend, model: str) -> None:
    """SigLIP's and others' text towers look both ways: no true length, other tokenizers, other scores."""
    if getattr(source.model, "logit_bias", None) is not None:
        raise ExportError(f"--model {model}: a SigLIP model (it has a logit bias); only CLIP models are supported")
    if not isinstance(source.tokenizer, tokenizer.ClipTokenizer):
        raise ExportError(f"--model {model}: its tokenizer is not CLIP's; only CLIP models are supported")
    if not source.open_length:
        raise ExportError(f"--model {model}: its text tower is not CLIP's causal one; only CLIP models are supported")


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
    parser.add_argument("--rknn", type=_socs, default=[], metavar="SOC,...", help="NPU programs: rk3588,rk3576, ...")
    parser.add_argument("--no-sdpa", action="store_true", help="no fused attention on the NPU (RK3576 never has it)")
    options = vars(parser.parse_args(arguments))
    socs, sdpa = options.pop("rknn"), not options.pop("no_sdpa")
    if not options["model"] and not socs:
        parser.error("--model or --rknn: one of the two is needed")
    try:
        if options["model"]:
            export(**options)
        if socs and importlib.util.find_spec("rknn"):
            convert(options["to"], socs, sdpa, options["photos"])
        elif socs:
            given = ["--to", str(options["to"]), "--rknn", ",".join(socs)] + ["--no-sdpa"] * (not sdpa)
            given += ["--photos", str(options["photos"])] if options["photos"] else []
            convert_elsewhere(given)
    except (SettingError, BackendError, ExportError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
