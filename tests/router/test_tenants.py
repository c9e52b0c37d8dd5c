"""API keys, their file, and the interceptor before every method of the router."""

import asyncio
import hashlib
import re
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from seamount.router.tenants import (
    LOCAL,
    PROBED_METHOD,
    ApiKeys,
    Identity,
    caller,
    new_key,
    read_api_keys,
    router_interceptors,
)
from seamount.v1 import admin_pb2, inference_pb2, session_pb2
from seamount.wire.credentials import bearer, digest
from seamount.wire.errors import InvalidArgument, PermissionDenied, Unauthenticated, from_rpc_error
from seamount.wire.ids import TenantId

ACME, GLOBEX, OPS = "acme-key-0123456789", "globex-key-0123456789", "ops-key-0123456789"
FILES = (session_pb2, inference_pb2, admin_pb2, health_pb2, reflection_pb2)
METHODS = [
    method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
]
ADMIN_SERVICE = "seamount.v1.AdminService"


def path_of(method) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


class WhoAmI(grpc.GenericRpcHandler):
    """Answers every method of the project's services with the tenant, in the details of an ABORTED."""

    def service(self, details):
        if not details.method.startswith("/seamount.v1."):
            return None

        async def answer(_request, context):
            await asyncio.sleep(0.001)
            who = caller()
            await context.abort(grpc.StatusCode.ABORTED, f"{who.tenant} {who.admin}")

        return grpc.unary_stream_rpc_method_handler(answer)


@asynccontextmanager
async def serving(keys: ApiKeys | None) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=router_interceptors(keys))
    server.add_generic_rpc_handlers((WhoAmI(),))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(["x.Y"]), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    file = tmp_path / "keys"
    file.write_text(
        "# who may call\n\n"
        f"acme:{digest(ACME).hex()}\n"
        f"globex:{digest(GLOBEX).hex()}  # since spring\n"
        f"ops:{digest(OPS).hex()}:admin\n"
    )
    return read_api_keys(file)


async def outcome(channel: grpc.aio.Channel, path: str, metadata: tuple) -> grpc.aio.AioRpcError:
    call = channel.unary_stream(path)(b"", metadata=metadata, timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value


def test_the_methods_under_test_are_all_there_are() -> None:
    names = {path_of(method) for method in METHODS}
    assert {"/seamount.v1.SessionService/RunTurn", "/seamount.v1.AdminService/ListPools"} <= names
    assert {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"} <= names
    assert len(names) >= 15


@pytest.mark.parametrize("method", [m for m in METHODS if path_of(m) != PROBED_METHOD], ids=path_of)
@pytest.mark.parametrize(
    "metadata",
    [(), bearer("no-such-key-0123456789"), bearer(ACME[:-1]), bearer(digest(ACME).hex()), (("authorization", ACME),)],
    ids=["no key", "unknown key", "cut key", "its hash", "no scheme"],
)
async def test_every_method_without_a_key_is_unauthenticated(keys: ApiKeys, method, metadata: tuple) -> None:
    async with serving(keys) as channel:
        error = await outcome(channel, path_of(method), metadata)
    typed = from_rpc_error(error)
    assert isinstance(typed, Unauthenticated)
    assert "authorization: Bearer" in typed.message


async def test_even_methods_that_do_not_exist(keys: ApiKeys) -> None:
    async with serving(keys) as channel:
        for path in ("/seamount.v1.WorkerService/Reserve", "/no.such.Service/Method"):
            assert isinstance(from_rpc_error(await outcome(channel, path, ())), Unauthenticated)
            assert isinstance(from_rpc_error(await outcome(channel, path, bearer(ACME))), PermissionDenied)


@pytest.mark.parametrize("method", [m for m in METHODS if m.full_name.startswith("seamount.")], ids=path_of)
async def test_methods_know_their_caller(keys: ApiKeys, method) -> None:
    async with serving(keys) as channel:
        for key, expected in ((ACME, "acme False"), (GLOBEX, "globex False"), (OPS, "ops True")):
            error = await outcome(channel, path_of(method), bearer(key))
            if method.containing_service.full_name == ADMIN_SERVICE and key != OPS:
                assert isinstance(from_rpc_error(error), PermissionDenied)
            else:
                assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, expected)


async def test_concurrent_calls_keep_their_callers_apart(keys: ApiKeys) -> None:
    async with serving(keys) as channel:
        shown = [(ACME, "acme False"), (GLOBEX, "globex False"), (OPS, "ops True")] * 30
        errors = await asyncio.gather(
            *(outcome(channel, "/seamount.v1.SessionService/RunTurn", bearer(key)) for key, _ in shown)
        )
    assert [error.details() for error in errors] == [expected for _, expected in shown]


async def test_without_a_key_file_everyone_is_local(keys: ApiKeys) -> None:
    async with serving(None) as channel:
        for method in METHODS:
            if method.full_name.startswith("seamount."):
                error = await outcome(channel, path_of(method), ())
                assert error.details() == f"{LOCAL.tenant} True"


@pytest.mark.parametrize("metadata", [(), bearer("no-such-key-0123456789")], ids=["no key", "unknown key"])
async def test_a_probe_needs_no_key(keys: ApiKeys, metadata: tuple) -> None:
    async with serving(keys) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_and_reflection_answer_with_a_key(keys: ApiKeys) -> None:
    async with serving(keys) as channel:
        health_stub = health_pb2_grpc.HealthStub(channel)
        answer = await health_stub.Check(health_pb2.HealthCheckRequest(), metadata=bearer(ACME), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            requests, metadata=bearer(ACME), timeout=5
        )
        assert (await call.read()).HasField("list_services_response")


def test_outside_of_a_call_there_is_no_caller() -> None:
    with pytest.raises(Unauthenticated):
        caller()


def test_keys_rotate_by_standing_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"acme:{digest(ACME).hex()}\nacme:{digest(GLOBEX).hex()}\n")
    keys = read_api_keys(file)
    assert len(keys) == 2
    assert keys.find(ACME) == keys.find(GLOBEX) == Identity(tenant=TenantId("acme"))


