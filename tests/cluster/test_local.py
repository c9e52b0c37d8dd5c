"""What plain processes refuse before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seamount.cluster.local import LocalCluster
from seamount.cluster.sections import NODE_ADDRESS
from seamount.cluster.settings import validate
from seamount.wire.errors import InvalidArgument


async def test_the_address_of_a_node_is_rays_to_resolve(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("worker-token-0123456789abcdef\n")
    settings = validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path)},
            "pools": {"host": NODE_ADDRESS},
            "router": {"worker_token_file": str(token)},
        }
    )
    with pytest.raises(InvalidArgument) as caught:
        await LocalCluster(settings=settings).__aenter__()
    assert caught.value.field == "pools.host"
    assert not (tmp_path / "run").exists()


def test_plain_processes_need_no_ray() -> None:
    """As on a GPU machine that has torch and Triton alone."""
    code = "import sys; sys.modules['ray'] = None; import seamount.cluster.local"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
