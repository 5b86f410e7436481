#!/usr/bin/env bash
# How the trainer ends when somebody else wants it to: a training run saves first, whatever the signal; --score keeps what it
# has written, and goes on; what has nothing to save ends at once; a standard output that takes nothing more shows in the exit status.
# usage: dev/test/test_signals.sh          (after make train_remoe sample-data; a few seconds)
#        TRAINER=./train_remoe may name another trainer
cd "$(dirname "$0")/../.." || exit 1
. dev/test/check.sh
trainer=$(realpath "${TRAINER:-./train_remoe}")
here=build/test/signals
export OMP_NUM_THREADS=1
rm -rf $here
mkdir -p $here
model='--layers 1 --hidden 16 --heads 2 --kv-heads 1 --ffn-mult 2 --experts 4 --batch 2 --seq-len 32 --warmup-steps 1 --sample-tokens 0'

endless() { # endless NAME OPTIONS...: in the background, its first step done; $pid
    local name=$1
    shift
    # whatever the caller ignores: a terminal that closes is ignored by what nohup has started
    env --default-signal=HUP "$trainer" $model --steps 1000000000 --out $here/$name "$@" >$here/$name.txt 2>&1 &
    pid=$!
    until [ -s $here/$name/log.jsonl ] || ! kill -0 $pid 2>/dev/null; do
        sleep 0.02
    done
}

ended() { # ended SECONDS: the last background process does so in time; its status
    local turns=$(($1 * 50))
    while kill -0 $pid 2>/dev/null && [ $((turns--)) -gt 0 ]; do
        sleep 0.02
    done
    ! kill -0 $pid 2>/dev/null || { kill -KILL $pid && return 99; }
    wait $pid
}

saved() { [ -f $here/$1/latest/state.json ]; }

for name in HUP TERM INT; do
    endless $name
    kill -$name $pid
    ended 20 && saved $name
    check "SIG$name: saved, exit 0" $?
done

(trap '' HUP && exec "$trainer" $model --steps 1000000000 --out $here/nohup >$here/nohup.txt 2>&1) &
pid=$!
until [ -s $here/nohup/log.jsonl ] || ! kill -0 $pid 2>/dev/null; do sleep 0.02; done
kill -HUP $pid
sleep 0.3
kill -0 $pid
check "nohup: a terminal that closes is ignored" $?
kill -TERM $pid
ended 20 && saved nohup
check "... and a later kill is not" $?

"$trainer" $model --steps 1000000000 --out $here/pipe 2>$here/pipe.txt | head -n 6 >/dev/null
[ "${PIPESTATUS[0]}" = 1 ] && saved pipe && grep -q 'standard output' $here/pipe.txt
check "a pipe whose reader is gone: saved, exit 1" $?

"$trainer" $model --steps 3 --out $here/full >/dev/full 2>$here/full.txt
[ $? = 1 ] && saved full && grep -q 'standard output' $here/full.txt
check "a full standard output: saved, exit 1" $?

endless validation --val-every 1 --val-batches 1000000000 --batch 1 --val-data build/sample/val.c.bin
kill -TERM $pid
ended 20 && saved validation
check "in a validation" $?

# a sparsity that is never reached: 2000 steps of settling
"$trainer" $model --lambda-init 1e-30 --alpha 1 --batch 64 --out $here/bench --bench >$here/bench.txt 2>&1 &
pid=$!
sleep 0.5
kill -TERM $pid
ended 5
[ $? = 143 ] && [ ! -e $here/bench ]
check "--bench has nothing to save: it ends at once" $?

# --score: what a signal interrupts, the same command makes whole, with the same bits; so it does after a kill
for ((i = 0; i < 3000; i++)); do
    echo "{\"id\":$i,\"query\":\"static inline int number_$i\",\"choices\":[\"(int x)\",\"= $i;\",\"[$i]\"],\"gold\":1}"
done >$here/requests.jsonl
score() { exec "$trainer" --load $here/TERM --batch 1 --score $here/requests.jsonl --out "$here/$1"; } # in a subshell
(score whole) >$here/whole.txt 2>&1
check "--score" $?
for name in INT TERM KILL; do
    rm -f $here/cut
    score cut >$here/cut.txt 2>&1 &
    pid=$!
    until [ -s $here/cut ] || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done
    kill -$name $pid 2>/dev/null
    ended 20
    status=$?
    [ $name = KILL ] || [ $status = 130 ] && [ "$(wc -l <$here/cut)" -lt 3000 ]
    check "--score, SIG$name: interrupted ($status)" $?
    (score cut) >$here/cut.txt 2>&1 && cmp $here/whole $here/cut
    check "... and goes on to the same bits" $?
done
(flock 9 && score cut) 9<>$here/cut >$here/cut.txt 2>&1
[ $? = 1 ] && grep -q 'another process' $here/cut.txt
check "--score: one process at a time writes results" $?

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