def test_a_new_key_is_found_by_its_line_and_not_in_it(tmp_path: Path) -> None:
    key, line = new_key("acme", admin=True)
    (tmp_path / "keys").write_text(line)
    assert read_api_keys(tmp_path / "keys").find(key) == Identity(tenant=TenantId("acme"), admin=True)
    assert key not in line
    assert hashlib.sha256(key.encode()).hexdigest() in line
    assert new_key("acme")[0] != key


HASH = digest(ACME).hex()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds 0 keys"),
        ("# nothing\n", "holds 0 keys"),
        ("acme\n", "line 1: expected tenant:sha256"),
        (f"\n\nacme:{HASH}:root", "line 3: expected tenant:sha256"),
        (f"acme:{HASH[:-1]}", "line 1: expected"),
        (f"acme:{HASH.upper()}", "line 1: expected"),
        (f"acme:{HASH}:admin:x", "line 1: expected"),
        (f"a/b:{HASH}", "line 1: a tenant has"),
        (f"{{a}}:{HASH}", "line 1: a tenant has"),
        (f":{HASH}", "line 1: a tenant has"),
        (f"{'a' * 65}:{HASH}", "line 1: a tenant has"),
        (f"acme:{HASH}\nglobex:{HASH}", "line 2: this key stands in the file twice"),
    ],
)
def test_bad_key_files_are_refused_by_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(InvalidArgument, match=re.escape(says)) as caught:
        read_api_keys(tmp_path / "keys")
    assert caught.value.field == "router.api_key_file"
    assert HASH not in caught.value.message


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot read"):
        read_api_keys(tmp_path / "none")


def test_a_tenant_of_64_characters_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{'a' * 64}:{HASH}")
    who = read_api_keys(tmp_path / "keys").find(ACME)
    assert who is not None
    assert who.tenant == "a" * 64


def test_a_lookup_costs_the_same_among_many_keys() -> None:
    def cost_s(num_keys: int) -> float:
        entries = [(digest(f"key {i}"), Identity(tenant=TenantId(f"t{i}"))) for i in range(num_keys)]
        keys = ApiKeys(entries)
        samples = []
        for i in range(400):
            started = time.perf_counter()
            keys.find(f"key {i % 2 * 10**9}")
            samples.append(time.perf_counter() - started)
        return statistics.median(samples)

    assert cost_s(10_000) < 5 * cost_s(1)


async def test_oversized_secrets_are_just_unknown(keys: ApiKeys) -> None:
    assert keys.find("x" * 7000) is None
    async with serving(keys) as channel:
        error = await outcome(channel, "/seamount.v1.SessionService/RunTurn", bearer("x" * 6000))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
