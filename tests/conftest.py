"""What several files of tests share: models, daemons, hubs, networks. Each is made once."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.empty_pb2 import Empty
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import backends
import export
import labels
import model
import security
import service
import tasks
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.board import Board
from tests.hostile import PATIENCE, held, impatient
from tests.hub import FakeHub
from tests.immich import MODEL, make_folder
from tests.kit import (
    AS_IT_IS,
    COLOURS,
    DEMO,
    IMAGENET,
    LIMIT_S,
    SPECIES,
    Drawing,
    Node,
    Watched,
    code_of,
    encoded,
    export_immich_from,
    picture,
    settings_of,
    shared,
    train_tiny,
    write_labels,
)
from tests.lan import Lan
from tests.npu_double import FAKE_NPU

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or daemons of tests under nohup would ignore it as well


@pytest.fixture(scope="session")
def measuring(request: pytest.FixtureRequest) -> bool:
    """Whether times count: `-m measure`, on a quiet machine."""
    return "measure" in request.config.option.markexpr


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as an OpenCLIP folder."""
    return shared(tmp_path_factory, "tiny", train_tiny)


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return shared(tmp_path_factory, "tiny-onnx", lambda folder: export.export(str(tiny), folder, model_id="tiny"))


@pytest.fixture(scope="session")
def tiny_immich(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return shared(tmp_path_factory, "tiny-immich", lambda folder: export_immich_from(tiny, folder))


@pytest.fixture(scope="session")
def openai(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A folder with the name of immich's default model."""
    return shared(tmp_path_factory, MODEL, lambda folder: make_folder(tiny, folder))


@pytest.fixture(scope="session")
def reference(tiny: Path) -> Any:
    """OpenCLIP itself: (model, transform, tokenizer)."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{tiny}")


@pytest.fixture(scope="session")
def torch_node(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Node]:
    data = write_labels(tmp_path_factory.mktemp("torch-data"))
    node = Node(data, CLIP_MODEL=tiny, BIOCLIP_MODEL=tiny, LUMEN_JPEG_DRAFT=0).ready()
    yield node
    assert node.stop() == 0, node.log


@pytest.fixture(scope="session")
def onnx_node(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path, tiny_immich: Path) -> Iterator[Node]:
    """An edge device: torch and open_clip cannot be imported at all."""
    data = write_labels(tmp_path_factory.mktemp("onnx-data"))
    for name in ("torch", "open_clip", "torchvision"):
        (data / f"{name}.py").write_text(f"raise ImportError('{name} does not exist on this device')")
    node = Node(
        data,
        CLIP_BACKEND="onnxrt",
        CLIP_MODEL=tiny_onnx,
        BIOCLIP_MODEL=tiny_immich,
        PYTHONPATH=data,
        LUMEN_JPEG_DRAFT=0,
    ).ready()
    yield node
    assert node.stop() == 0, node.log


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a daemon on loopback, of a client, of their CA, and of a client of another CA; a token."""
    folder = tmp_path_factory.mktemp("certificates")
    authority, stranger = trustme.CA(), trustme.CA()
    for name, made in (
        ("server", authority.issue_cert("localhost", "127.0.0.1")),
        ("client", authority.issue_cert("photos.example.org")),
        ("stranger", stranger.issue_cert("photos.example.org")),
    ):
        made.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        made.private_key_pem.write_to_path(str(folder / f"{name}.key"))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    (folder / "token").write_text("a-token-that-nobody-guesses\n")
    (folder / "token").chmod(0o600)
    return folder


@pytest.fixture(params=["torch", "onnxrt"])
def node(request: pytest.FixtureRequest) -> Node:
    return request.getfixturevalue("torch_node" if request.param == "torch" else "onnx_node")  # type: ignore[no-any-return]


@pytest.fixture
def watched(tiny_onnx: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Watched, Any]]:
    """A daemon inside this process, on a real socket, around a watched model; one batch at a time but for workers."""
    settings = settings_of(
        lumen_data_dir=tmp_path, clip_backend="onnxrt", bioclip_backend="none", clip_model=str(tiny_onnx)
    )
    daemon = service.Daemon(settings)
    backend = Watched(backends.create_backend(settings.clip))
    if getattr(request, "param", "") != "workers":
        backend._backend.workers = 1
    names = ["an animal", "a landscape"]
    vectors = labels.label_vectors(names, AS_IT_IS, lambda texts: backend.encode_text(backend.tokenize(texts)))
    served = model.Model(backend, "clip", daemon.engine, 8)
    sets = {"classes": labels.LabelSet(names, vectors, 100.0)}
    server, port = service.start_server(daemon, "127.0.0.1", 0)
    daemon.serve(tasks.Models(daemon.engine, served, None, sets, 8))
    backend.daemon, backend.address = daemon, f"127.0.0.1:{port}"
    backend.batches.clear()
    backend.busy.clear()
    with grpc.insecure_channel(backend.address) as channel:
        yield backend, pb_grpc.InferenceStub(channel)
    backend.gate.set()
    server.stop(0).wait()
    daemon.intake.decoders.stop()
    daemon.engine.stop()


@pytest.fixture
def npu_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stand-in for rknn-toolkit-lite2, which has no wheel for this machine; see FAKE_NPU."""
    library = tmp_path / "library"
    (library / "rknnlite").mkdir(parents=True)
    (library / "rknnlite" / "__init__.py").touch()
    (library / "rknnlite" / "api.py").write_text(FAKE_NPU)
    monkeypatch.syspath_prepend(str(library))
    for module in ("rknnlite", "rknnlite.api"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return library


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    label_repos = {
        "datasets/huggingface/label-files": {"imagenet-1k-id2label.json": json.dumps(IMAGENET).encode()},
        "datasets/imageomics/TreeOfLife-10M": {"embeddings/txt_emb_species.json": json.dumps(SPECIES).encode()},
    }
    hub = FakeHub(label_repos)
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def harsh(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> Iterator[Node]:
    """A daemon for the faults, whose pools have all their threads: it has had as many streams at once as it takes."""
    folder = tmp_path_factory.mktemp("harsh")
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none", "LUMEN_HANG_S": 20}
    settings |= impatient(folder, {**PATIENCE, "lumen_clip.TRAFFIC_LOG_S": 4})
    node = Node(write_labels(folder / "data", tiny_onnx), ("--log-level", "debug"), **settings).ready()
    release = threading.Event()
    calls = [node.stub.Infer(held(pb.InferRequest(task="clip_embed", payload=b"a"), release)) for _ in range(64)]
    assert all(next(call).result for call in calls)
    # The spare threads as well. The first stream of a connection is admitted beyond the limit.
    own = [grpc.insecure_channel(node.address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(64)]
    for channel in own:
        calls.append(
            pb_grpc.InferenceStub(channel).Infer(held(pb.InferRequest(task="clip_embed", payload=b"a"), release))
        )
        assert next(calls[-1]).result
    mirror = reflection_pb2_grpc.ServerReflectionStub(node.channel)
    question = reflection_pb2.ServerReflectionRequest()
    silent = [mirror.ServerReflectionInfo(held(question, release)) for _ in range(security.SHORT_CALLS_MAX)]
    waiting = [node.stub.Health.future(Empty(), timeout=LIMIT_S) for _ in range(200)]
    for refused in [node.stub.Infer(held(pb.InferRequest(), release)) for _ in range(16)]:
        with pytest.raises(grpc.RpcError):
            next(refused)
    for call in waiting:
        with contextlib.suppress(grpc.RpcError):  # too many at once are refused, too
            call.result()
    release.set()
    assert all(list(call) == [] for call in calls)
    for call in silent:
        call.cancel()
    for channel in own:
        channel.close()
    yield node
    assert node.stop() == 0, node.log


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for i, colour in enumerate(COLOURS.values()):
        path = tmp_path / "album" / f"{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(colour, (1600, 1200)), quality=98))
    return tmp_path / "album"


@pytest.fixture(scope="session")
def drawings() -> list[Drawing]:
    return [Drawing(**row) for row in json.loads(gzip.decompress((DEMO / "held_out.json.gz").read_bytes()))]


@pytest.fixture
def lan() -> Iterator[Lan]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2, for networks of its own")
    made = Lan()
    yield made
    made.close()


@pytest.fixture(scope="session")
def board(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """A board with the installation of docs/deployment.md; LUMEN_BOOT_ROOT keeps the bare Debian for the next time."""
    if "boot" not in request.config.option.markexpr:
        pytest.skip("takes four minutes; run it with: python -m pytest -s -m boot")
    tools = ("debootstrap", "systemd-nspawn", "nsenter", "ip")
    if os.geteuid() != 0 or not all(map(shutil.which, tools)):
        pytest.skip(f"needs root and {', '.join(tools)} (Debian: debootstrap, systemd-container, iproute2)")
    folder = tmp_path_factory.mktemp("board")
    board = Board(Path(os.environ.get("LUMEN_BOOT_ROOT") or folder / "base"), folder)
    try:
        board.power_on()
        install, *_ = code_of("docs/deployment.md", "systemd")
        assert len(install.splitlines()) <= 8
        for line in install.splitlines():
            print(f"pi@board:~/lumen-clip$ {line}\n{board.run(line, user='pi')}")
        yield board
        print(journal := board.journal())
        assert journal.count(" lumen-clip[") > 50 and "Traceback" not in journal and "blob data" not in journal
    finally:
        board.power_off()


@pytest.fixture(scope="session")
def big(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A true ViT-B-32 with seeded random weights, as OpenCLIP weights and as an ONNX folder."""
    if not {"big", "measure", "spread"} & set(request.config.option.markexpr.split()):
        pytest.skip("takes four minutes and 2 GB of memory; run it with: python -m pytest -s -m big")

    def make(folder: Path) -> None:
        import open_clip
        import torch

        folder.mkdir()
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-32").eval()
        torch.save(model.state_dict(), folder / "seeded.pt")
        export.export(f"ViT-B-32:{folder / 'seeded.pt'}", folder / "onnx")
        export.export(f"ViT-B-32:{folder / 'seeded.pt'}", folder / "int8", "int8")

    return shared(tmp_path_factory, "big", make)
