#!/bin/bash
# Usage: deploy/dependencies.sh [build] [test] [bundle]
#
# Installs the Debian packages (12, and its kin) that moed needs to be built, tested and bundled: the one list of them.
# What each is for stands in CONTRIBUTING.md. Does nothing where they are all there.
set -euo pipefail

build=(gcc libc6-dev make autoconf automake pkg-config
       libgrpc-dev libprotobuf-c-dev protobuf-c-compiler protobuf-compiler libprotobuf-dev grpc-proto libzmq3-dev
       libjansson-dev libmicrohttpd-dev)
test=(libcmocka-dev python3-numpy openssl)
bundle=(patchelf)

packages=()
for group in "${@:-build}"; do
    case $group in
    build) packages+=("${build[@]}") ;;
    test) packages+=("${test[@]}") ;;
    bundle) packages+=("${bundle[@]}") ;;
    *)
        echo "dependencies.sh: no group of packages '$group': build, test or bundle is expected" >&2
        exit 2
        ;;
    esac
done

if ! command -v apt-get >/dev/null; then
    echo "dependencies.sh: no apt-get here: install by hand what Debian calls ${packages[*]}" >&2
    exit 1
fi

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
    if ! command -v sudo >/dev/null; then
        echo "dependencies.sh: neither root nor sudo here: have these packages installed: ${missing[*]}" >&2
        exit 1
    fi
fi
echo "installing ${missing[*]}"
install() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 "$@" </dev/null
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { install update && install install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    cat "$log" >&2
    echo "dependencies.sh: apt-get failed, see above" >&2
    exit 1
fi
