from types import SimpleNamespace
from typing import Any

import pytest

from seamount.cluster.app import PoolProgress, pool_progress
from seamount.cluster.fleet_plan import WantedPool, running_gangs, wanted_pools
from seamount.cluster.settings import Settings, validate


def application(status: str, version: str, message: str = "") -> SimpleNamespace:
    deployment = SimpleNamespace(message=message)
    return SimpleNamespace(status=SimpleNamespace(value=status), deployments={version: deployment}, message="")


def progress(wanted: WantedPool, applications: dict[str, Any]) -> PoolProgress:
    (only,) = pool_progress([wanted], running_gangs(applications), applications)
    return only


WANTED = WantedPool(pool="decode", num_gangs=2, expert_parallel=2, version="new")


def test_progress_counts_ready_gangs_of_the_wanted_version() -> None:
    said = progress(WANTED, {"decode-0": application("RUNNING", "old"), "decode-1": application("RUNNING", "new")})
    assert (said.num_ready, said.num_wanted, said.detail) == (1, 2, "")
    assert progress(WANTED, {"prefill-0": application("RUNNING", "new")}).num_ready == 0


def test_progress_gives_the_last_line_of_what_serve_says() -> None:
    trace = "Traceback (most recent call last):\n  File ...\nValueError: no checkpoint here\n\n"
    said = progress(
        WANTED, {"decode-0": application("DEPLOYING", "new"), "decode-1": application("DEPLOY_FAILED", "new", trace)}
    )
    assert (said.num_ready, said.detail) == (0, "ValueError: no checkpoint here")
    up = {f"decode-{n}": application("RUNNING", "new") for n in range(2)}
    assert progress(WANTED, up | {"decode-2": application("DEPLOY_FAILED", "new", trace)}).detail == ""


def versions(settings: Settings) -> dict[str, str]:
    return {pool.pool: pool.version for pool in wanted_pools(settings)}


def test_the_defaults_want_one_gang_of_each_pool() -> None:
    sizes = {pool.pool: (pool.num_gangs, pool.expert_parallel) for pool in wanted_pools(validate({}))}
    assert sizes == {"decode": (1, 2), "prefill": (1, 1)}
    assert len(set(versions(validate({})).values())) == 2


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({}, set()),
        ({"pools": {"decode": {"gangs": 3}, "prefill": {"gangs": 0}}}, set()),
        ({"router": {"port": 9000, "turn_deadline_s": 3}}, set()),
        ({"placement": {"local_append_max_tokens": 5}}, set()),
        ({"pools": {"decode": {"expert_parallel": 4}}}, {"decode"}),
        ({"pools": {"prefill": {"resources": {"GPU": 1}}}}, {"prefill"}),
        ({"model": {"path": "/elsewhere"}}, {"decode", "prefill"}),
        ({"cache": {"num_pages": 300}}, {"decode", "prefill"}),
        ({"engine": {"prefill_chunk_tokens": 64}}, {"decode", "prefill"}),
    ],
)
def test_a_gangs_version_changes_with_what_its_ranks_are_told(change: dict[str, Any], changed: set[str]) -> None:
    before, after = versions(validate({})), versions(validate(change))
    assert {pool for pool in before if before[pool] != after[pool]} == changed
