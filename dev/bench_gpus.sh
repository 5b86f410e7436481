#!/usr/bin/env bash
# What several GPUs of one machine are worth: dev/bench_gpus.sh [ROW ...]; by default the rows that the cards have memory for. Each card
# alone, all at the same time, then all together, TIMES (2) times in turns: cards of one name differ by some percent, and clocks fall by a
# fifth under load, so the measure is the slower card's own speed in the same minute.
#     GPT2_DATA  shards of GPT-2 tokens, as --train-data takes them (default: the built-in sample's: with a fixed k the text does not matter)
#     GPUS       how many (default: all); ROUTER (topk): relu's number of active experts moves by some percent of a step's time
# A figure is whole optimizer steps, as --bench times them. Results are appended to build/gpu/bench_gpus.tsv, logs lie beside it.
set -uf
cd "$(dirname "$0")/.." || exit
logs=build/gpu
mkdir -p $logs

# row | what | least GB a card | B | sequences a step | options
ROWS='
small|small, 8 experts|40|64|512|--preset small
b128|small, 8 experts, one micro-batch a rank|40|64|0|--preset small
medium|medium, 8 experts|75|32|512|--preset medium
large|large, 8 experts|130|32|256|--preset large
e64|small, 64 experts|130|64|512|--preset small --experts 64
relu|small, 8 experts, relu|40|64|512|--preset small --router relu
'
GPUS=${GPUS:-$(nvidia-smi -L | wc -l)}
TIMES=${TIMES:-2}
data=(--train-data "${GPT2_DATA:-build/sample/train_*.bin}" --val-data '' --tokenizer '' --bench)
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
card_gb=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | awk 'NR == 1 { printf "%d", $1 * 1.048576 / 1000 }')
failed=0

field() { grep "^$1|" <<<"$ROWS" | cut -d '|' -f "$2"; }

figure() { sed -n "s|.*[^0-9.]\([0-9.]*\) $2.*|\1|p" "$1" | head -n 1; } # figure LOG UNIT: the number before the unit

alone() { # alone ROW BATCH GLOBAL OPTIONS...: each card by itself, all at the same time; the slower one's tok/s
    local row=$1 batch=$2 global=$3 pids=() slowest='' speed
    shift 3
    for ((i = 0; i < GPUS; i++)); do
        CUDA_VISIBLE_DEVICES=$i OMP_NUM_THREADS=$(($(nproc) / GPUS)) ./train_remoecu "$@" "${data[@]}" --batch "$batch" \
            --global-batch "$global" >"$logs/gpus_${row}_alone_$i.txt" 2>&1 &
        pids+=($!)
    done
    for ((i = 0; i < GPUS; i++)); do
        wait "${pids[$i]}" || { tail -n 3 "$logs/gpus_${row}_alone_$i.txt" >&2 && return 1; }
        speed=$(figure "$logs/gpus_${row}_alone_$i.txt" tok/s)
        slowest=$(awk -v a="$speed" -v b="$slowest" 'BEGIN { print b == "" || a < b ? a : b }')
    done
    echo "$slowest"
}

together() { # together ROW BATCH GLOBAL OPTIONS...
    local row=$1 batch=$2 global=$3 log
    shift 3
    log="$logs/gpus_${row}_together.txt"
    ./train_remoecu "$@" "${data[@]}" --batch "$batch" --global-batch "$global" --gpus "$GPUS" >"$log" 2>&1 ||
        { tail -n 3 "$log" >&2 && return 1; }
    figure "$log" tok/s
}

measure() { # measure ROW
    local row=$1 batch global one many options
    batch=$(field "$row" 4) global=$(field "$row" 5)
    [ "$global" != 0 ] || global=$((batch * GPUS))
    options=$(field "$row" 6)
    [[ $options = *--router* ]] || options+=" --router ${ROUTER:-topk}"
    for ((turn = 0; turn < TIMES; turn++)); do
        # shellcheck disable=SC2086 # options are words
        one=$(alone "$row" "$batch" "$global" $options) && many=$(together "$row" "$batch" "$global" $options) || { failed=1; return; }
        awk -v one="$one" -v many="$many" -v n="$GPUS" -v what="$(field "$row" 2)" -v B="$batch" -v global="$global" -v card="$card" \
            -v exposed="$(grep -o 'included: .*' "$logs/gpus_${row}_together.txt" | sed 's/.*included: \([0-9.]* %\).*, \([0-9.]* %\).*/\1 to \2/')" \
            -v gb="$(figure "$logs/gpus_${row}_together.txt" GB)" 'BEGIN {
                printf "%s\t%d\t%d\t%d x %s\t%.0f\t%.0f\t%.3f\t%s\t%s\n", what, B, global, n, card, one, many, many / one, exposed, gb }' |
            tee -a $logs/bench_gpus.tsv
    done
}

[ -x train_remoecu ] || make -s train_remoecu || exit 1
[ -n "${GPT2_DATA:-}" ] || make -s sample-data >/dev/null
printf 'what\tB\tglobal\tcards\tslower card alone, tok/s\ttogether\ttimes\texposed\tGB a card\n'
if [ $# = 0 ]; then
    set -- $(grep -v '^$' <<<"$ROWS" | awk -F '|' -v gb="$card_gb" '$3 <= gb { print $1 }')
fi
for row in "$@"; do
    [ -n "$(field "$row" 1)" ] || { echo "no row is called $row" >&2; exit 1; }
    measure "$row"
done
exit $failed
