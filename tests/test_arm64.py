"""Another processor."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty

import tasks
from tests.kit import DEMO, ROOT, RUNTIME, Drawing, Node, load, vectors_of
from tests.npu_double import with_program


@pytest.fixture(scope="session")
def arm64_root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian for aarch64 installed as in docs/deployment.md; LUMEN_ARM64_ROOT keeps it for the next time."""
    if "arm64" not in request.config.option.markexpr:
        pytest.skip("takes half an hour; run it with: python -m pytest -m arm64")
    tools = ("debootstrap", "chroot", "qemu-aarch64-static")
    if os.geteuid() != 0 or not all(map(shutil.which, tools)):
        pytest.skip(f"needs root and {', '.join(tools)} (Debian: debootstrap, qemu-user-static, binfmt-support)")
    if not Path("/proc/sys/fs/binfmt_misc/qemu-aarch64").exists():
        pytest.skip("the kernel does not run aarch64 programs here: mount binfmt_misc, update-binfmts --enable")
    root = Path(os.environ.get("LUMEN_ARM64_ROOT") or tmp_path_factory.mktemp("arm64") / "root")
    if not (root / "usr" / "bin" / "python3").exists():
        packages = "python3,python3-venv,ca-certificates"
        run = ("debootstrap", "--arch=arm64", "--variant=minbase", f"--include={packages}", "bookworm", str(root))
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    for name in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
        shutil.copy(name, root / name.lstrip("/"))
    home = root / "opt" / "lumen-clip"
    home.mkdir(parents=True, exist_ok=True)
    for name in (*RUNTIME, "requirements-edge.txt"):
        shutil.copy(ROOT / name, home)
    shutil.copytree(ROOT / "gen", home / "gen", dirs_exist_ok=True)
    (root / "var" / "lib" / "lumen").mkdir(exist_ok=True)
    # No compiler is found on a board.
    install = "cd /opt/lumen-clip && python3 -m venv .venv && .venv/bin/pip install -q --only-binary :all: -r"
    subprocess.run(("chroot", str(root), "/bin/sh", "-c", f"{install} requirements-edge.txt"), check=True)
    return root


@pytest.mark.arm64
@pytest.mark.timeout(7200)
def test_a_copy_of_some_files_serves_the_demo_on_aarch64(arm64_root: Path, drawings: list[Drawing]) -> None:
    """Lost otherwise: the boards, which are what all this is for."""
    program = ("chroot", str(arm64_root), "/opt/lumen-clip/.venv/bin/python", "/opt/lumen-clip/lumen_clip.py")
    node = Node(Path("/var/lib/lumen"), ("--demo",), program).bound()
    try:
        node.wait_for("ready: ", 900)
        usual = {name for name in tasks.TASKS if not name.startswith("semantic_")}  # those are off unless asked for
        assert {task.name for task in node.stub.GetCapabilities(Empty()).tasks} == usual
        fox, house = ((DEMO / "pictures" / f"{name}.png").read_bytes() for name in ("fox", "house"))
        assert node.result("smart_classify", fox)["labels"][0]["label"].endswith("/Vulpes/vulpes/red fox")
        assert node.ask("smart_classify", house).meta["source"] == "scene_classification"
        here = load(DEMO)
        files = [drawing.file() for drawing in drawings[::64]]
        there = [node.result("clip_image_embed", file)["vector"] for file in files]
        assert np.sum(vectors_of(here, files) * np.array(there), axis=1).min() > 0.9999
        texts = ["a photo of a fox.", "Vulpes vulpes", "“curly” &amp; é"]
        there = [node.result("clip_embed", text.encode())["vector"] for text in texts]
        assert np.sum(here.encode_text(here.tokenize(texts)) * np.array(there), axis=1).min() > 0.9999
    finally:
        assert node.stop() == 0, node.log


@pytest.mark.arm64
@pytest.mark.timeout(7200)
def test_the_real_npu_library_reports_its_faults_in_one_line(arm64_root: Path) -> None:
    """Lost otherwise: tracebacks on the boards of those whose NPU is not set up yet, which is everybody's first day.

    The library is rknn-toolkit-lite2 as PyPI has it; the board is a device tree of our own in the root's empty /proc.
    """
    shutil.rmtree(arm64_root / "var" / "lib" / "npu", ignore_errors=True)
    with_program(DEMO, arm64_root / "var" / "lib" / "npu")
    python = ("chroot", str(arm64_root), "/opt/lumen-clip/.venv/bin/python")
    settings = {"CLIP_BACKEND": "rknn", "CLIP_MODEL": "/var/lib/npu", "BIOCLIP_BACKEND": "none"}
    settings["CLIP_LABELS"] = "/opt/lumen-clip/gen/demo/names.json"
    device_tree = arm64_root / "proc" / "device-tree" / "compatible"
    device_tree.parent.mkdir(parents=True, exist_ok=True)
    missing_library = r"core 0 does not start \(Exception: Can not find dynamic library on RK3588! Please download"
    for names, more, said in (
        ("vendor,board\0rockchip,rk3588s\0", {}, missing_library),
        ("vendor,board\0rockchip,rk3399\0", {}, "names no Rockchip NPU that we know"),
        # What the library says of a board that it does not know, where the operator insists.
        ("vendor,board\0rockchip,rk3399\0", {"CLIP_RKNN_TARGET": "rk3588"}, r"\(Exception: Please specify the target"),
    ):
        device_tree.write_bytes(names.encode())
        node = Node(Path("/var/lib/lumen"), (), (*python, "/opt/lumen-clip/lumen_clip.py"), **settings, **more).bound()
        try:
            node.wait_for("ready: ", 900)
            [line] = [line for line in node.log.splitlines() if "the NPU is not used" in line]
            assert re.search(said, line) and " ERROR lumen.rknn_backend: " in line and "Traceback" not in node.log
            assert node.stub.GetCapabilities(Empty()).extra["clip_npu"].startswith("refused: ")
            fox = (DEMO / "pictures" / "fox.png").read_bytes()
            assert node.result("clip_classify", fox)["labels"][0]["label"] == "fox"
        finally:
            assert node.stop() == 0, node.log
    # A file that the operator named and that is not there ends the start; the library itself says no more than -1.
    node = Node(
        Path("/var/lib/lumen"),
        (),
        (*python, "/opt/lumen-clip/lumen_clip.py"),
        **{**settings, "CLIP_RKNN_MODEL": "/nowhere.rknn"},
    )
    assert node.process.wait(300) == 2
    node.stop()
    assert "lumen-clip: CLIP_RKNN_MODEL=/nowhere.rknn: no such file" in node.log and "Traceback" not in node.log
    script = """
from pathlib import Path
import errors
import rknn_backend
try:
    rknn_backend.NPUContext(Path("/nowhere.rknn"), 0, False)
except errors.NPURefused as refusal:
    print(f"{refusal}{refusal.detail}")
"""
    run = subprocess.run(
        (*python, "-c", f"import sys; sys.path.append('/opt/lumen-clip'){script}"), capture_output=True
    )
    wanted = "the NPU's library cannot read the program (Invalid RKNN model path: /nowhere.rknn)"
    assert run.stdout.decode().strip() == wanted and b"Traceback" not in run.stderr
