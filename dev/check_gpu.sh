#!/usr/bin/env bash
# Everything that a GPU is needed to see, in one call: dev/check_gpu.sh [build] [test] [compare] [resume] [curves] [sanitize] [train]
# [fit]; all but the last two by default. (Speed: make bench-gpu.) Logs in build/gpu/. A short table last; exit 1 if anything failed.
# CURVE_DATA and CURVE_VOCAB name token shards and their vocabulary size for the curves (default: the built-in sample); GPT2_DATA
# shards of GPT-2 tokens for train and fit.
#     build      trainers and tests, both precisions
#     test       the CUDA tests in both precisions
#     compare    make compare, both precisions
#     resume     a run and its repeat, interrupted and resumed, CPU -> GPU -> CPU: the same bits
#     curves     250 steps of a small model on the CPU and on the GPU: loss within 1 %, stage II within 2 steps, S within 0.003
#     sanitize   compute-sanitizer: memcheck, initcheck and racecheck of the tests, small shapes
#     train      small, E 8, the first TRAIN_STEPS (250) steps of the paper's schedule: settling time, S, speed of each stage
#     fit        the dense stage in too little memory: E 8 without a store, E 32 within 80 GB, E 64 where the card has 120
set -uf
# where it is set, no program starts itself anew (llmc/machine.h) under a tool that follows it
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
cd "$(dirname "$0")/.." || exit
logs=build/gpu
mkdir -p $logs
table=()
failed=0
CURVE_DATA=${CURVE_DATA:-}

note() { # note NAME RESULT-CODE FIGURE
    [ "$2" -eq 0 ] || failed=1
    table+=("$(printf '%-28s %-6s %s' "$1" "$([ "$2" -eq 0 ] && echo ok || echo FAILED)" "$3")")
}

last() { tail -n 1 "$logs/$1.txt"; }

check_build() {
    local begin=$SECONDS pids=() code=0
    for program in train_remoe train_remoecu train_remoecu_fp32 test_remoecu test_remoecu_fp32 build/sample/manifest.json build/compare_dumps; do
        make -s $program >"$logs/build_$(basename $program).txt" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=1; done
    note build $code "$((SECONDS - begin)) s"
    [ $code -eq 0 ] || { grep -rh -m 5 error $logs --include='build_*.txt'; exit 1; }
}

check_test() {
    ./test_remoecu_fp32 >$logs/test_fp32.txt 2>&1 &
    local other=$!
    ./test_remoecu >$logs/test_bf16.txt 2>&1
    note 'tests, bf16' $? "$(last test_bf16)"
    wait $other
    note 'tests, fp32' $? "$(last test_fp32)"
}

check_compare() {
    for gpu in train_remoecu train_remoecu_fp32; do
        make -s compare GPU=./$gpu >"$logs/compare_$gpu.txt" 2>&1
        note "compare $gpu" $? "$(last compare_$gpu)"
    done
}

TINY='--layers 2 --hidden 64 --heads 4 --batch 8 --seq-len 64 --steps 20 --lr 2e-3 --lambda-init 1e-5 --sample-tokens 0 --save-every 10 --keep 0'

sum_of() { cat "$1"/model.safetensors "$1"/optimizer.safetensors | sha256sum | cut -c1-16; }

check_resume() {
    local out=$logs/resume a b c d
    rm -rf $out
    ./train_remoecu $TINY --out $out/a >$logs/resume_a.txt 2>&1 && ./train_remoecu $TINY --out $out/b >$logs/resume_b.txt 2>&1
    cp -r $out/a $out/c && rm -rf $out/c/step_00000020
    ./train_remoecu --resume $out/c/step_00000010 >$logs/resume_c.txt 2>&1
    a=$(sum_of $out/a/step_00000020) b=$(sum_of $out/b/step_00000020) c=$(sum_of $out/c/step_00000020)
    [ -n "$a" ] && [ "$a" = "$b" ]
    note 'repeat: same bits' $? "$a $b"
    [ -n "$a" ] && [ "$a" = "$c" ]
    note 'resumed: same bits' $? "$a $c"
    cp -r $out/a $out/d && rm -rf $out/d/step_00000020
    ./train_remoe --resume $out/d/step_00000010 >$logs/resume_d.txt 2>&1
    note 'GPU run goes on on the CPU' $? "$(grep -m 1 '^step *11' $logs/resume_d.txt)"
    ./train_remoecu --resume $out/d/step_00000020 --steps 25 >$logs/resume_e.txt 2>&1
    note '... and on the GPU again' $? "$(grep -m 1 '^step *21' $logs/resume_e.txt)"
    d=$(sum_of $out/d/step_00000020)
    [ "$d" != "$a" ] # another machine: other rounding, so the bits must differ for the check to mean anything
    note 'CPU and GPU steps differ' $? "$d"
}

