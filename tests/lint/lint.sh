#!/usr/bin/env bash
# Rules that the compiler does not know: which folder may include which, that every test program is built
# and run, an SPDX line in every source, the format (where clang-format 14 is at hand).
# usage: lint.sh rules | format
set -uo pipefail
cd "$(dirname "$0")/../.."
failed=0
complain() { printf 'lint: %s\n' "$*" >&2; failed=1; }

rules() {
    local f bad
    while read -r folder allowed; do
        bad=$(grep -nE '^#include "' "$folder"/*.[ch] | grep -vE "#include \"($allowed)/" || true)
        [ -z "$bad" ] || complain "$folder includes only $allowed:"$'\n'"$bad"
    done <<'ARROWS'
core core
kernels core|kernels
dist core|dist
sched core|sched
ARROWS
    bad=$(grep -nE '#include <(mpi|nccl|cuda.*)\.h>' core/*.[ch] kernels/*.[ch] sched/*.[ch] || true)
    [ -z "$bad" ] || complain "only dist knows MPI and NCCL, only kernels' .cu files CUDA:"$'\n'"$bad"
    for f in tests/unit/*.c tests/ops/*.c tests/mpi/*.c; do
        grep -qE "(unit|ops|mpi)/$(basename "$f")" tests/CMakeLists.txt || complain "$f is not built by tests/CMakeLists.txt"
    done
    for f in tests/fuzz/fuzz_*.c; do
        grep -q LLVMFuzzerTestOneInput "$f" || continue
        f=$(basename "$f" .c)
        grep -qE "^pmpd_fuzz\(${f#fuzz_}\>" tests/fuzz/CMakeLists.txt || complain "$f is not built by tests/fuzz/CMakeLists.txt"
        [ -n "$(ls "tests/fuzz/corpus/${f#fuzz_}" 2>/dev/null)" ] || complain "$f has no inputs in tests/fuzz/corpus"
    done
    for f in tests/e2e/test_*.py; do
        f=$(basename "$f" .py)
        grep -qE "foreach\(name.*\<${f#test_}\>" tests/CMakeLists.txt || complain "$f is not run by tests/CMakeLists.txt"
    done
    for f in $(git ls-files '*.c' '*.h' '*.cc' '*.cu' 2>/dev/null); do
        grep -q 'SPDX-License-Identifier: Apache-2.0' "$f" || complain "$f has no SPDX line"
    done
    bad=$(grep -nE '\bassert\(|\bexit\(' core/*.c kernels/*.c dist/*.c sched/*.c | grep -vE '_exit\(|//' || true)
    [ -z "$bad" ] || complain "libraries neither assert nor exit:"$'\n'"$bad"
}

format() {
    clang-format --version 2>/dev/null | grep -q 'version 14' || { echo "no clang-format 14"; exit 77; }
    for f in $(git ls-files '*.c' '*.h' 2>/dev/null); do
        clang-format "$f" | cmp -s - "$f" || complain "$f: clang-format -i $f"
    done
}

"$1"
exit $failed
