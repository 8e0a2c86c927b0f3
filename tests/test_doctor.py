"""`--doctor`: what stands between a machine and a running daemon."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

import doctor
from tests.kit import KEPT, LIMIT_S, NOWHERE, Node, settings_of, write_labels
from tests.npu_double import with_program


def a_board(folder: Path, **changes: str) -> doctor.Places:
    """An RK3588 board with everything right, as far as its files say, but for the `changes`."""
    places = doctor.Places(folder / "proc", folder / "sys", folder / "dev", (folder / "lib",))
    files = {
        "proc/device-tree/compatible": "radxa,rock-5b\0rockchip,rk3588\0",
        "proc/cpuinfo": "Features : fp asimd asimddp fphp\nflags : avx avx2 fma\n",
        "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable:  6000000 kB\n",
        "sys/module/rknpu/version": "RKNPU driver: v0.9.8\n",
        "sys/class/drm/renderD129/device/uevent": "DRIVER=RKNPU\nOF_NAME=npu\n",
        "sys/class/drm/renderD128/device/uevent": "DRIVER=panthor\n",
        "dev/dri/renderD129": "",
        "dev/dri/renderD128": "",
        "lib/librknnrt.so": "\x7fELF" + "x" * 5000 + "librknnrt version: 2.3.2 (429f97ae6b@2025-04-09)",
    }
    for name, content in {**files, **changes}.items():
        if content != "missing":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
    return places


HEALTHY_BOARD = {
    "board": "ok radxa,rock-5b, rockchip,rk3588: runs programs for rk3588, on 3 NPU cores",
    "NPU driver": "ok 0.9.8",
    "NPU library": r"ok librknnrt 2\.3\.2 \(.*librknnrt\.so\)",
    "NPU programs": r"ok CLIP: .*/visual/rknpu/rk3588/model\.rknn, made by toolkit 2\.5\.0",
    "NPU nodes": r"ok .*/dev/dri/renderD129 can be read and written",
    "memory": r"ok 6\.1 GB available, the models need about 0\.\d GB",
}


SICK_BOARDS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "healthy": ({}, {}),
    "no library": (
        {"lib/librknnrt.so": "missing"},
        {"NPU library": "! librknnrt.so is not in /usr/lib; copy it there.*"},
    ),
    "old driver": (
        {"sys/module/rknpu/version": "RKNPU driver: v0.8.2"},
        {"NPU driver": "! 0.8.2 is too old; 0.9.8 and later work: update the vendor's kernel"},
    ),
    "no driver": (
        {"sys/module/rknpu/version": "missing", "sys/class/drm/renderD129/device/uevent": "missing"},
        {
            "NPU driver": "! no rknpu driver; boot the vendor's kernel.*",
            "NPU nodes": "! no device node of the NPU in /dev/dri; in a container: --device /dev/dri .*",
        },
    ),
    "node not passed in": (
        {"dev/dri/renderD129": "missing"},
        {"NPU nodes": "! .*renderD129 is not ours; it is not in /dev; in a container: --device /dev/dri"},
    ),
    "hidden device tree": (
        {"proc/device-tree/compatible": "missing"},
        {"board": "! .* is not readable; in a container: --security-opt.*", "NPU programs": "-- CLIP: no target"},
    ),
    "another board": (
        {"proc/device-tree/compatible": "raspberrypi,5\0brcm,bcm2712\0"},
        {"board": "! .*no Rockchip NPU that we know; set CLIP_BACKEND=onnxrt", "NPU programs": "-- CLIP: no target"},
    ),
    "no program": (
        {"proc/device-tree/compatible": "vendor,b\0rockchip,rk3566\0"},
        {
            "board": "ok .*rk3566: runs programs for rk3566, on 1 NPU core",
            "NPU programs": "! CLIP: .*/rk3566/model.rknn is missing; make it on a PC: export.py --rknn rk3566",
        },
    ),
    "little memory": (
        {"proc/meminfo": "MemAvailable: 100 kB\n"},
        {"memory": "! 0.0 GB available, the models need about 0.0 GB; --precision int8 needs less"},
    ),
}


@pytest.mark.parametrize("board", SICK_BOARDS)
@pytest.mark.parametrize("tower", ["with an ONNX tower", "without"])
def test_the_doctor_names_what_ails_a_board(
    tiny_onnx: Path, tmp_path: Path, npu_library: Path, board: str, tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lost otherwise: an evening with forums. What the daemon can do without is a warning, and no failure."""
    changes, expected = SICK_BOARDS[board]
    folder = with_program(tiny_onnx, tmp_path / "model", golden={})
    with (folder / "visual" / "rknpu" / "rk3588" / "model.rknn").open("ab") as program:
        program.write(b'"target_platform":["rk3588"],"version":"2.5.0","virtual_tensor":[]')
    if tower == "without":
        (folder / "visual" / "model.onnx").unlink()
    settings = settings_of(
        clip_backend="rknn", bioclip_backend="none", clip_model=str(folder), lumen_data_dir=write_labels(tmp_path / "d")
    )
    visit = doctor.Visit(settings, "127.0.0.1", 0, a_board(tmp_path / "root", **changes))
    findings = doctor.examine(visit)
    said: dict[str, list[str]] = {}
    for name, mark, text in findings:
        said.setdefault(name, []).append(f"{mark} {text}")
    for name, line in {**HEALTHY_BOARD, **expected}.items():
        if tower == "without" and line.startswith("! ") and name not in ("memory",):
            line = line.replace("! ", "FAIL ", 1)
        assert any(re.fullmatch(line, found) for found in said[name]), (name, said[name])
    failed = any("! " in line for name, line in expected.items() if name != "memory") and tower == "without"
    assert doctor.report(findings) == failed
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(findings) and all(line.split()[0] in ("ok", "--", "!", "FAIL") for line in printed)
    assert not [line for line in printed if "could not be checked" in line]