CURVE='--layers 3 --hidden 128 --heads 4 --kv-heads 2 --batch 64 --seq-len 128 --steps 250 --lr 1e-3 --lr-min 1e-4 --warmup-steps 20
    --lambda-init 1e-5 --val-batches 4 --sample-tokens 0'

check_curves() {
    local data='' runs=$logs/curves
    rm -rf $runs
    [ -z "$CURVE_DATA" ] || data="--vocab-size $CURVE_VOCAB --train-data $CURVE_DATA"
    ./train_remoe $CURVE $data --out $runs/cpu >$logs/curve_cpu.txt 2>&1 &
    local cpu=$!
    ./train_remoecu_fp32 $CURVE $data --out $runs/fp32 >$logs/curve_fp32.txt 2>&1
    ./train_remoecu $CURVE $data --out $runs/bf16 >$logs/curve_bf16.txt 2>&1
    wait $cpu
    for precision in fp32 bf16; do
        dev/compare_logs.sh $runs/cpu/log.jsonl $runs/$precision/log.jsonl >$logs/curve_compared_$precision.txt 2>&1
        note "curves, $precision" $? "$(last curve_compared_$precision)"
    done
}

SANITIZE_SECONDS=${SANITIZE_SECONDS:-300} # each
SANITIZE_JOBS=${SANITIZE_JOBS:-16}
SANITIZED='mma,embedding,rmsnorm,rope,crossentropy,adamw attention grouped_gemm dispatch experts merge rmsnorm_router,dispatch_rmsnorm pairs gemm router'
RACED='model:relu,model:topk,model:ec model:auxfree,model:sparsemixer merge,model:lory model:hash,model:dense,model:update model:bits,model:sampling model:overflow,model:graph'

# sanitize TOOL PROGRAM COMPONENTS: in the background, a few at a time (they share the card's memory), each reference on one core.
# initcheck does not follow what is written through TMA, as the Hopper kernels' results are and cuBLASLt's: it gets the portable kernels
# racecheck reports hazards within kernels of cuBLASLt's, nvjet_*, and fails if it is told to leave them out: see races
sanitize() {
    local name options='' report='--error-exitcode 9'
    name="$1_$(basename "$2")_${3//[:,]/_}"
    case $1:$3 in
    racecheck:* | *:router | *:merge) options=--few ;;
    esac
    [ "$1" != initcheck ] || options+=' --portable'
    [ "$1" != racecheck ] || report='--print-limit 100000'
    while [ "$(jobs -rp | wc -l)" -ge "$SANITIZE_JOBS" ]; do wait -n; done
    OMP_NUM_THREADS=1 timeout "$SANITIZE_SECONDS" compute-sanitizer --tool "$1" $report "$2" $options ${3//,/ } >"$logs/$name.txt" 2>&1 &
    pids+=($!)
    names+=("$name")
}

reported() { # reported LOG: the kernels that a sanitizer's errors name
    sed -nE 's/.* at (void )?([A-Za-z_][A-Za-z0-9_:]*)[<(].*/; \2/p' "$logs/$1.txt" | sort -u | head -n 4 | tr -d '\n'
}

races() { # races LOG: how many hazards racecheck has seen in kernels that are not cuBLASLt's; nothing if it did not finish
    awk '/Race reported/ && /nvjet_/ { theirs++ }
         /RACECHECK SUMMARY/ { print $4 - theirs }' "$logs/$1.txt"
}

