"""The part of `export.py` behind `--rknn`: an exported image tower -> a program for Rockchip's NPU.

It is run by the Python of `.venv-rknn`, which has rknn-toolkit2 but not OpenCLIP, the hub's client or gRPC.
`export.py` imports this file, so helpers that both of them need are here.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from preprocess import Pixels, Preprocess

HERE = Path(__file__).resolve().parent
TOOLKIT = "2.5.0"
NPU_ENVIRONMENT = HERE / ".venv-rknn"
SIMULATOR_FLOOR = 0.9999  # the least cosine to the fp32 ONNX tower
NPU_PICTURES = 8  # the simulator takes half a minute for each with a ViT-L
# Attention as one operator. Disabling one of the two alone crashes toolkit 2.5.0.
ATTENTION_RULES = ["fuse_matmul_softmax_matmul_to_sdpa", "fuse_exmatmul_add_mul_exsoftmax13_exmatmul_to_sdpa"]
# On RK3576 the fused operator returned zeros and reported no error (rknn-toolkit2 issue 574).
WITHOUT_FUSED_ATTENTION = ("rk3576",)


class ExportError(Exception):
    """What was asked for cannot be exported; the text is one line."""


# --- helpers of both files ---------------------------------------------------------------------------------------


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def pixels_of(pictures: Sequence[Image.Image], recipe: Preprocess) -> Pixels:
    """uint8 RGB `[n, size, size, 3]`, prepared as the daemon prepares a PNG file."""
    rows = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        rows.append(preprocess.decode_image(file.getvalue(), [recipe], 10**8, draft=False)[recipe])
    return np.stack(rows)


def rebuild_graph(graph: Any, nodes: Sequence[Any], weights: Sequence[Any]) -> None:
    """Replaces the nodes and weights of an ONNX graph by those of the given ones that its output depends on."""
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


# --- the conversion ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tower:
    """An exported image tower, and the pictures that its programs are checked with."""

    path: Path
    model_id: str
    recipe: Preprocess
    golden: str  # the golden picture of the manifest, a PNG file in base64
    inputs: Pixels  # the last is the golden picture
    expected: model_files.Vectors  # of the inputs, by ONNX Runtime


def convert(folder: Path, socs: Sequence[str], pictures: Sequence[Image.Image], sdpa: bool = True) -> None:
    """Writes `visual/rknpu/<soc>/model.rknn` and `model.json` to a folder that `export` made, for each of `socs`.

    `sdpa`: attention as one operator where the NPU supports it. Raises ExportError; a program that misses the floor is
    not kept.
    """
    tower = read_tower(folder.resolve(), pictures[:NPU_PICTURES])  # the toolkit runs in another folder
    for soc in socs:
        home = tower.path.parent / "rknpu" / soc
        staging = home.with_name(f".{soc}.{os.getpid()}")
        staging.mkdir(parents=True)
        try:
            contract = make_program(tower, soc, sdpa and soc not in WITHOUT_FUSED_ATTENTION, staging / "model.rknn")
            write_json(staging / "model.json", contract)
            shutil.rmtree(home, ignore_errors=True)
            os.replace(staging, home)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        print(f"{home}: {(home / 'model.rknn').stat().st_size / 1e6:.1f} MB")


def read_tower(folder: Path, pictures: Sequence[Image.Image]) -> Tower:
    """Raises ExportError if the folder has no fp32 image tower of an export."""
    path = folder / "visual" / "model.onnx"
    manifest = model_files.read_json(folder / "manifest.json")
    if not path.is_file() or manifest.get("precision") != "fp32":
        raise ExportError(
            f"--to {folder}: --rknn needs the fp32 image tower of an export there, with its manifest.json"
        )
    recipe = Preprocess.from_config(model_files.read_json(path.with_name("preprocess_cfg.json")))
    golden = manifest["golden"]["picture"]
    inputs = pixels_of([*pictures, Image.open(io.BytesIO(base64.b64decode(golden)))], recipe)
    return Tower(path, manifest["model_id"], recipe, golden, inputs, _run_onnx(path, inputs))


def make_program(tower: Tower, soc: str, fused: bool, to: Path) -> dict[str, Any]:
    """Compiles and checks a program; -> its model.json. `fused`: attention as one operator. Raises ExportError."""
    found, log = _compile(tower, soc, fused, to)
    table = cost_table(log)
    cosine = float(np.sum(model_files.unit_rows(found) * tower.expected, axis=1).min())
    print(f"{soc}: cosine to ONNX Runtime in the simulator, {len(tower.inputs)} pictures: worst {cosine:.7f}")
    print(f"{soc}: {summary(table)}")
    if "out of the float16" in log:
        raise ExportError(f"{soc}: a value leaves the range of float16; nothing is left")
    if not cosine >= SIMULATOR_FLOOR:
        raise ExportError(f"{soc}: allowed: cosine {SIMULATOR_FLOOR} and more; nothing is left")
    recipe = tower.recipe
    return {
        "format": rknn_backend.NPU_FORMAT,
        "soc": soc,
        "toolkit": TOOLKIT,
        "input": {"dtype": "uint8", "layout": "NHWC", "shape": [1, recipe.size, recipe.size, 3]},
        "baked": {"mean": recipe.mean, "std": recipe.std},
        "preprocess": asdict(recipe),
        "batch_sizes": [1],
        "fused_attention": fused,
        "model_id": tower.model_id,
        "onnx_sha256": machine.sha256_of(tower.path),
        "rknn_sha256": machine.sha256_of(to),
        "compiler_cycles": sum(op.cycles for op in table),
        "simulator_cosine": round(cosine, 7),
        "golden": {
            "floor": rknn_backend.NPU_FLOOR,
            "picture": tower.golden,
            "picture_vector": tower.expected[-1].round(7).tolist(),
        },
    }


def _run_onnx(path: Path, pixels: Pixels) -> model_files.Vectors:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: pixels[i : i + 1]})[0] for i in range(len(pixels))])


def npu_graph(path: Path) -> Any:
    """An exported image tower as the NPU wants it: float32 NCHW `image`, batch 1, the patches by a matrix product.

    The compiler puts its own uint8 NHWC input with mean and std in front of such a graph. It splits a large patch
    convolution into smaller ones of a finer stride and discards most of their output, which takes nine tenths of
    ViT-B/32's cycles. As reshape, transpose and matrix product the same costs next to nothing.
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
    rebuild_graph(graph, cut + rest, [*graph.initializer, *added])
    del graph.input[:]
    shape = [1, channels, side, side]
    graph.input.append(helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape))
    graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.checker.check_model(model)
    return model


