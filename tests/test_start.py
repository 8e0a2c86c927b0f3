"""Starting, downloading, stopping."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc

import export
import labels
import lumen_clip
import machine
from errors import SettingError
from gen import ml_service_pb2 as pb
from model_files import encoder_of
from settings import ModelOptions, Settings
from tests.hostile import impatient
from tests.hub import IMMICH_REPO, FakeHub, folder_content
from tests.kit import (
    IMAGENET,
    LIMIT_S,
    NOWHERE,
    RED,
    ROOT,
    SERVICE,
    Node,
    encoded,
    in_chunks,
    load,
    one_model,
    picture,
    pixels_of,
    wait_until,
    write_labels,
)
from tests.npu_double import golden_of, with_program


def test_first_start_downloads_and_the_second_asks_nobody(tmp_path: Path, hub: FakeHub, tiny_immich: Path) -> None:
    """Lost otherwise: a library that works when the internet is away; it works after one start with it."""
    hub.repos[IMMICH_REPO] = folder_content(tiny_immich) | {"visual/rknpu/rk3588/model.rknn": b"not for us"}
    bio = {"BIOCLIP_MODEL": tiny_immich, "HF_ENDPOINT": hub.url}
    hub.cut_after = {"visual/model.onnx": 5000, "imagenet-1k-id2label.json": 100}
    for start in (1, 2):
        node = Node(tmp_path, CLIP_BACKEND="onnxrt", **bio).ready()
        assert node.result("clip_embed", b"a dog")["model_id"] == "ViT-B-32:laion2b_s34b_b79k"
        assert len(node.result("clip_classify", encoded(picture(RED)))["labels"]) == 5
        assert node.stop() == 0
        if start == 1:
            assert f"downloading {IMMICH_REPO}@main" in node.log and "computing the text vectors" in node.log
            assert "\r" not in node.log  # bars are for terminals
            assert any("visual/model.onnx" in r for r in hub.requests) and not any("rknn" in r for r in hub.requests)
            hub.requests.clear()
    assert hub.requests == [] and "text vectors" not in node.log
    for path in ("clip/imagenet_class_names.json", "bioclip/txt_emb_species.json"):
        assert (tmp_path / path).is_file()
    for path in ("clip/onnxrt/ViT-B-32:laion2b_s34b_b79k", f"bioclip/onnxrt/{tiny_immich.name}"):
        assert {p.name for p in (tmp_path / path).iterdir()} == {"text_vectors.npz", "text_vectors.meta.json"}


def test_a_board_downloads_its_own_program(tmp_path: Path, hub: FakeHub, tiny_onnx: Path, npu_library: Path) -> None:
    """Lost otherwise: the NPU, for those who have no PC to convert on, or hundreds of megabytes for other boards."""
    folder = with_program(tiny_onnx, tmp_path / "model", golden=golden_of(tiny_onnx))
    shutil.copytree(folder / "visual" / "rknpu" / "rk3588", folder / "visual" / "rknpu" / "rk3566")
    hub.repos[IMMICH_REPO] = folder_content(folder)
    data = write_labels(tmp_path / "data")
    settings = {"BIOCLIP_BACKEND": "none", "HF_ENDPOINT": hub.url, "PYTHONPATH": npu_library}
    # First a container that hides the board, which is then named.
    for target, runtime, fetched in (("", "onnxrt", set()), ("rk3588", "rknn", {"rk3588"}), ("rk3588", "rknn", set())):
        hub.requests.clear()
        node = Node(data, CLIP_BACKEND="rknn", CLIP_RKNN_TARGET=target, **settings).ready()
        assert node.stub.GetCapabilities(Empty()).runtime == runtime
        assert node.stop() == 0
        assert {part for r in hub.requests for part in machine.NPU_CORES if f"/{part}/" in r} == fetched


def test_a_damaged_download_is_fetched_once_more_and_then_refused(
    tmp_path: Path, hub: FakeHub, tiny_onnx: Path
) -> None:
    """Lost otherwise: a board with a tired disk, or vectors of weights that are not the model's."""
    hub.repos[IMMICH_REPO] = folder_content(tiny_onnx)
    data = write_labels(tmp_path)
    settings = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "HF_ENDPOINT": hub.url}
    assert Node(data, **settings).ready().stop() == 0
    tower = data / "models" / IMMICH_REPO.replace("/", "--") / "visual" / "model.onnx"
    whole = tower.read_bytes()

    def damage() -> None:
        tower.write_bytes(whole[:-1000] + bytes(1000))

    damage()
    hub.requests.clear()
    node = Node(data, **settings).ready()
    assert node.log.count("is damaged; fetching it once more") == 1 and tower.read_bytes() == whole
    assert node.result("clip_image_embed", encoded(picture(RED)))["dim"] == 64 and node.stop() == 0
    # A hub that has it wrong as well is asked once, not for ever.
    hub.repos[IMMICH_REPO]["visual/model.onnx"] = whole[:-1000] + bytes(1000)
    damage()
    node = Node(data, **settings)
    assert node.ended() == 1
    node.stop()
    assert node.log.count("fetching it once more") == 1 and "Traceback" not in node.log
    assert "visual/model.onnx is not the file that manifest.json names" in node.log.splitlines()[-1]


