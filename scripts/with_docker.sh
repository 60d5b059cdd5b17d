#!/usr/bin/env bash
# Run a command with a container engine: scripts/with_docker.sh COMMAND ARGUMENTS...
#
# An engine that answers already is used as it is. Otherwise a dockerd of this script's own is started (as root, with
# docker.io installed), and stopped when the command is done: its containers, networks, mounts and files go with it.
# Its containers reach each other and not the world: it leaves the machine's firewall alone. So WHEELHOUSE=1 is set.
#
#   FOREBAY_DOCKER_DIR   folder for that engine's images, kept for the next time (default: a temporary one)
set -euo pipefail

START_TIMEOUT_S=60
STOP_TIMEOUT_S=60

if [ $# -eq 0 ]; then
    sed -n '2,/^set/{/^#/s/^# \?//p}' "$0" >&2
    exit 2
fi
if docker info > /dev/null 2>&1; then exec "$@"; fi
for program in dockerd docker; do
    command -v "$program" > /dev/null || { echo "no engine answers, and there is no $program to start one" >&2; exit 1; }
done

run=$(mktemp -d)  # sockets, pids and the log: short, for the path of a socket is
data=${FOREBAY_DOCKER_DIR:-$run/data}
mkdir -p "$data"
export DOCKER_HOST=unix://$run/docker.sock
export WHEELHOUSE=${WHEELHOUSE-1}
bridge=$(test -e /sys/class/net/docker0 && echo there || true)

# In a session of its own: a Ctrl-C is the command's, and the engine ends after it.
setsid dockerd --iptables=false --ip-masq=false --data-root "$data" --exec-root "$run/exec" \
    --pidfile "$run/dockerd.pid" --host "$DOCKER_HOST" > "$run/log" 2>&1 &
engine=$!

failed() { tail -20 "$run/log" >&2; echo "$1" >&2; exit 1; }

stop() {
    local status=$?
    trap - EXIT
    if docker info > /dev/null 2>&1; then
        docker ps --all --quiet | xargs --no-run-if-empty docker rm --force --volumes > /dev/null || true
        docker network prune --force > /dev/null || true
    fi
    kill "$engine" 2> /dev/null || true
    # It ends containerd itself, and gives its mounts back.
    if ! timeout "$STOP_TIMEOUT_S" tail --pid="$engine" -f /dev/null; then
        echo "dockerd ($engine) does not end; its files stay in $run" >&2
        exit 1
    fi
    if [ -z "$bridge" ] && command -v ip > /dev/null; then ip link delete docker0 2> /dev/null || true; fi
    awk -v run="$run/" -v data="$data/" 'index($2, run) == 1 || index($2, data) == 1 { print $2 }' /proc/mounts |
        sort -r | xargs --no-run-if-empty umount
    rm -rf "$run"
    exit "$status"
}
trap stop EXIT

waited=0
until docker info > /dev/null 2>&1; do
    kill -0 "$engine" 2> /dev/null || failed "dockerd could not be started"
    [ $((waited += 1)) -le "$START_TIMEOUT_S" ] || failed "dockerd does not answer after $START_TIMEOUT_S s"
    sleep 1
done
"$@"
