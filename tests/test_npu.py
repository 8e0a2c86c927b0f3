"""Rockchip's NPU: against a stand-in library, and against Rockchip's own toolkit where it can be installed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty

import backends
import doctor
import export
import export_rknn
import machine
import preprocess
from settings import ModelOptions
from tests.kit import (
    COLOURS,
    DEMO,
    RED,
    ROOT,
    Node,
    encoded,
    load,
    picture,
    pixels_of,
    run_client,
    write_labels,
)
from tests.npu_double import golden_of, with_program


def npu_of(folder: Path, tmp_path: Path, target: str = "rk3588", **options: Any) -> Any:
    return backends.create_backend(ModelOptions("CLIP", "rknn", str(folder), tmp_path, rknn_target=target, **options))


@pytest.mark.parametrize("form", ["ours", "immich's"])
def test_the_npu_gets_one_picture_at_a_time_in_the_form_its_file_wants(
    tiny_onnx: Path, tiny_immich: Path, tmp_path: Path, npu_library: Path, form: str
) -> None:
    """Lost otherwise: right-looking vectors of wrong pixels; the .rknn file does not say which form it takes."""
    source = tiny_onnx if form == "ours" else tiny_immich
    contract = {"golden": golden_of(tiny_onnx)} if form == "ours" else {}
    backend = npu_of(with_program(source, tmp_path / source.name, **contract), tmp_path)
    cpu = load(source)
    pixels = np.stack([pixels_of(encoded(picture(c))) for c in [*COLOURS.values(), *COLOURS.values()][:7]])
    vectors = backend.encode_images(pixels)
    assert np.sum(vectors * cpu.encode_images(pixels), axis=1).min() > 0.9999
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6  # though float16 came from the NPU
    assert (backend.runtime, backend.precision, backend.model_id) == ("rknn", "fp16", cpu.model_id)
    assert backend.space == cpu.space and backend.refusal == ""

    # A context for each core, each on a thread of its own; all of them at work; the file's bytes given back.
    from rknnlite.api import made

    assert [context.mask for context in made] == [1, 2, 4]
    assert len({context.thread for context in made}) == 3 and threading.get_ident() not in {c.thread for c in made}
    assert all(context.pictures >= 3 and context.rknn_data is None for context in made)


@pytest.mark.parametrize(
    ("names", "target", "masks"),
    [
        ("radxa,rock-5b\0rockchip,rk3588\0", "rk3588", [1, 2, 4]),
        ("xunlong,orangepi-5\0rockchip,rk3588s\0", "rk3588", [1, 2, 4]),
        ("radxa,rock-5c\0rockchip,rk3582\0", "rk3588", [1, 2, 4]),
        ("rockchip,rk3576-evb1-v10\0rockchip,rk3576\0", "rk3576", [1, 2]),
        ("radxa,zero3w\0rockchip,rk3566\0", "rk3566", [0]),
        ("raspberrypi,5-model-b\0brcm,bcm2712\0", "", []),
    ],
)
def test_the_board_says_which_program_and_how_many_cores_it_has(
    tiny_onnx: Path,
    tmp_path: Path,
    npu_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: str,
    target: str,
    masks: list[int],
) -> None:
    """Lost otherwise: boards of the same chip under another name, and those that bear no core number."""
    (tmp_path / "compatible").write_bytes(names.encode())
    monkeypatch.setattr(machine, "DEVICE_TREE", tmp_path / "compatible")
    assert machine.board_target() == target
    monkeypatch.setenv("FAKE_SOC", target)
    folder = with_program(tiny_onnx, tmp_path / "model", target or "rk3588", golden=golden_of(tiny_onnx))
    backend = npu_of(folder, tmp_path, target="")
    from rknnlite.api import made

    assert [context.mask for context in made] == masks and backend.runtime == ("rknn" if target else "onnxrt")
    assert target or "names no Rockchip NPU that we know" in backend.refusal


def test_cores_are_as_many_as_asked_for_as_memory_bears_and_as_work(
    tiny_onnx: Path,
    tmp_path: Path,
    npu_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lost otherwise: a board of 2 GB that swaps, or an NPU given up because its third core does not work."""
    folder = with_program(tiny_onnx, tmp_path / "model", golden=golden_of(tiny_onnx))
    size = (folder / "visual" / "rknpu" / "rk3588" / "model.rknn").stat().st_size
    assert npu_of(folder, tmp_path, rknn_cores=2).npu.startswith("rk3588, 2 of 3 cores, self-test ")
    monkeypatch.setattr(machine, "memory", lambda: (7 * size, 0))
    assert npu_of(folder, tmp_path).npu.startswith("rk3588, 2 of 3 cores")
    assert "memory for 2 of 3 NPU cores alone" in caplog.text
    monkeypatch.setattr(machine, "memory", lambda: (sys.maxsize, 0))  # a system that does not say
    monkeypatch.delitem(sys.modules, "rknnlite.api")
    monkeypatch.setenv("FAKE_BROKEN_CORES", "2")
    assert npu_of(folder, tmp_path).npu.startswith("rk3588, 2 of 3 cores")
    assert "core 2 does not start (Exception: failed to submit!); the NPU goes on with 2 cores" in caplog.text