def test_the_doctor_never_faints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: the one tool for a machine on which everything else fails."""
    nothing = doctor.Places(tmp_path / "a", tmp_path / "b", tmp_path / "c", (tmp_path / "d",))
    garbage = tmp_path / "garbage"
    for name in ("proc/device-tree/compatible", "proc/cpuinfo", "proc/meminfo", "sys/module/rknpu/version"):
        (garbage / name).parent.mkdir(parents=True, exist_ok=True)
        (garbage / name).write_bytes(bytes(range(256)) * 8)
    (garbage / "sys/class/drm").mkdir(parents=True)
    (garbage / "sys/class/drm/renderD128").touch()
    (garbage / "lib").mkdir()
    (garbage / "lib/librknnrt.so").touch()
    odd = doctor.Places(garbage / "proc", garbage / "sys", garbage / "dev", (garbage / "lib",))
    for places in (nothing, odd):
        for backend in ("onnxrt", "rknn"):
            settings = settings_of(clip_backend=backend, clip_model="x:y", lumen_data_dir=tmp_path / "e" / "f")
            found = doctor.examine(doctor.Visit(settings, "127.0.0.1", 0, places))
            assert {name for name, _, _ in found} == {name for name, _ in doctor.CHECKS}
            assert not [text for _, _, text in found if "could not be checked" in text]
    monkeypatch.setattr(doctor, "_nodes", lambda places: 1 / 0)
    settings = settings_of(clip_backend="rknn", clip_model="x:y", lumen_data_dir=tmp_path)
    found = doctor.examine(doctor.Visit(settings, "127.0.0.1", 0, nothing))
    assert ("NPU nodes", "!", "could not be checked (ZeroDivisionError: division by zero)") in found


def see_the_doctor(tmp_path: Path, *arguments: str, **environment: Any) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k in KEPT}
    clean |= {"LUMEN_DATA_DIR": str(tmp_path), "HF_ENDPOINT": NOWHERE} | {k: str(v) for k, v in environment.items()}
    command = [*Node.PROGRAM, "--doctor", "--host", "127.0.0.1", *arguments]
    run = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=LIMIT_S)
    assert "Traceback" not in run.stdout + run.stderr
    return run


def test_the_doctor_of_this_machine(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: the first thing to run when something is wrong."""
    well = see_the_doctor(tmp_path, "--demo", "--port", "0")
    assert well.returncode == 0 and not re.search(r"^(FAIL|!)", well.stdout, re.MULTILINE), well.stdout
    assert "CPUExecutionProvider" in well.stdout and "nothing is to be downloaded" in well.stdout
    assert list(tmp_path.iterdir()) == []  # it looks and leaves no trace

    plain = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "CLIP_MODEL": tiny_onnx}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = see_the_doctor(write_labels(tmp_path), "--port", str(taken.getsockname()[1]), **plain)
        assert run.returncode == 1 and re.search(r"^FAIL port .*Address already in use; stop what", run.stdout, re.M)
    for changes, said in (
        ({"CLIP_BACKEND": "rknn"}, r"^FAIL NPU library +rknn-toolkit-lite2 is not installed; it has wheels for"),
        ({"CLIP_TEMPLATES": "3"}, r"^FAIL settings +CLIP_TEMPLATES=3: allowed: 1, 7, 80; the rest is of the defaults$"),
        ({"CLIP_MODEL": "ViT-B-32:laion2b_s34b_b79k"}, r"^FAIL hub .*CLIP's model must be downloaded; copy a folder"),
        ({"CLIP_ORT_PROVIDERS": "CUDAExecutionProvider"}, r"^FAIL runtime +CLIP_ORT_PROVIDERS=CUDAExecutionProvider:"),
    ):
        run = see_the_doctor(tmp_path, "--port", "0", **{**plain, **changes})
        assert run.returncode == 1 and re.search(said, run.stdout, re.MULTILINE), run.stdout
        assert {"board", "CPU", "port", "mDNS"} <= {line[5:].split("  ")[0] for line in run.stdout.splitlines()}
    run = see_the_doctor(tmp_path, "--port", "0", **plain, ADVERTISE_IP="192.0.2.7")
    assert run.returncode == 0 and "will be announced at 192.0.2.7" in run.stdout
