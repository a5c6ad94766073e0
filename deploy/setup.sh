#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that Ballast needs to build, run and test; nothing when all are there.
# For whoever builds from source. Works as root or with sudo.
set -euo pipefail

packages=(
  g++ cmake ninja-build git            # build
  libopenmpi-dev openmpi-bin           # ranks
  libabsl-dev nlohmann-json3-dev libcli11-dev
  libdnnl-dev                          # matrix products
  prometheus-cpp-dev libcivetweb-dev zlib1g-dev libcurl4-openssl-dev   # metrics and HTTP
  catch2                               # tests
  curl prometheus                      # the tests of endpoints and dashboards
)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  echo "setup: every package is there"
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "setup: this is neither Debian nor Ubuntu; install the equivalents of: ${missing[*]}" >&2
  exit 1
fi
as_root=
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "setup: needs root or sudo to install: ${missing[*]}" >&2; exit 1; }
  as_root=sudo
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -qq
# The prometheus package would start a server of its own; the tests start theirs.
$as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "setup: done"
