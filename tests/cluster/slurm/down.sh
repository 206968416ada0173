#!/usr/bin/env bash
# down.sh DIR: ends the Slurm in DIR and everything that runs on its nodes; touches nothing else.
set -uo pipefail
dir=$(realpath "$1")

gone() { [ ! -d "/proc/$1" ] || grep -q '^State:[[:space:]]*[ZX]' "/proc/$1/status" 2>/dev/null; }

end() { # PID_FILE SIGNAL: and wait, at most five seconds before there is no more asking
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill "-$2" "$pid" 2>/dev/null
  for _ in $(seq 50); do gone "$pid" && break; sleep 0.1; done
  gone "$pid" || kill -KILL "$pid" 2>/dev/null
  rm -f "$1"
}

for switch in "$dir"/run/node*.pid; do end "$switch" KILL; done
end "$dir/run/slurmctld.pid" TERM
end "$dir/munge/pid" TERM
exit 0
