"""The container images and compose."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import compose_spec
import pytest
import yaml

import lumen_clip
from settings import Settings, demo_environment
from tests.kit import DEMO, ROOT, RUNTIME, Node, train_tiny


def dockerfile() -> list[tuple[str, str, str]]:
    """Each instruction of the Dockerfile as (its stage, its name, what follows); continued lines are joined."""
    rows, stage = [], ""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stage = rest.split()[-1]
        rows.append((stage, name, rest))
    return rows


def image_targets() -> list[str]:
    """The stages that no other stage is made from or copies from; the last one is what a plain build makes."""
    rows = dockerfile()
    used = {rest.split()[0] for _, name, rest in rows if name == "FROM"}
    used |= set(re.findall(r"--from=(\S+)", "\n".join(rest for _, name, rest in rows if name == "COPY")))
    return [stage for stage, name, _ in rows if name == "FROM" and stage not in used]


def in_build_context(path: str) -> bool:
    """What .dockerignore leaves in: its last line that matches the path, or a folder above it, decides."""

    def matches(part: str, pattern: str) -> bool:
        if pattern.startswith("**/"):
            return Path(part).name == pattern[3:]
        names, patterns = part.split("/"), pattern.split("/")
        return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))

    parts, taken = [path, *map(str, Path(path).parents)][:-1], True
    for line in (ROOT / ".dockerignore").read_text().split():
        if any(matches(part, line.removeprefix("!")) for part in parts):
            taken = line.startswith("!")
    return taken


def copy_as_the_image_does(folder: Path) -> None:
    """The files that the Dockerfile's stage `app` takes from the build context."""
    lines = [rest.split() for stage, name, rest in dockerfile() if (stage, name) == ("app", "COPY")]
    assert lines
    for *sources, target in lines:
        for path in (path for source in sources for path in ROOT.glob(source)):
            files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
            for file in files:
                if in_build_context(file.relative_to(ROOT).as_posix()):
                    to = folder / target / file.relative_to(path if path.is_dir() else ROOT)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, to)


def test_the_image_contains_the_whole_daemon_and_nothing_else(tmp_path: Path) -> None:
    """Lost otherwise: every container, when a new module stays behind; or room, for tests and tools in each."""
    app = tmp_path / "app"
    copy_as_the_image_does(app)
    assert sorted(path.name for path in app.glob("*.py")) == RUNTIME
    assert not list(app.rglob("*.json.gz")) and not (app / "gen" / "demo" / "train.py").exists()
    for path in app.glob("*.py"):  # those that are imported late, too
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {f"{name}.py" for name in names} & {p.name for p in ROOT.glob("*.py")} <= set(RUNTIME), path.name
    node = Node(tmp_path / "data", ("--demo",), (sys.executable, str(app / "lumen_clip.py"))).ready()
    try:
        command = (sys.executable, str(app / "client.py"), "smart_classify", "--address", node.address)
        run = subprocess.run([*command, str(app / "gen/demo/pictures/fox.png")], capture_output=True, text=True)
        assert run.returncode == 0 and "red fox" in run.stdout, run.stderr
    finally:
        assert node.stop() == 0, node.log


def test_the_build_context_contains_no_other_files() -> None:
    """Lost otherwise: minutes before each build, and keys and photographs in a layer that somebody pushes."""
    for path in (".git/config", ".venv/lib/x.py", "data/clip/x.npz", "lumen.key", "lumen-clip.env", "models/x.onnx"):
        assert not in_build_context(path), path
    assert not in_build_context("gen/demo/__pycache__/x.pyc") and not in_build_context("tests/kit.py")
    assert in_build_context("gen/demo/visual/model.onnx") and in_build_context("requirements-edge-locked.txt")


def test_the_dockerfile_passes_its_linter() -> None:
    """Lost otherwise: what everybody knows to go wrong in images."""
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    run = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_target_runs_as_root_or_without_a_health_check() -> None:
    """Lost otherwise: a decoder's hole that is the machine's, or a dead container that looks alive."""
    rows = dockerfile()
    assert image_targets() == ["cuda", "rocm", "rknn", "cpu"]
    base = {stage: rest.split()[0] for stage, name, rest in rows if name == "FROM"}
    for target in image_targets():
        line = [target]
        while line[-1] in base:
            line.append(base[line[-1]])
        lines = {name: rest for stage in reversed(line) for row, name, rest in rows if row == stage}
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", lines["USER"])  # by number: Kubernetes' runAsNonRoot reads no names
        assert lines["VOLUME"] == "/data" and lines["ENTRYPOINT"] == '["python", "lumen_clip.py"]'
        assert '"client.py", "health"' in lines["HEALTHCHECK"]
        # What is installed is installed in other stages, of which the target copies the result.
        steps = [rest for stage, name, rest in rows if stage in line and name == "RUN"]
        assert steps and not any(re.search(r"\b(pip|apt|apt-get|curl)\b", step) for step in steps)