def test_a_kill_in_the_middle_of_a_download_costs_no_more_than_the_rest(
    tmp_path: Path, hub: FakeHub, tiny_onnx: Path
) -> None:
    """Lost otherwise: a half model that looks like a whole one."""
    hub.repos["org/model"] = folder_content(tiny_onnx)
    hub.stall_after = {"textual/model.onnx": 3_000_000}
    settings = {
        "CLIP_BACKEND": "onnxrt",
        "BIOCLIP_BACKEND": "none",
        "CLIP_MODEL": "hf-hub:org/model",
        "HF_ENDPOINT": hub.url,
    }
    node = Node(write_labels(tmp_path), **settings).bound()
    assert hub.stalled.wait(LIMIT_S)
    node.process.kill()
    node.stop()
    node = Node(tmp_path, **settings).ready()
    assert node.result("clip_embed", b"a dog")["dim"] == 64
    assert node.stop() == 0


def test_a_wrong_label_file_from_the_hub_is_refused_and_named(tmp_path: Path, hub: FakeHub, tiny_onnx: Path) -> None:
    """Lost otherwise: labels from a file that somebody replaced."""
    hub.repos["datasets/huggingface/label-files"]["imagenet-1k-id2label.json"] = b'{"0": "tench"}'
    settings = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "CLIP_MODEL": tiny_onnx, "HF_ENDPOINT": hub.url}
    node = Node(tmp_path, **settings)
    assert node.ended() == 1
    node.stop()
    assert (
        "lumen-clip: the hub's imagenet-1k-id2label.json of huggingface/label-files is not what it should be"
        in node.log
    )
    assert "Traceback" not in node.log
    hub.repos["datasets/huggingface/label-files"]["imagenet-1k-id2label.json"] = json.dumps(IMAGENET).encode()
    assert Node(tmp_path, **settings).ready().stop() == 0  # the hub was asked again


def test_torch_weights_come_from_the_hub_once(tmp_path: Path, hub: FakeHub, tiny: Path) -> None:
    """Lost otherwise: the default backend; with `hf-hub:` and with OpenCLIP's tags alike."""
    hub.repos["org/tiny"] = folder_content(tiny)
    options = ModelOptions("CLIP", "torch", "hf-hub:org/tiny", tmp_path)
    script = (
        "import backends, sys; from pathlib import Path; from settings import ModelOptions\n"
        f"options = ModelOptions('CLIP', 'torch', {options.model!r}, Path(sys.argv[1]))\n"
        "print(backends.create_backend(options).model_id)"
    )
    for endpoint in (hub.url, NOWHERE):
        environment = {**os.environ, "HF_ENDPOINT": endpoint}
        run = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == "org/tiny", run.stderr


