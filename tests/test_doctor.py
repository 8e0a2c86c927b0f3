"""`--doctor`: what stands between a machine and a running daemon."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import doctor
import label_cache
import tree_of_life
from tests.immich import FakeImmich
from tests.kit import KEPT, LIMIT_S, NOWHERE, Node, one_model, settings_of, write_labels
from tests.npu_double import with_program
from tests.test_metrics import free_port


def a_board(folder: Path, **changes: str) -> Path:
    """The root folder of an RK3588 board with everything right, as far as its files say, but for the `changes`."""
    files = {
        "proc/device-tree/compatible": "radxa,rock-5b\0rockchip,rk3588\0",
        "proc/cpuinfo": "Features : fp asimd asimddp fphp\nflags : avx avx2 fma\n",
        "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable:  6000000 kB\n",
        "sys/module/rknpu/version": "RKNPU driver: v0.9.8\n",
        "sys/class/drm/renderD129/device/uevent": "DRIVER=RKNPU\nOF_NAME=npu\n",
        "sys/class/drm/renderD128/device/uevent": "DRIVER=panthor\n",
        "dev/dri/renderD129": "",
        "dev/dri/renderD128": "",
        "usr/lib/librknnrt.so": "\x7fELF" + "x" * 5000 + "librknnrt version: 2.3.2 (429f97ae6b@2025-04-09)",
    }
    for name, content in {**files, **changes}.items():
        if content != "missing":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
    return folder


HEALTHY_BOARD = {
    "board": "ok radxa,rock-5b, rockchip,rk3588: runs programs for rk3588, on 3 NPU cores",
    "NPU driver": "ok 0.9.8",
    "NPU library": r"ok librknnrt 2\.3\.2 \(.*librknnrt\.so\)",
    "NPU programs": r"ok CLIP: .*/visual/rknpu/rk3588/model\.rknn, made by toolkit 2\.5\.0",
    "NPU nodes": r"ok .*/dev/dri/renderD129 can be read and written",
    "memory": r"ok 6\.1 GB available, the models need about 0\.\d GB",
}


FAULTY_BOARDS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "healthy": ({}, {}),
    "no library": (
        {"usr/lib/librknnrt.so": "missing"},
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
        {"NPU nodes": "! .*renderD129 is not accessible; it is not in /dev; in a container: --device /dev/dri"},
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
        {"proc/meminfo": "MemTotal: 2000000 kB\nMemAvailable: 100 kB\n"},
        {"memory": "! 0.0 GB available, the models need about 0.0 GB; an int8 export needs less"},
    ),
}


@pytest.mark.parametrize("board", FAULTY_BOARDS)
@pytest.mark.parametrize("tower", ["with an ONNX tower", "without"])
def test_the_doctor_names_the_fault_of_a_board(
    tiny_onnx: Path, tmp_path: Path, npu_library: Path, board: str, tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lost otherwise: an evening with forums. What the daemon can do without is a warning, and no failure."""
    changes, expected = FAULTY_BOARDS[board]
    folder = with_program(tiny_onnx, tmp_path / "model", golden={})
    with (folder / "visual" / "rknpu" / "rk3588" / "model.rknn").open("ab") as program:
        program.write(b'"target_platform":["rk3588"],"version":"2.5.0","virtual_tensor":[]')
    if tower == "without":
        (folder / "visual" / "model.onnx").unlink()
    settings = settings_of(
        clip_backend="rknn", bioclip_backend="none", clip_model=str(folder), lumen_data_dir=write_labels(tmp_path / "d")
    )
    setup = doctor.Setup(settings, "127.0.0.1", 0, a_board(tmp_path / "root", **changes))
    findings = doctor.examine(setup)
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


