"""What is installed: locked, hashed, audited as far as the network allows."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import packaging.requirements
import pytest

from settings import VERSION
from tests.kit import ROOT, Node

EXTRAS = {"edge", "cpu", "gpu", "osx", "rknn", "heic", "immich", "ray", "dev"}


@pytest.mark.parametrize(
    ("name", "lock"),
    [
        ("edge", "requirements-edge"),
        ("edge", "requirements"),
        ("torch", "requirements"),
        ("immich", "requirements-immich"),
    ],
)
def test_the_locks_hold_what_the_requirements_ask_for(name: str, lock: str) -> None:
    """Lost otherwise: an install that is today's on one machine and last year's, or somebody else's, on the next."""
    locked = (ROOT / f"{lock}-locked.txt").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==([\w.+]+)", locked, re.MULTILINE))
    assert locked.count("--hash=sha256:") >= len(pins) > 8 and "://" not in locked
    asked = [line for line in (ROOT / f"requirements-{name}.txt").read_text().splitlines() if re.match(r"\w", line)]
    assert asked
    for line in asked:
        requirement = packaging.requirements.Requirement(line.partition("#")[0].strip())
        assert requirement.specifier.contains(pins[requirement.name.lower()]), line


def test_an_installation_brings_what_is_needed_and_no_module(tmp_path: Path) -> None:
    """Lost otherwise: `uv pip install '.[cpu]'`; or a module called `errors` or `client` in everybody's way."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "settings.py", "errors.py", "client.py"):
        shutil.copy(ROOT / name, tmp_path)
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheels"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [wheel] = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {f"lumen_clip-{VERSION}.dist-info"}
        metadata = archive.read(f"lumen_clip-{VERSION}.dist-info/METADATA").decode()
    assert set(re.findall("^Provides-Extra: (.*)$", metadata, re.MULTILINE)) == EXTRAS
    required = re.findall('^Requires-Dist: ([^;\n]*)(?:;.*extra == "(.*)")?', metadata, re.MULTILINE)
    names = {(re.split("[<>=]", requirement)[0], extra) for requirement, extra in required}
    assert names >= {("grpcio", ""), ("onnxruntime", ""), ("torch", "cpu"), ("torch", "gpu"), ("pytest", "dev")}
    assert ("pillow-heif", "heic") in names and ("pillow-heif", "") not in names
    assert ("torch", "") not in names


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_pip_takes_a_devices_locks_by_hash_and_without_a_compiler(tmp_path: Path, machine: str) -> None:
    """Lost otherwise: the install on a board, when one wheel of thirty is not there."""
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(17, 40)]
    platforms.append(f"--platform=manylinux2014_{machine}")
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--only-binary", ":all:", "--no-deps", "-q"]
    command += [*platforms, "--python-version", "3.11", "-d", str(tmp_path)]
    for lock in ("requirements-edge-locked.txt", "requirements-immich-locked.txt"):
        run = subprocess.run([*command, "-r", str(ROOT / lock)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    wheels = [path.name for path in tmp_path.iterdir()]
    assert len(wheels) > 20 and any(name.startswith("onnxruntime-") and machine in name for name in wheels)


def test_a_daemon_writes_to_its_data_folder_alone_and_reports_to_nobody(tmp_path: Path) -> None:
    """Lost otherwise: the privacy of a photo library. ONNX Runtime's wheels keep an identifier of the machine, and what
    they will send, in the home folder and in the temporary one; with reports switched off they make neither."""
    places = {name: tmp_path / name for name in ("HOME", "TMPDIR", "data")}
    for place in places.values():
        place.mkdir()
    node = Node(places.pop("data"), ("--demo",), **places).ready()
    assert node.stop() == 0, node.log
    assert not [path for place in places.values() for path in place.rglob("*")]


def test_no_installed_package_has_a_known_vulnerability(tmp_path: Path) -> None:
    """Lost otherwise: months with a decoder that the whole world knows how to break."""
    report = tmp_path / "report.json"
    for name in ("requirements-edge", "requirements", "requirements-immich"):
        lock = str(ROOT / f"{name}-locked.txt")
        command = ["pip_audit", "-r", lock, "--require-hashes", "--disable-pip", "-f", "json", "-o", str(report)]
        run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
        if not report.exists():
            pytest.skip(f"the advisories could not be reached: {(run.stderr.strip().splitlines() or ['?'])[-1][:200]}")
        found = json.loads(report.read_text())["dependencies"]
        holes = {f"{d['name']} {d['version']}": [v["id"] for v in d["vulns"]] for d in found if d.get("vulns")}
        assert not holes
        unseen = [d["name"] for d in found if "skip_reason" in d]
        if unseen:  # pip-audit would say "no known vulnerabilities found"
            pytest.skip(
                f"{name}: {len(found) - len(unseen)} of {len(found)} packages audited; the registry has no advisories"
            )
        report.unlink()


def test_the_keys_that_the_documents_make_are_never_committed() -> None:
    """Lost otherwise: the daemon's private key and token, with the next `git add .`."""
    made = set(re.findall(r"\blumen\.(?:key|pem|token)\b", (ROOT / "docs" / "deployment.md").read_text()))
    assert made == {"lumen.key", "lumen.pem", "lumen.token"}
    patterns = (ROOT / ".gitignore").read_text().split()
    for name in (*made, "server.key"):
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns), name