def test_a_first_start_serves_before_all_prompts_of_many_labels_are_computed(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: minutes of a board's first start, or the accuracy of all prompts afterwards."""
    names = [f"thing {i}" for i in range(300)]
    (tmp_path / "names.json").write_text(json.dumps(names))
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none", "CLIP_TEMPLATES": "7"}
    settings["CLIP_LABELS"] = str(tmp_path / "names.json")
    folder, photo = tmp_path / "clip" / "onnxrt" / "tiny", encoded(picture(RED))
    vectors = labels.label_vectors(names, labels.names_recipe(7), encoder_of(load(tiny_onnx)))
    expected = labels.LabelSet(names, vectors, load(tiny_onnx).logit_scale)
    [row] = expected.probabilities(load(tiny_onnx).encode_images(pixels_of(photo)[None]))
    slow = settings | impatient(tmp_path, {"lumen_clip.PROMPTS_S": 0.0})
    node = Node(tmp_path, **slow).ready()
    try:
        assert len(node.result("clip_classify", photo)["labels"]) == 5
        node.wait_for("the labels of clip_classify have all their prompts")
        assert node.log.index("ready: ") < node.log.index("have all their prompts")
        found = node.result("clip_classify", photo)["labels"]
        assert [label["label"] for label in found] == [name for name, _ in expected.top(row, 5)]
        assert not (folder / lumen_clip.FIRST_PROMPTS).exists()
    finally:
        assert node.stop() == 0
    node = Node(tmp_path, **settings).ready()
    try:
        assert node.result("clip_classify", photo)["labels"] == found
    finally:
        assert node.stop() == 0
    assert "all their prompts" not in node.log


def test_a_first_start_computes_no_labels_that_the_export_contains(
    tiny: Path, tiny_onnx: Path, tmp_path: Path, hub: FakeHub
) -> None:
    """Lost otherwise: the minutes in which a board computes at its first start what a PC could compute for it."""
    data, folder, photo = write_labels(tmp_path / "data"), tmp_path / "tiny", encoded(picture(RED))
    asked = ["--model", str(tiny), "--to", str(folder), "--model-id", "tiny", "--data-dir", str(data), "--labels"]
    assert export.main(asked) == 0
    said, found = "computing the text vectors of", list[Any]()
    hub.repos["org/tiny"] = folder_content(folder)
    own_text = {"CLIP_ONNX_TEXT": tiny_onnx / "textual" / "model.onnx"}  # the vectors are not those of this tower
    cases: list[tuple[Any, dict[str, Path], bool]] = [
        (folder, {}, False),
        ("hf-hub:org/tiny", {}, False),
        (folder, own_text, True),
        (tiny_onnx, {}, True),
    ]
    for model, more, computes in cases:
        settings = one_model(model, CLIP_TEMPLATES=7, HF_ENDPOINT=hub.url, **more)
        node = Node(write_labels(tmp_path / str(len(found))), **settings).ready()
        try:
            found.append(node.result("clip_classify", photo)["labels"])
        finally:
            assert node.stop() == 0
        assert (said in node.log) == computes, node.log
    assert all(labels == found[0] for labels in found) and len(found[0]) == 5
    own = tmp_path / "names.json"  # the vectors in the folder belong to other names
    own.write_text(json.dumps(["a red thing", "a blue thing"]))
    node = Node(tmp_path / "own", **one_model(folder, CLIP_LABELS=own)).ready()
    try:
        assert {label["label"] for label in node.result("clip_classify", photo)["labels"]} == {
            "a red thing",
            "a blue thing",
        }
    finally:
        assert node.stop() == 0


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CLIP_BACKEND", "tensorflow", "allowed: torch, onnxrt, rknn, none"),
        ("BIOCLIP_BACKEND", "cuda", "allowed: torch, onnxrt, rknn, none"),
        ("CLIP_BACKEND", "none", "there is nothing to serve"),
        ("BATCH_SIZE", "0", "allowed: a whole number from 1 to 1024"),
        ("BATCH_SIZE", "eight", "allowed: a whole number from 1 to 1024"),
        ("CLIP_MAX_BATCH_SIZE", "-4", "allowed: a whole number from 1 to 1024"),
        ("CLIP_TEMPLATES", "3", "allowed: 1, 7, 80"),
        ("CLIP_RKNN_TARGET", "rk3399", "allowed: rk3562, rk3566, rk3568, rk3576, rk3588"),
        ("CLIP_PRECISION", "int4", "allowed: auto, fp32, fp16"),
        ("ADVERTISE_IP", "300.1.1.1", "allowed: an IPv4 address"),
        ("CLIP_MDNS_TYPE", "lumen", "allowed: service types"),
        ("CLIP_MDNS_NAME", "a.b", "allowed: one DNS label"),
        ("LUMEN_JPEG_DRAFT", "yes", "allowed: 0, 1"),
        ("LUMEN_MAX_STREAMS", "0", "allowed: a whole number from 1 to 4096"),
        ("LUMEN_SEMANTIC", "siglip", "allowed: clip, bioclip"),
        ("LUMEN_MAX_MEGAPIXELS", "1e3", "allowed: a whole number from 1 to 1000"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(tmp_path: Path, variable: str, value: str, said: str) -> None:
    """Lost otherwise: an operator's evening with a traceback."""
    node = Node(tmp_path, **{variable: value})
    assert node.ended() == 2
    node.stop()
    assert node.log.startswith(f"lumen-clip: {variable}={value}: ") and said in node.log and node.log.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "value", "path"),
    [
        ("LUMEN_TLS_CERT", "lumen.pem", ""),
        ("LUMEN_TLS_KEY", "keys/lumen.key", ""),
        ("LUMEN_TLS_CLIENT_CA", "./ca.pem", ""),
        ("LUMEN_TOKEN_FILE", "~/lumen.token", ""),
        ("LUMEN_SCENES", "scenes.json", ""),
        ("LUMEN_DATA_DIR", "data", ""),
        ("CLIP_LABELS", "names.json", ""),
        ("BIOCLIP_LABELS", "species", ""),
        ("CLIP_MODEL", "models/vit-b-32", ""),
        ("BIOCLIP_MODEL", "ViT-B-32:weights/x.pt", "weights/x.pt"),
        ("CLIP_ONNX_IMAGE", "image.onnx", ""),
        ("BIOCLIP_ONNX_TEXT", "text.onnx", ""),
        ("CLIP_RKNN_MODEL", "x.rknn", ""),
    ],
)
def test_under_systemd_a_relative_path_is_an_error_that_names_it(
    tmp_path: Path, variable: str, value: str, path: str
) -> None:
    """Lost otherwise: an evening with "No such file" for a file that is there. systemd starts the daemon in /."""
    with pytest.raises(SettingError) as error:
        Settings.from_environment({variable: value, "NOTIFY_SOCKET": "/run/systemd/notify"})
    said = f"{variable}={value}: {path or value} is not an absolute path"
    said += "; paths in systemd's environment file must be absolute"
    assert str(error.value) == said
    Settings.from_environment({variable: value})
    Settings.from_environment({variable: f"/etc/{value}", "NOTIFY_SOCKET": "@notify"})
    if variable == "LUMEN_TLS_CERT":
        node = Node(tmp_path, NOTIFY_SOCKET=tmp_path / "notify", **{variable: value})
        assert node.ended() == 2
        node.stop()
        assert node.log == f"lumen-clip: {said}\n"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CLIP_MODEL", "ViT-L/14:openai"),
        ("CLIP_MODEL", "ViT-B-32"),
        ("CLIP_MODEL", "hf-hub:org/name"),
        ("BIOCLIP_LABELS", "TreeOfLife-10M"),
        ("BIOCLIP_LABELS", "TreeOfLife-200M"),
        ("CLIP_DEVICE", "cuda:0"),
    ],
)
def test_a_name_is_not_taken_for_a_relative_path(variable: str, value: str) -> None:
    """Lost otherwise: every start under systemd with a model or labels of the hub."""
    Settings.from_environment({variable: value, "NOTIFY_SOCKET": "/run/systemd/notify"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"CLIP_MODEL": "ViT-B-99:laion2b"}, "CLIP_MODEL=ViT-B-99:laion2b: OpenCLIP has no architecture 'ViT-B-99'"),
        (
            {"CLIP_MODEL": "ViT-B-32:laion9b"},
            "CLIP_MODEL=ViT-B-32:laion9b: 'laion9b' is neither a file nor a tag of ViT-B-32; tags: openai",
        ),
        ({"CLIP_MODEL": "/no/such/folder"}, "CLIP_MODEL=/no/such/folder: not a folder; allowed: ARCH:pretrained-tag"),
        ({"CLIP_PRECISION": "fp16", "CLIP_DEVICE": "cpu"}, "CLIP_PRECISION=fp16: half precision runs on a GPU only"),
        ({"CLIP_MODEL": "."}, "CLIP_MODEL=.: the folder has no open_clip_config.json, which torch needs"),
        ({"CLIP_DEVICE": "gpu"}, "CLIP_DEVICE=gpu: not a device of torch (RuntimeError: "),
        ({"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": "."}, "CLIP_MODEL=.: the folder has no visual/model.onnx"),
        (
            {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": ".", "CLIP_ONNX_IMAGE": "x.onnx"},
            "CLIP_ONNX_IMAGE=x.onnx: no such file",
        ),
        (
            {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": "hf-hub:org/nothing"},
            "cannot download the model from the hub repository org/nothing (RepositoryNotFoundError: ",
        ),
        (
            {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": "hf-hub:org/torch"},
            "CLIP_MODEL=hf-hub:org/torch: the hub repository org/torch cannot be used: it has no visual/model.onnx",
        ),
        (
            {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": "@", "CLIP_ORT_PROVIDERS": "CUDAExecutionProvider"},
            "CUDAExecutionProvider is not available",
        ),
        ({"CLIP_BACKEND": "rknn"}, "CLIP_BACKEND=rknn: needs a Rockchip board"),
        (
            {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": "@", "BIOCLIP_BACKEND": ""},
            "BIOCLIP_MODEL=hf-hub:imageomics/bioclip-2: it is not published for onnxrt; set BIOCLIP_BACKEND to torch",
        ),
    ],
)
def test_what_the_operator_has_to_change_ends_the_start_with_one_line_and_status_2(
    tmp_path: Path, hub: FakeHub, tiny_onnx: Path, settings: dict[str, Any], said: str
) -> None:
    """Lost otherwise: a daemon that hangs, serves something else, or that systemd starts again and again in vain."""
    hub.repos["org/torch"] = {"open_clip_pytorch_model.bin": b""}
    settings = {k: tiny_onnx if v == "@" else v for k, v in settings.items()}
    node = Node(tmp_path, **{"BIOCLIP_BACKEND": "none", "HF_ENDPOINT": hub.url, **settings})
    assert node.ended() == 2
    node.stop()
    [line] = [line for line in node.log.splitlines() if line.startswith("lumen-clip: ")]
    assert said in line and "Traceback" not in node.log


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"CLIP_LABELS": "x.json"}, "CLIP_LABELS=x.json: allowed: a JSON list of names"),
        ({"BIOCLIP_BACKEND": "torch", "BIOCLIP_LABELS": "x.json"}, "BIOCLIP_LABELS=x.json: no such file; allowed: "),
        ({"LUMEN_SCENES": "x.json", "BIOCLIP_BACKEND": "torch"}, "LUMEN_SCENES=x.json: No such file or directory"),
        ({"WITHOUT": "onnxruntime"}, "CLIP_BACKEND=onnxrt: not installed: onnxruntime; install requirements-edge.txt"),
        ({"WITHOUT": "torch", "CLIP_BACKEND": "torch"}, "CLIP_BACKEND=torch: not installed: torch; install "),
    ],
)
def test_what_is_missing_here_is_said_before_anything_is_downloaded_or_announced(
    tmp_path: Path, hub: FakeHub, settings: dict[str, str], said: str
) -> None:
    """Lost otherwise: half an hour of downloads before a line that could have come at once."""
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nsys.modules[os.environ.get('WITHOUT', '-')] = None\n")
    options = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "HF_ENDPOINT": hub.url, "PYTHONPATH": tmp_path}
    node = Node(tmp_path, **{**options, **settings})
    assert node.ended() == 2
    node.stop()
    assert node.log.startswith(f"lumen-clip: {said}") and node.log.count("\n") == 1, node.log


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            None,
            "no such file; allowed: TreeOfLife-10M or TreeOfLife-200M, a JSON file, or a folder with text_vectors.npz",
        ),
        ('["Aves"]', "not a JSON list of [[kingdom, ..., species], common name] (row 0 is not "),
        ("[]", "an empty list"),
    ],
)
def test_species_of_ones_own_that_are_not_usable_are_a_bad_setting(
    tmp_path: Path, tiny_onnx: Path, content: str | None, said: str
) -> None:
    """Lost otherwise: a line that names no variable, and a start that is tried again and again in vain."""
    path = tmp_path / "species.json"
    if content is not None:
        path.write_text(content)
    model = {"CLIP_BACKEND": "none", "BIOCLIP_BACKEND": "onnxrt", "BIOCLIP_MODEL": tiny_onnx}
    node = Node(tmp_path, **model, BIOCLIP_LABELS=path)
    assert node.ended() == 2
    node.stop()
    [line] = [line for line in node.log.splitlines() if line.startswith("lumen-clip: ")]
    assert line.startswith(f"lumen-clip: BIOCLIP_LABELS={path}: {said}") and "Traceback" not in node.log