def test_no_file_of_the_machine_stops_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: the one tool for a machine on which everything else fails."""
    nothing = tmp_path / "nothing"
    garbage = tmp_path / "garbage"
    for name in ("proc/device-tree/compatible", "proc/cpuinfo", "proc/meminfo", "sys/module/rknpu/version"):
        (garbage / name).parent.mkdir(parents=True, exist_ok=True)
        (garbage / name).write_bytes(bytes(range(256)) * 8)
    (garbage / "sys/class/drm").mkdir(parents=True)
    (garbage / "sys/class/drm/renderD128").touch()
    (garbage / "usr/lib").mkdir(parents=True)
    (garbage / "usr/lib/librknnrt.so").touch()
    for root in (nothing, garbage):
        for backend in ("onnxrt", "rknn"):
            settings = settings_of(clip_backend=backend, clip_model="x:y", lumen_data_dir=tmp_path / "e" / "f")
            found = doctor.examine(doctor.Setup(settings, "127.0.0.1", 0, root))
            checks = {name for name, _ in doctor.CHECKS if backend == "rknn" or not name.startswith("NPU")}
            assert {name for name, _, _ in found} == checks
            assert not [text for _, _, text in found if "could not be checked" in text]
    monkeypatch.setattr(doctor, "_nodes", lambda root: 1 / 0)
    settings = settings_of(clip_backend="rknn", clip_model="x:y", lumen_data_dir=tmp_path)
    found = doctor.examine(doctor.Setup(settings, "127.0.0.1", 0, nothing))
    assert ("NPU nodes", "!", "could not be checked (ZeroDivisionError: division by zero)") in found


def run_doctor(tmp_path: Path, *arguments: str, **environment: Any) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k in KEPT}
    clean |= {"LUMEN_DATA_DIR": str(tmp_path), "HF_ENDPOINT": NOWHERE} | {k: str(v) for k, v in environment.items()}
    command = [*Node.PROGRAM, "--doctor", "--host", "127.0.0.1", *arguments]
    run = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=LIMIT_S)
    assert "Traceback" not in run.stdout + run.stderr
    return run


def test_the_doctor_of_this_machine(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: the first thing to run when something is wrong."""
    well = run_doctor(tmp_path, "--demo", "--port", "0")
    assert well.returncode == 0 and not re.search(r"^(FAIL|!)", well.stdout, re.MULTILINE), well.stdout
    assert "CPUExecutionProvider" in well.stdout and "nothing is to be downloaded" in well.stdout
    assert list(tmp_path.iterdir()) == []  # it looks and leaves no trace

    plain = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "CLIP_MODEL": tiny_onnx}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = run_doctor(write_labels(tmp_path), "--port", str(taken.getsockname()[1]), **plain)
        assert run.returncode == 1 and re.search(
            r"^FAIL port .*already in use; stop what uses it, or set --p", run.stdout, re.M
        )
        run = run_doctor(tmp_path, "--port", "0", **plain, LUMEN_METRICS_PORT=taken.getsockname()[1])
        line = r"^FAIL port .*already in use; stop what uses it, or set LUMEN_METRICS_PORT"
        assert run.returncode == 1 and re.search(line, run.stdout, re.M)
    for changes, said in (
        ({"CLIP_BACKEND": "rknn"}, r"^FAIL NPU library +rknn-toolkit-lite2 is not installed; it has wheels for"),
        (
            {"CLIP_TEMPLATES": "3"},
            r"^FAIL settings +CLIP_TEMPLATES=3: allowed: 1, 7, 80; the other checks use",
        ),
        ({"CLIP_MODEL": "ViT-B-32:laion2b_s34b_b79k"}, r"^FAIL hub .*CLIP's model must be downloaded; copy a folder"),
        ({"CLIP_ORT_PROVIDERS": "CUDAExecutionProvider"}, r"^FAIL runtime +CLIP_ORT_PROVIDERS=CUDAExecutionProvider:"),
    ):
        run = run_doctor(tmp_path, "--port", "0", **{**plain, **changes})
        assert run.returncode == 1 and re.search(said, run.stdout, re.MULTILINE), run.stdout
        assert {"board", "CPU", "port", "mDNS"} <= {line[5:].split("  ")[0] for line in run.stdout.splitlines()}
    run = run_doctor(tmp_path, **{**plain, "CLIP_BACKEND": "onx", "BATCH_SIZE": -1})
    assert all(f"FAIL settings      {text}" in run.stdout for text in ("CLIP_BACKEND=onx: ", "BATCH_SIZE=-1: "))
    run = run_doctor(tmp_path, "--host", "192.0.2.7", **plain)
    assert run.returncode == 1 and re.search(
        r"^FAIL port .*Cannot assign requested address; set --host", run.stdout, re.M
    )
    run = run_doctor(tmp_path, "--port", "0", **plain, ADVERTISE_IP="192.0.2.7")
    assert run.returncode == 0 and "will be announced at 192.0.2.7" in run.stdout


