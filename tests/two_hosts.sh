#!/usr/bin/env bash
# Two hosts, n1 and n2, on this machine, each with an address and a network of its own.
#
#     unshare --mount --pid --net --uts --fork --kill-child --mount-proc tests/two_hosts.sh FOLDER [COMMAND ...]
#
# All is in the namespaces that unshare makes, and gone with them: processes, networks, the lines of /etc/hosts. FOLDER
# gets a file "hosts" when they are there; then COMMAND runs beside them, until standard input is closed. Others join with
# nsenter --all --target PID, and run on a host with nsenter --net=/run/netns/n1. The cable of n1 is "port1".
set -eu
folder="$(realpath "$1")"
shift
mount --make-rprivate /
mount -t tmpfs none /run
mkdir -p /run/netns
hostname controller
printf '127.0.0.1 localhost\n10.77.0.254 controller\n10.77.0.1 n1\n10.77.0.2 n2\n' >"$folder/names"
mount --bind "$folder/names" /etc/hosts
ip link set lo up
ip link add bridge0 type bridge
ip addr add 10.77.0.254/24 dev bridge0
ip link set bridge0 up
for number in 1 2; do
    ip netns add "n$number"
    ip link add "port$number" type veth peer name eth0 netns "n$number"
    ip link set "port$number" master bridge0 up
    ip -n "n$number" addr add "10.77.0.$number/24" dev eth0
    ip -n "n$number" link set eth0 up
    ip -n "n$number" link set lo up
done
touch "$folder/hosts"
if (($#)); then "$@" </dev/null & fi
cat # until standard input is closed, as when the one who started this is gone
