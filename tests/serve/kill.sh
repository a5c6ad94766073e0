#!/usr/bin/env bash
# For developers: fifty servers of four ranks, each losing one rank (every fifth: two, 20 ms apart) to kill -9 at another
# moment while sixty requests run. Fails when an answer is lost or differs from what a single rank says. About ten minutes.
# Usage: tests/serve/kill.sh [PRESET] (default: cpu)
set -euo pipefail
cd "$(dirname "$0")/../.."
preset=${1:-cpu}
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset" --target serve_e2e_test | tail -n 1
ASAN_OPTIONS=detect_leaks=0 "build/$preset/serve_e2e_test" "fifty kills lose nothing" --durations yes
