#!/usr/bin/env bash
# Several ranks: what they compute is what one rank computes, whatever carries the data and however late it comes; checkpoints do
# not tell how many wrote them; a rank that dies, hangs, stops or was started wrongly is named, and nothing saved is lost.
# usage: dev/test/test_gpus.sh [NAME...]      (after make train_remoecu_emulated train_remoecu_emulated_fp32 train_remoe sample-data
#        build/compare_dumps; some minutes). NAME: equal, balance, variants, reshard, uses, scores, faults, launch; all by default
#        GPU=./train_remoecu (and GPU_fp32) on real cards, RANKS='2' as many as there are
cd "$(dirname "$0")/../.." || exit 1
. dev/test/check.sh
gpu=${GPU:-./train_remoecu_emulated}
gpu_fp32=${GPU_fp32:-${gpu}_fp32}
RANKS=${RANKS:-2 3 4}
SEED=${SEED:-1}
here=build/test/gpus
export OMP_NUM_THREADS=1 EMULATED_GPUS=8
mkdir -p $here
# embedding and head have five blocks (buckets.h), a layer four, norms and routers one: shards of all lengths, some of none
tiny='--layers 2 --hidden 32 --heads 4 --kv-heads 2 --ffn-mult 2 --vocab-size 2560 --seq-len 16 --batch 2 --steps 4 --lr 2e-3
    --warmup-steps 1 --sample-tokens 0 --lambda-init 1e-2'

# one chunk of pairs a layer, so that each launch adds to a gradient once, and no count over all ranks
declare -A alike=([dense]='--router dense' [hash]='--router hash' [topk]='--router topk --active 2 --load-balance 0'
    [auxfree]='--router auxfree --active 2 --bias-rate 0.02'
    [lory]='--router lory --segment-length 8'
    [sparsemixer]='--router sparsemixer --active 2 --load-balance 0 --router-jitter 0.4' [relu]='--router relu --active 8 --load-balance 0')

run() { # run NAME OPTIONS...: a training run; its status
    local name=$1
    shift
    rm -rf "${here:?}/$name"
    timeout -k 5 100 "${TRAINER:-$gpu}" $tiny --val-data '' --out "$here/$name" "$@" >"$here/$name.txt" 2>&1
}

last_of() { echo "$here/$1/${2:-latest}"; }

position() { grep '"sequences"' "$(last_of "$1" "$2")/state.json"; }

same() { # same A B [STEP]: weights, moments and the place in the data of two runs, byte for byte
    [ "$(position "$1" "$3")" = "$(position "$2" "$3")" ] &&
        cmp "$(last_of "$1" "$3")/model.safetensors" "$(last_of "$2" "$3")/model.safetensors" &&
        cmp "$(last_of "$1" "$3")/optimizer.safetensors" "$(last_of "$2" "$3")/optimizer.safetensors"
}

column() { # column NAME KEY: of the log
    grep -o "\"$2\": [^,}]*" "$here/$1/log.jsonl"
}

same_column() { # same_column A B KEY
    [ -n "$(column "$1" "$3")" ] && [ "$(column "$1" "$3")" = "$(column "$2" "$3")" ]
}

equal() { # equal N ROUTER: n ranks of one micro-batch are one rank of n
    local n=$1 router=$2 options
    options="${alike[$router]} --global-batch $((2 * n))"
    run one $options && run many $options --gpus "$n"
    check "${TRAINER:-$gpu}, $router: $n ranks run" $?
    same one many
    check "... with the bits of one rank of $n micro-batches" $?
    same_column one many lm_loss && same_column one many sparsity && same_column one many grad_norm
    check '... its losses, sparsity and norms' $?
}