NPU_FAULTS = [
    ("zeros", {"FAKE_ZEROS": "1"}, {}, "self-test: the model returned a vector that is not finite or has no length"),
    ("golden", {}, {"golden": "rolled"}, r"self-test: cosine -?0\.\d+ to the golden vector; allowed: 0.999 and more"),
    ("soc", {}, {"soc": "rk3576"}, "the program is for rk3576, the board is a rk3588"),
    ("onnx", {}, {"onnx_sha256": "ab"}, "the program was made of another visual/model.onnx than the one beside it"),
    ("later", {}, {"format": 2}, "model.json is of format 2; this version reads 1"),
    ("cores", {"FAKE_BROKEN_CORES": "0 1 2"}, {}, "the NPU's core 0 does not start"),
    ("damaged", {}, {}, "the NPU's core 0 does not start"),
    ("none", {}, {}, "the folder has no visual/rknpu/rk3588/model.rknn; export.py --rknn makes it"),
]


@pytest.mark.parametrize(("fault", "environment", "contract", "said"), NPU_FAULTS, ids=[f[0] for f in NPU_FAULTS])
def test_an_npu_with_a_fault_is_refused_with_a_warning_and_the_cpu_is_used(
    tiny_onnx: Path,
    tmp_path: Path,
    npu_library: Path,
    fault: str,
    environment: dict[str, str],
    contract: dict[str, Any],
    said: str,
) -> None:
    """Lost otherwise: months of wrong vectors (rknn-toolkit2 issues 549, 574) or an idle NPU (immich issue 30037)."""
    golden = golden_of(tiny_onnx)
    if contract.get("golden"):
        contract = {"golden": {**golden, "picture_vector": np.roll(golden["picture_vector"], 1).tolist()}}
    folder = with_program(tiny_onnx, tmp_path / "model", **{"golden": golden, **contract})
    program = folder / "visual" / "rknpu" / "rk3588" / "model.rknn"
    if fault == "damaged":
        program.write_bytes(program.read_bytes()[:1000])
    if fault == "none":
        program.unlink()
    settings = {"CLIP_BACKEND": "rknn", "CLIP_RKNN_TARGET": "rk3588", "CLIP_MODEL": folder, "BIOCLIP_BACKEND": "none"}
    data = write_labels(tmp_path / "data")
    node = Node(data, PYTHONPATH=npu_library, **settings, **environment).ready()
    try:
        [line] = [line for line in node.log.splitlines() if "ERROR" in line and "the NPU is not used" in line]
        assert re.search(said, line) and line.endswith("images run on the CPU instead, by ONNX Runtime")
        assert "Traceback" not in node.log
        capability = node.stub.GetCapabilities(Empty())
        assert capability.runtime == "onnxrt" and re.fullmatch(f"refused: {said}", capability.extra["clip_npu"])
        assert list(capability.precisions) == ["fp32"]
        _, call = node.stub.Health.with_call(Empty())
        assert re.fullmatch(f"the NPU is not used: {said}", dict(call.trailing_metadata())["lumen-degraded"])
        shown = run_client("health", address=node.address)
        assert shown.returncode == 0 and re.fullmatch(f"SERVING\nthe NPU is not used: {said}\n", shown.stdout)
        assert node.result("clip_classify", encoded(picture(RED)))["labels"][0]["label"]
    finally:
        assert node.stop() == 0

    # Without a tower that could take over, there is nothing to serve.
    shutil.move(folder / "visual" / "model.onnx", tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].pop("visual/model.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if fault != "onnx":  # which cannot be told any more
        node = Node(data, PYTHONPATH=npu_library, **settings, **environment)
        assert node.ended() == 1
        node.stop()
        [line] = [line for line in node.log.splitlines() if line.startswith("lumen-clip: ")]
        assert re.search(said, line) and "no visual/model.onnx that could run on the CPU instead" in line


def test_an_npu_without_golden_vectors_is_compared_with_the_cpu(
    tiny_immich: Path, tmp_path: Path, npu_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: immich's folders, which carry no vectors to compare with, on a board that computes wrongly."""
    folder = with_program(tiny_immich, tmp_path / "model")
    assert re.search(r"self-test (1.0000|0.9999)", npu_of(folder, tmp_path).npu)
    monkeypatch.delitem(sys.modules, "rknnlite.api")
    monkeypatch.setenv("FAKE_ZEROS", "1")
    assert npu_of(folder, tmp_path).refusal.startswith("self-test")


def test_an_npu_that_fails_later_fails_that_request_alone(
    tiny_onnx: Path, tmp_path: Path, npu_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: None taken for a vector, and a daemon down with it."""
    backend = npu_of(with_program(tiny_onnx, tmp_path / "model", golden=golden_of(tiny_onnx)), tmp_path)
    with pytest.raises(RuntimeError, match="the NPU failed on an image"):
        backend.encode_images(np.zeros((2, 17, 17, 3), np.uint8))
    assert (
        backend.encode_images(np.zeros((4, backend.preprocess.size, backend.preprocess.size, 3), np.uint8)).shape[0]
        == 4
    )


def test_the_graph_for_the_npu_computes_what_the_export_does(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: nine tenths of an NPU's time, or the right vectors, by the rewritten patch convolution."""
    import onnx
    import onnxruntime

    tower = tiny_onnx / "visual" / "model.onnx"
    graph = export_rknn.npu_graph(tower)
    kinds = {node.op_type for node in graph.graph.node}
    assert "Conv" not in kinds and "LayerNormalization" in kinds  # the latter is one operator of the NPU's
    onnx.save_model(graph, tmp_path / "npu.onnx")
    cpu = load(tiny_onnx)
    pixels = np.stack([pixels_of(encoded(picture(c, seed=i))) for i, c in enumerate(COLOURS.values())])
    session = onnxruntime.InferenceSession(tmp_path / "npu.onnx")
    given = preprocess.normalize(pixels, cpu.preprocess)  # what the compiler puts in front
    found = np.concatenate([session.run(None, {"image": row[None]})[0] for row in given])
    assert np.sum(found * cpu.encode_images(pixels), axis=1).min() > 0.999999


SAID_BY_THE_TOOLKIT = """\
D RKNN: [02:08:11.101] Total Internal Memory Size: 1029KB
D RKNN: [02:08:11.103] ID OpType DataType Target InputShape OutputShape Cycles(DDR/NPU/Total) RW(KB) FullName
D RKNN: [02:08:11.103] 0  InputOperator UINT8 CPU \\ (1,3,224,224) 0/0/0 147 InputOperator
D RKNN: [02:08:11.103] 1  ConvAdd FLOAT16 NPU (1,768,1,50),(768,768,1,1) (1,768,1,50) 64000/73728/73728 1300 Conv:x
D RKNN: [02:08:11.103] 2  ConvAdd FLOAT16 NPU (1,768,1,50),(768,768,1,1) (1,768,1,50) 64000/73728/73728 1300 Conv:y
D RKNN: [02:08:11.103] 3  exSoftmax13 FLOAT16 CPU (1,12,50,50) (1,12,50,50) 0/0/0 117 Softmax:z
"""


def test_the_compilers_table_is_read_and_summarised() -> None:
    """Lost otherwise: a patch convolution at ten times the time, or a softmax on the CPU, that nobody sees."""
    table = export_rknn.cost_table(SAID_BY_THE_TOOLKIT)
    assert [op.kind for op in table] == ["InputOperator", "ConvAdd", "ConvAdd", "exSoftmax13"]
    said = "0.15 M cycles by the compiler's estimate (ConvAdd 0.15, InputOperator 0.00, exSoftmax13 0.00)"
    assert export_rknn.summary(table) == f"{said}; on the CPU: 1 exSoftmax13"
    with pytest.raises(export_rknn.ExportError, match="no table of cycles"):
        export_rknn.cost_table("I RKNN: done")


def run_export(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "export.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif((ROOT / ".venv-rknn").exists(), reason="the toolkit's environment is here, so it would be used")
def test_without_the_toolkit_it_is_said_what_to_run(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: an afternoon with the toolkit's own requirements, which do not install."""
    run = run_export("--to", tiny_onnx, "--rknn", "rk3588,rk3576", "--no-sdpa")
    told = [line.strip() for line in run.stderr.splitlines()]
    assert run.returncode == 1 and "in an environment of its own" in told[0] and len(told) == 5
    assert told[2] == ".venv-rknn/bin/pip install -r requirements-rknn.txt"
    assert told[4] == f".venv-rknn/bin/python export.py --to {tiny_onnx} --rknn rk3588,rk3576 --no-sdpa"
    run = run_export("--to", tiny_onnx, "--rknn", "rk3399")
    assert run.returncode == 2 and "'rk3399'; allowed: rk3562, rk3566, rk3568, rk3576, rk3588" in run.stderr
    run = run_export("--to", tiny_onnx)
    assert run.returncode == 2 and "--model, --rknn or both are needed" in run.stderr
    with pytest.raises(export_rknn.ExportError, match="needs the fp32 image tower of an export"):
        export_rknn.convert(tmp_path, ["rk3588"], [])


@pytest.fixture(scope="session")
def toolkit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(the Python of the environment in docs/rockchip.md, a folder of photographs); LUMEN_RKNN_VENV keeps the first."""
    if "rknn" not in request.config.option.markexpr:
        pytest.skip("installs Rockchip's toolkit (1.5 GB) and takes ten minutes; run it with: python -m pytest -m rknn")
    if os.uname().machine != "x86_64" or not shutil.which("python3.11"):
        pytest.skip("Rockchip's toolkit needs x86-64 and python3.11")
    venv = Path(os.environ.get("LUMEN_RKNN_VENV") or tmp_path_factory.mktemp("rknn") / "venv")
    pip = [str(venv / "bin" / "pip"), "install", "-q"]
    if not venv.exists():
        subprocess.run(["python3.11", "-m", "venv", str(venv)], check=True)
        subprocess.run([*pip, "-r", str(ROOT / "requirements-rknn.txt")], check=True)
        subprocess.run([*pip, "--no-deps", f"rknn-toolkit2=={export_rknn.TOOLKIT}"], check=True)
    folder = tmp_path_factory.mktemp("photographs")
    subprocess.run([*pip, "--no-deps", "--target", str(folder / "package"), "scikit-image"], check=True)
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg"):
        shutil.copy(folder / "package" / "skimage" / "data" / name, folder)
    shutil.rmtree(folder / "package")
    return str(venv / "bin" / "python"), folder


def converted(toolkit: tuple[str, Path], folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Converts as a user does; -> (what was printed, the cycles and cosines by SoC)."""
    command = [toolkit[0], str(ROOT / "export.py"), "--to", str(folder), "--photos", str(toolkit[1]), *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    print(f"\n{run.stdout}", end="")
    programs = sorted((folder / "visual" / "rknpu").iterdir())
    return run.stdout, {home.name: json.loads((home / "model.json").read_text()) for home in programs}


@pytest.mark.rknn
@pytest.mark.timeout(1200)
def test_the_demo_becomes_a_program_for_every_npu(toolkit: tuple[str, Path], tmp_path: Path) -> None:
    """Lost otherwise: boards whose program does not compile, or computes something else in float16."""
    shutil.copytree(DEMO, tmp_path / "demo")
    said, made = converted(toolkit, tmp_path / "demo", "--rknn", ",".join(machine.NPU_CORES))
    assert set(made) == set(machine.NPU_CORES)
    for soc, contract in made.items():
        home = tmp_path / "demo" / "visual" / "rknpu" / soc
        assert contract["simulator_cosine"] >= 0.9999 and contract["soc"] == soc
        assert contract["fused_attention"] == (soc != "rk3576")
        assert contract["input"] == {"dtype": "uint8", "layout": "NHWC", "shape": [1, 64, 64, 3]}
        assert contract["rknn_sha256"] == machine.sha256_of(home / "model.rknn")
        assert contract["batch_sizes"] == [1] and contract["toolkit"] == export_rknn.TOOLKIT
        program = home / "model.rknn"  # which says by itself what doctor.py reads there
        assert doctor._search(program, rb'"target_platform":\["(\w+)"') == soc
        assert doctor._search(program, rb'"version":"(\d+\.\d+\.\d+)"') == export_rknn.TOOLKIT
    assert re.search(r"rk3588: .* on the CPU: nothing", said)
    # The golden vector is what ONNX Runtime makes of the golden picture, so a board can be told right from wrong.
    golden, cpu = made["rk3588"]["golden"], load(DEMO)
    picture = preprocess.decode_image(base64.b64decode(golden["picture"]), [cpu.preprocess], 1 << 20, draft=False)
    assert cpu.encode_images(picture[cpu.preprocess][None])[0] @ np.array(golden["picture_vector"]) > 0.99999
    # What is there stays when a conversion fails, and a daemon on a PC reads the folder as before.
    assert load(tmp_path / "demo").self_test_cosine > 0.9999
    _, made = converted(toolkit, tmp_path / "demo", "--rknn", "rk3588", "--no-sdpa")
    assert made["rk3588"]["fused_attention"] is False and made["rk3588"]["simulator_cosine"] >= 0.9999


@pytest.mark.rknn
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("architecture", "budget"), [("ViT-B-32", 12_000_000), ("ViT-L-14", 170_000_000)])
def test_true_size_towers_stay_in_the_npus_budget(
    toolkit: tuple[str, Path], tmp_path: Path, architecture: str, budget: int
) -> None:
    """Lost otherwise: a tower that takes ten times the NPU's time, as ViT-B/32 does with its patch convolution.

    ViT-L-14 is BioCLIP-2's shape. Weights are random; the photographs are real.
    """
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model(architecture).state_dict(), tmp_path / "seeded.pt")
    export.export(f"{architecture}:{tmp_path / 'seeded.pt'}", tmp_path / "model", tower="image", data_dir=tmp_path)
    said, made = converted(toolkit, tmp_path / "model", "--rknn", "rk3588")
    assert made["rk3588"]["simulator_cosine"] >= 0.9999
    assert made["rk3588"]["compiler_cycles"] <= budget
    assert "on the CPU: nothing" in said
