#!/bin/sh
# Holds every #include against the arrows between the folders: who may name whom (ARCHITECTURE.md).
# arrows.sh [DIR]; without DIR the source tree of the running `make check`.
set -u
cd "${1:-${top_srcdir:-.}}" || exit 99

# The folder that an include names, "-" for a system header, or the complaint about its form.
target_of() {
    case $1 in
    '"config.h"') echo - ;;
    '"'*.pb-c.h'"') echo proto ;; # generated; their directory is on the include path
    '"'*../*) echo "a relative path" ;;
    '"'*/*) target=${1#\"}; echo "${target%%/*}" ;;
    '"'*) echo "no folder" ;;
    *) echo - ;;
    esac
}

# check FOLDER ALLOWED...: prints a line for each include that is not allowed.
check() {
    folder=$1
    [ -d "$folder" ] || return 0
    shift
    find "$folder" -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc' ! -name Makefile.inc | sort |
        xargs grep -HnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*["<]' /dev/null |
        sed -nE 's/^([^:]*:[0-9]+):[[:space:]]*#[[:space:]]*include[[:space:]]*(["<][^">]*[">]).*/\1 \2/p' |
        while read -r place include; do
            target=$(target_of "$include")
            allowed=no
            for name in - "$folder" "$@"; do
                [ "$target" = "$name" ] && allowed=yes
            done
            [ $allowed = yes ] || echo "# $place: $include names $target; $folder may name: $folder${*:+ $*}"
        done
}

number=0
failed=0
report() {
    number=$((number + 1))
    complaints=$(check "$@")
    if [ -z "$complaints" ]; then
        echo "ok $number - $1"
    else
        echo "not ok $number - $1"
        echo "$complaints"
        failed=1
    fi
}

echo 1..6
report proto
report common
report kernels
report client proto common
report gateway proto common
report worker proto common kernels
exit $failed
