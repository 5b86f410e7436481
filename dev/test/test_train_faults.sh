#!/usr/bin/env bash
# What the trainer does when things go wrong: killed at any moment, disk full, folder not writable, files damaged, options absurd.
# Whatever happens, every checkpoint that has its name is whole and `latest` names one; a restart goes on to the same bits as a
# run that nothing disturbed; every refusal says why.
# usage: dev/test/test_train_faults.sh          (after make train_remoe; about half a minute)
#        TRAINER=./train_remoe may name another trainer
cd "$(dirname "$0")/../.." || exit 1
. dev/test/check.sh
trainer=$(realpath "${TRAINER:-./train_remoe}")
here=build/test/train_faults
export OMP_NUM_THREADS=1
RANDOM=20240520 # seeds bash's generator: the same moments every time, as far as the machine allows

refused() { # expected status, expected text, options of the trainer...; a bad file's refusal names a remedy
    local expected=$1 text=$2 status
    shift 2
    # a limit of memory and time: what should be refused must not take the machine along if it is not
    (ulimit -v 16000000 && timeout -k 1 20 "$trainer" "$@") >output 2>&1
    status=$?
    [ $status = "$expected" ] && grep -q -e "$text" output && { [ $status = 2 ] || grep -q '^  ---> ' output; }
    status=$?
    check "exit $expected with '$text' and a remedy: $*" $status
    [ $status = 0 ] || sed 's/^/    /' output
}

latest() { # of a run: a link, or where there are none a file with its name
    [ -L "$1/latest" ] && readlink "$1/latest" || cat "$1/latest"
}

# whole RUN REFERENCE: each checkpoint in RUN is the reference's of that step, byte for byte; `latest` names one of them. What steps
# aside while another takes its name counts until that has it
whole() {
    local folder name
    for folder in "$1"/step_*; do
        [ -e "$folder" ] || break
        [ "$folder" != "${folder%.old}" ] && [ -e "${folder%.old}" ] && continue
        name=$(basename "$folder" .old)
        diff -rq -x state.json "$folder" "$2/$name" >&2 || return 1
        state "$folder" | cmp - <(state "$2/$name") >&2 || return 1
    done
    [ ! -e "$1/latest" ] && [ ! -L "$1/latest" ] || [ -f "$1/$(latest "$1")/state.json" ] || [ -f "$1/$(latest "$1").old/state.json" ]
}

state() { # without what differs from run to run
    grep -v '"options"\|"run"' "$1/state.json"
}

rows() { # of a log: each step and its loss, each validation
    grep -o '^{"step": [0-9]*, "[a-z]*_loss": [^,}]*' "$1/log.jsonl"
}

# finished RUN REFERENCE STEPS: the last checkpoint, the rows of the log each exactly once, and nothing left behind
finished() {
    local name
    name=$(printf 'step_%08d' "$3")
    whole "$1" "$2" && [ "$(latest "$1")" = "$name" ] &&
        rows "$1" | cmp - <(rows "$2") >&2 && [ "$(rows "$1" | grep -c lm_loss)" = "$3" ] &&
        [ -z "$(find "$1" -name '.tmp*' -o -name '*.tmp')" ]
}

le32() { # a number as four bytes, lowest first
    local shift
    for shift in 0 8 16 24; do
        printf %b "\\x$(printf %02x $(($1 >> shift & 255)))"
    done
}

shard() { # a token shard of the trainer's own text, a character a token
    le32 20240520
    le32 1
    le32 "$1"
    head -c 1012 /dev/zero
    LC_ALL=C tr -dc ' -~' <../../../train_remoe.c | head -c "$1" | LC_ALL=C sed 's/./&\x00/g'
}

if [ ! -x "$trainer" ]; then
    echo "error: no ${TRAINER:-./train_remoe}" >&2
    echo "  ---> make train_remoe" >&2
    exit 1
fi
rm -rf $here
mkdir -p $here
${CC:-cc} -shared -fPIC dev/test/fault_at.c -o $here/fault_at.so -ldl || exit 1
cd $here || exit 1
shard 20000 >data.bin
model="--layers 2 --hidden 16 --heads 2 --kv-heads 1 --ffn-mult 2 --experts 4 --vocab-size 128"
batch="--data data.bin --seq-len 16 --batch 4 --lr 1e-2 --lambda-init 1e-6"
# shellcheck disable=SC2086 # options are many words
train() { # in the foreground: in the background a kill would end the shell around it, not the trainer
    "$trainer" $model $batch "$@"
}

