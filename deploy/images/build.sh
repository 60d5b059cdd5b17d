#!/usr/bin/env bash
# Build our images: deploy/images/build.sh [api] [cpu] [cuda] [served]. The default is api and cpu.
#
#   WHEELHOUSE=1   fetch the packages with this machine's pip and its configuration, and build without a network
#   PYTHON         the Python 3.11 whose pip that is (default .venv/bin/python)
#   DOCKER_FLAGS   further options of docker build
#   VERSION        of Forebay (default: from git's tags, or 0 if PYTHON has no setuptools-scm)
#   PUSH           a registry's folder, such as ghcr.io/OWNER, to which each image is pushed under the names that the Helm
#                  chart asks for: forebay-api:VERSION, forebay-inference:VERSION-cpu
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-${VENV:-.venv}/bin/python}
revision=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
version=${VERSION:-$("$PYTHON" -m setuptools_scm 2> /dev/null || echo 0)}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

wheelhouse() {  # wheelhouse LOCK: an image with every package of it, checked against its hashes; prints its name
    local folder=$scratch/$1 name=forebay-wheels:$1
    "$PYTHON" -m pip download --quiet --require-hashes --only-binary :all: --no-binary nkeys --no-deps \
        -r constraints/build.lock -r "constraints/$1.lock" -d "$folder" >&2 || return
    printf 'FROM scratch\nCOPY . /\n' | docker build --quiet -t "$name" -f - "$folder" > /dev/null || return
    rm -rf "$folder"
    echo "$name"
}

build() {  # build NAME FILE LOCK OPTIONS...
    local wheels options=(--label "org.opencontainers.image.created=$(date -u +%FT%TZ)")
    if [ -n "${WHEELHOUSE:-}" ]; then
        wheels=$(wheelhouse "$3")
        options+=(--build-arg "WHEELS=$wheels")
    fi
    # shellcheck disable=SC2086
    docker build ${DOCKER_FLAGS:-} --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
        "${options[@]}" "${@:4}" -t "$1" -f "deploy/images/$2.Dockerfile" .
    if [ -n "${PUSH:-}" ]; then
        local variant=-${1#*:}
        local name=$PUSH/${1%:*}:${version//+/_}${variant#-latest}  # a tag has no +
        docker tag "$1" "$name" && docker push --quiet "$name"
    fi
}

for image in "${@:-api cpu}"; do
    for variant in $image; do
        case $variant in
            api) build forebay-api:latest api api ;;
            cpu | cuda | served)
                build "forebay-inference:$variant" inference "inference-$variant" --build-arg "VARIANT=$variant" ;;
            *) echo "no image of ours: $variant (api, cpu, cuda, served)" >&2; exit 2 ;;
        esac
    done
done
