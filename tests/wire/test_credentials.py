"""Secrets in metadata and files, and TLS both ways over a real server."""

import datetime
import ipaddress
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from seamount.router.client import AsyncClient, Retries, Tls
from seamount.v1 import inference_pb2, inference_pb2_grpc
from seamount.wire.credentials import (
    bearer,
    channel_credentials,
    digest,
    presented_secret,
    read_secret,
    server_credentials,
)
from seamount.wire.errors import InvalidArgument, Unavailable

SECRET = "0123456789abcdef"


@pytest.mark.parametrize(
    ("metadata", "secret"),
    [
        (bearer(SECRET), SECRET),
        ((("authorization", f"bearer {SECRET}"),), SECRET),
        ((("x", "y"), ("authorization", f"BEARER  {SECRET} ")), SECRET),
        (None, None),
        ((), None),
        (bearer(None), None),
        ((("authorization", f"Basic {SECRET}"),), None),
        ((("authorization", SECRET),), None),
        (bearer(SECRET) * 2, None),
        ((("authorization", b"Bearer x"),), None),
    ],
)
def test_a_call_shows_one_bearer_secret_or_none(metadata: tuple | None, secret: str | None) -> None:
    assert presented_secret(metadata) == secret


def test_digests_differ_and_take_any_text() -> None:
    assert len({digest("a"), digest("b"), digest("\udcff"), digest("")}) == 4
    assert len(digest("a")) == 32


@pytest.mark.parametrize("content", [SECRET, f"\n {SECRET}\n", "x" * 16, "x" * 512])
def test_a_secret_is_the_whole_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    assert read_secret(tmp_path / "token", field="f") == content.strip()


@pytest.mark.parametrize(
    "content", [b"", b"x" * 15, b"x" * 513, b"two words of it here", b"x" * 20 + b"\x00", "é".encode() * 20]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(InvalidArgument) as caught:
        read_secret(tmp_path / "token", field="router.worker_token_file")
    assert caught.value.field == "router.worker_token_file"
    with pytest.raises(InvalidArgument, match="cannot read"):
        read_secret(tmp_path / "none", field="f")


def write_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(encoded)
    return key


def make_authority(folder: Path) -> None:
    """``ca.pem``, and ``server`` and ``client`` pairs that it signed."""
    now = datetime.datetime.now(datetime.UTC)
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    ca_key = write_key(folder / "ca.key")
    for name in ("ca", "server", "client"):
        key = ca_key if name == "ca" else write_key(folder / f"{name}.key")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
            .sign(ca_key, hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


class Models(inference_pb2_grpc.InferenceServiceServicer):
    async def ListModels(self, request, context):
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(id="m")])

    async def Generate(self, request, context):
        raise AssertionError("not called")
        yield

    async def Tokenize(self, request, context):
        raise AssertionError("not called")


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls_reaches_those_who_may(tmp_path: Path, mutual: bool) -> None:
    make_authority(tmp_path)
    (tmp_path / "other").mkdir()
    make_authority(tmp_path / "other")
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Models(), server)
    credentials = server_credentials(
        tmp_path / "server.pem", tmp_path / "server.key", client_ca_file=tmp_path / "ca.pem" if mutual else None
    )
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    await server.start()
    ca = tmp_path / "ca.pem"
    clients = {
        "plain": None,
        "stranger's ca": Tls(ca_file=tmp_path / "other" / "ca.pem"),
        "no certificate": Tls(ca_file=ca),
        "stranger's certificate": Tls(
            ca_file=ca, certificate_file=tmp_path / "other" / "client.pem", key_file=tmp_path / "other" / "client.key"
        ),
        "own certificate": Tls(ca_file=ca, certificate_file=tmp_path / "client.pem", key_file=tmp_path / "client.key"),
    }
    answered = set()
    for name, tls in clients.items():
        async with AsyncClient(address, tls=tls, retries=Retries(max_attempts=1)) as client:
            try:
                assert [model.id for model in await client.list_models()] == ["m"]
                answered.add(name)
            except Unavailable:
                pass
    await server.stop(0)
    open_to_all = set() if mutual else {"no certificate", "stranger's certificate"}
    assert answered == {"own certificate"} | open_to_all


def test_files_that_are_no_pem_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no pem")
    with pytest.raises(InvalidArgument, match="is not a PEM file"):
        channel_credentials(tmp_path / "text")
    with pytest.raises(InvalidArgument, match="cannot read"):
        server_credentials(tmp_path / "none.pem", tmp_path / "none.key")
    with pytest.raises(InvalidArgument, match="needs its key"):
        channel_credentials(None, certificate_file=tmp_path / "text")
