"""A whole system with key and token files: nothing answers a stranger, on no port."""

import secrets
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from seamount.cluster.checkpoint import init_checkpoint
from seamount.cluster.local import LocalCluster
from seamount.cluster.settings import validate
from seamount.router.client import AsyncClient, Sampling, user
from seamount.router.tenants import PROBED_METHOD, new_key
from seamount.v1 import admin_pb2, inference_pb2, session_pb2, transfer_pb2, worker_pb2
from seamount.wire.credentials import bearer
from seamount.wire.errors import NotFound, PermissionDenied, Unauthenticated, from_rpc_error

ROUTER_FILES = (session_pb2, inference_pb2, admin_pb2, health_pb2, reflection_pb2)
RANK_FILES = (worker_pb2, transfer_pb2, health_pb2)


def methods(files: tuple) -> list[str]:
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]


async def refusal(address: str, path: str, metadata: tuple) -> Exception:
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream(path)(b"", metadata=metadata, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    return from_rpc_error(caught.value)


@pytest.mark.cluster
async def test_strangers_are_refused_everywhere_and_tenants_see_their_own(tmp_path: Path) -> None:
    init_checkpoint(tmp_path / "model", seed=secrets.randbits(30), geometry="test")
    keys = {name: new_key(name, admin=name == "ops") for name in ("acme", "globex", "ops")}
    token = secrets.token_hex(32)
    (tmp_path / "keys").write_text("\n".join(line for _, line in keys.values()))
    (tmp_path / "token").write_text(token)
    settings = validate(
        {
            "model": {"path": "model", "name": "small"},
            "cache": {"num_pages": 64},
            "engine": {"max_context_tokens": 2048},
            "router": {"port": 0, "api_key_file": "keys", "worker_token_file": "token"},
        },
        base=tmp_path,
    )
    async with LocalCluster(settings=settings) as cluster:
        ranks = [process.address for name, process in cluster.processes.items() if not name.startswith("router")]
        assert len(ranks) == 3
        wrong_for_router = ((), bearer(token), bearer(secrets.token_urlsafe(32)))
        wrong_for_ranks = ((), bearer(keys["ops"][0]), bearer(secrets.token_hex(32)))
        for address, paths, wrong in (
            (cluster.address, [path for path in methods(ROUTER_FILES) if path != PROBED_METHOD], wrong_for_router),
            *((rank, methods(RANK_FILES), wrong_for_ranks) for rank in ranks),
        ):
            assert len(paths) >= 8
            for path in paths:
                for metadata in wrong:
                    assert isinstance(await refusal(address, path, metadata), Unauthenticated), (address, path)

        async with (
            AsyncClient(cluster.address, api_key=keys["acme"][0]) as acme,
            AsyncClient(cluster.address, api_key=keys["globex"][0]) as globex,
            AsyncClient(cluster.address, api_key=keys["ops"][0]) as ops,
        ):
            session = await acme.create_session()
            turn = await acme.run_turn(session.id, [user("hi " * 300)], sampling=Sampling(max_output_tokens=3)).result()
            assert turn.receipt.num_output_tokens == 3
            assert turn.receipt.num_pushed_tokens > 0  # ranks reach each other with the token
            for stranger in (globex, ops):
                with pytest.raises(NotFound):
                    await stranger.get_session(session.id)
                assert (await stranger.list_sessions())[0] == []
            with pytest.raises(PermissionDenied):
                await acme.list_ranks()
            assert len(await ops.list_ranks()) == 3
    logs = b"".join(path.read_bytes() for path in settings.run_dir.glob("*.log"))
    assert logs
    for secret in (token, *(key for key, _ in keys.values())):
        assert secret.encode() not in logs
