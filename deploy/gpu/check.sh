#!/usr/bin/env bash
# On a machine with a GPU: builds the kernels alone, runs their tests, also under compute-sanitizer where it is installed,
# measures them, and prints one table; where python3 has PyTorch, a second one beside it of what that needs for the same
# layers. Nothing is installed.
# Usage: deploy/gpu/check.sh [--prefix FOLDER] [--out FOLDER]
#   --prefix  where Abseil, Catch2 and nlohmann-json are (deploy/gpu/prefix.sh); default: where CMake finds them
#   --out     gets gpu-results.md, gpu-results.json and, of PyTorch, peers.json; default: build/gpu-kernels
set -euo pipefail
cd "$(dirname "$0")/../.."
prefix="" out=build/gpu-kernels
while [ $# -gt 0 ]; do
  case "$1" in
    --prefix | --out) [ $# -ge 2 ] || { echo "deploy/gpu/check.sh: $1 wants a folder" >&2; exit 2; } ;;
    *) echo "usage: deploy/gpu/check.sh [--prefix FOLDER] [--out FOLDER]" >&2; exit 2 ;;
  esac
  case "$1" in
    --prefix)
      [ -d "$2/include/absl" ] || {
        echo "deploy/gpu/check.sh: --prefix: $2 is no folder that deploy/gpu/prefix.sh has made" >&2
        exit 2
      }
      prefix=$(cd "$2" && pwd)
      ;;
    --out) out=$2 ;;
  esac
  shift 2
done
mkdir -p "$out"
echo "== build"
cmake --preset gpu-kernels ${prefix:+-DCMAKE_PREFIX_PATH="$prefix"} >/dev/null
cmake --build --preset gpu-kernels | tail -n 1
build=build/gpu-kernels
echo "== tests"
export BALLAST_REQUIRE_GPU=1
ctest --test-dir $build --output-on-failure -R ': gpu:' | tail -n 15
sanitized="not run: compute-sanitizer is not installed"
if command -v compute-sanitizer >/dev/null; then
  sanitized="clean"
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer: $tool"
    # Ranks on streams of their own would wait out their deadlines under it; those of one launch are run.
    compute-sanitizer --tool "$tool" --error-exitcode 1 $build/device_gpu_test '~[bench]~[streams]' | tail -n 3 ||
      sanitized="failed: $tool"
  done
fi
echo "== measurements"
$build/ballast-bench-gpu --json "$out/gpu-results.json" >"$out/table.md"
if ! python3 -c 'import torch' 2>/dev/null; then
  peers="PyTorch: not measured, as python3 here has none"
elif python3 tests/bench/peers.py >"$out/peers.json"; then
  peers=$(python3 tests/bench/peers.py --merge "$out/gpu-results.json" "$out/peers.json")
else
  peers="PyTorch: not measured, as tests/bench/peers.py failed"
fi
{
  echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), driver" \
    "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1), $(date -u +%F);" \
    "tests passed, compute-sanitizer $sanitized"
  echo
  cat "$out/table.md"
  echo
  echo "$peers"
} >"$out/gpu-results.md"
rm "$out/table.md"
cat "$out/gpu-results.md"
[ "${sanitized%%:*}" != failed ]