check_sanitize() { # under the sanitizers a GPU is as slow as the emulator: the same small shapes
    local i=0 code
    pids=() names=()
    make -s build/test_remoecu_small build/test_remoecu_small_fp32 >$logs/build_small.txt 2>&1
    for components in $SANITIZED model; do
        sanitize memcheck build/test_remoecu_small "$components"
        case $components in # these read what cuBLASLt has written
        gemm | model | rmsnorm_router,*) ;;
        *) sanitize initcheck build/test_remoecu_small "$components" ;;
        esac
    done
    for components in $SANITIZED $RACED; do
        sanitize racecheck build/test_remoecu_small "$components"
    done
    for components in attention grouped_gemm dispatch experts; do
        sanitize racecheck build/test_remoecu_small_fp32 $components
    done
    for pid in "${pids[@]}"; do
        wait "$pid"
        code=$?
        case ${names[$i]} in
        racecheck_*) [ "$(races "${names[$i]}")" = 0 ] || code=9 ;;
        esac
        note "${names[$i]}" $code "$(last "${names[$i]}")$(reported "${names[$i]}")"
        i=$((i + 1))
    done
}

small() { # small LOG OPTIONS...: the paper's small model on GPT2_DATA
    local log=$1
    shift
    ./train_remoecu --preset small --train-data "$GPT2_DATA" --val-data '' --tokenizer '' --out $logs/$log "$@" >$logs/$log.txt 2>&1
}

# A warm-up longer than the run: these are the first steps of the paper's 60,000, whose first 600 are warm-up. At the largest
# learning rate from the start S overshoots, and the settling time is another
check_train() {
    rm -rf $logs/train
    small train --batch 64 --global-batch 64 --steps "${TRAIN_STEPS:-250}" --warmup-steps 600 --lambda-init "${LAMBDA_INIT:-1e-8}"
    note 'small from step 0' $? "$(grep ' steps in ' $logs/train.txt)"
    grep 'settling time' $logs/train.txt >$logs/train_settled.txt
    note '... settles' $? "$(last train_settled) (about 124 at lambda_0 = 1e-8)"
    awk '/lm_loss/ {
             match($0, /"stage": [0-9]/); stage = substr($0, RSTART + 9, 1)
             match($0, /"tok_s": [0-9.e+]*/); speed[stage] += substr($0, RSTART + 9, RLENGTH - 9); count[stage]++
             match($0, /"sparsity": [0-9.e+-]*/); s[n + 0] = substr($0, RSTART + 12, RLENGTH - 12)
             match($0, /"lambda": [0-9.e+-]*/); lambda = substr($0, RSTART + 10, RLENGTH - 10)
             match($0, /"lm_loss": [0-9.e+]*/); loss = substr($0, RSTART + 11, RLENGTH - 11)
             if (n++ % 10 == 0) printf "step %d loss %s S %s lambda %s\n", n, loss, s[n - 1], lambda
         }
         END {
             for (i = n - 20; i < n; i++) mean += s[i] / 20
             for (k = 1; k <= 3; k++) if (count[k]) printf "stage %s: %.0f tok/s  ", k, speed[k] / count[k]
             printf "mean S of the last 20 steps %.4f\n", mean
             exit !(n > 20 && mean > 0.865 && mean < 0.885)
         }' $logs/train/log.jsonl >$logs/train_curve.txt
    note '... S, speed of its stages' $? "$(last train_curve)"
    find $logs/train -name 'step_*' -prune -exec rm -rf {} + # 9 GB
}

check_fit() {
    small fit8 --batch 32 --global-batch 32 --bench --lambda-init 1e-3 --pair-budget 0.001
    note 'E 8 without a store' $? "$(grep -h -A1 '^bench' $logs/fit8.txt | tail -n 1)"
    small fit32 --experts 32 --batch 8 --global-batch 16 --bench --lambda-init 1e-3 --pair-budget 15
    note 'E 32' $? "$(grep -h -A1 '^bench' $logs/fit32.txt | tail -n 1)"
    awk '/^memory/ { sub(/.*total /, ""); exit !($1 < 80) }' $logs/fit32.txt
    note '... within 80 GB' $? "$(grep -h '^memory' $logs/fit32.txt | sed 's/.*| //')"
    if [ "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)" -lt 114440 ]; then # MiB: 120 GB
        table+=("$(printf '%-28s %-6s %s' 'E 64' skipped 'weights, gradients and moments alone are 100 GB')")
        return
    fi
    small fit64 --experts 64 --batch 8 --global-batch 16 --bench --lambda-init 1e-3
    note 'E 64' $? "$(grep -h -A1 '^bench' $logs/fit64.txt | tail -n 1)"
}

[ $# -gt 0 ] || set -- build test compare resume curves sanitize
for step; do
    check_$step
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
printf '%s\n' "${table[@]}"
exit $failed
