#!/usr/bin/env bash
# For developers: the long runs of a real server under mpirun, on the demo model.
#   soak       1,000 requests of mixed length, 16 at a time, on four ranks whose experts move every 20 steps: none is lost,
#              none differs from what a single rank says, memory does not grow. About two minutes.
#   kill       fifty servers of four ranks, each losing one rank to kill -9 at another moment while sixty requests run, and
#              twenty that lose two, 20 ms apart: no answer is lost or differs. About ten minutes.
#   rebalance  500 requests on four ranks, once with --policy never and once with experts that move every 20 steps: the
#              texts are the same, byte for byte. About a minute.
# Usage: tests/serve/long.sh soak|kill|rebalance [PRESET] (default: cpu)
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:-}
preset=${2:-cpu}
case "$name" in
  soak | kill | rebalance) ;;
  *) echo "usage: tests/serve/long.sh soak|kill|rebalance [PRESET], not '$name'" >&2; exit 2 ;;
esac
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset" --target serve_e2e_test | tail -n 1
ASAN_OPTIONS=detect_leaks=0 "build/$preset/serve_e2e_test" "[$name]" --durations yes
