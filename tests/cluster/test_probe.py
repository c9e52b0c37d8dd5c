"""The readiness probe of a router that speaks TLS, run as Kubernetes runs it, against a real server."""

from __future__ import annotations

import asyncio
import datetime
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from seamount.cluster.probe import refusal
from seamount.cluster.settings import load_settings
from seamount.wire.credentials import server_credentials

NAME = "models.example"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as cert-manager's secret is mounted: tls.crt and tls.key, signed by ca.crt."""
    folder = tmp_path_factory.mktemp("tls")
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    own_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    for file, subject, public, is_ca in (
        ("ca.crt", ca_name, ca_key.public_key(), True),
        ("tls.crt", own_name, key.public_key(), False),
    ):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        (folder / file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "tls.key").write_bytes(pem)
    return folder


@asynccontextmanager
async def serving(secret: Path, status: int, *, mutual: bool) -> AsyncIterator[int]:
    """A server with the health service alone; its port."""
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    credentials = server_credentials(
        secret / "tls.crt", secret / "tls.key", client_ca_file=secret / "ca.crt" if mutual else None
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await servicer.set("", status)
    await server.start()
    yield port
    await server.stop(None)


async def probe(folder: Path, secret: Path, port: int, *, mutual: bool = False, name: str = NAME) -> tuple[int, str]:
    """Exit code, and what it says on stderr."""
    router = {"port": port, "tls_certificate_file": str(secret / "tls.crt"), "tls_key_file": str(secret / "tls.key")}
    if mutual:
        router["client_ca_file"] = str(secret / "ca.crt")
    (folder / "serving.yaml").write_text(yaml.safe_dump({"router": router}))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "seamount.cluster.probe", name),
        env=os.environ | {"SEAMOUNT_CONFIG": str(folder / "serving.yaml")},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


@pytest.mark.parametrize("mutual", [False, True])
async def test_it_follows_the_health_service(secret: Path, tmp_path: Path, mutual: bool) -> None:
    async with serving(secret, SERVING, mutual=mutual) as port:
        assert await probe(tmp_path, secret, port, mutual=mutual) == (0, "")
    async with serving(secret, NOT_SERVING, mutual=mutual) as port:
        assert await probe(tmp_path, secret, port, mutual=mutual) == (1, "probe: NOT_SERVING\n")


async def test_nobody_there_is_not_ready(secret: Path, tmp_path: Path) -> None:
    code, said = await probe(tmp_path, secret, 1)
    assert code == 1
    assert "UNAVAILABLE" in said


async def test_a_certificate_of_another_name_is_not_trusted(secret: Path, tmp_path: Path) -> None:
    async with serving(secret, SERVING, mutual=False) as port:
        code, said = await probe(tmp_path, secret, port, name="other.example")
    assert code == 1
    assert "UNAVAILABLE" in said


async def test_a_router_without_tls_is_none_of_its_business(tmp_path: Path) -> None:
    (tmp_path / "serving.yaml").write_text("{}")
    assert refusal(load_settings(tmp_path / "serving.yaml"), NAME) is not None


async def test_a_missing_authority_is_named(secret: Path, tmp_path: Path) -> None:
    for file in ("tls.crt", "tls.key"):
        (tmp_path / file).write_bytes((secret / file).read_bytes())
    code, said = await probe(tmp_path, tmp_path, 1)
    assert code == 1
    assert "ca.crt" in said