@pytest.mark.parametrize("fault", ["no hub", "a disk that is read-only", "a hub that answers with a page"])
def test_what_may_be_over_at_the_next_start_ends_with_status_1(
    tmp_path: Path, hub: FakeHub, tiny_onnx: Path, fault: str
) -> None:
    """Lost otherwise: a board that stays down because the network was, or a disk that was full for an hour."""
    hub.repos[IMMICH_REPO] = folder_content(tiny_onnx)
    if fault == "a disk that is read-only":
        (tmp_path / "models").write_text("no folder can be made here")
    if fault == "a hub that answers with a page":
        hub.page = b"<html>Welcome to our hotel</html>"
    endpoint = NOWHERE if fault == "no hub" else hub.url
    node = Node(tmp_path, CLIP_BACKEND="onnxrt", BIOCLIP_BACKEND="none", HF_ENDPOINT=endpoint)
    assert node.ended() == 1
    node.stop()
    [line] = [line for line in node.log.splitlines() if line.startswith("lumen-clip: ")]
    assert f"cannot download the model from the hub repository {IMMICH_REPO} (" in line and "Traceback" not in node.log


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: a traceback for a model in /home, of which systemd shows the daemon nothing."""
    home = tmp_path / "home"
    home.mkdir(mode=0)
    dropped = "-dac_override,-dac_read_search"
    limited = ("setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}") if os.geteuid() == 0 else ()
    for setting in ({"CLIP_MODEL": home / "model"}, {"CLIP_MODEL": tiny_onnx, "CLIP_LABELS": home / "names.json"}):
        node = Node(tmp_path / "data", program=(*limited, *Node.PROGRAM), **{**one_model(tiny_onnx), **setting})
        assert node.ended() == 2
        node.stop()
        [line] = [line for line in node.log.splitlines() if line.startswith("lumen-clip: ")]
        assert "ermission denied" in line and str(home) in line and "Traceback" not in node.log


def test_while_loading_health_answers_and_the_rest_says_what_is_loaded(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: clients that take a starting daemon for a dead one, or for a ready one."""
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        options = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": "hf-hub:org/model", "BIOCLIP_BACKEND": "none"}
        node = Node(tmp_path, **options, HF_ENDPOINT=endpoint).bound()
        node.wait_for("downloading org/model")
        node.stub.Health(Empty(), timeout=LIMIT_S)
        check = health_pb2_grpc.HealthStub(node.channel).Check
        assert (
            check(health_pb2.HealthCheckRequest(service=SERVICE)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        )
        calls = (
            lambda: node.infer(),
            lambda: node.stub.GetCapabilities(Empty()),
            lambda: list(node.stub.StreamCapabilities(Empty())),
        )
        for call in calls:
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert error.value.details() == "not ready: loading hf-hub:org/model (onnxrt)"
        assert node.stop() == 0  # SIGTERM is heard while loading


def test_a_taken_port_is_one_line_and_the_first_daemon_goes_on(torch_node: Node, tmp_path: Path) -> None:
    """Lost otherwise: two daemons share a port, and every second request goes astray."""
    port = torch_node.address.partition(":")[2]
    second = Node(tmp_path, ("--port", port))
    assert second.ended() == 1
    second.stop()
    assert second.log == f"lumen-clip: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert torch_node.result("clip_embed", b"a dog")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_answers_what_it_has_and_exits_0(
    tmp_path: Path, tiny_onnx: Path, number: signal.Signals
) -> None:
    """Lost otherwise: photographs in flight, at each upgrade."""
    settings = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "CLIP_MODEL": tiny_onnx}
    node = Node(write_labels(tmp_path, tiny_onnx), ("--log-level", "debug"), **settings).ready()
    photo = encoded(picture(RED, (4000, 3000)), "PNG")  # takes a while to decode
    release = threading.Event()

    def requests() -> Iterator[pb.InferRequest]:
        yield pb.InferRequest(task="clip_embed", payload=b"a dog")
        yield from in_chunks(photo, 20, task="clip_image_embed")
        node.wait_for("stopping: ")
        check = health_pb2_grpc.HealthStub(node.channel).Check
        wait_until(lambda: check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING)
        time.sleep(0.1)
        yield pb.InferRequest(task="clip_embed", payload=b"a dog that came too late")
        release.wait(LIMIT_S)

    call = node.stub.Infer(requests(), timeout=LIMIT_S)
    assert next(call).result
    wait_until(lambda: b" prepare " in (tmp_path / "in-flight").read_bytes())
    node.process.send_signal(number)
    assert next(call).result
    with pytest.raises(grpc.RpcError) as error:
        next(call)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    release.set()
    assert node.ended() == 0 and "Traceback" not in node.log
    # What came too late was not begun, and the stream's end says so.
    assert node.wait_for(r"in \d+ s: (.*) requests, (.*) errors, (.*) cancelled").groups() == ("2", "0", "0")
