#!/usr/bin/env bash
# Sets up a bare Debian 12 or Ubuntu 24.04: packages, the build in build/, a Python environment for
# the report and test scripts in build/venv. Nothing is fetched when everything is there already.
# Sourced by quickstart.sh and tests/run.sh, or run by hand. Without root it says what is missing.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${PMPD_BUILD:-$top/build}

packages=(gcc g++ cmake ninja-build pkg-config git ca-certificates python3 python3-venv openmpi-bin libopenmpi-dev
          libhdf5-dev libconfig-dev libjansson-dev libpcre2-dev libxxhash-dev libisal-dev libsentencepiece-dev
          libopenblas-dev)

say() { printf '== %s\n' "$*"; }

install_packages() {
    local missing=()
    for p in "${packages[@]}"; do
        dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
    done
    [ ${#missing[@]} -eq 0 ] && return
    if ! command -v apt-get >/dev/null; then
        echo "This is neither Debian nor Ubuntu; install what corresponds to: ${missing[*]}" >&2
        exit 1
    fi
    if [ "$(id -u)" -ne 0 ]; then
        echo "Packages are missing and this is not root. Have an administrator run:" >&2
        echo "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    say "installing ${#missing[@]} packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}" >/dev/null
}

make_venv() {
    local want=$top/experiments/report/requirements.txt stamp=$build/venv/requirements.done
    cmp -s "$want" "$stamp" && return
    say "making the Python environment in $build/venv"
    local python=/usr/bin/python3
    [ -x "$python" ] || python=python3
    "$python" -m venv "$build/venv"
    "$build/venv/bin/pip" install --quiet --disable-pip-version-check -r "$want"
    cp "$want" "$stamp"
}

build_pmpd() {
    say "building pmpd in $build"
    cmake -S "$top" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPMPD_WERROR=ON >"$build/configure.log" ||
        { cat "$build/configure.log" >&2; exit 1; }
    cmake --build "$build" >"$build/build.log" || { tail -n 60 "$build/build.log" >&2; exit 1; }
}

# Open MPI on one machine: allowed for root, more ranks than cores, ranks not bound to one core each,
# and ranks and threads that wait give the core away.
mpi_on_one_machine() {
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
    export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none
    export OMP_WAIT_POLICY=passive
}

mkdir -p "$build"
install_packages
build_pmpd
make_venv
mpi_on_one_machine
pmpd=$build/pmpd
python=$build/venv/bin/python
