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
cmake -S . -B "$build" -G Ninja -DPMPD_FUZZ=ON -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ >/dev/null
cmake --build "$build" >/dev/null
bin=$build/tests/fuzz
mkdir -p "$build/fuzz/seeds"
"$bin/fuzz_seeds" "$build/fuzz/seeds"
entries=("$@")
[ $# -gt 0 ] || mapfile -t entries < <(sed -n 's/^pmpd_fuzz(\([a-z_]*\).*/\1/p' tests/fuzz/CMakeLists.txt)
export TMPDIR=/dev/shm
[ -w "$TMPDIR" ] || TMPDIR=/tmp
TMPDIR=$(mktemp -d "$TMPDIR/pmpd-fuzz-run-XXXXXX")
trap 'rm -rf "$TMPDIR"' EXIT

total=0 bad=0
printf '%-16s %12s %8s %13s %7s\n' entry executions exec/s 'coverage' crashes
for e in "${entries[@]}"; do
    work=$build/fuzz/$e log=$build/fuzz/$e.log
    mkdir -p "$work/corpus" "$work/finds"
    dict=tests/fuzz/dict/$e.dict
    case $e in config | model | safetensors | shards | prompts | windows) dict=tests/fuzz/dict/json.dict ;; esac
    folders=("$work/corpus" "tests/fuzz/corpus/$e" "$build/fuzz/seeds/$e")
    for i in "${!folders[@]}"; do [ -d "${folders[$i]}" ] || unset "folders[$i]"; done
    options=(-max_total_time="$seconds" -max_len=16384 -malloc_limit_mb=64 -timeout=5 -report_slow_units=1
             -print_final_stats=1 -artifact_prefix="$work/finds/")
    [ -f "$dict" ] && options+=(-dict="$dict")
    "$bin/fuzz_$e" "${options[@]}" "${folders[@]}" >"$log" 2>&1 || true
    n=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")
    crashes=$(find "$work/finds" -type f -newer "$bin/fuzz_$e" | grep -c . || true)
    cover=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | sed -n '1p;$p' | paste -sd' ' | sed 's/ / -> /')
    printf '%-16s %12s %8s %13s %7s\n' "$e" "${n:-?}" "${rate:-?}" "$cover" "$crashes"
    total=$((total + ${n:-0})) bad=$((bad + crashes))
done
printf '%-16s %12s %8s %13s %7s\n' all "$total" '' '' "$bad"
[ "$bad" -eq 0 ]
