#!/usr/bin/env bash
# First process of the controller's namespaces: head.sh FOLDER
set -eu
folder=$1
hostname head
mount -t proc proc /proc
mount -t tmpfs tmpfs "$folder/bin" # sbatch exports PATH into jobs: there they must find Slurm's own commands
mount --bind "$folder/hosts" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
ip link set lo up
ip link add cluster type bridge
ip addr add 10.77.0.1/24 dev cluster
ip link set cluster up
munged --force --socket="$folder/munge.sock" --key-file="$folder/munge.key" --log-file="$folder/munged.log" \
    --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed"
slurmctld -D -c -i &
touch "$folder/head.up"
while :; do wait -n || sleep 0.1; done # also reaps processes whose parent has died