# --- killed at random moments, again and again, until the run is complete
begin=$(date +%s%N)
train --steps 200 --save-every 2 --keep 0 --out reference >output 2>&1
check "a run that nothing disturbs" $?
took=$((($(date +%s%N) - begin) / 1000000)) # ms
kills=0
for _ in $(seq 12); do
    if [ -L killed/latest ]; then
        "$trainer" --resume latest --out killed >output 2>&1 &
    else
        rm -rf killed # killed before it had saved: a new run in its place would cut its log
        # shellcheck disable=SC2086
        "$trainer" $model $batch --steps 200 --save-every 2 --out killed >output 2>&1 &
    fi
    pid=$!
    sleep "$(printf '0.%03d' $((10 + RANDOM % (took / 12 + 20))))"
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    [ $? = 137 ] && kills=$((kills + 1))
    whole killed reference
    check "checkpoints after kill $kills" $?
done
[ $kills -ge 6 ]
check "$kills of 12 kills came before the end" $?
"$trainer" --resume latest --out killed >output 2>&1
finished killed reference 200
check "the run killed $kills times ends as the one that was not" $?

# --- killed, or out of space, at every single operation on files: while the next step is saved and an old one removed, and while
# the same step is saved again
train --steps 6 --save-every 2 --keep 0 --val-data data.bin --val-every 2 --val-batches 2 --out short >output 2>&1
mkdir start
cp -r short/step_00000002 short/step_00000004 start
ln -s step_00000004 start/latest
grep -v '^{"step": [456]' short/log.jsonl >start/log.jsonl

kept() { # RUN CHECKPOINT: one that is saved again is lost at no moment
    [ "$2" = latest ] || [ -f "$1/step_00000004/state.json" ] || [ -f "$1/step_00000004.old/state.json" ]
}

disturb() { # disturb kill|full CHECKPOINT OPTIONS...: every n until nothing is left to disturb; the number of them in $n
    local how=$1 from=$2 status
    shift 2
    n=0
    status=1
    while [ $status != 0 ] && [ $n -lt 200 ]; do
        n=$((n + 1))
        rm -rf run
        cp -r start run
        {
            LD_PRELOAD=./fault_at.so FAULT_AT=$n FAULT=$how "$trainer" --resume run/$from --save-every 2 "$@" >output 2>&1
            status=$?
        } 2>/dev/null # where the shell says who was killed
        if [ "$how" = full ] && [ $status != 0 ]; then
            [ $status = 1 ] && grep -q 'error: .*No space left on device' output && grep -q '^  ---> ' output
            check "the message when operation $n fails" $?
        elif [ $status != 0 ] && [ $status != 137 ]; then
            check "exit $status at operation $n" 1
        fi
        whole run short && kept run "$from"
        check "checkpoints after $how at operation $n from $from, $*" $?
        [ $((n % 4)) != 0 ] && [ "$how" = full ] && continue # that it goes on is shown for each kill
        LD_PRELOAD=./fault_at.so "$trainer" --resume latest --out run >output 2>&1
        finished run short 6
        check "the end after $how at operation $n from $from, $*" $?
    done
}

disturb kill latest --keep 1
[ $n -gt 30 ] && [ $n -lt 200 ]
check "$n operations were tried: the trainer is disturbed" $?
disturb kill step_00000002 --keep 0
disturb full latest --keep 1
disturb full step_00000002 --keep 0
export PLAIN=1 # a file system without links, locks, and the exchange of two names
disturb kill step_00000002 --keep 0
grep -q 'run cannot be locked: No locks available' output && [ -f run/latest ] && [ ! -L run/latest ]
check "a file system without links and locks" $?
unset PLAIN
look="--data data.bin --batch 1 --seq-len 8 --dump"
# shellcheck disable=SC2086
"$trainer" --load run $look dump >output 2>&1 && "$trainer" --load run/step_00000006 $look dump2 >output 2>&1 && cmp dump dump2
check "a latest that is a file" $?

