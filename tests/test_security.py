"""TLS, client certificates and tokens."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.kit import LIMIT_S, SERVICE, Node, run_client, write_labels


def tls_node(certificates: Path, tiny_onnx: Path, data: Path, **environment: Any) -> Node:
    tls = {"LUMEN_TLS_CERT": certificates / "server.pem", "LUMEN_TLS_KEY": certificates / "server.key"}
    model = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none"}
    return Node(write_labels(data, tiny_onnx), **model, **tls, **environment).ready()


def test_a_daemon_with_tls_serves_only_tls_clients(certificates: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """If this fails, pictures travel unencrypted although TLS is configured."""
    node = tls_node(certificates, tiny_onnx, tmp_path)
    try:
        seen = run_client("clip_embed", "a dog", "--ca", str(certificates / "ca.pem"), address=node.address)
        assert seen.returncode == 0, seen.stderr
        plain = run_client("clip_embed", "a dog", "--timeout", "5", address=node.address)
        assert plain.returncode == 1 and plain.stderr.count("client.py: ") == 1
        other = run_client("clip_embed", "x", "--tls", "--timeout", "5", address=node.address)  # its CA is not trusted
        assert other.returncode == 1 and other.stderr.count("client.py: ") == 1 and "Traceback" not in other.stderr
        by_name = ("--ca", str(certificates / "ca.pem"), "--server-name", "localhost")
        assert run_client("health", *by_name, address=node.address).stdout == "SERVING\n"
    finally:
        assert node.stop() == 0 and "Traceback" not in node.log


def test_with_a_client_ca_only_its_clients_are_served(certificates: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """If this fails, clients without a certificate of the configured CA are served."""
    node = tls_node(certificates, tiny_onnx, tmp_path, LUMEN_TLS_CLIENT_CA=certificates / "ca.pem")

    def ask(name: str) -> subprocess.CompletedProcess[str]:
        own = ("--cert", str(certificates / f"{name}.pem"), "--key", str(certificates / f"{name}.key")) if name else ()
        timeout = "60" if name == "client" else "5"
        arguments = ("clip_embed", "a dog", "--timeout", timeout, "--ca", str(certificates / "ca.pem"), *own)
        return run_client(*arguments, address=node.address)

    try:
        assert [ask(name).returncode for name in ("client", "", "stranger")] == [0, 1, 1]
    finally:
        assert node.stop() == 0


def test_every_call_needs_the_token_and_calls_without_it_occupy_no_streams(
    certificates: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    """If this fails, clients without the token can use the daemon, or keep others out with idle streams."""
    token = (certificates / "token").read_text().strip()
    node = tls_node(certificates, tiny_onnx, tmp_path, LUMEN_TOKEN_FILE=certificates / "token")
    trusted = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
    release = threading.Event()

    def silent() -> Iterator[pb.InferRequest]:
        release.wait(LIMIT_S)
        yield from ()

    try:
        with grpc.secure_channel(node.address, trusted) as channel:
            stub = pb_grpc.InferenceStub(channel)
            strangers = [stub.Infer(silent(), timeout=LIMIT_S) for _ in range(200)]
            for call in strangers:
                with pytest.raises(grpc.RpcError) as error:
                    next(call)
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            wrong = [("authorization", f"Bearer {token[:-1]}"), ("authorization", token), ("authorization", "Bearer ")]
            for metadata in ([], [wrong[0]], [wrong[1]], [wrong[2]], wrong):
                for ask in (stub.Health, stub.GetCapabilities, lambda *a, **k: list(stub.StreamCapabilities(*a, **k))):
                    with pytest.raises(grpc.RpcError) as error:
                        ask(Empty(), timeout=LIMIT_S, metadata=metadata)
                    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
            )
            with pytest.raises(grpc.RpcError):
                next(listed)
            # Supervisors have no token and use the standard health service.
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert check.status == health_pb2.HealthCheckResponse.SERVING
            # The idle calls are still open; a client with the token is served.
            right = [("authorization", f"Bearer {token}")]
            request = pb.InferRequest(task="clip_embed", payload=b"a dog")
            [response] = stub.Infer(iter([request]), timeout=LIMIT_S, metadata=right)
            assert response.result
        own = ("--ca", str(certificates / "ca.pem"), "--token-file", str(certificates / "token"))
        for arguments in (("clip_embed", "a dog"), ("capabilities",), ("health",)):
            seen = run_client(*arguments, *own, address=node.address)
            assert seen.returncode == 0, seen.stderr
        assert run_client("health", "--ca", str(certificates / "ca.pem"), address=node.address).stdout == "SERVING\n"
        without = run_client("clip_embed", "a dog", "--ca", str(certificates / "ca.pem"), address=node.address)
        assert without.returncode == 1 and "unauthenticated" in without.stderr
    finally:
        release.set()
        assert node.stop() == 0
    assert token not in node.log and "rejected calls since the start" in node.log


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"LUMEN_TLS_CERT": "server.pem"}, "LUMEN_TLS_CERT=.*server.pem: needs LUMEN_TLS_KEY as well"),
        ({"LUMEN_TLS_KEY": "server.key"}, "LUMEN_TLS_KEY=.*server.key: needs LUMEN_TLS_CERT as well"),
        ({"LUMEN_TLS_CLIENT_CA": "ca.pem"}, "LUMEN_TLS_CLIENT_CA=.*ca.pem: needs LUMEN_TLS_CERT as well"),
        (
            {"LUMEN_TLS_CERT": "nowhere", "LUMEN_TLS_KEY": "server.key"},
            "LUMEN_TLS_CERT=.*nowhere: No such file or directory",
        ),
        (
            {"LUMEN_TLS_CERT": "server.pem", "LUMEN_TLS_KEY": "client.key"},
            "LUMEN_TLS_CERT=.*: not a PEM certificate that LUMEN_TLS_KEY is the key of",
        ),
        (
            {"LUMEN_TLS_CERT": "server.pem", "LUMEN_TLS_KEY": "server.key", "LUMEN_TLS_CLIENT_CA": "token"},
            "LUMEN_TLS_CLIENT_CA=.*token: not a PEM certificate",
        ),
        ({"LUMEN_TOKEN_FILE": "nowhere"}, "LUMEN_TOKEN_FILE=.*nowhere: No such file or directory"),
        ({"LUMEN_TOKEN_FILE": "short"}, "LUMEN_TOKEN_FILE=.*short: allowed: one token of 16 printable"),
        ({"LUMEN_TOKEN_FILE": "token"}, "LUMEN_TOKEN_FILE=.*token: without LUMEN_TLS_CERT the token would be sent"),
    ],
)
def test_unusable_security_settings_stop_the_start(
    certificates: Path, tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    """If this fails, a daemon runs unprotected although its operator has configured protection."""
    (certificates / "short").write_text("secret\n")
    environment = {name: certificates / value for name, value in settings.items()}
    node = Node(tmp_path, ("--host", "0.0.0.0"), **environment)
    assert node.ended() == 2
    node.stop()
    assert re.match(f"lumen-clip: {said}", node.log) and node.log.count("\n") == 1


def test_on_loopback_a_token_needs_no_tls(certificates: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """If this fails, users of one machine need certificates to keep others out."""
    model = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none"}
    node = Node(write_labels(tmp_path, tiny_onnx), **model, LUMEN_TOKEN_FILE=certificates / "token").ready()
    try:
        assert run_client("clip_embed", "x", address=node.address).returncode == 1
        own = ("--token-file", str(certificates / "token"))
        assert run_client("clip_embed", "x", *own, address=node.address).returncode == 0
        # The client does not send the token unencrypted to another machine.
        remote = run_client("clip_embed", "x", *own, address="192.0.2.1:50051")
        assert remote.returncode == 2 and "would be sent unencrypted" in remote.stderr
    finally:
        assert node.stop() == 0
