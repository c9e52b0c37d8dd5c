"""Makes ``.venv`` with everything pinned, and nothing of CUDA on a machine without a GPU. Standard library only.

python3 .ci/setup_environment.py
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OF_CUDA = re.compile(r"nvidia[-_].*|triton|cuda[-_].*|pytorch[-_]triton.*", re.IGNORECASE)


def main() -> None:
    if not (3, 11) <= sys.version_info < (3, 13):
        fail(f"Seamount needs Python 3.11 or 3.12; {sys.executable} is {sys.version.split()[0]}: set PYTHON=...")
    if not PYTHON.exists():
        say(f"making {VENV.name} with Python {sys.version.split()[0]}")
        try:
            venv.create(VENV, with_pip=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(VENV, ignore_errors=True)
            fail("this Python cannot make virtual environments: install its venv package (Debian: python3-venv)")
    install_torch()
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    say("installing what builds the package")
    pip("install", "-c", str(CONSTRAINTS), *requires)
    say("installing Seamount and its dependencies (about 2 minutes)")
    pip("install", "-c", str(CONSTRAINTS), "--no-build-isolation", "-e", f"{ROOT}[dev]")
    if not has_gpu() and (found := cuda_packages_installed()):
        fail(f"no GPU here, but parts of CUDA were installed: {', '.join(found)}; remove .venv and try again")
    say("done")


def install_torch() -> None:
    """First and by itself: asked for by another package, pip takes the CUDA build, of several GB, wherever it can."""
    (pin,) = re.findall(r"(?m)^torch==\S+$", CONSTRAINTS.read_text())
    cpu_only = sys.platform == "linux" and not has_gpu()  # elsewhere there is no CUDA to avoid
    sources = cpu_sources(pin) if cpu_only else []
    say(f"installing {pin}{' (CPU build)' if cpu_only else ''}")
    pip("install", "-c", str(CONSTRAINTS), *sources, pin)


def cpu_sources(pin: str) -> list[str]:
    """Where pip finds the CPU build: its builds are named +cpu, which counts as newer than the plain version."""
    sources = ["--extra-index-url", CPU_INDEX] if is_reachable(f"{CPU_INDEX}/torch/") else []
    if found := cuda_requirements(pin, sources):
        fail(
            f"no GPU here, and with {pin} pip would install {', '.join(found[:3])} ...: {CPU_INDEX} cannot be reached. "
            "Give pip a folder with the CPU build (pip config set global.find-links FOLDER) and try again"
        )
    return sources


def has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def is_reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def cuda_requirements(pin: str, sources: list[str]) -> list[str]:
    """What of CUDA the build that pip would choose asks for."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "plan.json"
        pip("install", "-c", str(CONSTRAINTS), "--dry-run", "--no-deps", "--report", str(report), *sources, pin)
        plan = json.loads(report.read_text())["install"]
    requires = [requirement for item in plan for requirement in item["metadata"].get("requires_dist", [])]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in requires if "extra ==" not in requirement}
    return sorted(name for name in names if OF_CUDA.fullmatch(name))


def cuda_packages_installed() -> list[str]:
    listed = subprocess.run(
        [PYTHON, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True, timeout=120
    )
    return sorted(name for item in json.loads(listed.stdout) if OF_CUDA.fullmatch(name := item["name"]))


def pip(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    if done.returncode != 0:
        fail(f"pip {' '.join(arguments)}\n{done.stdout}{done.stderr}".rstrip())


def say(what: str) -> None:
    print(f"setup: {what}", flush=True)


def fail(why: str) -> None:
    raise SystemExit(f"setup: {why}")


if __name__ == "__main__":
    main()
