"""What status makes of the pools' and ranks' figures."""

import io
import json

from rich.console import Console

from seamount.cluster.status import ClusterStatus, plain, print_tables
from seamount.v1 import admin_pb2, worker_pb2


def rank(rank_id: str, pool: worker_pb2.Pool, *, alive: bool = True, **state) -> admin_pb2.Rank:
    fields = {"rank_id": rank_id, "pool": pool, "healthy": True, "num_pages": 64, "num_sampled_tokens": 2**60} | state
    return admin_pb2.Rank(address="127.0.0.1:1", alive=alive, state=worker_pb2.RankState(**fields))


def status(*ranks: admin_pb2.Rank) -> ClusterStatus:
    pools = [admin_pb2.PoolState(pool=worker_pb2.POOL_DECODE, num_gangs=3, num_ranks=7, num_pages=11)]
    return ClusterStatus(address="a:1", pools=pools, ranks=list(ranks))


DECODE = rank("d0", worker_pb2.POOL_DECODE, session_ids=["s1", "s2"])
PREFILL = rank("p0", worker_pb2.POOL_PREFILL)


def test_json_has_every_field_as_numbers_and_names() -> None:
    seen = json.loads(json.dumps(plain(status(DECODE, PREFILL))))
    assert (seen["address"], seen["complete"]) == ("a:1", True)
    assert seen["pools"][0]["pool"] == "decode"
    assert seen["pools"][0]["num_ranks"] == 7
    state = seen["ranks"][0]["state"]
    assert state["num_sampled_tokens"] == 2**60
    assert state["session_ids"] == ["s1", "s2"]
    assert state["draining"] is False
    assert set(state) == {field.name for field in worker_pb2.RankState.DESCRIPTOR.fields}


def test_complete_means_all_alive_healthy_and_some_decode() -> None:
    assert status(DECODE, PREFILL).complete
    assert not status().complete
    assert not status(PREFILL).complete
    assert not status(DECODE, rank("p0", worker_pb2.POOL_PREFILL, alive=False)).complete
    assert not status(rank("d0", worker_pb2.POOL_DECODE, healthy=False)).complete


def test_tables_show_each_rank_and_its_condition() -> None:
    out = io.StringIO()
    ranks = [
        DECODE,
        rank("dead-one", worker_pb2.POOL_DECODE, alive=False),
        rank("sick-one", worker_pb2.POOL_DECODE, healthy=False),
        rank("going-one", worker_pb2.POOL_DECODE, draining=True),
    ]
    print_tables(status(*ranks), Console(file=out, width=160))
    rows = {line.split()[1]: line for line in out.getvalue().splitlines() if "127.0.0.1:1" in line}
    assert "healthy" in rows["d0"]
    assert "dead" in rows["dead-one"].split("dead-one")[1]
    assert "unhealthy" in rows["sick-one"]
    assert "draining" in rows["going-one"]