test_equal() { # every router once; every number of ranks; both precisions with an order of sums that shows (not n = 2)
    local n router most=${RANKS##* }
    for router in "${!alike[@]}"; do
        equal "${RANKS%% *}" "$router"
    done
    for n in $RANKS; do
        [ "$n" = "${RANKS%% *}" ] || equal "$n" relu
    done
    TRAINER=$gpu_fp32 equal "$most" topk
    # three micro-batches a domain
    local validated="--global-batch $((2 * most)) --val-every 2 --val-batches 3"
    run one ${alike[dense]} $validated --val-data 'build/sample/val.*.bin' &&
        run many ${alike[dense]} $validated --val-data 'build/sample/val.*.bin' --gpus "$most"
    same one many && same_column one many val_loss
    check 'validation between the steps: the losses of one rank' $?
}

dump() { # dump NAME OPTIONS...: of the model in $here/balance_model
    local name=$1
    shift
    timeout -k 5 100 "$gpu_fp32" --load $here/balance_model --dump $here/$name --data build/sample/train_000000.bin --seq-len 16 \
        --lambda 0.1 "$@" >"$here/$name.txt" 2>&1
}

test_balance() { # f_le is counted over all ranks: n ranks of B sequences are one of n B, to rounding
    local n
    TRAINER=$gpu_fp32 run balance_model --global-batch 4 --batch 4
    for n in $RANKS; do
        dump balance_one --batch $((2 * n)) && dump balance_many --batch 2 --gpus "$n"
        check "$n ranks dump" $?
        build/compare_dumps 1e-5 $here/balance_one $here/balance_many >$here/balance.txt
        check "... the losses and gradients of one rank with all sequences" $?
        [ "$n" = "${RANKS%% *}" ] || continue
        TRAINER=$gpu_fp32 run balance_a --lambda-init 1e-6 --batch $((2 * n)) &&
            TRAINER=$gpu_fp32 run balance_b --lambda-init 1e-6 --gpus "$n"
        check "$n ranks train" $?
        same_column balance_a balance_b lambda
        check "... with the same lambdas before S meets its target" $?
    done
}

test_variants() { # all that must not change a bit
    local n=${RANKS%% *} router=
    run base --gpus "$n" --global-batch $((4 * n)) --save-every 2 --keep 0
    check "$n ranks with two micro-batches each" $?
    variant() { # variant WHAT OPTIONS...
        local what=$1
        shift
        run variant $router --gpus "$n" --global-batch $((4 * n)) "$@" && same base variant
        check "the same bits: $what" $?
    }
    variant 'a repeat'
    variant 'undivided states' --zero 0
    variant 'undivided states, by NCCL' --zero 0 --comm nccl
    variant 'by NCCL' --comm nccl
    variant 'by copies' --comm copies
    variant 'recomputed norms' --recompute
    variant 'no pairs stored' --pair-budget 1e-6
    if [[ $gpu = *emulated* ]]; then
        EMULATED_STREAMS=late variant 'all work as late as it may come'
        EMULATED_STREAMS=late variant 'as late, by NCCL' --comm nccl
        EMULATED_STREAMS=late variant 'as late, undivided' --zero 0
        EMULATED_STREAMS=ahead variant 'moves as early as they may come'
        for seed in 1 2; do
            EMULATED_STREAMS=$seed variant "work in order $seed"
        done
        EMULATED_PEERS=0 variant "GPUs that do not reach each other"
        grep -q NCCL $here/variant.txt
        check '... which is said' $?
    fi
    rm -rf $here/resumed && cp -r $here/base $here/resumed && rm -rf $here/resumed/step_00000004
    timeout 100 "$gpu" --resume $here/resumed/step_00000002 --gpus "$n" >$here/resumed.txt 2>&1 && same base resumed
    check 'the same bits: resumed' $?
    router=${alike[lory]}
    run base $router --gpus "$n" --global-batch $((4 * n))
    check "lory on $n ranks" $?
    variant 'no pairs stored' --pair-budget 1e-6
    variant 'undivided states, by NCCL' --zero 0 --comm nccl
    if [[ $gpu = *emulated* ]]; then
        EMULATED_STREAMS=late variant 'all work as late as it may come'
        EMULATED_STREAMS=ahead variant 'moves as early as they may come'
    fi
}

resumed_by() { # resumed_by N NAME: a copy of the run NAME goes on from its second step, with N ranks
    rm -rf $here/resumed && cp -r "$here/$2" $here/resumed && rm -rf $here/resumed/step_00000004
    timeout 100 "$gpu" --resume $here/resumed/step_00000002 --gpus "$1" >$here/resumed.txt 2>&1
}

test_reshard() { # saved by some ranks, resumed by others, each of which computes the same bits
    local n options
    for n in ${RANKS%% *} ${RANKS##* }; do
        options="${alike[topk]} --batch 1 --global-batch $n --save-every 2 --keep 0"
        run alone $options && run together $options --gpus "$n" && same alone together
        check "$n ranks and one save the same" $?
        resumed_by 1 together && same alone resumed
        check "saved by $n ranks, resumed by one" $?
        resumed_by "$n" alone && same alone resumed
        check "saved by one rank, resumed by $n" $?
    done
    resumed_by "${RANKS%% *}" together && [ "$(position together)" = "$(position resumed)" ]
    check "saved by $n ranks, resumed by ${RANKS%% *}" $?
    timeout 100 ./train_remoe --resume $here/together/step_00000002 --out $here/together >$here/cpu.txt 2>&1
    check 'and by the CPU' $?
}

test_uses() { # all that a run does besides
    local n=${RANKS%% *}
    run model --global-batch 4 --batch 4
    local evaluate="--load $here/model --eval --batch 2 --val-batches 7 --val-data build/sample/val.*.bin"
    set -f # the trainer's own pattern
    timeout 100 "$gpu" $evaluate >$here/eval_one.txt 2>&1 &&
        timeout 100 "$gpu" $evaluate --gpus "$n" >$here/eval_many.txt 2>&1 &&
        cmp $here/eval_one.txt $here/eval_many.txt
    check '--eval' $?
    set +f
    timeout 100 "$gpu" --load $here/model --sample 'int main' --sample-tokens 8 2>/dev/null >$here/sample_one.txt &&
        timeout 100 "$gpu" --load $here/model --sample 'int main' --sample-tokens 8 --gpus "$n" 2>/dev/null >$here/sample_many.txt &&
        [ -s $here/sample_one.txt ] && cmp $here/sample_one.txt $here/sample_many.txt
    check '--sample' $?
    run overfit --gpus "$n" --overfit-batch --sample-tokens 4 --sample-every 4
    check '--overfit-batch, samples' $?
    timeout 400 "$gpu" $tiny --gpus "$n" --bench --router topk --batch 1 >$here/bench.txt 2>&1 &&
        grep -q 'waiting for other GPUs' $here/bench.txt
    check '--bench, with the exposed communication' $?
    run diverged --gpus "$n" --lr 1e3 --lr-min 1e3 --grad-clip 0 --save-every 1
    [ $? = 1 ] && grep -q '3 non-finite steps in a row' $here/diverged.txt && [ "$(grep -c 'the run ends' $here/diverged.txt)" = 1 ]
    check 'weights that blow up end all ranks, said once' $?
    timeout 100 "$gpu" $tiny --gpus "$n" --batch 3 --global-batch $((2 * n)) --out $here/uneven >$here/uneven.txt 2>&1
    [ $? = 2 ] && grep -q -- '---> --batch 2' $here/uneven.txt && [ "$(grep -c error $here/uneven.txt)" = 1 ]
    check 'a batch that ranks cannot share, said once' $?
}

# ----------------------------------------------------------------------------
# faults

endless() { # endless NAME OPTIONS...: in the background; when its first steps are done, $pid, and the ranks' processes in $ranks
    local name=$1
    shift
    rm -rf "${here:?}/$name"
    "$gpu" $tiny --val-data '' --steps 1000000 --save-every 5 --out "$here/$name" "$@" >"$here/$name.txt" 2>&1 &
    pid=$!
    until [ -e "$here/$name/latest" ] || ! kill -0 $pid 2>/dev/null; do sleep 0.05; done
    ranks=($(pgrep -P $pid))
}

ended() { # ended SECONDS: the background process, and all its ranks, in time; its status
    local turns=$(($1 * 20))
    while kill -0 $pid 2>/dev/null && [ $((turns--)) -gt 0 ]; do sleep 0.05; done
    ! kill -0 $pid 2>/dev/null || { kill -KILL $pid "${ranks[@]}"; return 99; }
    for rank in "${ranks[@]}"; do
        ! kill -0 "$rank" 2>/dev/null || { kill -KILL "$rank"; return 98; }
    done
    wait $pid
}

# goes on from its last checkpoint to STEP; the bits are those of a run that nobody has disturbed
undisturbed() { # undisturbed NAME
    local step name=$1
    step=$(($(sed -n 's/.*"step": \([0-9]*\),.*/\1/p' $here/$name/latest/state.json | head -n 1) + 3))
    timeout 200 "$gpu" --resume $here/$name --steps $step --gpus "$n" >$here/$name.resumed.txt 2>&1 &&
        run undisturbed --gpus "$n" --global-batch $((2 * n)) --steps $step --lr-min 2e-3 && same "$name" undisturbed
}

test_scores() { # requests shared out among ranks: the bytes that one rank writes, in its order
    local n=${RANKS##* } i what
    run scored ${alike[relu]} --global-batch 2
    for ((i = 0; i < 12; i++)); do
        echo "{\"query\":\"int number_$i\",\"choices\":[\"= $i;\",\"(void)\"],\"gold\":0}"
        echo "{\"text\":\"text number $i, longer than the context of sixteen tokens that the model has been given\"}"
    done >$here/score.jsonl
    for ((i = 0; i < 7; i++)); do
        echo "{\"id\":$i,\"context\":\"int number_$i\",\"max_tokens\":$((i % 3 + 1)),\"temperature\":0.$i}"
    done >$here/generate.jsonl
    for what in score generate; do
        for i in 1 $n; do
            rm -f $here/$what.$i
            timeout 200 "$gpu" --load "$(last_of scored)" --$what $here/$what.jsonl --out $here/$what.$i --gpus "$i" >$here/$what.$i.txt 2>&1
            check "--$what by $i" $?
        done
        cmp $here/$what.1 $here/$what.$n
        check "--$what: $n ranks write what one does" $?
        head -n 5 $here/$what.1 >$here/$what.part
        timeout 200 "$gpu" --load "$(last_of scored)" --$what $here/$what.jsonl --out $here/$what.part --gpus "$n" >$here/$what.part.txt 2>&1 &&
            cmp $here/$what.1 $here/$what.part
        check "--$what: $n ranks go on where one has stopped" $?
    done
    echo '{"context":"a"}' >>$here/score.jsonl
    timeout 60 "$gpu" --load "$(last_of scored)" --score $here/score.jsonl --out $here/score.bad --gpus "$n" >$here/score.bad.txt 2>&1
    [ $? = 1 ] && [ "$(grep -c 'score.jsonl:25: a request has' $here/score.bad.txt)" = 1 ]
    check 'a wrong line is named, once' $?
}

test_faults() {
    local n=${RANKS%% *} victim seed
    local options="--gpus $n --global-batch $((2 * n)) --lr-min 2e-3"
    for victim in 0 $((n - 1)); do
        endless "killed_$victim" $options
        kill -KILL "${ranks[$victim]}"
        ended 5
        local status=$?
        [ $status != 0 ] && [ $status != 98 ] && [ $status != 99 ]
        check "rank $victim killed: the run ends within 5 s ($status)" $?
        grep -q "rank $victim" "$here/killed_$victim.txt"
        check '... and names it' $?
        undisturbed "killed_$victim"
        check '... and goes on to the undisturbed bits' $?
    done
    for seed in $(seq "$SEED" $((SEED + ${KILLS:-2} - 1))); do # at any moment
        endless moment $options
        RANDOM=$seed
        sleep 0.$((RANDOM % 900 + 100))
        kill -KILL "${ranks[$((RANDOM % n))]}"
        ended 5
        status=$?
        [ $status != 0 ] && [ $status != 98 ] && [ $status != 99 ] && undisturbed moment
        check "killed at a moment (seed $seed): noticed, resumable" $?
    done
    endless hung $options --watchdog-minutes 0.05
    kill -STOP "${ranks[1]}"
    ended 30 # the parent kills what does not end by itself after 20
    status=$?
    kill -KILL "${ranks[1]}" 2>/dev/null
    [ $status != 0 ] && [ $status != 98 ] && [ $status != 99 ] && grep -q 'rank 1' $here/hung.txt
    check "a hung rank is named ($status)" $?
    endless interrupted $options --val-every 1 --val-data 'build/sample/val.*.bin' --val-batches 8 # it mostly validates
    kill -INT "${ranks[$((n - 1))]}"
    ended 20
    check 'Ctrl-C at one rank: all save, exit 0' $?
    undisturbed interrupted
    check '... and goes on to the undisturbed bits' $?
    endless terminated $options
    kill -TERM $pid
    ended 20
    check 'SIGTERM to the parent: all save, exit 0' $?
    run timed $options --steps 1000000 --max-minutes 0.05 && grep -q 'stopped at step' $here/timed.txt
    check '--max-minutes' $?
}

# ----------------------------------------------------------------------------
# launch

test_launch() { # by somebody else's variables
    local n=${RANKS%% *} port pids=() pid r code=0
    run by_gpus ${alike[topk]} --global-batch $((2 * n)) --gpus "$n"
    port=$((20000 + RANDOM % 20000))
    rm -rf $here/by_variables
    for ((r = n - 1; r >= 0; r--)); do
        RANK=$r WORLD_SIZE=$n LOCAL_RANK=$r LOCAL_WORLD_SIZE=$n MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
            timeout 200 "$gpu" $tiny ${alike[topk]} --global-batch $((2 * n)) --out $here/by_variables >$here/by_variables_$r.txt 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait $pid || code=1; done
    check "torchrun's variables" $code
    same by_gpus by_variables
    check '... the same bits' $?
    [ ! -s $here/by_variables_1.txt ]
    check '... and rank 0 alone speaks' $?
    for ((r = 0; r < 2; r++)); do
        RANK=$r WORLD_SIZE=2 LOCAL_RANK=$r LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((port + 1)) \
            timeout 60 "$gpu" $tiny --lr 0.00$((r + 1)) --out $here/differ >$here/differ_$r.txt 2>&1 &
        pids[$r]=$!
    done
    wait ${pids[0]}
    [ $? != 0 ] && grep -q 'rank 1.*--lr.*0.002' $here/differ_0.txt
    check 'ranks with other options are named' $?
    wait ${pids[1]}
    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((port + 2)) \
        timeout 60 "$gpu" $tiny --connect-minutes 0.02 --out $here/missing >$here/missing.txt 2>&1
    [ $? = 1 ] && grep -q 'rank.* 1' $here/missing.txt
    check 'a rank that never comes is named' $?
    if [[ $gpu = *emulated* ]]; then
        EMULATED_GPUS=1 timeout 60 "$gpu" $tiny --gpus 2 --out $here/one_card >$here/one_card.txt 2>&1
        [ $? = 1 ] && grep -q -- '--->' $here/one_card.txt && [ "$(grep -c error $here/one_card.txt)" = 1 ]
        check 'more ranks than GPUs, said once' $?
    fi
    mkdir -p $here/elsewhere/build/sample
    cp build/sample/train_* build/sample/val.[d-z]*.bin $here/elsewhere/build/sample/ # rank 1 lacks a domain
    local folders=(. $here/elsewhere) out=$PWD/$here/lacks program
    program=$(realpath "$gpu")
    for ((r = 1; r >= 0; r--)); do
        (cd ${folders[$r]} &&
            RANK=$r WORLD_SIZE=2 LOCAL_RANK=$r LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((port + 3)) \
                timeout 60 "$program" $tiny --tokenizer '' --out "$out") >$here/lacks_$r.txt 2>&1 &
        pids[$r]=$!
    done
    wait ${pids[0]}
    [ $? = 1 ] && grep -q 'rank 1.*the data differs' $here/lacks_0.txt
    check 'a rank that lacks a validation shard is named' $?
    wait ${pids[1]}
    WORLD_SIZE=8 timeout 60 "$gpu" --help >$here/help.txt
    check "--help, whatever a launcher has left behind" $?
    rm -rf $here/full
    timeout 60 "$gpu" $tiny --gpus 2 --steps 1 --val-data '' --out $here/full >/dev/full 2>$here/full.txt
    [ $? = 1 ] && [ "$(grep -c error $here/full.txt)" = 1 ]
    check 'a full standard output, said once' $?
    timeout 60 ./train_remoe --gpus 2 >$here/cpu.txt 2>&1
    [ $? = 2 ] && grep -q train_remoecu $here/cpu.txt
    check 'the CPU trainer takes no --gpus' $?
}

for name in ${*:-equal balance variants reshard uses scores faults launch}; do
    test_$name
done
echo "test_gpus: $passed passed, $failed failed"
[ "$failed" = 0 ]
