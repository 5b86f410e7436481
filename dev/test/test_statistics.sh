#!/usr/bin/env bash
# What the routers are said to do (--stats, --flip-every, --trace) against a count from dumps' gates (count_statistics.py); the same
# file for any batch, threads and ranks; a run's bits do not depend on being looked at; refusals say why.
# usage: dev/test/test_statistics.sh            (after make train_remoe sample-data; needs python3; 10 s)
#        TRAINER=./train_remoecu_emulated_fp32 [RANKS='2 3'] another trainer (the emulator takes minutes), and ranks to share the
#        work among; ROUTERS='' relu alone
cd "$(dirname "$0")/../.." || exit 1
. dev/test/check.sh
trainer=${TRAINER:-./train_remoe}
here=build/test/statistics
export OMP_NUM_THREADS=1 EMULATED_GPUS=8
command -v python3 >/dev/null || { echo 'skipped: there is no python3'; echo '0 passed, 0 failed, 1 skipped'; exit 0; }
rm -rf $here && mkdir -p $here/data

# domains of 68, 8 and 1 windows of 16 tokens, whose names hold what file names may hold; A, B, C are the same without the names
names=("val.1 c++ \"é\"" $'val.2 \xff\\x41\n{}' 'val.3')
python3 - $here "${names[@]}" <<'PYTHON' || exit 1
import os, struct, sys
here, tokens = os.fsencode(sys.argv[1]), open("build/sample/train_000000.bin", "rb").read()[1024:]
for letter, name, first, n in zip("ABC", sys.argv[2:], (0, 5000, 9000), (16 * 68 + 3, 16 * 8 + 1, 20)):
    shard = struct.pack("<256i", 20240520, 1, n, *[0] * 253) + tokens[2 * first : 2 * (first + n)]
    for path in (b"/%c.bin" % ord(letter), b"/data/" + os.fsencode(name) + b".bin"):
        open(here + path, "wb").write(shard)
PYTHON

tiny='--layers 3 --hidden 32 --heads 2 --kv-heads 1 --ffn-mult 2 --seq-len 16 --batch 4 --global-batch 8 --lr 1e-2 --lr-min 1e-3
    --warmup-steps 1 --lambda-init 1e-3 --sample-tokens 0'
count() { python3 dev/test/count_statistics.py "$@"; }

train() { # train NAME OPTIONS...
    local name=$1
    shift
    rm -rf "${here:?}/$name"
    timeout -k 5 200 $trainer $tiny --data build/sample/train_000000.bin --val-data '' --tokenizer build/sample --out "$here/$name" \
        "$@" >"$here/$name.txt" 2>&1
}

look() { # look MODEL OPTIONS...
    local model=$1
    shift
    timeout -k 5 200 $trainer --load "$here/$model" --val-data "$here/data/val.*.bin" --seq-len 16 "$@" >$here/look.txt 2>&1
}

dump() { # dump MODEL LETTER WINDOWS FILE
    timeout -k 5 200 $trainer --load "$here/$1" --data "$here/$2.bin" --seq-len 16 --batch "$3" --lambda 0.1 --dump "$here/$4" \
        >$here/dump.txt 2>&1
}

counted() { # counted WHAT MODEL A_WINDOWS B_WINDOWS OPTIONS...: a statistics file against dumps
    local what=$1 model=$2 a=$3 b=$4
    shift 4
    look "$model" --eval --stats $here/stats "$@" && dump "$model" A "$a" A && dump "$model" B "$b" B && dump "$model" C 1 C &&
        count stats $here/stats $here/A.bin:$here/A $here/B.bin:$here/B $here/C.bin:$here/C
    check "$what: the counts are those of dumps' gates" $?
}

routers=${ROUTERS-topk auxfree hash ec}
train relu --steps 3 && train auxfree --router auxfree --active 2 --steps 3
check 'models to look at' $?
counted relu relu 68 8 --batch 80
cp $here/stats $here/first
counted 'relu, every layer' relu 68 8 --batch 80 --stats-layers all
counted 'relu, some tokens' relu 7 7 --batch 80 --stats-tokens 100
for router in $routers; do
    train "$router" --router "$router" --active 2 --steps 2 && counted "$router" "$router" 68 8 --batch 80
    check "$router trains" $?
done
python3 - $here/first <<'PYTHON'
import json, os, sys
data = open(sys.argv[1], "rb").read()
meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
assert json.loads(meta["domains"]) == ['1 c++ "é"', '2 \\xFF\\x5Cx41\n{}', "3"], meta
assert [meta[k] for k in ("kind", "router", "step", "experts", "active", "layers", "used_layers")] == ["stats", "relu", "3", "8", "1", "3", "[1]"]
PYTHON
check 'names of domains survive, and what the file was made from' $?

for variant in '--batch 1' '--batch 7' '--batch 80 --threads 2' '--batch 3 --val-batches 1'; do
    look relu --eval --stats $here/stats $variant && cmp $here/first $here/stats
    check "the same file with $variant" $?
