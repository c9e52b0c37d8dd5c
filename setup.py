"""Lays out the import package before a build.

The source folders stand at the top level (``router/``, ``workers/`` …), their import names are ``seamount.router``
and so on. ``gen/seamount/`` (ignored by git) holds a relative link to each of them and the stubs generated from
``proto/seamount/v1``, so that setuptools, mypy and an editable install all see one ordinary package.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "gen" / "seamount"
LINKS = {"cluster": "cluster", "router": "router", "workers": "workers", "kernels": "kernels", "wire": "proto/wire"}


def link_sources() -> None:
    PACKAGE.mkdir(parents=True, exist_ok=True)
    (PACKAGE / "__init__.py").write_text('"""Seamount: the session is the unit of serving."""\n', encoding="utf-8")
    (PACKAGE / "py.typed").touch()
    for name, target in LINKS.items():
        link = PACKAGE / name
        if not link.exists():  # true for the plain folders of an sdist, too
            link.symlink_to(Path(os.path.relpath(ROOT / target, PACKAGE)), target_is_directory=True)


def generate_stubs() -> None:
    from grpc_tools import protoc

    sources = sorted((ROOT / "proto" / "seamount" / "v1").glob("*.proto"))
    if not sources:  # a wheel built from an sdist that already carries the stubs
        return
    out = PACKAGE / "v1"
    out.mkdir(exist_ok=True)
    (out / "__init__.py").write_text('"""Stubs generated from proto/seamount/v1."""\n', encoding="utf-8")
    well_known = Path(protoc.__file__).parent / "_proto"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # finds protoc-gen-mypy_grpc
    gen = ROOT / "gen"
    arguments = [
        "protoc",
        f"-I{ROOT / 'proto'}",
        f"-I{well_known}",
        f"--python_out={gen}",
        f"--pyi_out={gen}",
        f"--grpc_python_out={gen}",
        f"--mypy_grpc_out={gen}",
        *map(str, sources),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("setup.py: protoc failed; see its messages above")


link_sources()
generate_stubs()
setup()