def _compile(tower: Tower, soc: str, fused: bool, to: Path) -> tuple[NDArray[np.float32], str]:
    """Builds the program and runs it in the simulator; -> (its rows for the inputs, all that the toolkit printed)."""
    import onnx

    recipe, pixels = tower.recipe, tower.inputs
    mean, std = ([255 * value for value in values] for values in (recipe.mean, recipe.std))
    with tempfile.TemporaryDirectory() as scratch, _captured(Path(scratch)) as log:
        graph = Path(scratch) / "model.onnx"
        onnx.save_model(npu_graph(tower.path), graph)
        from rknn.api import RKNN

        rknn = RKNN(verbose=True)

        def done(step: str, status: int) -> None:
            if status != 0:
                errors = [line for line in log().splitlines() if line.startswith("E RKNN")]
                raise ExportError(f"{soc}: the toolkit failed at {step} ({' '.join(errors[-2:])[:400]})")

        try:
            done(
                "config",
                rknn.config(
                    target_platform=soc,
                    mean_values=[mean],
                    std_values=[std],
                    disable_rules=[] if fused else ATTENTION_RULES,
                    # By this string immich's loader recognises a program that takes uint8 pixels.
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
        return np.concatenate(rows), log()


@contextmanager
def _captured(scratch: Path) -> Iterator[Callable[[], str]]:
    """Sends both output streams of this process, also those of native code, to a file; -> a function that reads it."""
    path = scratch / "log.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    here = Path.cwd()
    os.chdir(scratch)  # the toolkit writes its intermediate graphs to the working directory

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


# --- what the toolkit prints -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """A row of the compiler's cost table."""

    kind: str
    on_cpu: bool
    cycles: int


# D RKNN: [02:11:05.123] 7     exMatMul   FLOAT16   NPU   (1,50,768),...   (1,50,768)   9984/3744/9984   1234   ...
_COST_ROW = re.compile(r"^D RKNN: \[[\d:.]+\] \d+\s+(\S+)\s+\S+\s+(CPU|NPU)\s.*?\d+/\d+/(\d+)\s+\d+", re.MULTILINE)


def cost_table(log: str) -> list[Operator]:
    """The compiler's table of estimated cycles. Raises ExportError if there is none."""
    table = [Operator(kind, target == "CPU", int(cycles)) for kind, target, cycles in _COST_ROW.findall(log)]
    if not table:
        raise ExportError("the toolkit printed no table of cycles; is it another version?")
    return table


def summary(table: Sequence[Operator]) -> str:
    """The table in short: the total, the five most expensive kinds of operators, and what runs on the CPU."""
    sums: dict[str, int] = {}
    for op in table:
        sums[op.kind] = sums.get(op.kind, 0) + op.cycles
    largest = sorted(sums, key=lambda kind: -sums[kind])[:5]
    parts = ", ".join(f"{kind} {sums[kind] / 1e6:.2f}" for kind in largest)
    on_cpu = [op.kind for op in table if op.on_cpu and op.kind not in ("InputOperator", "OutputOperator")]
    counts = ", ".join(f"{on_cpu.count(kind)} {kind}" for kind in dict.fromkeys(on_cpu)) or "nothing"
    return f"{sum(sums.values()) / 1e6:.2f} M cycles by the compiler's estimate ({parts}); on the CPU: {counts}"


# --- the toolkit's environment -----------------------------------------------------------------------------------


def convert_elsewhere(arguments: Sequence[str]) -> None:
    """Runs `export.py` by the Python of the toolkit's environment. Raises ExportError, which says how to make one."""
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
    if status := subprocess.run([program, HERE / "export.py", *arguments]).returncode:
        raise ExportError(f"the conversion ended with status {status}")