REFUSED: list[tuple[str, dict[str, str]]] = [
    ("TLS", {"LUMEN_TLS_CERT": "@/nowhere", "LUMEN_TLS_KEY": "@/server.key"}),
    ("TLS", {"LUMEN_TLS_CERT": "@/garbage", "LUMEN_TLS_KEY": "@/server.key"}),
    ("TLS", {"LUMEN_TLS_CERT": "@/server.pem", "LUMEN_TLS_KEY": "@/client.key"}),
    ("TLS", {"LUMEN_TLS_KEY": "@/server.key"}),
    ("TLS", {"LUMEN_TLS_CLIENT_CA": "@/garbage", "LUMEN_TLS_CERT": "@/server.pem", "LUMEN_TLS_KEY": "@/server.key"}),
    ("token", {"LUMEN_TOKEN_FILE": "@/nowhere"}),
    ("token", {"LUMEN_TOKEN_FILE": "@/garbage"}),
    ("token", {"LUMEN_TOKEN_FILE": "@/token"}),  # without TLS
    ("scenes", {"LUMEN_SCENES": "@/nowhere", "BIOCLIP_BACKEND": "onnxrt"}),
    ("scenes", {"LUMEN_SCENES": "@/garbage", "BIOCLIP_BACKEND": "onnxrt"}),
    ("labels", {"CLIP_LABELS": "@/nowhere"}),
    ("labels", {"CLIP_LABELS": "@/garbage"}),
    ("species", {"CLIP_BACKEND": "none", "BIOCLIP_BACKEND": "onnxrt", "BIOCLIP_LABELS": "@/nowhere"}),
    ("species", {"CLIP_BACKEND": "none", "BIOCLIP_BACKEND": "onnxrt", "BIOCLIP_LABELS": "@/garbage"}),
    ("species", {"CLIP_BACKEND": "none", "BIOCLIP_BACKEND": "onnxrt", "BIOCLIP_LABELS": "@/folder"}),
    ("models", {"CLIP_MODEL": "@/nowhere"}),
    ("models", {"CLIP_MODEL": "@"}),
    ("models", {"CLIP_MODEL": "ViT-B-32:@/garbage"}),
    ("models", {"CLIP_ONNX_TEXT": "@/nowhere"}),
    ("models", {"CLIP_BACKEND": "torch"}),  # with a folder of ONNX files
    ("models", {"CLIP_BACKEND": "torch", "CLIP_MODEL": "ViT-B-32:laion9b", "CLIP_DEVICE": "cpu"}),
    ("models", {"CLIP_BACKEND": "torch", "CLIP_MODEL": "hf-hub:a/b", "CLIP_DEVICE": "gpu"}),
    ("models", {"CLIP_BACKEND": "torch", "CLIP_MODEL": "hf-hub:a/b", "CLIP_DEVICE": "cpu", "CLIP_PRECISION": "fp16"}),
    ("runtime", {"CLIP_ORT_PROVIDERS": "CUDAExecutionProvider"}),
]


@pytest.mark.parametrize(("name", "changes"), REFUSED)
def test_the_doctor_refuses_what_the_start_refuses_with_the_same_text(
    tmp_path: Path, tiny_onnx: Path, certificates: Path, name: str, changes: dict[str, str]
) -> None:
    """Lost otherwise: "ok" for a configuration that does not start."""
    (certificates / "garbage").write_text("garbage\n")
    (certificates / "folder").mkdir(exist_ok=True)
    (certificates / "folder" / label_cache.FILE).write_text("garbage\n")
    changes = {setting: value.replace("@", str(certificates)) for setting, value in changes.items()}
    settings = {**one_model(tiny_onnx), "BIOCLIP_MODEL": tiny_onnx, "LUMEN_TUNE": "0", "CLIP_TEMPLATES": "1", **changes}
    data = write_labels(tmp_path, tiny_onnx)
    node = Node(data, ("--host", "0.0.0.0"), **settings)
    assert node.ended() == 2
    node.stop()
    [said] = [line.removeprefix("lumen-clip: ") for line in node.log.splitlines() if line.startswith("lumen-clip: ")]
    run = run_doctor(data, "--host", "0.0.0.0", "--port", "0", **settings)
    assert run.returncode == 1
    assert [line.split(None, 2)[1:] for line in run.stdout.splitlines() if line.startswith("FAIL")] == [[name, said]]