# --- a run that was copied goes on where it is; one that goes back to an earlier step has its `latest` there at once
rm -rf moved && cp -r start moved
"$trainer" --resume moved >output 2>&1
finished moved short 6 && [ "$(readlink start/latest)" = step_00000004 ]
check "a copied run" $?
rm -rf run && cp -r short run
LD_PRELOAD=./fault_at.so FAULT_AT=15 FAULT=full "$trainer" --resume run/step_00000002 >output 2>&1
[ $? = 1 ] && [ "$(readlink run/latest)" = step_00000002 ] && "$trainer" --resume run >output 2>&1 && finished run short 6
check "back to step 2, disturbed, and on" $?

# --- whose folder: a run goes on in its own, and in no other's
unchanged() { # FOLDER COMMAND...: nothing in the folder is touched
    local folder=$1 before
    shift
    before=$(picture "$folder")
    "$@"
    [ "$before" = "$(picture "$folder")" ]
    check "$folder as it was after: $*" $?
}

picture() { # of a folder: names, times, links and contents
    find "$1" -name output -prune -o -printf '%p %T@ %l ' -type f -exec cksum {} +
}

cp -r start/step_00000004 mine
unchanged . refused 1 'mine is a copy outside of its run' --resume mine
mv mine killed/mine
unchanged killed refused 1 'killed holds another run than killed/mine: its step_' --resume killed/mine
cp -r start/step_00000004 killed/step_00000004
unchanged killed refused 1 'killed holds another run than killed/step_00000004: its step_' --resume killed/step_00000004
rm -r killed/step_00000004 killed/mine
unchanged killed refused 1 'killed holds another run than start/step_00000004' --resume start --out killed
mkdir log_only && echo '{"step": 0}' >log_only/log.jsonl
unchanged log_only refused 1 'log_only already holds a run: the log.jsonl' --resume start --out log_only
# shellcheck disable=SC2086
unchanged log_only refused 1 'log_only already holds a run: the log.jsonl' $model $batch --steps 2 --out log_only
rm -rf run && cp -r start run && ln -s run/step_00000004 linked
"$trainer" --resume linked >output 2>&1
finished run short 6 && [ ! -e log.jsonl ]
check "a link leads to its run" $?
"$trainer" --resume start/step_00000002 --out branch >output 2>&1
rows branch | cmp - <(rows short | tail -n +3) && diff -r -x state.json branch/latest/ short/latest/ &&
    ! cmp <(grep '"run"' branch/latest/state.json) <(grep '"run"' start/latest/state.json) >/dev/null
check "a branch of a run is a run of its own" $?
unchanged branch refused 1 'branch holds another run' --resume start --out branch
rm -rf run && cp -r start run && sed -i '/"run"/d; /"shards"/,/^  \],/d' run/step_*/state.json
"$trainer" --resume run >output 2>&1 && "$trainer" --resume run --steps 7 >output 2>&1 && "$trainer" --resume run/step_00000006 --steps 7 >output 2>&1
diff -r -x state.json run/step_00000006 short/step_00000006 && [ -f run/step_00000007/state.json ]
check "a checkpoint from before runs had numbers" $?

# --- a run whose \`latest\` is lost, leads nowhere, or was copied as a folder
"$trainer" --load start $look dump4 >output 2>&1
for damage in 'rm run/latest' 'ln -sfn step_7 run/latest' 'ln -sfn latest run/latest' 'rm run/latest; cp -r run/step_00000004 run/latest' \
    'rm run/latest; mkdir run/latest' 'rm run/latest; mv run/step_00000004 run/latest' 'mv run/step_00000004 run/step_00000004.old'; do
    rm -rf run && cp -r start run && eval "$damage"
    # shellcheck disable=SC2086
    unchanged run refused 1 'run already holds a run' $model $batch --steps 2 --out run
    # shellcheck disable=SC2086
    unchanged run "$trainer" --load run $look dump >output 2>&1
    cmp dump dump4
    check "loaded after: $damage" $?
    "$trainer" --resume run >output 2>&1
    finished run short 6 && [ -L run/latest ]
    check "resumed after: $damage" $?
done

rm -rf run && cp -rL start run && echo mine >run/latest/notes.txt && "$trainer" --resume run >output 2>&1
grep -q 'run/latest was a copy of run/step_00000004' output && [ -L run/latest ] && [ -s run/latest.copy/notes.txt ]
check "a copied latest is not lost" $?

