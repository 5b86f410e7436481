#!/usr/bin/env bash
# One of the paper's nine pre-training runs: 60,000 steps of 512 x 1024 tokens. README.md, beside this, has what each costs.
#     dev/scripts/pretrain.sh SIZE ROUTER [the trainer's options...]       SIZE: small medium large; ROUTER: dense topk relu
#     dev/scripts/pretrain.sh --dry-run SIZE ROUTER ...                    prints the command (so does DRY_RUN=1)
# The same command again goes on where OUT's newest checkpoint is, so a job that is started anew needs no other one. Options
# win over what is chosen here (--batch, --steps, ...); those of the model's shape are left out once there is a run to resume.
#     GPUS      ranks, a GPU each (default: all that nvidia-smi shows); with LAUNCHED=1 those of all machines together
#     DATA      folder with token shards *train_*.bin and val.*.bin (data/pile); a run that is resumed keeps its own
#     TOKENIZER folder with vocab.json and merges.txt (data/gpt2)
#     OUT       folder of the run (runs/SIZE-ROUTER)
#     TRAINER   the program (./train_remoecu)
#     LAUNCHED  1: a launcher starts the ranks, so there is no --gpus
#     LAUNCHER  words before the program, that start it as often as GPUS says: "srun ..."; with LAUNCHED=1
# Paths are relative to the repository, where this script goes first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage_error() {
    printf 'usage error: %s\n  ---> %s\n' "$1" "${2:-dev/scripts/pretrain.sh SIZE ROUTER [options], SIZE small|medium|large, ROUTER dense|topk|relu}" >&2
    exit 2
}

DRY_RUN=${DRY_RUN:-0}
if [ "${1:-}" = --dry-run ]; then
    DRY_RUN=1
    shift
fi
[ $# -ge 2 ] || usage_error 'SIZE and ROUTER are missing'
size=$1 router=$2
shift 2
case $size in small | medium | large) ;; *) usage_error "no size $size" ;; esac
case $router in dense | topk | relu) ;; *) usage_error "no router $router" ;; esac
for option; do
    case $option in
    --dry-run) usage_error '--dry-run comes first' ;;
    --out | --out=*) usage_error "$option among the options" 'OUT=FOLDER before the command' ;;
    --gpus | --gpus=*) usage_error "$option among the options" 'GPUS=N before the command' ;;
    --resume | --resume=*) usage_error "$option among the options" 'OUT=FOLDER of the run: it is resumed' ;;
    esac
done

LAUNCHED=${LAUNCHED:-0}
GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
DATA=${DATA:-data/pile}
TOKENIZER=${TOKENIZER:-data/gpt2}
OUT=${OUT:-runs/$size-$router}
TRAINER=${TRAINER:-./train_remoecu}
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || usage_error "'$GPUS' GPUs" 'GPUS=N says how many there are'
read -ra launcher <<<"${LAUNCHER:-}"

most_batch() { # sequences a micro-batch: what fits a card of 80 GB, and is as fast as any
    case $size:$router in
    small:*) echo 64 ;;
    medium:* | large:dense) echo 32 ;;
    large:*) if [ "$GPUS" = 1 ]; then echo 32; elif [ "$GPUS" -lt 4 ]; then echo 8; else echo 16; fi ;; # 1: of 141 GB
    esac
}

batch=$(most_batch)
while [ $((512 % (batch * GPUS))) != 0 ] && [ "$batch" -gt 1 ]; do
    batch=$((batch / 2))
done
[ $((512 % (batch * GPUS))) = 0 ] || usage_error "512 sequences a step cannot be shared by $GPUS GPUs" 'GPUS=1, 2, 4, ... 512'

holds_run() { # any checkpoint
    [ -e "$OUT/latest" ] || [ -L "$OUT/latest" ] || compgen -G "$OUT/step_*" >/dev/null
}

held() { # held KEY: what the run in OUT was started with; empty where no checkpoint says
    local states=("$OUT"/latest/state.json "$OUT"/step_*/state.json) state
    for state in "${states[@]}"; do
        [ ! -f "$state" ] || { sed -n "s/.*\"$1\": \"\([a-z]*\)\".*/\1/p" "$state" && return; }
    done
}

# what the checkpoint's config.json decides, and the trainer refuses beside --resume
SHAPE=' preset router experts active granularity layers hidden heads kv-heads ffn-mult vocab-size load-balance router-jitter segment-length load '

without_shape() { # without_shape OPTIONS...: into options
    local name
    options=()
    while [ $# -gt 0 ]; do
        name=${1#--} name=${name%%=*}
        case "$1:$SHAPE" in
        --*:*" ${name//_/-} "*)
            if [[ $1 != *=* && (${name//_/-} != load-balance || ${2:-} =~ ^[01]$) ]]; then
                shift
            fi
            ;;
        *) options+=("$1") ;;
        esac
        [ $# = 0 ] || shift
    done
}

if holds_run; then
    if [ "$(held preset) $(held router)" != "$size $router" ]; then
        echo "error: $OUT holds another run: '$(held preset) $(held router)', not '$size $router'" >&2
        echo '  ---> OUT=FOLDER, another one' >&2
        exit 1
    fi
    without_shape "$@"
    command=(--resume "$OUT" --batch "$batch" "${options[@]}")
else
    # a run that was killed before its first checkpoint has left a log only, beside which the trainer begins no other run
    if [ -s "$OUT/log.jsonl" ] && [ "$DRY_RUN" = 0 ] && [ "${RANK:-0}" = 0 ]; then
        mv "$OUT/log.jsonl" "$OUT/log.unsaved_$(date -u +%Y%m%d_%H%M%S).jsonl"
    fi
    command=(--preset "$size" --router "$router" --out "$OUT" --batch "$batch" --train-data "$DATA/*train_*.bin"
        --val-data "$DATA/val.*.bin" --tokenizer "$TOKENIZER" "$@")
fi
[ "$LAUNCHED" = 1 ] || [ "$GPUS" = 1 ] || command=(--gpus "$GPUS" "${command[@]}")
command=("${launcher[@]}" "$TRAINER" "${command[@]}")

if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
if [ "${RANK:-0}" = 0 ]; then # torchrun starts this script once a rank
    grep -E "^\| (size|$size) \| (router|$router) \|" dev/scripts/README.md >&2
    [ "$GPUS:$size:$router" != "1:large:${router/dense/}" ] ||
        echo 'one card of 80 GB is too small for this model: 141 GB, or GPUS=2 and more' >&2
fi
exec "${command[@]}"
