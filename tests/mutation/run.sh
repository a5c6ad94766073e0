#!/usr/bin/env bash
# For developers: plants one bug after the other in a copy of the tree and sees whether the tests notice. A patch names in
# its first lines what the bug is, what to build and which tests are to fail:
#   # bug: ...
#   # target: TARGETS OF THE BUILD
#   # tests: REGULAR EXPRESSION OF CTEST
# First the same tests must pass without any bug. Prints a line per bug; fails if one survives, does not compile or no
# longer applies. A test that hangs counts as failed after 90 seconds. About twelve minutes on two cores, with ccache.
# Usage: tests/mutation/run.sh [--check | NAME...] (default: all; --check: only whether the patches apply)
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
copy=$root/build/mutation/tree
build=$copy/build/cpu
log=$root/build/mutation/log

header() { sed -n "s/^# $2: //p" "$1"; }  # PATCH KEY
applies() { patch --dry-run -s -p1 -d "$1" <"$2" >/dev/null; }

# Makes the copy equal to the tree: files that differ get a new time, so that they are built again.
sync_copy() {
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    [ -e "$file" ] || { rm -f "$copy/$file"; continue; }
    cmp -s "$file" "$copy/$file" || { mkdir -p "$copy/$(dirname "$file")"; cp "$file" "$copy/$file"; }
  done
}

run_tests() {  # REGEX
  ctest --test-dir "$build" --no-tests=error -j "$(nproc)" -R "$1" >>"$log" 2>&1
}

patches=()
for patch in tests/mutation/*.patch; do
  name=$(basename "$patch" .patch)
  if [ $# -eq 0 ] || [ "$1" = --check ] || [[ " $* " == *" $name "* ]]; then patches+=("$patch"); fi
done
[ ${#patches[@]} -gt 0 ] || { echo "no such patch in tests/mutation: $*" >&2; exit 2; }

stale=0
for patch in "${patches[@]}"; do
  for key in bug target tests; do
    [ -n "$(header "$patch" "$key")" ] || { echo "$patch: no line '# $key: ...'"; stale=1; }
  done
  applies "$root" "$patch" || { echo "$patch: no longer applies"; stale=1; }
done
[ $stale -eq 0 ] || exit 1
if [ "${1:-}" = --check ]; then echo "${#patches[@]} patches apply"; exit 0; fi

mkdir -p "$copy"
: >"$log"
sync_copy
launcher=()
if command -v ccache >/dev/null; then
  export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$root} CCACHE_NOHASHDIR=1
  launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
fi
(cd "$copy" && cmake --preset cpu -DBALLAST_UNIT_TEST_SECONDS=90 "${launcher[@]}") >>"$log" 2>&1
targets=$(for patch in "${patches[@]}"; do header "$patch" target | tr ' ' '\n'; done | sort -u)
# shellcheck disable=SC2086
cmake --build "$build" --target $targets >>"$log" 2>&1 || { echo "the tree does not build: $log"; exit 1; }
regex=$(for patch in "${patches[@]}"; do header "$patch" tests; done | sort -u | paste -sd '|')
run_tests "$regex" || { echo "tests fail without any bug: $log"; exit 1; }
for patch in "${patches[@]}"; do
  if ctest --test-dir "$build" -N -R "$(header "$patch" tests)" | grep -q 'Total Tests: 0'; then
    echo "$patch: no such tests"
    exit 1
  fi
done

survived=0
for patch in "${patches[@]}"; do
  name=$(basename "$patch" .patch)
  begin=$SECONDS
  sync_copy
  patch -s -p1 --no-backup-if-mismatch -d "$copy" <"$patch" >>"$log"
  # shellcheck disable=SC2046
  if ! cmake --build "$build" --target $(header "$patch" target) >>"$log" 2>&1; then
    verdict="DOES NOT COMPILE"
    survived=$((survived + 1))
  elif run_tests "$(header "$patch" tests)"; then
    verdict=SURVIVED
    survived=$((survived + 1))
  else
    verdict=KILLED
  fi
  printf '%-9s %3d s  %-28s %s\n' "$verdict" $((SECONDS - begin)) "$name" "$(header "$patch" bug)"
done
sync_copy
echo "${#patches[@]} bugs, $((${#patches[@]} - survived)) found, $survived not"
[ $survived -eq 0 ]
