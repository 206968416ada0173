#!/usr/bin/env bash
# isolated.sh COMMAND...: runs it as process 1 of its own process, mount and host-name namespaces; they end with it.
set -euo pipefail
flags=(--mount --uts --pid --fork --kill-child=KILL --mount-proc)
[ "$(id -u)" = 0 ] || flags=(--map-current-user --keep-caps "${flags[@]}") # then in a user namespace too
exec unshare "${flags[@]}" "$@"
