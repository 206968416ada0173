#!/usr/bin/env bash
# up.sh DIR [NODES] [CPUS_PER_NODE]: a real Slurm of NODES nodes on this machine, in about two seconds.
#
# Then `export SLURM_CONF=DIR/slurm.conf`. Each node lives in namespaces of its own (processes, mounts, host name):
# `kill -9 $(cat DIR/run/node2.pid)` cuts its power, `node_up.sh DIR node2` boots it, `down.sh DIR` ends everything.
# As root or not. Exit code 77: a program is missing, or the kernel forbids namespaces.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(realpath -m "$1") nodes=${2:-2} cpus=${3:-4}
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/slurm.conf

for program in munged slurmctld slurmd sbatch srun scontrol unshare; do
  command -v "$program" >/dev/null || { echo "$program is not installed" >&2; exit 77; }
done
"$here/isolated.sh" true 2>/dev/null || { echo "this kernel does not let us make namespaces" >&2; exit 77; }

mkdir -p "$dir"/{state,log,run,spool,munge}
chmod 0711 "$dir/munge"

# A row of ports (controller and nodes) that nobody listens on, below the range that the kernel hands out for outgoing
# connections. One of us chooses at a time, and keeps the others waiting until its daemons listen.
exec 9>"${TMPDIR:-/tmp}/distft-slurm-$(id -u).lock"
flock --timeout 60 9
free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
port=$((12000 + RANDOM % 600 * 10))
for _ in $(seq 100); do
  ok=1
  for offset in $(seq 0 "$nodes"); do free $((port + offset)) || ok=0; done
  [ $ok = 1 ] && break
  port=$((port + 10))
done

sed -e "s|@DIR@|$dir|g; s|@HOST@|$(hostname -s)|; s|@USER@|$(id -un)|g; s|@NODES@|$nodes|; s|@CPUS@|$cpus|" \
  -e "s|@PORT@|$port|g; s|@FIRST@|$((port + 1))|; s|@LAST@|$((port + nodes))|" "$here/slurm.conf.in" >"$SLURM_CONF"
# A GPU must be a device file; any will do, for nobody opens it.
echo "NodeName=node[1-$nodes] Name=gpu File=/dev/null,/dev/zero" >"$dir/gres.conf"
{ cat /etc/hosts; for i in $(seq "$nodes"); do echo "127.0.0.1 node$i"; done; } >"$dir/hosts"

[ -f "$dir/munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
munged --force --num-threads=2 --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
  --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" 9>&-
slurmctld -c 9>&-
for i in $(seq "$nodes"); do "$here/node_up.sh" "$dir" "node$i" 9>&-; done

for _ in $(seq 300); do # "idle*" is a node that has not answered yet
  [ "$(timeout 5 sinfo -h -N -p debug -o %T 2>/dev/null | grep -cx idle)" = "$nodes" ] && exit 0
  sleep 0.1
done
echo "Slurm did not come up in $dir" >&2
tail -n 20 "$dir"/log/*.log >&2
exit 1
