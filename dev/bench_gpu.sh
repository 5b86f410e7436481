#!/usr/bin/env bash
# Speed on this GPU, and README's table of it: dev/bench_gpu.sh [ROW ...]; by default the rows that the card has memory for.
#     GPT2_DATA  shards of GPT-2 tokens (data/download_fineweb.sh), as --train-data takes them
#     PEER       a PyTorch script to measure beside ours, in turns: $PEER --size small --B 64 --router relu --E 8 --G 1 prints
#                {"tflops": x, "tok_s": x} of micro-steps alone (forward and backward), at the same micro-batch
#     TIMES      turns (default: 2 with PEER, else 1); figures are their means
# A training row is whole optimizer steps of GLOBAL (512) sequences in stage III, as --bench times them; TFLOP/s and MFU are the
# smaller of those at nominal k and at the measured active experts. Results are appended to build/gpu/bench.tsv, logs lie
# beside it; a row that is compared with another measures that one first, if this call has not.
set -uf
cd "$(dirname "$0")/.." || exit
logs=build/gpu
mkdir -p $logs

# row | what | least GB of the card | B | compared with | our options | the peer's
ROWS='
small|small, 8 experts|40|64||--preset small|--size small --router relu --E 8 --G 1
b128|small, 8 experts, B 128|75|128|small|--preset small|
portable|small, 8 experts, portable kernels|40|64|small|--preset small --kernels portable|
medium|medium, 8 experts|75|32||--preset medium|--size medium --router relu --E 8 --G 1
large|large, 8 experts|130|32||--preset large|--size large --router relu --E 8 --G 1
dense|small, dense|40|64|small|--preset small --router dense|--size small --router dense
topk|small, topk|40|64|small|--preset small --router topk|
auxfree|small, auxfree|40|64|topk|--preset small --router auxfree|
sparsemixer|small, sparsemixer|40|64|topk|--preset small --router sparsemixer|
lory|small, lory|40|64|topk|--preset small --router lory|
ec|small, ec|40|64|topk|--preset small --router ec|
hash|small, hash|40|64|topk|--preset small --router hash|
x8|small, dense x8|40|16|topk|--preset small --router dense --ffn-mult 32|
g8|small, granularity 8: 64 experts, 8 active|40|64|small|--preset small --granularity 8|--size small --router relu --E 8 --G 8
e32|small, 32 experts|75|64|small|--preset small --experts 32|--size small --router relu --E 32 --G 1
e64|small, 64 experts|130|64|small|--preset small --experts 64|--size small --router relu --E 64 --G 1
stage1|small, stage I|75|32|small|--preset small|
gemm|experts'"'"' products|20||||
attention|attention|10||||
'
GPT2_DATA=${GPT2_DATA:-}
PEER=${PEER:-}
TIMES=${TIMES:-$([ -n "$PEER" ] && echo 2 || echo 1)}
GLOBAL=${GLOBAL:-512}
failed=0
declare -A measured tok_s mfu_active

card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$card" ] || { echo "no NVIDIA GPU to be seen (nvidia-smi)" >&2; exit 1; }
card_gb=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | awk 'NR == 1 { printf "%d", $1 * 1.048576 / 1000 }')
commit=${COMMIT:-}
if [ -z "$commit" ]; then
    commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
    [ "$commit" = unknown ] || git diff --quiet HEAD -- . ':!README.md' || commit="$commit and changes"
fi

field() { # field ROW NUMBER: of ROWS
    grep "^$1|" <<<"$ROWS" | cut -d '|' -f "$2"
}

record() { # record WHAT B TOK_S TFLOPS MFU S GB PEER RATIO: a line of the results, and of README's table
    (IFS=$'\t' && printf '%s\n' "$*"$'\t'"$card"$'\t'"$(date -u +%Y-%m-%d)"$'\t'"$commit") >>$logs/bench.tsv
}

build() { # build PROGRAM
    make -s "$1" >$logs/build.txt 2>&1 || { fail "make $1" $logs/build.txt; exit 1; }
}

fail() { # fail ROW LOG
    failed=1
    echo "$1 FAILED; the end of $2:"
    tail -n 3 "$2"
}

train() { # train LOG B OPTIONS...
    local log=$1 batch=$2
    shift 2
    rm -rf "${logs:?}/$log"
    ./train_remoecu --train-data "$GPT2_DATA" --val-data '' --tokenizer '' --out "$logs/$log" --batch "$batch" \
        --global-batch "$GLOBAL" "$@" >"$logs/$log.txt" 2>&1
}

