#!/usr/bin/env bash
# Trains the demo model from nothing: packages, Python environment, corpus, training, export and card.
# For whoever wants to reproduce deploy/demo/model; nobody needs it to build or run Ballast.
# An interrupted run goes on where it was.  Usage: train.sh [WORK_DIR] (default: build/demo-train)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
work=${1:-$root/build/demo-train}
mkdir -p "$work"

missing=()
for package in python3-venv python3.11-doc libboost1.74-dev manpages-ja iso-codes; do
  dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if ((${#missing[@]})); then
  as_root=$([ "$(id -u)" = 0 ] || echo sudo)
  echo "train: installing ${missing[*]}"
  $as_root apt-get update -qq
  $as_root apt-get install -y --no-install-recommends "${missing[@]}"
fi
[ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q -r "$here/requirements.txt"
cd "$here"
[ -f "$work/data/sources.json" ] || "$work/venv/bin/python" corpus.py "$work/data"
"$work/venv/bin/python" train.py "$work/data" "$work/run" --threads "$(nproc)"
"$work/venv/bin/python" evaluate.py "$work/data" "$work/run" "$root/deploy/demo/model"
"$work/venv/bin/python" prompts.py "$work/data" "$root/deploy/demo/prompts"
