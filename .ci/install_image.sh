#!/bin/sh
# What the Dockerfile runs, one step a call, in a folder with pyproject.toml and constraints.txt:
#   wheel FOLDER          build Seamount's wheel into FOLDER (needs the whole tree)
#   packages cpu|cuda     everything that it depends on, pinned
#   seamount FOLDER       the wheel itself, and a check that all of it fits together
set -eu

listed() { # the requirements of one place in pyproject.toml, one a line: build-system.requires or project.dependencies
  python -c '
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    found = tomllib.load(file)
for key in sys.argv[1].split("."):
    found = found[key]
print("\n".join(found))
' "$1"
}

step=$1
argument=$2
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT

case "$step" in
wheel)
  listed build-system.requires >"$requirements"
  python -m pip install --quiet -c constraints.txt -r "$requirements"
  python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$argument" .
  ;;
packages)
  # torch first and by itself: asked for by another package, pip takes the CUDA build wherever it can.
  torch=$(grep '^torch==' constraints.txt)
  case "$argument" in
  cpu) python -m pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu" ;;
  cuda) python -m pip install --quiet "$torch" ;;
  *) echo "install_image.sh: packages cpu or packages cuda, not $argument" >&2 && exit 2 ;;
  esac
  listed project.dependencies >"$requirements"
  python -m pip install --quiet -c constraints.txt -r "$requirements"
  ;;
seamount)
  python -m pip install --quiet --no-deps --no-index --find-links "$argument" seamount
  python -m pip check
  seamount --version
  ;;
*)
  echo "install_image.sh: wheel, packages or seamount, not $step" >&2
  exit 2
  ;;
esac
