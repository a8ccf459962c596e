#!/usr/bin/env bash
# Fuzzes every entry for so many seconds, one after the other, and prints a table. Needs clang with its
# runtime (Debian: clang libclang-rt-14-dev libomp-dev). Finds are kept in the build folder.
# usage: run.sh SECONDS [ENTRY...]      PMPD_BUILD: the build folder, by default build-fuzz
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
seconds=$1
shift
build=${PMPD_BUILD:-$PWD/build-fuzz}
command -v clang++ >/dev/null || { echo "clang++ is not there: install clang, libclang-rt-14-dev and libomp-dev" >&2; exit 1; }
mkdir -p "$build/fuzz/seeds"
{ cmake -S . -B "$build" -G Ninja -DPMPD_FUZZ=ON -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ &&
    cmake --build "$build" --target fuzz_entries; } >"$build/fuzz/build.log" 2>&1 ||
    { tail -n 40 "$build/fuzz/build.log" >&2; exit 1; }
bin=$build/tests/fuzz
"$bin/fuzz_seeds" "$build/fuzz/seeds"
entries=("$@")
[ $# -gt 0 ] || mapfile -t entries < <(sed -n 's/^pmpd_fuzz(\([a-z_]*\).*/\1/p' tests/fuzz/CMakeLists.txt)
export TMPDIR=/dev/shm
[ -w "$TMPDIR" ] || TMPDIR=/tmp
TMPDIR=$(mktemp -d "$TMPDIR/pmpd-fuzz-run-XXXXXX")
trap 'rm -rf "$TMPDIR"' EXIT
total=0 bad=0

fuzz() { # ENTRY
    local work=$build/fuzz/$1 log=$build/fuzz/$1.log dict=tests/fuzz/dict/$1.dict n rate cover crashes
    mkdir -p "$work/corpus" "$work/finds" "$build/fuzz/seeds/$1"
    local options=(-max_total_time="$seconds" -max_len=8192 -malloc_limit_mb=64 -timeout=5 -report_slow_units=1
                   -print_final_stats=1 -artifact_prefix="$work/finds/")
    [ -f "$dict" ] && options+=(-dict="$dict")
    touch "$work/started"
    "$bin/fuzz_$1" "${options[@]}" "$work/corpus" "tests/fuzz/corpus/$1" "$build/fuzz/seeds/$1" >"$log" 2>&1 || true
    n=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")
    cover=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | sed -n '1p;$p' | paste -sd' ' | sed 's/ / -> /')
    crashes=$(find "$work/finds" -type f -newer "$work/started" | grep -c . || true)
    printf '%-16s %12s %8s %15s %7s\n' "$1" "${n:-?}" "${rate:-?}" "$cover" "$crashes"
    total=$((total + ${n:-0})) bad=$((bad + crashes))
}

printf '%-16s %12s %8s %15s %7s\n' entry executions exec/s 'coverage' crashes
for e in "${entries[@]}"; do fuzz "$e"; done
printf '%-16s %12s %8s %15s %7s\n' all "$total" '' '' "$bad"
[ "$bad" -eq 0 ]
