#!/bin/sh
# bundle.sh DIR PROGRAM...: makes DIR a tree that runs on any machine with the same or a newer glibc, wherever it is
# put: the programs in bin/, and in lib/ every shared library they need but those of glibc and of the GPU's driver,
# which belong to the machine. The programs find lib/ relative to themselves.
set -eu
dir=$1
shift
if ! command -v patchelf >/dev/null; then
    echo "bundle.sh: patchelf is missing: deploy/dependencies.sh bundle installs it" >&2
    exit 1
fi

# Of the machine: the kernel's, glibc's, the driver's.
is_of_the_machine() {
    case ${1##*/} in
    linux-vdso.so.* | ld-linux*.so.* | libc.so.* | libm.so.* | libmvec.so.* | libdl.so.* | libpthread.so.* | librt.so.* | \
        libresolv.so.* | libutil.so.* | libnsl.so.* | libanl.so.* | libcuda.so.* | libnvidia-*) return 0 ;;
    esac
    return 1
}

rm -rf "$dir"
mkdir -p "$dir/bin" "$dir/lib"
for program; do
    needed=$(ldd "$program")
    case $needed in
    *'not found'*)
        echo "$program: $needed" >&2
        exit 1
        ;;
    esac
    for library in $(echo "$needed" | sed -n 's/.* => \(\/[^ ]*\) (.*/\1/p'); do
        is_of_the_machine "$library" || [ -e "$dir/lib/${library##*/}" ] || cp -L "$library" "$dir/lib/"
    done
    cp "$program" "$dir/bin/"
done

# DT_RPATH, not DT_RUNPATH: it holds for the libraries' own libraries, too.
for program in "$dir"/bin/*; do
    patchelf --force-rpath --set-rpath '$ORIGIN/../lib' "$program"
done

# Nothing may come from outside now.
for program in "$dir"/bin/*; do
    for library in $(ldd "$program" | sed -n 's/.* => \([^ ]*\).*/\1/p'); do
        is_of_the_machine "$library" && continue
        case $(readlink -f "$library") in
        "$(readlink -f "$dir")"/*) ;;
        *)
            echo "$program: $library is not of the bundle" >&2
            exit 1
            ;;
        esac
    done
done