# --- the default folder, and the newest run
mkdir -p default/runs/tiny-relu && echo '{"step": 0}' >default/runs/tiny-relu/log.jsonl && cp data.bin default && cd default || exit 1
# shellcheck disable=SC2086
{
    unchanged runs/tiny-relu "$trainer" $model $batch --steps 2 >../output 2>&1
    [ -L runs/tiny-relu-2/latest ] && "$trainer" $model $batch --steps 2 --router topk >../output 2>&1 && [ -L runs/tiny-topk/latest ]
    check "the next free folder" $?
    touch -d '1 minute ago' runs/tiny-relu-2/*/model.safetensors
    unchanged runs/tiny-relu-2 "$trainer" --resume latest --steps 3 >../output 2>&1
    [ "$(readlink runs/tiny-topk/latest)" = step_00000003 ]
    check "the newest run, whatever its router" $?
}
mkdir empty && cd empty && refused 1 'no folder below runs holds a checkpoint' --resume latest && cd ..
refused 2 'runs/tiny-topk/step_00000003/config.json decides it' --resume latest --router topk
cd .. || exit 1

# --- a finished run: nothing is written; and no poorer checkpoint in a better one's place
unchanged short "$trainer" --resume short >output 2>&1
grep -q 'short/step_00000006 has done 6 steps.*nothing was changed' output && grep -q -e '---> .*--resume .* --steps 12' output
check "a finished run says how to go on" $?
rm -rf run && cp -r short run && sed -i '/"step": 6, "val_loss".*"all"/d' run/log.jsonl
"$trainer" --resume run >output 2>&1
finished run short 6
check "a finished run that was not validated" $?
unchanged short refused 2 'save-dtype belongs to --export' --resume short --save-dtype bf16
unchanged short refused 2 'save-dtype belongs to --export' --resume short --steps 8 --save-dtype bf16
unchanged . refused 2 'resume is empty' --resume ""

# --- other data than the run began with
rm -rf run && cp -r start run && cp data.bin other.bin && printf 'z\0' | dd of=other.bin bs=1 seek=1030 conv=notrunc status=none
mv data.bin kept.bin && mv other.bin data.bin
unchanged run refused 1 'not those that this run began with (1 shards, now 1): data.bin holds other tokens' --resume run
cp -r run other && "$trainer" --resume other --data data.bin >output 2>&1 && grep -q 'warning: the training data are not those' output
check "other data, by the user's will" $?
mv kept.bin data.bin
"$trainer" --resume run >output 2>&1
finished run short 6
check "the data brought back" $?

# --- validation data: all that a validation reads is looked at before the first step
shard 1488 >val.bin && shard 9 >val.short.bin
cp val.bin val.bad.bin && le32 8000000 | dd of=val.bad.bin bs=1 seek=2024 conv=notrunc status=none
# shellcheck disable=SC2086
{
    refused 1 'no file matches none' $model $batch --steps 2 --val-data 'none*.bin' --out validated
    refused 1 'val.bad.bin: token 500 is' $model $batch --steps 2 --val-data 'val.*bin' --out validated
    [ ! -e validated ]
    check "nothing was trained before validation data were refused" $?
    train --steps 2 --val-data 'val.bin,val.short.bin' --out validated >output 2>&1 && grep -q 'val.short.bin will not be validated' output &&
        [ "$(grep -c val_loss validated/log.jsonl)" = 2 ]
    check "a domain that is too short is left out" $?
    refused 1 'nothing to evaluate' --load start --eval --val-data val.short.bin
    "$trainer" --load start --eval --val-data val.bin --batch 3 >output 2>&1
    check "another batch than the run's: --global-batch is a matter of training" $?
    "$trainer" $model $batch --steps 1000000 --val-every 1 --val-data val.bin --out changed >output 2>&1 &
}
pid=$!
while ! grep -q val_loss changed/log.jsonl 2>/dev/null && kill -0 $pid; do
    sleep 0.05
done
dd if=val.bad.bin of=val.bin conv=notrunc status=none
while ! grep -q 'val.bin was not validated' output && kill -0 $pid; do
    sleep 0.05
done
kill $pid
wait $pid && grep -q 'saved changed' output
check "a failed validation does not end the run" $?

# --- what is no file but would be waited for
rm -rf run && cp -r start run && rm run/log.jsonl && mkfifo run/log.jsonl fifo.bin
refused 1 'run/log.jsonl is not a regular file' --resume run
# shellcheck disable=SC2086
refused 1 'fifo.bin is not a regular file' $model $batch --data fifo.bin --steps 2 --out bad_out

# --- two at once; and a second interrupt, which does not wait for the step
"$trainer" --load start --data data.bin --batch 1 --seq-len 8 --global-batch 16000000 --out endless >output 2>&1 &
pid=$!
while [ ! -e endless/log.jsonl ] && kill -0 $pid; do
    sleep 0.05
done
refused 1 'another process trains in endless' --load start --data data.bin --batch 1 --seq-len 8 --out endless
mkdir endless/step_00000004 && cp start/latest/[mo]* endless/step_00000004 && touch endless/step_00000004/config.json
refused 1 'another process trains in endless' --resume endless # before a file in it is opened
rm -r endless/step_00000004
kill -INT $pid
sleep 0.2
kill -0 $pid
check "the first interrupt waits for the end of the step" $?
kill -INT $pid
wait $pid
[ $? = 130 ]
check "the second does not" $?

# --- a file size limit, and a small disk
rm -rf run && cp -r start run
(ulimit -f 100 && exec "$trainer" --resume latest --out run) >output 2>&1
[ $? = 1 ] && grep -q 'cannot write run/.tmp_step_00000006/optimizer.safetensors: File too large' output && whole run short
check "file size limit" $?
"$trainer" --resume latest --out run >output 2>&1
finished run short 6
check "the end after the file size limit" $?

small_disk() { # in a name space of its own: the mount goes with it
    mkdir -p disk && mount -t tmpfs -o size=600k none disk || exit 99
    cp -r start disk/run
    "$trainer" --resume latest --out disk/run >output 2>&1
    [ $? = 1 ] && grep -q 'No space left on device' output && grep -q '  ---> free some disk space' output || exit 1
    whole disk/run short || exit 2
    mount -o remount,size=8m disk || exit 99
    "$trainer" --resume latest --out disk/run >output 2>&1
    finished disk/run short 6
}
export -f small_disk whole finished rows state latest
export trainer
if unshare -rm true 2>/dev/null; then
    unshare -rm bash -c small_disk
    status=$?
else
    status=99
fi
if [ $status = 99 ]; then
    skipped=$((skipped + 1))
    echo "skipped: a small disk, which needs the right to mount one"
else
    check "a small disk: $status" $status
fi

# --- nowhere to write
touch file
# shellcheck disable=SC2086 # options are many words, here and below
{
    refused 1 'cannot open file/log.jsonl: Not a directory' $model $batch --steps 2 --out file
    refused 1 'cannot make the folder file/run: Not a directory' $model $batch --steps 2 --out file/run
    refused 1 'cannot make the folder /proc/run' $model $batch --steps 2 --out /proc/run
    for path in /dev/full nowhere/dump start; do
        refused 1 "cannot write $path: " --load start --data data.bin --batch 1 --seq-len 8 --dump $path
    done
}

# --- an export, disturbed at every operation on files: it has its name when it is whole, and the next one succeeds
"$trainer" --load start --export exported >output 2>&1
check "an export" $?
for how in kill full; do
    status=1
    for ((n = 1; n < 200 && status != 0; n++)); do
        rm -rf again
        {
            LD_PRELOAD=./fault_at.so FAULT_AT=$n FAULT=$how "$trainer" --load start --export again >output 2>&1
            status=$?
        } 2>/dev/null
        { [ $how = kill ] && [ $status = 137 ]; } || [ $status = 0 ] || { [ $status = 1 ] && grep -q '^  ---> ' output; }
        check "exit $status of an export, $how at operation $n" $?
        [ ! -e again ] || [ "$(ls exported)" = "$(ls again)" ]
        check "an export is whole after $how at operation $n" $?
    done
    [ $n -gt 20 ] && diff -r -x README.md exported again >&2 && [ -z "$(find . -maxdepth 1 -name '.tmp_*')" ]
    check "the export after $((n - 1)) times $how" $?
done

# --- damaged checkpoints
damage() { # a copy of a run; $file: one of its latest checkpoint
    rm -rf bad bad_out
    cp -r start bad
    file=bad/latest/$1
}

unusable() { # expected text: neither resumed nor loaded
    refused 1 "$1" --resume bad --out bad_out
    refused 1 "$1" --load bad --data data.bin --batch 4 --seq-len 16 --steps 9 --out bad_out
}

train --steps 1 --hidden 32 --out wide >output 2>&1
for name in model.safetensors optimizer.safetensors; do
    damage $name && : >"$file" && unusable "$name is not a good safetensors file: it is empty"
    damage $name && truncate -s 5 "$file" && unusable "$name is not a good safetensors file: it has 5 bytes"
    damage $name && truncate -s -1 "$file" && unusable "$name is not a good safetensors file: data_offsets"
    damage $name && echo >>"$file" && unusable "$name is not a good safetensors file: .* its tensors end at byte"
    damage $name && le32 2147483647 | dd of="$file" bs=1 seek=4 conv=notrunc status=none &&
        unusable "$name is not a good safetensors file: .* said to begin with a header of"
    damage $name && printf '\xff' | dd of="$file" bs=1 seek=20 conv=notrunc status=none &&
        unusable "$name is not a good safetensors file: header: line 1, column"
    damage $name && sed -i 's/"F32"/"I32"/' "$file" && unusable "$name: tensor .* has dtype I32, expected F32"
    damage $name && cp wide/latest/$name "$file" && unusable "$name: tensor .* has shape .*32.*, expected .*16"
    damage $name && rm "$file" && mkdir "$file" && unusable "$name is not a good safetensors file: it is not a regular"
done
damage model.safetensors && rm "$file" && unusable 'cannot open bad/step_00000004/model.safetensors'
damage optimizer.safetensors && cp bad/latest/model.safetensors "$file" && unusable 'has no tensor exp_avg.'
damage optimizer.safetensors && rm "$file" && refused 1 'has no optimizer.safetensors' --resume bad --out bad_out
damage state.json && rm "$file" && refused 1 'has no state.json' --resume bad --out bad_out
damage config.json && rm "$file" && unusable 'no checkpoint in bad'
for name in config.json state.json; do
    damage $name && : >"$file" && unusable "$name is not valid JSON: line 1, column 1"
    damage $name && truncate -s 100 "$file" && unusable "$name is not valid JSON: line"
    damage $name && head -c 300 /dev/zero >"$file" && unusable "$name is not valid JSON: line 1, column 1"
    damage $name && echo '[]' >"$file" && unusable "$name: expected one JSON object"
    damage $name && rm "$file" && mkdir "$file" && unusable "cannot read bad/step_00000004/$name: Is a directory"
done
damage config.json && sed -i 's/"hidden_size": 16/"hidden_size": 32/' "$file" && unusable 'has shape .*16.*, expected .*32'
damage config.json && sed -i 's/"num_experts": 4/"num_experts": 8/' "$file" && unusable 'has shape .*4.*, expected .*8'
damage config.json && sed -i 's/"num_hidden_layers": 2/"num_hidden_layers": 3/' "$file" && unusable 'no tensor model.layers.2'
damage config.json && sed -i -E 's/"(vocab_size|intermediate_size)": [0-9]*/"\1": 16777216/; s/"hidden_size": 16/"hidden_size": 65536/' \
    "$file" && unusable 'GB of memory'
damage state.json && sed -i 's/"stage": [0-9]*/"stage": 4294967297/' "$file" && unusable '"stage" is missing or unusable'
damage state.json && sed -i 's/"sequences": /&99999999999999999/' "$file" && unusable '"sequences" is missing or unusable'
damage state.json && sed -i 's/"batch": 4/"batch": 0/' "$file" &&
    refused 1 'batch (from the checkpoint) expects an integer from 1' --resume bad --out bad_out
damage state.json && sed -i 's/"seq_len": 16/"seq_len": 20000/' "$file" &&
    refused 1 'none long enough for a window of 20000' --resume bad --out bad_out

# --- damaged data
for bytes in 0 3 1000 1023 1024 20001; do
    head -c $bytes data.bin >bad.bin
    # shellcheck disable=SC2086
    refused 1 'bad.bin is ' $model $batch --data bad.bin --steps 2 --out bad_out
done
cp data.bin long.bin && echo >>long.bin
shard 16 >short.bin
cp data.bin foreign.bin && le32 1 | dd of=foreign.bin bs=1 conv=notrunc status=none
cp data.bin version.bin && le32 2 | dd of=version.bin bs=1 seek=4 conv=notrunc status=none
cp data.bin negative.bin && printf '\xff\xff\xff\xff' | dd of=negative.bin bs=1 seek=8 conv=notrunc status=none
cp data.bin token.bin && le32 8000000 | dd of=token.bin bs=1 seek=11024 conv=notrunc status=none
# shellcheck disable=SC2086
{
    refused 1 'long.bin is damaged' $model $batch --data long.bin --steps 2 --out bad_out
    refused 1 'none long enough for a window' $model $batch --data short.bin --steps 2 --out bad_out
    refused 1 'foreign.bin is not a token shard' $model $batch --data foreign.bin --steps 2 --out bad_out
    refused 1 'a token shard of version 2' $model $batch --data version.bin --steps 2 --out bad_out
    refused 1 'negative.bin is damaged' $model $batch --data negative.bin --steps 2 --out bad_out
    refused 1 'token.bin: token 5000 is 4608, but the vocabulary has 128' $model $batch --data token.bin --steps 400 --out learned
    [ -f learned/latest/state.json ] && refused 1 'token.bin: token 5000' --resume learned # what came before it is kept
    check "what was learned before a bad token" $?
    rm -rf learned
    refused 1 'not a token shard: it is JSON text' $model $batch --data start/latest/config.json --steps 2 --out bad_out
    refused 1 'start is not a regular file' $model $batch --data start --steps 2 --out bad_out
    refused 1 'no file matches none\*.bin' $model $batch --data 'none*.bin' --steps 2 --out bad_out
    refused 2 'an empty name in a list of data files' $model $batch --data 'data.bin,' --steps 2 --out bad_out
    refused 2 'the weight of data.bin:0' $model $batch --data 'data.bin:0' --steps 2 --out bad_out
}

# --- data that is cut short while it is read
cp data.bin shrinks.bin
# shellcheck disable=SC2086
timeout -k 1 60 "$trainer" $model $batch --data shrinks.bin --val-data '' --steps 1000000 --out shrinks >output 2>&1 &
pid=$!
for _ in $(seq 100); do
    grep -q lm_loss shrinks/log.jsonl 2>/dev/null && break
    sleep 0.1
done
truncate -s 1024 shrinks.bin
wait $pid
[ $? = 1 ] && grep -q "/shrinks.bin could not be read: it was cut short while it was in use" output && grep -q '^  ---> ' output
check "a shard that is cut short while it is mapped: $(tail -n 1 output)" $?

# --- absurd options: refused before anything is allocated
# shellcheck disable=SC2086
{
    refused 1 'GB of memory' $batch --hidden 65536 --heads 512 --kv-heads 512
    refused 1 'GB of memory' $model $batch --layers 1024 --hidden 4096 --batch 4
    refused 1 'GB of memory' $model $batch --batch 65536 --seq-len 16000
    refused 1 'GB of memory' --load start --data data.bin --batch 65536 --seq-len 16000 --dump dump
    refused 2 'experts of .* weights' --layers 1024 --hidden 65536 --heads 1024 --kv-heads 1024 --ffn-mult 1024 --experts 65536
    refused 2 '' --experts 65536 --granularity 65536
    refused 2 '' --experts 1 --granularity 65536 --active 65536 --ffn-mult 1024
    refused 2 'tokens a micro-batch' $model $batch --batch 65536 --seq-len 1048576
    refused 2 'nothing to evaluate' --load start --eval --train-data data.bin
    refused 2 'expects an integer from 1' $model $batch --batch 9223372036854775808
    refused 2 'expects an integer' $model $batch --val-batches 9223372036854775807
    refused 2 'expects a number' $model $batch --lr nan
    refused 2 'longer than 16383 bytes' $model $batch --out "$(head -c 50000 /dev/zero | tr '\0' x)"
}

echo "$passed passed, $failed failed$([ $skipped -gt 0 ] && echo ", $skipped skipped")"
[ $failed -eq 0 ]