# what --bench printed: tok/s, TFLOP/s, mfu (the smaller ones; - on an unknown card), mfu_active, S, its target, GB
figures() {
    awk '/^bench / { s = $(NF - 2) + 0; target = $NF; next }
         target != "" && / tok\/s / {
             mfu = active = "-"
             for (i = 1; i < NF; i++) {
                 if ($i == "nominal") { nominal = $(i - 3) + 0; scale = $(i - 2) ~ /^G/ ? 1e-3 : 1 }
                 if ($i == "measured") measured = $(i - 3) + 0
                 if ($i == "mfu") mfu = $(i + 1) + 0
                 if ($i == "mfu_active") active = $(i + 1) + 0
             }
             tflops = scale * (measured < nominal ? measured : nominal)
             print $1, tflops, (active < mfu ? active : mfu), active, s, target, $(NF - 1)
         }' "$1"
}

means() { # of the columns of stdin
    awk '{ for (i = 1; i <= NF; i++) { sum[i] += $i; text[i] = $i } }
         END { for (i = 1; i <= NF; i++) printf((text[i] == "-" ? "- " : "%.8g "), sum[i] / NR) }'
}

quotient() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.3f", a / b }'; }

percent() { awk -v x="$1" 'BEGIN { printf((x == "-" ? "-" : "%.1f %%"), 100 * x) }'; }

measure() { # measure ROW: a training row
    local row=$1 batch against turn turns='' peers='' log begin=$SECONDS most
    [ -z "${measured[$row]:-}" ] || return 0
    measured[$row]=1
    batch=$(field "$row" 4) against=$(field "$row" 5)
    [ -z "$against" ] || measure "$against"
    begin=$SECONDS
    for ((turn = 1; turn <= TIMES; turn++)); do
        log=bench_${row}_$turn
        until train "$log" "$batch" $(field "$row" 6) --bench --lambda-init 1e-3; do # too little memory: half the micro-batch
            most=$(sed -n 's/.*largest that fits: --batch \([0-9]*\).*/\1/p' "$logs/$log.txt")
            [ "${most:-$batch}" -lt "$batch" ] || { fail "$row" "$logs/$log.txt"; return 1; }
            batch=$((batch / 2))
        done
        turns+="$(figures "$logs/$log.txt")"$'\n'
        if [ -n "$PEER" ] && [ -n "$(field "$row" 7)" ]; then
            python3 "$PEER" $(field "$row" 7) --B "$batch" >"$logs/${log}_peer.txt" 2>&1 ||
                echo "$row: the peer failed: $(tail -n 1 "$logs/${log}_peer.txt")"
            peers+="$(sed -n 's/.*"tflops": *\([0-9.]*\).*/\1/p' "$logs/${log}_peer.txt")"$'\n'
        fi
    done
    report "$row" "$batch" "$(grep . <<<"$turns" | means)" "$(grep . <<<"$peers" | means)"
    echo "$row: $((SECONDS - begin)) s"
}

report() { # report ROW B FIGURES PEER: shows and records
    local row=$1 batch=$2 peer=${4% } against ratio='' tok tflops mfu active s target gb
    read -r tok tflops mfu active s target gb <<<"$3"
    [ -n "$gb" ] || { fail "$row" "$logs/bench_${row}_1.txt"; return 1; }
    tok_s[$row]=$tok mfu_active[$row]=$active against=$(field "$row" 5)
    case $row:${tok_s[${against:-none}]:-} in
    *:) ;;
    dense:*) ratio="8 experts / dense, tok/s: $(quotient "${tok_s[$against]}" "$tok")" ;;
    *) ratio="to $against, tok/s: $(quotient "$tok" "${tok_s[$against]}")" ;;
    esac
    [ -z "$peer" ] || ratio+="${ratio:+; }to the peer, TFLOP/s: $(quotient "$tflops" "$peer")"
    s=$(awk -v s="$s" -v t="$target" 'BEGIN { d = s - t; printf((d * d < 0.005 ^ 2 ? "%.4f" : "%.4f, not " t), s) }')
    [ "$row" != dense ] || s=-
    set -- "$(field "$row" 2)" "$batch" "$(printf %.0f "$tok")" "$(printf %.1f "$tflops")" "$(percent "$mfu")" "$s" \
        "$(printf %.1f "$gb")" "${peer:--}" "${ratio:--}"
    printf '%s: B %s, %s tok/s, %s TFLOP/s, MFU %s, S %s, %s GB, peer %s TFLOP/s; ratio %s\n' "$row" "${@:2}"
    record "$@"
}

# Means of steps 4 to 12, with a lambda that does nothing yet and a learning rate that hardly does: S is the initial weights'
stage1_figures() {
    awk 'function value(key) {
             match($0, "\"" key "\": [-0-9.e+]*")
             return substr($0, RSTART + length(key) + 4, RLENGTH - length(key) - 4) + 0
         }
         /lm_loss/ && /"stage": 1/ && n++ >= 3 {
             m++; tok += value("tok_s"); tflops += value("tflops_active"); mfu += value("mfu_active")
             s += value("sparsity"); gb = value("mem_gb")
         }
         END { if (m) print tok / m, tflops / m, mfu / m, s / m, gb }' "$1"
}

