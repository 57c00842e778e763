#!/bin/bash
# service.sh [--json]: the whole service on this machine's CPU, with the model that `make bench` makes: what streams get
# as they become more, what the prefix cache saves, and what streams see of a long prompt beside them.
# Runs in the build directory.
set -euo pipefail

json=
case ${1-} in
--json) json=--json ;;
'') ;;
*)
    echo "service.sh: unknown option '$1': --json is all there is" >&2
    exit 2
    ;;
esac
model=${bench_model:-moed-bench.gguf}
directory=$(mktemp -d "${TMPDIR:-/tmp}/moed.XXXXXX")
gateway=
worker=
target=

stop() {
    for pid in $worker $gateway; do
        kill "$pid" 2>/dev/null && wait "$pid" || true
    done
    worker=
    gateway=
}
trap 'stop; rm -rf "$directory"' EXIT

# A gateway and one worker with these options.
start() {
    stop
    ./moed-gateway --listen 127.0.0.1:0 --worker-endpoint "ipc://$directory/worker" --max-requests 1024 \
        >"$directory/gateway.log" 2>&1 &
    gateway=$!
    ./moed-worker --model "$model" --gateway "ipc://$directory/worker" "$@" >"$directory/worker.log" 2>&1 &
    worker=$!
    for ((i = 0; i < 100; i++)); do
        target=$(sed -n 's/.* listening .*address=\([^ ]*\).*/\1/p' "$directory/gateway.log")
        [ -z "$target" ] || break
        sleep 0.1
    done
    ./moed-client model --target "$target" --wait-ready 300 >/dev/null
}

load() {
    ./moed-client load --target "$target" --seed 1 $json "$@"
}

say() {
    [ -n "$json" ] || printf '\n%s\n' "$*"
}

start --max-sequences 64 --prefix-cache off
say "Prompts of 64 tokens, 32 tokens each, from 1 to 64 streams"
load --sweep 1,2,4,8,16,32,64 --requests 128 --prompt-tokens 64 --output-tokens 32

for cache in off on; do
    start --max-sequences 8 --prefix-cache $cache
    say "Prompts of 4000 tokens that share 3968, prefix cache $cache"
    load --concurrency 2 --requests 6 --warmup 2 --shared-prefix 3968 --prompt-tokens 4000 --output-tokens 8
done

start --max-sequences 8 --prefix-cache off
say "Four streams, alone..."
load --concurrency 4 --requests 8 --prompt-tokens 16 --output-tokens 200
say "...and beside prompts of 4000 tokens"
load --concurrency 1 --duration 8 --prompt-tokens 4000 --output-tokens 1 >"$directory/prompts" &
load --concurrency 4 --requests 8 --prompt-tokens 16 --output-tokens 200
wait $!