def test_the_compose_file_is_right_and_has_a_service_for_each_target() -> None:
    """Lost otherwise: `docker compose up`, or what it was to keep from the machine."""
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", (ROOT / "compose.yaml").read_text())
    content = yaml.safe_load(text)
    compose_spec.PyCompose.from_json(json.dumps(content)).validate()
    services = content["services"]
    assert set(services) == set(image_targets())
    assert [name for name, given in services.items() if "profiles" not in given] == ["cpu"]
    for name, given in services.items():
        assert given["build"] == {"context": ".", "target": name}
        assert given["network_mode"] == "host" and given["restart"] == "unless-stopped"
        assert given["read_only"] and given["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in given["security_opt"] and "data:/data" in given["volumes"]
        assert int(given["stop_grace_period"].removesuffix("s")) > lumen_clip.DRAIN_S


def test_what_an_image_sets_itself_is_no_reason_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Lost otherwise: a warning at every start of a setting that the operator never made."""
    rows = dockerfile()
    for target in image_targets():
        pairs = [
            pair.split("=")
            for stage, name, rest in rows
            if stage in ("base", target) and name == "ENV"
            for pair in rest.split()
        ]
        environment = dict(pairs)
        for changes in ({}, {"BIOCLIP_BACKEND": "none"}, {"CLIP_BACKEND": "none", "BIOCLIP_BACKEND": "torch"}):
            Settings.from_environment({**environment, **changes})
            Settings.from_environment(demo_environment({**environment, **changes}))
    assert [record.getMessage() for record in caplog.records] == []


COMPILERS = ("cc", "gcc", "g++", "clang", "as", "ld", "make", "cmake", "nvcc", "hipcc", "rustc", "go")


class Podman:
    """Podman with a store of its own, in which the Dockerfile's base is a Debian 12 with Debian's own Python."""

    def __init__(self, folder: Path) -> None:
        files = [resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)]
        nofile, nproc = (min(limit % 2**63, 2**15) for limit in files)  # Podman asks for more than a machine may give
        (folder / "containers.conf").write_text(
            f'[containers]\ndefault_ulimits = ["nofile={nofile}:{nofile}", "nproc={nproc}:{nproc}"]\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\n'
        )
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n'
        )
        self.environment = os.environ | {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }
        self.folder, self.network = folder, tuple[str, ...]()  # the latter: a command that enters another network

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = (*self.network, *command)
        run = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0 or not check, f"{command}\n{run.stdout[-4000:]}{run.stderr[-4000:]}"
        return run

    def __call__(self, *arguments: str | Path, check: bool = True) -> str:
        return self.run("podman", *arguments, check=check).stdout.strip()

    def import_base(self) -> None:
        root = Path(os.environ.get("LUMEN_DOCKER_ROOT") or self.folder / "root")
        if not (root / "usr" / "bin" / "python3").exists():
            packages = "python3,python3-venv,python3-pip,ca-certificates"
            self.run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root)
        python = root / "usr" / "local" / "bin" / "python"
        python.unlink(missing_ok=True)
        python.symlink_to("/usr/bin/python3")
        names = ("resolv.conf", "hosts", "ssl/certs/ca-certificates.crt", "pip.conf")  # pip asks whom it asks here
        for path in (Path("/etc") / name for name in names):
            if path.exists():
                shutil.copy(path, root / path.relative_to("/"))
        [default] = [rest for _, name, rest in dockerfile() if name == "ARG" and rest.startswith("PYTHON=")]
        image = f"docker.io/library/python:{default.removeprefix('PYTHON=')}"
        pack = subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE)
        command = ["podman", "import", "-q", "-", image]
        subprocess.run(command, env=self.environment, stdin=pack.stdout, check=True, capture_output=True)
        assert pack.wait() == 0

    def build(self, target: str, *options: str | Path) -> str:
        """-> the image's name; the default target is built as the default."""
        image = f"localhost/lumen-clip:{target}"
        chosen = () if target == "cpu" else ("--target", target)
        # chroot: no control groups for RUN, which a sandbox may refuse. docker: the other format has no HEALTHCHECK.
        self("build", "--pull=never", "--isolation=chroot", "--format=docker", *options, *chosen, "-t", image, ROOT)
        return image

    def health(self, container: str) -> bool:
        return self.run("podman", "healthcheck", "run", container, check=False).returncode == 0

    def wait_until_healthy(self, container: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not self.health(container):
            assert time.monotonic() < deadline, self.log(container)
            time.sleep(0.5)

    def log(self, container: str) -> str:
        run = self.run("podman", "logs", container, check=False)
        return run.stdout + run.stderr


@pytest.fixture(scope="session")
def podman(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    if "docker" not in request.config.option.markexpr:
        pytest.skip("takes half an hour; run it with: python -m pytest -m docker")
    tools = ("podman", "runc", "debootstrap", "unshare", "nsenter")
    if os.geteuid() != 0 or not all(map(shutil.which, tools)):
        pytest.skip(f"needs root and {', '.join(tools)} (Debian: podman, runc, debootstrap)")
    podman = Podman(tmp_path_factory.mktemp("podman"))
    try:
        podman.import_base()
        yield podman
    finally:
        podman("rm", "--all", "--force", check=False)
        podman("rmi", "--all", "--force", check=False)
        podman("volume", "rm", "--all", "--force", check=False)
        podman.run("umount", podman.folder / "store" / "overlay", check=False)  # Podman lays it over itself
        shutil.rmtree(podman.folder, ignore_errors=True)


def rocm_index(folder: Path) -> Path:
    """A package index as PyTorch's for ROCm is, with wheels that hold nothing. Nobody here can reach the true one."""
    needs = {"torch": ["triton-rocm==3.9.0"], "torchvision": ["torch==2.15.0"], "triton-rocm": []}
    for (name, requires), version in zip(needs.items(), ("2.15.0+rocm7.2", "0.30.0+rocm7.2", "3.9.0"), strict=True):
        stem = f"{name.replace('-', '_')}-{version}"
        metadata = "".join(f"Requires-Dist: {line}\n" for line in requires)
        place = folder / name
        place.mkdir(parents=True)
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}"
        with zipfile.ZipFile(place / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", about)
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
        (place / "index.html").write_text(f'<a href="{stem}-py3-none-any.whl">{stem}-py3-none-any.whl</a>')
    return folder


@pytest.mark.docker
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", ["cpu", "rknn", "rocm", "cuda"])
def test_an_image_serves_the_demo_and_touches_nothing_but_its_volume(
    podman: Podman, tmp_path: Path, target: str
) -> None:
    """Lost otherwise: every container. The builder reads the Dockerfile itself; cuda and rknn find no device here."""
    options: tuple[str, ...] = ()
    if target == "rocm":
        options = ("-v", f"{rocm_index(tmp_path / 'index')}:/index:ro", "--build-arg", "ROCM_INDEX=file:///index")
    image = podman.build(target, *options)
    own = dict(row.split("=", 1) for row in json.loads(podman("inspect", image, "-f", "{{json .Config.Env}}")))
    backend = {"cpu": "onnxrt", "rknn": "rknn"}.get(target)
    assert own.get("CLIP_BACKEND") == backend and own.get("CLIP_DEVICE") == (None if backend else "cuda")
    inside = ("run", "--rm", "--network=none", "--entrypoint=sh", image, "-c")
    assert podman(*inside, "id -u; stat -c %u /data") == "10001\n10001"
    assert podman(*inside, f"for name in {' '.join(COMPILERS)}; do command -v $name; done; true") == ""
    packages = set(podman(*inside, "ls -d /opt/venv/lib/python3*/site-packages/*.dist-info").split())
    print(f"{target}: {podman(*inside, 'du -sm --apparent-size /opt/venv | cut -f 1')} MB in {len(packages)} packages")
    for name in ("torch", "nvidia_", "cuda_", "triton_rocm", "open_clip_torch"):
        wanted = {"torch": backend is None, "triton_rocm": target == "rocm", "open_clip_torch": backend is None}
        found = any(re.match(rf"{name}.*", Path(path).name) for path in packages)
        assert found == wanted.get(name, target == "cuda"), name

    podman("run", "-d", "--name", target, "--network=none", image, "--demo")
    healthy, ready = podman.health(target), "ready: " in podman.log(target)
    assert ready or not healthy
    podman.wait_until_healthy(target)
    ask = ("exec", target, "python", "client.py", "smart_classify", "gen/demo/pictures/fox.png")
    assert "Vulpes/vulpes/red fox" in podman(*ask)
    podman("kill", "-s", "STOP", target)  # an inference that hangs
    assert not podman.health(target)
    podman("kill", "-s", "CONT", target)
    assert podman.health(target)
    changed = podman("diff", target).splitlines()  # of the container's own layer; its volume is not part of it
    assert not [line for line in changed if line not in ("C /etc", "C /run", "A /run/secrets")], changed
    podman("stop", "-t", "30", target)
    assert podman("inspect", target, "-f", "{{.State.ExitCode}}") == "0"
    assert "lumen: stopped" in podman.log(target) and not podman.health(target)
    podman("rm", "-v", target)

    # As strictly as can be: nothing can be written but the volume, and nothing is allowed.
    strict = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges")
    podman("run", "-d", "--name", target, "--network=none", *strict, image, "--demo")
    podman.wait_until_healthy(target)
    assert "Vulpes/vulpes/red fox" in podman(*ask)
    podman("stop", "-t", "30", target)
    assert podman("inspect", target, "-f", "{{.State.ExitCode}}") == "0"
    assert " WARNING " not in podman.log(target).replace("WARNING lumen: lumen-demo-emoji: this is the demo model", "")
    podman("rm", "-v", target)
    if target == "cuda":
        train_tiny(tmp_path / "model")
        settings = ("-v", f"{tmp_path / 'model'}:/model:ro", "-e", "CLIP_MODEL=/model", "-e", "BIOCLIP_BACKEND=none")
        run = podman.run("podman", "run", "--rm", "--network=none", *settings, image, check=False)
        assert run.returncode == 1 and "OpenCLIP cannot load it on cuda (" in run.stderr, run.stderr


@pytest.mark.docker
@pytest.mark.timeout(7200)
def test_compose_keeps_a_container_up_and_its_caches(podman: Podman, tmp_path: Path) -> None:
    """Lost otherwise: `docker compose up -d`, which is all that most people will type. Here podman-compose reads it."""
    podman.build("cpu")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "compose"], check=True)
    compose = tmp_path / "compose" / "bin" / "podman-compose"
    subprocess.run([compose.with_name("pip"), "install", "-q", "podman-compose==1.6.0"], check=True)
    # A network of its own stands in for the host's, whose port may be taken.
    host = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up; exec sleep 900"])
    podman.environment["LUMEN_OPTIONS"] = "--demo"
    try:
        time.sleep(1)
        podman.network = ("nsenter", f"--net=/proc/{host.pid}/ns/net")
        podman.run(compose, "up", "-d", "--no-build")
        [container] = podman("ps", "--format", "{{.Names}}").split()
        assert container.endswith("_cpu_1")
        podman.wait_until_healthy(container)
        state = json.loads(podman("inspect", container))[0]
        assert state["HostConfig"]["ReadonlyRootfs"] and not state["EffectiveCaps"]
        ask = (sys.executable, ROOT / "client.py", "smart_classify", DEMO / "pictures" / "fox.png")
        assert "red fox" in podman.run(*ask).stdout
        first = podman.log(container)
        os.kill(state["State"]["Pid"], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while podman("inspect", container, "-f", "{{.State.Pid}}") in ("0", str(state["State"]["Pid"])):
            assert time.monotonic() < deadline, "it was not started again"
            time.sleep(0.5)
        podman.wait_until_healthy(container)
        assert "red fox" in podman.run(*ask).stdout
        again = podman.log(container).removeprefix(first)
        assert "computing the text vectors" in first and "computing the text vectors" not in again
        podman.run(compose, "stop")
        assert "lumen: stopped" in podman.log(container)
    finally:
        podman.run(compose, "down", "-v", check=False)
        podman.network = ()
        del podman.environment["LUMEN_OPTIONS"]
        host.kill()
        host.wait()