bench_stage1() { # pairs kept for the backward pass as far as memory goes; then all of them computed again in it
    local what budget log begin name=stored tok tflops mfu s gb ratio
    measure small
    case ${mfu_active[small]:--} in
    -) echo 'stage1 FAILED: it needs row small, and a card whose peak is known' && failed=1 && return ;;
    esac
    for budget in 0 0.001; do
        begin=$SECONDS log=bench_stage1_$name
        train $log "$(field stage1 4)" --preset small --steps 12 --warmup-steps 600 --lambda-init 1e-8 --pair-budget $budget
        find $logs/$log -name 'step_*' -prune -exec rm -rf {} + # 9 GB
        read -r tok tflops mfu s gb < <(stage1_figures $logs/$log/log.jsonl) || { fail stage1 $logs/$log.txt; return; }
        what="small, stage I, pairs $name (TFLOP/s, MFU of active experts)"
        ratio="to stage III, mfu_active: $(quotient "$mfu" "${mfu_active[small]}")"
        set -- "$what" "$(field stage1 4)" "$(printf %.0f "$tok")" "$(printf %.1f "$tflops")" "$(percent "$mfu")" \
            "$(printf %.4f "$s")" "$(printf %.1f "$gb")" - "$ratio"
        printf 'stage1, %s: %s tok/s, %s TFLOP/s, MFU %s, S %s, %s GB; ratio %s\n' $name "${@:3:5}" "$9"
        echo "stage1, $name: $((SECONDS - begin)) s"
        record "$@"
        name=recomputed
    done
}

bench_gemm() { # a line a shape: TFLOP/s of the six products, and the share of min(cuBLASLt dense, bytes / 3 TB/s)
    local begin=$SECONDS log=$logs/bench_gemm.txt shape tflops share
    build build/ladder_grouped_gemm
    build/ladder_grouped_gemm time >"$log" 2>&1 || { fail gemm "$log"; return; }
    while IFS='|' read -r shape tflops share; do
        echo "gemm $shape: $tflops TFLOP/s; $share"
        record "experts' products, $shape: up, down; backward down, up; weight gradients down, up" - - "$tflops" - - - - \
            "to min(cuBLASLt dense, bytes / 3 TB/s): $share"
    done < <(awk '/ wgmma .* ms / {
                      key = "d " $1 ", F " $2 ", E " $3
                      for (i = 1; $i != "wgmma"; i++) continue
                      between = key in tflops ? ", " : ""
                      if (between == "") order[n++] = key
                      tflops[key] = tflops[key] between $(i + 3)
                      share[key] = share[key] between $NF
                  }
                  END { for (i = 0; i < n; i++) print order[i] "|" tflops[order[i]] "|" share[order[i]] }' "$log")
    echo "gemm: $((SECONDS - begin)) s"
}

bench_attention() { # a line a shape
    local begin=$SECONDS log=$logs/bench_attention.txt batch shape forward backward
    build test_remoecu
    ./test_remoecu --bench attention >"$log" 2>&1 || { fail attention "$log"; return; }
    while IFS='|' read -r batch shape forward backward; do
        echo "attention, B $batch, $shape: forward $forward, backward $backward TFLOP/s"
        record "attention, causal, $shape: forward; backward" "$batch" - "$forward; $backward" - - - - -
    done < <(sed -nE 's/^attention B ([0-9]+), (.*): forward .* ms, (.*) TFLOP.s; backward .* ms, (.*) TFLOP.s$/\1|\2|\3|\4/p' "$log")
    echo "attention: $((SECONDS - begin)) s"
}

names=$(grep -oE '^[a-z0-9]+' <<<"$ROWS" | paste -sd ' ')
if [ $# -eq 0 ]; then
    for row in $names; do
        [ "$(field "$row" 3)" -gt "$card_gb" ] || set -- "$@" "$row"
    done
fi
for row; do
    [ -n "$(field "$row" 1)" ] || { echo "no row is called $row; there are: $names" >&2; exit 2; }
    case $row in
    gemm | attention) continue ;;
    esac
    if [ -z "$GPT2_DATA" ]; then
        printf '%s\n' "row $row needs shards of GPT-2 tokens in GPT2_DATA" \
            "  ---> data/download_fineweb.sh data/fineweb 1; export GPT2_DATA='data/fineweb/fineweb_train_*.bin'" >&2
        exit 2
    fi
    build train_remoecu
done
echo "$card ($card_gb GB), commit $commit; rows: $*"
for row; do
    case $row in
    stage1 | gemm | attention) "bench_$row" ;;
    *) measure "$row" ;;
    esac
done
dev/bench_table.sh
exit $failed
