#!/bin/bash
# From a bare Debian 12 to tokens: installs, builds, makes a small model, starts a gateway and a worker, generates.
set -euo pipefail

usage() {
    cat <<'END'
Usage: deploy/quickstart.sh [OPTION]...
Installs what moed needs, builds it, makes a small model with random weights, starts a gateway and a worker and generates
a few tokens through them. May be run again at any time; processes that an earlier run left are stopped first.

  --keep        leave gateway and worker running
  --stop        stop what --keep left running, and do nothing else
  --port N      where the gateway listens, on 127.0.0.1 (default: 50051)
  --model FILE  serve this GGUF file instead of the small model
  --help        this text
END
}

fail() {
    echo "quickstart.sh: $*" >&2
    exit 1
}

# Says what a program's log ends in.
fail_with_log() {
    echo "quickstart.sh: $1; its log ends in:" >&2
    tail -n 5 "$2" | cut -c 1-500 >&2
    exit 1
}

keep=
stop_only=
port=50051
model=
while [ $# -gt 0 ]; do
    case $1 in
    --keep) keep=yes ;;
    --stop) stop_only=yes ;;
    --port)
        port=${2-}
        if ! [[ $port =~ ^[0-9]{1,5}$ ]] || [ "$port" -lt 1 ] || [ "$port" -gt 65535 ]; then
            fail "--port is a number from 1 to 65535, not '$port'"
        fi
        shift
        ;;
    --model)
        model=$(realpath -e -- "${2-}" 2>/dev/null) || fail "--model: there is no file '${2-}'"
        shift
        ;;
    --help)
        usage
        exit 0
        ;;
    *) fail "unknown option '$1', see --help" ;;
    esac
    shift
done

exec </dev/null
cd "$(dirname "$0")/.."
sources=$PWD
build=$sources/build-quickstart
run=$build/run

running() {
    [ -d "/proc/$1" ] && ! grep -qs '^State:[[:space:]]*Z' "/proc/$1/status"
}

# Stops one of our programs by its pid file; a process that took over the number since is none of ours.
stop() {
    local name=$1 pid
    [ -f "$run/$name.pid" ] || return 0
    pid=$(<"$run/$name.pid")
    if [ "$(readlink "/proc/$pid/exe" 2>/dev/null)" = "$build/$name" ]; then
        kill "$pid" 2>/dev/null || true
        for ((i = 0; i < 400; i++)); do
            running "$pid" || break
            sleep 0.1
        done
        [ "$i" -lt 400 ] || kill -KILL "$pid" 2>/dev/null || true
        echo "stopped $name (pid $pid)"
    fi
    rm -f "$run/$name.pid"
}

stop_all() {
    stop moed-worker
    stop moed-gateway
    [ ! -f "$run/socket" ] || rm -rf -- "$(<"$run/socket")"
    rm -f "$run/socket"
}

start() {
    local name=$1
    shift
    setsid "$build/$name" "$@" >"$run/$name.log" 2>&1 &
    echo $! >"$run/$name.pid"
}

stop_all
if [ -n "$stop_only" ]; then
    exit 0
fi

echo "== installing and building"
deploy/dependencies.sh build
[ -x configure ] || autoreconf -fi >/dev/null 2>&1 || autoreconf -fi || fail "autoreconf failed"
mkdir -p "$build"
cd "$build"
[ -f Makefile ] || "$sources/configure" --quiet || fail "configure failed, see $build/config.log"
make -s -j"$(nproc)" || fail "the build failed"
mkdir -p "$run"

if [ -z "$model" ]; then
    model=$build/small.gguf
    if [ ! -f "$model" ]; then
        echo "== making a small model"
        ./moed-synth --preset small --quiet "$model.new" || fail "moed-synth failed"
        mv "$model.new" "$model"
    fi
fi

echo "== starting gateway and worker"
# A socket's path is short by law, a clone's may be long.
sockets=$(mktemp -d "${TMPDIR:-/tmp}/moed.XXXXXX")
echo "$sockets" >"$run/socket"
generated=
trap '[ "$keep$generated" = yesyes ] || stop_all' EXIT
target=127.0.0.1:$port
start moed-gateway --listen "$target" --worker-endpoint "ipc://$sockets/worker.sock"
start moed-worker --gateway "ipc://$sockets/worker.sock" --model "$model"
for ((i = 0; ; i++)); do
    running "$(<"$run/moed-gateway.pid")" || fail_with_log "the gateway ended" "$run/moed-gateway.log"
    running "$(<"$run/moed-worker.pid")" || fail_with_log "the worker ended" "$run/moed-worker.log"
    ! ./moed-client model --target "$target" --wait-ready 1 --timeout 5 >"$run/model" 2>/dev/null || break
    [ "$i" -lt 300 ] || fail_with_log "no worker is ready after five minutes" "$run/moed-worker.log"
done
cat "$run/model"
echo
./moed-client workers --target "$target" --timeout 10 || fail "moed-client workers failed"

generate=(moed-client generate --target "$target" --max-tokens 16 --ignore-eos 1 2 3 4 5)
echo
echo "== ${generate[*]}"
"./${generate[0]}" "${generate[@]:1}" --timeout 60 || fail "moed-client generate failed"

generated=yes
echo
if [ -n "$keep" ]; then
    cat <<END
The gateway listens on $target (pid $(<"$run/moed-gateway.pid")), one worker is connected (pid $(<"$run/moed-worker.pid")).
Programs are in $build, logs in $run.
  stop them:  deploy/quickstart.sh --stop
END
else
    stop_all
    echo "All is well. With --keep, gateway and worker stay."
fi