def test_the_doctor_reports_what_works_and_warns_of_what_has_no_effect(
    tmp_path: Path, tiny_onnx: Path, certificates: Path
) -> None:
    """Lost otherwise: an operator who cannot tell whether a file was read, or a name misspelt."""
    (tmp_path / "names.json").write_text('["a dog", "a cat"]')
    (tmp_path / "token").write_text("a-token-that-nobody-guesses")
    (tmp_path / "token").chmod(0o644)
    settings = {
        **one_model(tiny_onnx),
        "CLIP_LABELS": tmp_path / "names.json",
        "LUMEN_TLS_CERT": certificates / "server.pem",
        "LUMEN_TLS_KEY": certificates / "server.key",
        "LUMEN_TOKEN_FILE": tmp_path / "token",
        "LUMEN_IMMICH_FALLBACK": "http://127.0.0.1:9",
        "CLIP_DEVICE": "cuda",
        "CLIP_BACKNED": "torch",
        "CLIP_MDNS_STATUS": "busy",
    }
    before = sorted(tmp_path.rglob("*"))
    run = run_doctor(tmp_path, "--host", "0.0.0.0", "--port", "0", "--log-level", "error", **settings)
    assert run.returncode == 0 and run.stderr == "", run.stdout + run.stderr
    for said in (
        f"ok   labels        {tmp_path}/names.json: 2 names",
        f"ok   TLS           {certificates}/server.pem with its key",
        "ok   token         every call must carry it",
        f"!    token         LUMEN_TOKEN_FILE={tmp_path}/token can be read by others on this machine; chmod 600",
        "!    settings      CLIP_BACKNED is not a setting; did you mean CLIP_BACKEND?",
        "--   immich        off",
        "!    settings      LUMEN_IMMICH_FALLBACK=http://127.0.0.1:9 has no effect with LUMEN_IMMICH_PORT=0",
        "!    settings      CLIP_DEVICE=cuda has no effect with CLIP_BACKEND=onnxrt",
    ):
        assert said in run.stdout.splitlines(), run.stdout
    assert "CLIP_MDNS_STATUS is no longer a setting" in run.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_the_doctor_leaves_a_large_set_of_species_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: minutes of reading on a board, and a file in a folder that was only to be looked at."""
    monkeypatch.setattr(label_cache, "HALF_PRECISION_BYTES", 100)
    names, rows = ["a", "b", "c"], np.eye(3, 16, dtype=np.float32)
    key = label_cache.CacheKey.of(names, tree_of_life.RECIPE, "x", 16)
    label_cache.save(tmp_path, key, [rows], names, np.zeros(3, np.uint8))
    before = sorted(tmp_path.iterdir())
    settings = settings_of(clip_backend="none", bioclip_backend="onnxrt", bioclip_labels=tmp_path)
    assert list(doctor.species(doctor.Setup(settings, "127.0.0.1", 0))) == [("ok", f"{tmp_path}: 3 species")]
    assert sorted(tmp_path.iterdir()) == before
    assert len(tree_of_life.open_folder(tmp_path).vecs) == 3 and sorted(tmp_path.iterdir()) != before


@pytest.mark.parametrize(
    ("settings", "gpus", "said", "expected"),
    [
        ({"CLIP_BACKEND": "onnxrt"}, "", None, ("--", "no NVIDIA GPU; CLIP runs on the CPU")),
        (
            {"CLIP_BACKEND": "onnxrt"},
            "NVIDIA X",
            None,
            ("--", "NVIDIA X: not used; CLIP_ORT_PROVIDERS chooses it; CLIP runs on the CPU"),
        ),
        (
            {"CLIP_BACKEND": "onnxrt", "CLIP_ORT_PROVIDERS": "CUDAExecutionProvider,CPUExecutionProvider"},
            "NVIDIA X",
            None,
            ("ok", "NVIDIA X; CLIP runs on CUDA"),
        ),
        (
            {"CLIP_BACKEND": "onnxrt", "CLIP_ORT_PROVIDERS": "CUDAExecutionProvider"},
            "",
            None,
            ("!", "no NVIDIA GPU; CLIP runs on CUDA"),
        ),
        ({}, "NVIDIA X", {"gpus": 1, "CLIP": {"device": "cuda"}}, ("ok", "NVIDIA X; CLIP runs on cuda")),
        (
            {},
            "NVIDIA X",
            {"gpus": 0, "CLIP": {"device": "cpu"}},
            (
                "!",
                "NVIDIA X: torch cannot use it; CLIP runs on the CPU. Install a torch whose CUDA the driver knows",
            ),
        ),
        (
            {"CLIP_DEVICE": "cpu"},
            "NVIDIA X",
            {"gpus": 1, "CLIP": {"device": "cpu"}},
            ("--", "NVIDIA X: not used; CLIP_DEVICE chooses it; CLIP runs on the CPU"),
        ),
        (
            {"CLIP_DEVICE": "cuda"},
            "",
            {"gpus": 0, "CLIP": {"device": "cuda"}},
            (
                "FAIL",
                "CLIP_DEVICE=cuda: torch finds 0 GPUs; repair the driver; in a container: --gpus all; or set it to cpu",
            ),
        ),
        (
            {"CLIP_DEVICE": "cuda:1"},
            "NVIDIA X",
            {"gpus": 1, "CLIP": {"device": "cuda:1"}},
            (
                "FAIL",
                "CLIP_DEVICE=cuda:1: torch finds 1 GPUs; repair the driver; in a container: --gpus all; or set it to "
                "cpu",
            ),
        ),
        ({}, "", None, ("--", "no NVIDIA GPU; where CLIP runs is not known, see runtime and models")),
    ],
)
def test_the_doctor_tells_whether_a_gpu_is_used(
    tmp_path: Path, settings: dict[str, str], gpus: str, said: Any, expected: tuple[str, str]
) -> None:
    """Lost otherwise: a graphics card that idles while a library is embedded a hundred times more slowly."""
    if gpus:
        (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
        (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information").write_text(f"Model: \t\t {gpus}\nIRQ: 7\n")
    run = subprocess.CompletedProcess([], 0 if said else 1, f"3.3.0\n{json.dumps(said)}\n", "")
    setup = doctor.Setup(settings_of(**settings, bioclip_backend="none"), "", 0, tmp_path, {"open_clip": run})
    assert list(doctor.gpu(setup)) == [expected]


def test_the_doctor_looks_after_the_port_for_immich(tmp_path: Path, tiny_onnx: Path, certificates: Path) -> None:
    """Lost otherwise: a start that fails, or faces that nobody finds, after a check that found nothing."""
    fallback, port = FakeImmich(), free_port()
    (tmp_path / "names.json").write_text('["a dog", "a cat"]')
    settings = {**one_model(tiny_onnx), "CLIP_LABELS": tmp_path / "names.json", "LUMEN_IMMICH_PORT": port}
    cases = [
        ({}, 0, "!    immich        faces and text in pictures are refused; set LUMEN_IMMICH_FALLBACK"),
        ({"LUMEN_IMMICH_FALLBACK": f"{fallback.url}/"}, 0, f"ok   immich        {fallback.url} answers"),
        ({"LUMEN_IMMICH_FALLBACK": "http://127.0.0.1:9"}, 0, "!    immich        http://127.0.0.1:9 does not answer"),
        (
            {"LUMEN_TOKEN_FILE": certificates / "token", "LUMEN_TLS_CERT": certificates / "server.pem"},
            1,
            f"FAIL immich        LUMEN_IMMICH_PORT={port}: LUMEN_TLS_CERT is set, and the port for immich has neither",
        ),
    ]
    for more, status, said in cases:
        run = run_doctor(tmp_path, "--host", "0.0.0.0", "--port", "0", **settings, **more)
        assert (run.returncode, said in run.stdout) == (status, True), run.stdout
        assert f"ok   port          0.0.0.0 port {port} is free" in run.stdout
    fallback.shutdown()
    with socket.create_server(("0.0.0.0", port)):
        run = run_doctor(tmp_path, "--host", "0.0.0.0", "--port", "0", **settings)
    assert f"FAIL port          0.0.0.0 port {port}: Address already in use; " in run.stdout
    assert "or set LUMEN_IMMICH_PORT" in run.stdout
