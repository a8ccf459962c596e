#!/usr/bin/env bash
# Several hosts on one machine, to cut cables and to kill hosts.
#   hosts.sh N COMMAND [ARGUMENT]...   runs COMMAND in a world of its own with hosts h1..hN
# and, in there:
#   hosts.sh mpirun ARGUMENT...        Open MPI's mpirun on h1, one slot on every host
#   hosts.sh on I COMMAND...           COMMAND on host I
#   hosts.sh pids I                    processes of host I
#   hosts.sh kill I                    SIGKILL to all of them: the host dies
#   hosts.sh cut I | heal I            its cable: nothing comes through, nobody is told
# A host is a network namespace with a host name, a TMPDIR and mounts of its own; where HOSTS_FIRST_ONLY names
# a folder, the other hosts see an empty read-only one there. The world is a PID, mount and network namespace:
# nothing of it (names, addresses, mounts, processes) can be seen from outside or clash with anything there, and the
# kernel takes it all away when COMMAND ends or this script is killed.
# Needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN), iproute2 and util-linux; exit code 77 where they are missing.
set -euo pipefail

here=$(readlink -f "$0")
world=/run/hosts # in a mount namespace of the world's own
net=10.77.0

refuse() { echo "hosts.sh: $*" >&2; exit 2; }
usage() { sed -n '2,14s/^# \?//p' "$here" >&2; exit 2; }

make_world() { # N COMMAND...: the first process of the new namespaces
    local n=$1 i
    shift
    mount -t tmpfs tmpfs /run
    ip link set lo up
    mkdir -p $world /run/netns
    echo "$n" >$world/n
    ip netns add switch
    ip -n switch link add bridge type bridge
    ip -n switch link set bridge up
    for ((i = 1; i <= n; i++)); do
        ip netns add h$i
        ip -n switch link add port$i type veth peer name eth0 netns h$i
        ip -n switch link set port$i master bridge up
        ip -n h$i addr add $net.$i/24 dev eth0
        ip -n h$i link set eth0 up
        ip -n h$i link set lo up
        mkdir -p $world/tmp$i
        echo "$net.$i h$i" >>$world/names
        echo "h$i slots=1" >>$world/hostfile
    done
    echo "127.0.0.1 localhost" >>$world/names
    mount --bind $world/names /etc/hosts
    # mpirun's remote shell: agent [-OPTION]... HOST COMMAND...
    printf '#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do shift; done\nh=$1; shift\nexec "%s" on "${h#h}" /bin/sh -c "$*"\n' \
        "$here" >$world/agent
    chmod +x $world/agent
    PMPD_HOSTS=$n exec "$@"
}

on_host() { # I COMMAND...; ip netns exec has made a mount namespace
    local i=$1
    shift
    hostname "h$i"
    if [ -n "${HOSTS_FIRST_ONLY:-}" ] && [ "$i" != 1 ]; then
        mount -t tmpfs -o ro,size=4k tmpfs "$HOSTS_FIRST_ONLY"
    fi
    TMPDIR=$world/tmp$i exec "$@"
}

in_world() {
    [ -n "${PMPD_HOSTS:-}" ] && [ -f $world/n ] || refuse "$1 works inside: hosts.sh N COMMAND..."
}

check_host() { [[ ${1:-} =~ ^[1-9][0-9]*$ ]] && [ "$1" -le "$(cat $world/n)" ] || refuse "there is no host \"${1:-}\""; }

[ $# -ge 1 ] || usage
case $1 in
[1-9])
    [ $# -ge 2 ] || usage
    for tool in unshare ip mount hostname; do
        command -v $tool >/dev/null || { echo "hosts.sh: no $tool here"; exit 77; }
    done
    unshare --net --mount --pid --fork true 2>/dev/null || { echo "hosts.sh: may not make namespaces (needs root)"; exit 77; }
    exec unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc "$here" _world "$@"
    ;;
_world) shift; make_world "$@" ;;
_on) shift; on_host "$@" ;;
on)
    in_world on
    check_host "${2:-}"
    shift
    exec ip netns exec "h$1" unshare --uts "$here" _on "$@"
    ;;
mpirun)
    in_world mpirun
    shift
    exec "$here" on 1 mpirun --hostfile $world/hostfile --mca plm rsh --mca plm_rsh_agent $world/agent \
        --mca plm_rsh_no_tree_spawn 1 --mca btl self,tcp "$@"
    ;;
pids | kill | cut | heal)
    in_world "$1"
    check_host "${2:-}"
    case $1 in
    pids) ip netns pids "h$2" ;;
    kill) ip netns pids "h$2" | xargs -r kill -9 ;;
    cut) ip -n switch link set "port$2" down ;;
    heal)
        ip -n switch link set "port$2" up
        # the kernel takes up to a second to use the link again: wait for an answer, be it a refusal
        peer=$net.$(($2 == 1 ? 2 : 1))
        for ((i = 0; i < 10; i++)); do
            code=0
            "$here" on "$2" timeout 1 bash -c ": </dev/tcp/$peer/9" 2>/dev/null || code=$?
            [ $code = 124 ] || break
        done
        [ $i -lt 10 ] || { echo "hosts.sh: the link of host $2 stays dead" >&2; exit 1; }
        ;;
    esac
    ;;
*) usage ;;
esac
