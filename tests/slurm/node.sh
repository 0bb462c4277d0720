#!/usr/bin/env bash
# First process of a node's namespaces: node.sh NAME ADDRESS
set -eu
hostname "$1"
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip addr add "$2/24" dev eth0
ip link set eth0 up
slurmd -D -N "$1" &
while :; do wait -n || sleep 0.1; done # also reaps processes whose parent has died
