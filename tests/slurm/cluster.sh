#!/usr/bin/env bash
# A real Slurm cluster on this host alone: munged, slurmctld and several slurmd, each a node of its own,
# without systemd and cgroups. Everything lives in the folder DIR, with sockets, ports and a key of its
# own, so it stands beside any cluster that the host belongs to. As root.
# usage: cluster.sh install            Debian's packages, where they are missing
#        cluster.sh up DIR [NODES]     starts it; then: export SLURM_CONF=DIR/slurm.conf
#        cluster.sh kill-node DIR NODE like a power cut: its slurmd and all that runs on it, by SIGKILL
#        cluster.sh down DIR           stops what `up` started and what ran on it, removes DIR
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cpus_per_node=2 # more than the host may have: the nodes share it

complain() { printf 'cluster.sh: %s\n' "$*" >&2; }

installed() {
    local program
    for program in munged munge slurmctld slurmd sbatch; do
        PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || return 1
    done
}

install() {
    if installed; then
        return
    fi
    command -v apt-get >/dev/null || { complain "Slurm is not installed, and there is no apt-get"; return 1; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 slurm-wlm slurm-client munge >/dev/null
    installed || { complain "the packages slurm-wlm, slurm-client and munge did not bring all programs"; return 1; }
}

# A port that nobody listens on.
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 10000))
        if [[ " ${ports_taken:-} " != *" $port "* ]] && ! (: <>/dev/tcp/127.0.0.1/$port) 2>/dev/null; then
            ports_taken="${ports_taken:-} $port"
            found_port=$port
            return
        fi
    done
}

write_conf() {
    local host port_ctld i
    host=$(hostname -s)
    free_port
    port_ctld=$found_port
    free_port
    # TmpFS: the fake nodes share one /tmp, and PMIx wants a folder per node.
    # SlurmdTimeout, KillWait: short, so that a dead node and a deaf job are given up soon.
    cat >"$dir/slurm.conf" <<CONF
ClusterName=pmpd
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port_ctld
SlurmdPort=$found_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
TmpFS=$dir/tmp.%n
SlurmctldPidFile=$dir/pid/slurmctld
SlurmdPidFile=$dir/pid/slurmd.%n
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=10
MinJobAge=600
SlurmctldTimeout=10
SlurmdTimeout=5
CONF
    for i in $(seq "$nodes"); do
        free_port
        mkdir -p "$dir/spool.node$i" "$dir/tmp.node$i"
        echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$found_port CPUs=$cpus_per_node" \
            "RealMemory=1000 State=UNKNOWN" >>"$dir/slurm.conf"
    done
    echo "PartitionName=main Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP" >>"$dir/slurm.conf"
}

start_munge() {
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
    # --force: root owns everything here
    munged --force --num-threads=2 --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
        --pid-file="$dir/pid/munged" --log-file="$dir/log/munged" --seed-file="$dir/munge/seed"
    munge --socket="$dir/munge/socket" -n </dev/null >/dev/null
}

up() {
    local i idle
    mkdir -p "$dir"/{munge,state,log,pid}
    chmod 755 "$dir" "$dir/munge"
    write_conf
    start_munge
    slurmctld -i -f "$dir/slurm.conf"
    for i in $(seq "$nodes"); do
        slurmd -N "node$i" -f "$dir/slurm.conf"
    done
    for _ in $(seq 240); do
        idle=$(sinfo -h -N -o %T 2>/dev/null | grep -c '^idle$' || true)
        if [ "$idle" -ge "$nodes" ]; then
            return
        fi
        sleep 0.25
    done
    complain "the cluster did not come up within 60 s"
    tail -n 5 "$dir"/log/* >&2
    return 1
}

# Processes of this cluster, or of one node of it: daemons and slurmstepd are known by the log they hold
# open, what they started by its environment.
processes() { # [NODE]
    local node=${1:-} pid
    grep -lzx "SLURM_CONF=$dir/slurm.conf" /proc/[0-9]*/environ 2>/dev/null |
        xargs -r grep -lzxE "SLURMD_NODENAME=${node:-.*}" 2>/dev/null | cut -d/ -f3 || true
    for pid in $(pgrep '^(slurm|munged)'); do
        if readlink "/proc/$pid"/fd/* 2>/dev/null | grep -q "^$dir/log/.*$node\$"; then
            echo "$pid"
        fi
    done
}

kill_all() { # [NODE]
    local pids
    for _ in 1 2 3 4 5; do # what is being started right now is seen the next time
        pids=$(processes "$@")
        [ -n "$pids" ] || return 0
        # shellcheck disable=SC2086
        kill -KILL $pids 2>/dev/null || true
        sleep 0.1
    done
    complain "still there: $pids"
    return 1
}

down() {
    kill_all
    rm -rf "$dir"
}

what=${1:-}
dir=$(realpath -m "${2:-/nowhere}")
nodes=${3:-4}
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin
case $what:$# in
install:1) install ;;
up:2 | up:3) up ;;
kill-node:3) kill_all "$3" ;;
down:2) down ;;
*)
    sed -n '/^# usage/,/^# SPDX/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# //' >&2
    exit 2
    ;;
esac
