#!/usr/bin/env bash
# node_up.sh DIR NODE: boots one node of the Slurm in DIR. DIR/run/NODE.pid is its power switch (kill -9).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(realpath "$1") node=$2
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/slurm.conf
mkdir -p "$dir/spool/$node"

# The node's process 1: its own name and hosts file, and slurmd brought back as systemd would.
# shellcheck disable=SC2016  # expanded in there
boot='hostname "$1" && mount --bind "$2/hosts" /etc/hosts || exit 1
while :; do slurmd -D -N "$1"; sleep 1; done'
setsid "$here/isolated.sh" bash -c "$boot" boot "$node" "$dir" </dev/null >>"$dir/log/$node.boot" 2>&1 &
echo $! >"$dir/run/$node.pid"
