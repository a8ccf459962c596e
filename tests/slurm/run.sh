#!/usr/bin/env bash
# slurm/run.sbatch on a real Slurm: starts a cluster of four nodes on this host (cluster.sh), runs the
# cases, stops it. As root, about three minutes; skips (exit 77) without root or Slurm's packages.
# usage: run.sh [CASE...]     names of Jobs.test_* in cases.py, e.g. run.sh Jobs.test_srun
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PMPD_BUILD=${PMPD_BUILD:-$here/../../build}

if [ "$(id -u)" -ne 0 ]; then
    echo "skipped: a Slurm cluster needs root"
    exit 77
fi
if ! "$here/cluster.sh" install; then
    echo "skipped: Slurm cannot be installed here"
    exit 77
fi
# In a process namespace of its own nothing outlives the test, whatever happens to it.
if [ $$ -ne 1 ] && unshare --fork --pid --mount-proc --kill-child true 2>/dev/null; then
    exec unshare --fork --pid --mount-proc --kill-child "$0" "$@"
fi

state=$(mktemp -d /tmp/pmpd-slurm.XXXXXX) # short: sockets live there
end() {
    local code=$?
    trap - EXIT
    [ -z "${PMPD_SLURM_KEEP:-}" ] || cp -r "$state/log" "$PMPD_SLURM_KEEP"; "$here/cluster.sh" down "$state"
    exit $code
}
trap end EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
"$here/cluster.sh" up "$state" 4
export SLURM_CONF=$state/slurm.conf TMPDIR=$state PMPD_SLURM_STATE=$state
"$PMPD_BUILD/venv/bin/python" "$here/cases.py" "$@"