done
if [[ $trainer = *fp32 ]] && [ -x ./train_remoe ]; then
    trainer=./train_remoe look relu --eval --stats $here/stats && cmp $here/first $here/stats
    check 'the same file of the CPU trainer' $?
fi
for ranks in $RANKS; do
    look relu --eval --stats $here/stats --batch 3 --gpus "$ranks" && cmp $here/first $here/stats
    check "the same file of $ranks ranks" $?
done

# ----------------------------------------------------------------------------
# traces

train sparsemixer --router sparsemixer --active 2 --steps 2
for model in relu sparsemixer; do # a dump's draws are not those of evaluation
    look $model --eval --stats $here/stats --trace $here/trace --trace-tokens 100000 && count trace $here/stats $here/trace
    check "$model: a trace of all validation data has the statistics' counts" $?
done
printf 'int main(void) { return 0; } // \303\251\303\251 \xff\0\xfe\n\n\tThe rain in Spain stays mainly in the plain.\n' >$here/text
printf 'int main(void) { return 0; } // \303\251\303\251' >$here/short
look relu --trace $here/trace --text $here/text && python3 - $here/trace $here/T.bin <<'PYTHON' && dump relu T 1 T &&
import struct, sys
sys.path.insert(0, "dev/test")
sys.argv, (trace, path) = ["", "none"], sys.argv[1:]
data = open(trace, "rb").read()
import json
size = struct.unpack("<Q", data[:8])[0]
begin, end = json.loads(data[8 : 8 + size])["ids"]["data_offsets"]
ids = struct.unpack_from(f"<{(end - begin) // 4}i", data, 8 + size + begin)
open(path, "wb").write(struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids))
PYTHON
    count text $here/trace $here/text $here/T.bin:$here/T
check "a text's bytes, and its losses as a dump's logits have them" $?
look relu --trace $here/cut --text $here/text --trace-tokens 20 && grep -q 'of which the first 20 are traced' $here/look.txt &&
    count text $here/cut $here/text $here/T.bin:$here/T
check '... cut, with a warning' $?
train traced --steps 3 --trace $here/after --text $here/short && look traced --trace $here/trace --text $here/short &&
    cmp $here/after $here/trace
check 'a trace after training is that of the checkpoint' $?
for ranks in $RANKS; do
    look relu --trace $here/trace --text $here/text --gpus "$ranks" && cp $here/trace $here/many && look relu --trace $here/trace \
        --text $here/text && cmp $here/many $here/trace
    check "... of $ranks ranks" $?
done

# ----------------------------------------------------------------------------
# flips

