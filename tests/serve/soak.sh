#!/usr/bin/env bash
# For developers: a thousand requests of mixed length, 16 at a time, on four ranks whose experts move every 20 steps.
# Fails when one is lost, differs from what a single rank without moves answers, or memory grows. About two minutes.
# Usage: tests/serve/soak.sh [PRESET] (default: cpu)
set -euo pipefail
cd "$(dirname "$0")/../.."
preset=${1:-cpu}
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset" --target serve_e2e_test | tail -n 1
ASAN_OPTIONS=detect_leaks=0 "build/$preset/serve_e2e_test" "a thousand requests lose nothing" --durations yes
