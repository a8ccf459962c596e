#!/usr/bin/env bash
# On a machine with a GPU: builds core's base and the kernels alone (CMake, nvcc and a C compiler; no MPI,
# HDF5 or libconfig), runs every operation on the device against cpu_ref, compute-sanitizer on a part of
# them, then the timing table. Without a GPU it builds everything and says so.
# usage: tests/gpu/run.sh [BUILD]        exit code: 0 all passed, 77 no GPU, else a failure
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-build-gpu}
command -v cmake >/dev/null || { echo "tests/gpu/run.sh: no cmake: install it (apt-get install cmake)" >&2; exit 1; }
cmake -S . -B "$build" -DPMPD_KERNELS_ONLY=ON -DPMPD_CUDA=ON -DPMPD_WERROR=ON >/dev/null
cmake --build "$build" -j "$(nproc)"

run() {
    echo "== $*"
    "$@"
}
status=0
run "$build/tests/test_ops" --backend cuda || status=$?
if [ "$status" -eq 77 ]; then
    echo "no GPU here: built for all architectures, nothing run"
    exit 77
fi
[ "$status" -eq 0 ] || exit "$status"
run "$build/tests/test_nested" --backend cuda
run "$build/tests/test_ops" --backend cuda-emulated
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
        run compute-sanitizer --tool "$tool" --error-exitcode 9 "$build/tests/test_ops" --backend cuda --quick
    done
else
    echo "no compute-sanitizer on this machine: left out"
fi
run "$build/tests/gpu_timing"
