#!/usr/bin/env bash
# The demonstration: serves the demo model on four ranks while traffic shifts from mixed text to code, to Japanese, to
# JSON; once with the experts where they are, once with hot experts copied live. Ends with a table; writes
# build/demo/result.json and build/demo/report.html.
# Usage: deploy/demo.sh [--requests N] (requests per phase, 240 unless told; with 30 the two runs take one or two minutes)
set -euo pipefail
usage() { # usage WHY
  echo "demo: $1; usage: deploy/demo.sh [--requests N], N from 1 to 1000000" >&2
  exit 2
}
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
ranks=4
requests=240
while (($#)); do
  case "$1" in
    --requests)
      (($# > 1)) || usage "--requests has no value"
      requests=$2
      [[ $requests =~ ^[1-9][0-9]{0,6}$ ]] && ((requests <= 1000000)) || usage "--requests is '$requests'"
      shift 2 ;;
    *) usage "'$1' is unknown" ;;
  esac
done

deploy/setup.sh
echo "demo: building"
cmake --preset cpu >/dev/null
cmake --build --preset cpu --target ballast ballast-demo | tail -n 1
# shellcheck source=deploy/environment.sh
. deploy/environment.sh
out=build/demo
mkdir -p "$out"

server=
stop_server() {
  if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then kill -TERM "$server"; wait "$server" || true; fi
}
trap stop_server EXIT

run() { # run NAME POLICY
  local ready=$out/$1.ready.json
  rm -f "$ready"
  mpirun -n $ranks --oversubscribe --bind-to none build/cpu/ballast serve --model deploy/demo/model \
    --policy "$2" --port 0 --metrics-port 0 --ready-file "$ready" --step-log "$out/$1.steps.jsonl" \
    --max-seqs 32 >"$out/$1.log" 2>&1 &
  server=$!
  for _ in $(seq 600); do
    [ -f "$ready" ] && break
    kill -0 "$server" 2>/dev/null || { echo "demo: the server did not start:"; cat "$out/$1.log"; exit 1; }
    sleep 0.1
  done
  local port
  port=$(sed -n 's/.*"port":\([0-9]*\).*/\1/p' "$ready")
  echo "demo: $1 run, policy $2"
  build/cpu/ballast-demo drive --port "$port" --prompts deploy/demo/prompts --step-log "$out/$1.steps.jsonl" \
    --requests-per-phase "$requests" --concurrency 48 --max-tokens 160 --out "$out/$1.json"
  # The server stops by itself when rank 0 is told to.
  kill -TERM "$(sed -n 's/.*"pid":\([0-9]*\).*/\1/p' "$ready")"
  wait "$server" || { echo "demo: the server failed:"; tail "$out/$1.log"; exit 1; }
  server=
}

run static static
run dynamic regret
build/cpu/ballast-demo report --static "$out/static.json" --dynamic "$out/dynamic.json" --out-dir "$out"
echo "demo: report in $out/report.html"
