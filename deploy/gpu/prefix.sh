#!/usr/bin/env bash
# Copies what the preset gpu-kernels needs besides CUDA into a folder: Abseil, Catch2 and nlohmann-json of this machine's
# distribution. For GPU machines that cannot install packages. The folder is for x86-64 machines with this C++ library or a
# newer one.
# Usage: deploy/gpu/prefix.sh FOLDER        then there: deploy/gpu/check.sh --prefix FOLDER
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: deploy/gpu/prefix.sh FOLDER" >&2; exit 2; }
to=$1
for folder in absl catch2 nlohmann; do
  [ -d "/usr/include/$folder" ] || {
    echo "deploy/gpu/prefix.sh: /usr/include/$folder is not there: run deploy/setup.sh first" >&2
    exit 1
  }
done
lib=lib/$(gcc -print-multiarch)
mkdir -p "$to/include" "$to/$lib/cmake" "$to/lib/cmake" "$to/share"
cp -r /usr/include/absl /usr/include/catch2 /usr/include/nlohmann "$to/include/"
cp -P /usr/$lib/libabsl_*.so* "$to/$lib/"
for package in absl nlohmann_json Catch2; do
  found=$(find /usr/lib /usr/share -type d -path "*/cmake/$package" | head -n 1)
  [ -n "$found" ] || { echo "deploy/gpu/prefix.sh: no CMake package $package on this machine (deploy/setup.sh)" >&2; exit 1; }
  mkdir -p "$to/$(dirname "${found#/usr/}")"
  cp -r "$found" "$to/${found#/usr/}"
done
cp /usr/lib/libCatch2*.a "$to/lib/"
du -sh "$to"
