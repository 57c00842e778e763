#!/bin/sh
# Makes the golden cases in golden/ again: for each the logits of all positions (NAME.f32, float32), the routes
# (NAME.routes.json) and a line of cases.jsonl: the model's maker and its options, the tokens, the greedy continuation.
# The models are not kept: gen_qwen3moe.py and moed-synth make the same bytes again. Needs python3 with numpy.
# Usage: make_golden.sh PATH/OF/moed-synth
set -eu
synth=$(realpath "$1")
python=${PYTHON:-python3}
cd "$(dirname "$0")"
model=$(mktemp)
trap 'rm -f "$model"' EXIT

one() { # name, tokens, maker, options
    name=$1 tokens=$2 maker=$3
    shift 3
    case $maker in
    moed-synth) "$synth" --quiet "$@" "$model" ;;
    *) "$python" "$maker" "$model" "$@" ;;
    esac
    "$python" qwen3moe_ref.py "$model" --tokens "$tokens" --out "golden/$name.f32" --routes "golden/$name.routes.json"
    greedy=$("$python" qwen3moe_ref.py "$model" --tokens "$tokens" --greedy 12)
    printf '{"name": "%s", "maker": "%s", "options": "%s", "tokens": [%s], "greedy": %s}\n' \
        "$name" "$maker" "$*" "$tokens" "$greedy" >> golden/cases.jsonl
}

mkdir -p golden
: > golden/cases.jsonl
one tiny 1,17,300,5,5,511,42,7,260,33,90,128,64,2,499,11 gen_qwen3moe.py --preset tiny --quant q4_k_m --seed 1
one mixed 3,999,12,500,77,8,8,640,31,2,260,415 gen_qwen3moe.py --preset small --quant mixed --seed 7
one q5k 9,1,400,77,12,250 gen_qwen3moe.py --preset tiny --quant q5_k --seed 24
one q8tied 4,8,15,16,23,42,108 gen_qwen3moe.py --preset tiny --quant q8_0 --seed 22 --tied --rope-theta 10000000
one synth 400,2,77,310,310,9,58,204,511,0,131 moed-synth --preset tiny --quant q4_k_m --seed 8
one synth-mixed 7,258,31,90,101,5,333,64,250 moed-synth --preset tiny --quant mixed --seed 6 --layers 3 --head-dim 96 \
    --vocab 347 --rope-freq-base 10000
