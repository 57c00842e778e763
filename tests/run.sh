#!/bin/bash
# Installs what the tests need, builds moed and runs its tests: from a bare Debian 12 to one line of totals.
set -euo pipefail

usage() {
    cat <<'END'
Usage: tests/run.sh [OPTION]... [-- CONFIGURE-OPTION...]
Builds moed outside its sources and runs all tests. The last line of output is "N passed, N failed, N skipped": single
test points of all test programs, as they report them. Exit status 0 if none failed.

  --sanitize asan|tsan  build with AddressSanitizer and UndefinedBehaviorSanitizer, or with ThreadSanitizer
  --build-dir DIR       where to build (default: build-test, build-asan or build-tsan beside the sources)
  --tests "NAME..."     run only these programs, such as "attention_test tests/unit/gguf_test"
  --no-install          install no packages
  --help                this text
END
}

die() {
    echo "tests/run.sh: $*" >&2
    exit 1
}

sanitize=
build_dir=
tests=
install=yes
configure_options=()
while [ $# -gt 0 ]; do
    case $1 in
    --sanitize)
        sanitize=${2-}
        [ "$sanitize" = asan ] || [ "$sanitize" = tsan ] || die "--sanitize is asan or tsan, not '$sanitize'"
        shift
        ;;
    --build-dir)
        [ -n "${2-}" ] || die "--build-dir needs a directory"
        build_dir=$(realpath -m -- "$2")
        shift
        ;;
    --tests)
        [ -n "${2-}" ] || die "--tests needs the names of test programs"
        tests=$2
        shift
        ;;
    --no-install) install= ;;
    --help)
        usage
        exit 0
        ;;
    --)
        shift
        configure_options=("$@")
        break
        ;;
    *) die "unknown option '$1', see --help" ;;
    esac
    shift
done

exec </dev/null
cd "$(dirname "$0")/.."
sources=$PWD
case $sanitize in
# CUDA's driver and the sanitizers' shadow memory do not get along.
asan) configure_options=(--enable-asan --enable-ubsan --without-cuda CFLAGS="-O1 -g" "${configure_options[@]}") ;;
tsan) configure_options=(--enable-tsan --without-cuda CFLAGS="-O1 -g" "${configure_options[@]}") ;;
esac
build_dir=${build_dir:-$sources/build-${sanitize:-test}}

[ -z "$install" ] || deploy/dependencies.sh build test
echo "building in $build_dir"
[ -x configure ] && [ configure -nt configure.ac ] || autoreconf -fi >/dev/null 2>&1 || autoreconf -fi ||
    die "autoreconf failed"
mkdir -p "$build_dir"
cd "$build_dir"
rm -f test-suite.log
"$sources/configure" --quiet "${configure_options[@]}" || die "configure failed, see $build_dir/config.log"
jobs=$(nproc)
make -s -j"$jobs" || die "the build failed"

status=0
make -s -j"$jobs" -k check VERBOSE=1 ${tests:+TESTS="$tests"} || status=1
[ -s test-suite.log ] || die "the tests could not be built"
awk -v status="$status" '
    /^# (PASS|XFAIL|FAIL|XPASS|ERROR|SKIP): / { sub(":", "", $2); count[$2] += $3 }
    END {
        failed = count["FAIL"] + count["XPASS"] + count["ERROR"]
        printf "%d passed, %d failed, %d skipped\n", count["PASS"] + count["XFAIL"], failed, count["SKIP"]
        exit failed > 0 || status
    }' test-suite.log