column() { grep -o "\"$2\": [^ ]*" "$here/$1/log.jsonl"; }
flipping() { # flipping NAME OPTIONS...
    local name=$1
    shift
    train "$name" --flip-every 1 --val-data "$here/[AB].bin" --val-batches 1 "$@"
}
flipping flips --steps 3 --save-every 1 --keep 0 && for step in 1 2; do
    for name in A:56 B:8; do
        dump flips/step_0000000$step ${name%:*} ${name#*:} ${name%:*}$step || exit 1
    done
done && count flips $here/flips/log.jsonl 1 $here/A1:$here/A2 $here/B1:$here/B2
check 'flips of 64 sequences of two domains are those of two dumps' $?
train few --steps 2 --save-every 1 --keep 0 --flip-every 1 --val-data $here/B.bin --val-batches 1 && dump few/step_00000001 B 8 B1 &&
    dump few/step_00000002 B 8 B2 && count flips $here/few/log.jsonl 1 $here/B1:$here/B2
check '... of all sequences, where they are fewer' $?
train blind --steps 3 && cmp $here/blind/latest/model.safetensors $here/flips/latest/model.safetensors &&
    cmp $here/blind/latest/optimizer.safetensors $here/flips/latest/optimizer.safetensors
check "a run's bits do not depend on the flips" $?
cp -r $here/flips $here/again && rm -rf $here/again/step_0000000[23] && column flips flip_rate >$here/rates &&
    $trainer --resume $here/again/step_00000001 >$here/look.txt 2>&1 && column again flip_rate | cmp - $here/rates &&
    cmp $here/again/latest/model.safetensors $here/flips/latest/model.safetensors && [ "$(grep -c flip_rate $here/again/log.jsonl)" = 3 ]
check 'a resumed run counts the same flips' $?
flipping still --steps 2 --lr 0 --lr-min 0 && ! column still flip_rate | grep -v '"flip_rate": 0,' && [ "$(column still flip_rate | wc -l)" = 2 ]
check 'no learning rate, no flips' $?
flipping hash --steps 2 --router hash --active 2 && ! column hash flip_count | grep -v '"flip_count": 0,'
check 'hash: no flips' $?
train seldom --steps 5 --flip-every 2 --log-experts-every 3 --val-data $here/B.bin --val-batches 1 &&
    [ "$(grep -n flip_rate $here/seldom/log.jsonl | cut -d: -f1 | tr '\n' ' ')" = '1 3 5 ' ] &&
    [ "$(grep -n layer_expert_tokens $here/seldom/log.jsonl | cut -d: -f1 | tr '\n' ' ')" = '1 4 ' ]
check 'the rows of every n-th step' $?
for ranks in $RANKS; do # what ranks and one rank compute with the same bits
    flipping one --steps 3 --load-balance 0 --active 8 --global-batch $((4 * ranks)) &&
        flipping many --steps 3 --load-balance 0 --active 8 --global-batch $((4 * ranks)) --gpus "$ranks" &&
        column one flip_rate | cmp - <(column many flip_rate) && grep -q '"ms_waiting": [0-9]' $here/many/log.jsonl &&
        ! grep -q ms_waiting $here/one/log.jsonl
    check "the flips of $ranks ranks are those of one, whose rows say nothing of waiting" $?
done

# ----------------------------------------------------------------------------
# refusals

refused() { # refused STATUS TEXT OPTIONS...; a bad file's refusal names a remedy
    local expected=$1 text=$2 status
    shift 2
    timeout -k 1 60 $trainer "$@" >$here/output 2>&1
    status=$?
    [ $status = "$expected" ] && grep -q -e "$text" $here/output && { [ $status = 2 ] || grep -q '^  ---> ' $here/output; }
    status=$?
    check "exit $expected with '$text' and a remedy: $*" $status
    [ $status = 0 ] || sed 's/^/    /' $here/output
}

relu=(--load $here/relu --seq-len 16 --val-data "$here/[ABC].bin")
mkdir -p $here/twin && cp $here/B.bin $here/twin/A.bin && : >$here/empty && mkfifo $here/fifo
train dense --router dense --steps 1
refused 2 'belongs to --eval' "${relu[@]}" --stats $here/x
refused 2 'expected middle or all' "${relu[@]}" --eval --stats $here/x --stats-layers 1
refused 2 'is empty, expected a path' "${relu[@]}" --eval --stats=
refused 2 'belongs to --trace' "${relu[@]}" --eval --text $here/text
refused 2 'one at a time' "${relu[@]}" --trace $here/x --sample hello
refused 2 'one at a time' "${relu[@]}" --eval --stats $here/x --dump $here/y
refused 2 'stats-layers belongs to --stats' "${relu[@]}" --eval --stats-layers all
refused 2 'trace-tokens belongs to --trace' "${relu[@]}" --eval --trace-tokens 9
cp dev/test/test_statistics.sh $here/self.txt
refused 2 'write over its own' "${relu[@]}" --trace $here/self.txt --text $here/./self.txt
refused 1 'no safetensors file' "${relu[@]}" --trace $here/self.txt
refused 1 'no safetensors file' "${relu[@]}" --eval --stats $here/self.txt
cmp -s dev/test/test_statistics.sh $here/self.txt
check 'what was refused stays' $?
refused 2 'needs validation data' $tiny --flip-every 2 --val-data '' --out $here/x --steps 1
refused 1 'too short' $tiny --flip-every 2 --val-data $here/C.bin --seq-len 32 --steps 1 --out $here/x
refused 1 'switches no experts' --load $here/dense --seq-len 16 --val-data $here/A.bin --eval --stats $here/x
refused 1 'switches no experts' $tiny --router dense --flip-every 2 --val-data $here/A.bin --out $here/x --steps 1
refused 1 'are both called A' --load $here/relu --seq-len 16 --val-data "$here/A.bin,$here/twin/A.bin" --eval --stats $here/x
refused 1 'cannot write' "${relu[@]}" --eval --stats $here/nowhere/x
refused 1 'No space left' "${relu[@]}" --eval --stats /dev/full
refused 1 'No space left' "${relu[@]}" --trace /dev/full
refused 1 'is empty' "${relu[@]}" --trace $here/x --text $here/empty
refused 1 'is not a regular file' "${relu[@]}" --trace $here/x --text $here/fifo
refused 1 'nothing.txt' "${relu[@]}" --trace $here/x --text $here/nothing.txt
refused 1 'no tokenizer' "${relu[@]}" --trace $here/x --tokenizer $here/data
refused 1 'no validation data' --load $here/relu --seq-len 16 --val-data '' --trace $here/x
(failed=0; ulimit -f 20 && refused 1 'cannot write' "${relu[@]}" --eval --stats $here/x && [ "$failed" = 0 ])
check 'a file size limit' $?
[ ! -e $here/x ] && [ -z "$(find $here -name '*.tmp')" ]
check 'what is refused leaves nothing behind' $?

printf '%d passed, %d failed' "$passed" "$failed"
[ "$skipped" = 0 ] && echo || echo ", $skipped skipped"
[ "$failed" = 0 ]
