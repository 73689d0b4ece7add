#!/usr/bin/env bash
# create_venv.sh PYTHON FOLDER [SYSTEM]: a virtual environment, empty, or with SYSTEM set one that sees all packages of PYTHON.
set -euo pipefail
folder=$2 system=${3:-}
# By its path, since the new environment comes first on the Makefile's PATH.
python=$(command -v "$1") || { echo "$1 is not found; name a Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }

if [[ -n $system ]]; then
  "$python" -m venv --without-pip "$folder"
  # Not --system-site-packages: where PYTHON is itself a virtual environment, that would mean the packages of its base.
  site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import site; print("import site;", "; ".join(f"site.addsitedir({p!r})" for p in site.getsitepackages()))' \
    > "$site/coda_parent.pth"
elif ! "$python" -m venv "$folder"; then
  rm -rf "$folder"
  echo "$python cannot make a virtual environment; install its venv module (Debian and Ubuntu: apt-get install python3-venv)" >&2
  exit 1
fi
