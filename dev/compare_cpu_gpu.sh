#!/usr/bin/env bash
# What the CPU trainer and the CUDA trainer say of the same micro-batch, tensor by tensor: losses, gates, every gradient.
#     dev/compare_cpu_gpu.sh [GPU [DIR]]       (make compare)
# GPU: the CUDA trainer, ./train_remoecu; ./train_remoecu_fp32 and ./train_remoecu_emulated are others. DIR: a checkpoint; without
# one, two small models: as initialised, and trained for STEPS steps with OPTIONS (say '--router topk') on the built-in sample.
# The GPU is run twice: with the experts that the CPU chose, where every tensor must agree to rounding (fp32: 1e-5; bf16: 2e-2 at
# initialisation, 4e-2 trained), and with its own choice, where few pairs may differ. Exit 1 if anything is beyond its bound.
set -eu
cd "$(dirname "$0")/.."
gpu=${1:-./train_remoecu}
model=${2:-}
STEPS=${STEPS:-150}
OPTIONS=${OPTIONS:-}
DATA=${DATA:-build/sample/train_000000.bin}
BATCH=${BATCH:-2}
SEQ_LEN=${SEQ_LEN:-64}
LAMBDA=${LAMBDA:-0.1}
here=build/compare
failed=0
mkdir -p $here

small_model() { # small_model NAME OPTIONS...: a checkpoint in $here/NAME
    local name=$1
    shift
    rm -rf "${here:?}/$name"
    ./train_remoe --layers 2 --hidden 64 --heads 4 --kv-heads 2 --batch 8 --seq-len 64 --lambda-init 1e-4 --sample-tokens 0 \
        --val-data '' --out "$here/$name" "$@" $OPTIONS >"$here/$name.txt"
}

dump() { # dump TRAINER MODEL FILE OPTIONS...
    local trainer=$1 folder=$2 file=$3
    shift 3
    "$trainer" --load "$folder" --dump "$file" --data "$DATA" --batch "$BATCH" --seq-len "$SEQ_LEN" --lambda "$LAMBDA" "$@" >/dev/null
}

compare() { # compare WHAT MODEL BF16-TOLERANCE
    local what=$1 folder=$2 tolerance=$3 forced=(--route-from $here/cpu.safetensors)
    ! grep -qs '"router": "lory"' "$folder"/{,latest/}config.json || forced=() # which chooses no experts
    case $gpu in
    *fp32*) tolerance=1e-5 ;;
    esac
    dump ./train_remoe "$folder" $here/cpu.safetensors
    dump "$gpu" "$folder" $here/gpu.safetensors "${forced[@]}"
    dump "$gpu" "$folder" $here/gpu_free.safetensors
    printf '\n=== %s: ./train_remoe and %s, with the experts that the CPU chose\n' "$what" "$gpu"
    build/compare_dumps $tolerance $here/cpu.safetensors $here/gpu.safetensors || failed=1
    printf '\n=== %s: each with its own choice of experts\n' "$what"
    build/compare_dumps $tolerance $here/cpu.safetensors $here/gpu_free.safetensors free || failed=1
}

if [ -n "$model" ]; then
    compare "$model" "$model" 4e-2
else
    small_model initial --steps 1 --lr 0 --lr-min 0
    small_model trained --steps "$STEPS"
    compare 'as initialised' $here/initial 2e-2
    compare "after $STEPS steps" $here/trained 4e-2
fi
exit $failed
