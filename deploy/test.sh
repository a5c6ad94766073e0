#!/usr/bin/env bash
# Builds and tests Ballast: the preset cpu, and with --all also asan and tsan. For everybody, from a clean clone.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
presets=(cpu)
case "${1:-}" in
  "") ;;
  --all) presets=(cpu asan tsan) ;;
  *) echo "usage: deploy/test.sh [--all]" >&2; exit 2 ;;
esac
deploy/setup.sh
for preset in "${presets[@]}"; do
  echo "== $preset: build"
  cmake --preset "$preset" >"build-$preset.log" 2>&1 || { cat "build-$preset.log"; exit 1; }
  rm -f "build-$preset.log"
  cmake --build --preset "$preset" | tail -n 1
  echo "== $preset: test"
  ctest --preset "$preset" -j "$(nproc)"
done
