#!/bin/sh
# What data/'s programs do when things go wrong: killed at any moment, disk full, folder not writable, input
# damaged, command line mistyped. A restart goes on, finished shards are never harmed, and every refusal says
# why. About a quarter of a minute.
# usage: dev/test/test_data_faults.sh          (after make data-tools)
# shellcheck disable=SC2086 # $run is a command of many words
cd "$(dirname "$0")/../.." || exit 1
here=build/test/data_faults
tokenize=build/tokenize
train=build/train_tokenizer
passed=0
failed=0
trap '' XFSZ # writing beyond the limit is then an error, not a signal

check() { # what, status of what was tested
    if [ "$2" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $1"
    fi
}

refused() { # expected status, expected text, command...
    expected=$1
    text=$2
    shift 2
    "$@" >$here/output 2>&1
    status=$?
    [ $status = "$expected" ] && grep -q -e "$text" $here/output
    result=$?
    [ $result = 0 ] || sed 's/^/    /' $here/output
    check "exit $status (expected $expected) with '$text': $*" $result
}

seconds() { # a random number of them, 0.02 to $1
    od -An -N2 -tu2 /dev/urandom | awk -v most="$1" '{ printf "%.3f", 0.02 + (most - 0.02) * $1 / 65535 }'
}

same_folders() {
    diff -rq "$1" "$2" >$here/output 2>&1
    result=$?
    [ $result = 0 ] || sed 's/^/    /' $here/output
    return $result
}

if [ ! -x $tokenize ] || [ ! -x $train ]; then
    echo "error: no $tokenize or $train" >&2
    echo "  ---> make data-tools" >&2
    exit 1
fi
rm -rf $here
mkdir -p $here
$train --vocab-size 1024 --out $here/vocabulary data/sample.jsonl >$here/output 2>&1
check "a vocabulary" $?

# --- the input: plain, compressed and text; three lines are no documents
i=0
while [ $i -lt 60 ]; do
    sed "s/\"text\": \"/&$i /" data/sample.jsonl # no two documents alike, so that the split has much to choose from
    i=$((i + 1))
done >$here/a.jsonl
{
    echo '{"text": "without end'
    echo '{"title": "no text"}'
    echo
    cat data/sample.jsonl
    printf '{"text": 7}\n{"text": "last, without newline"}'
} >$here/b.jsonl
cat README.md data/*.c >$here/c.txt 2>/dev/null
inputs="$here/a.jsonl $here/b.jsonl $here/c.txt"
if command -v zstd >/dev/null; then
    zstd -q $here/a.jsonl -o $here/d.jsonl.zst
    inputs="$inputs $here/d.jsonl.zst"
else
    echo "skipped: .zst, for there is no zstd"
fi

# run: with --out FOLDER behind it, a whole command
run="$tokenize --tokenizer $here/vocabulary --shard-tokens 3000000 --val-fraction 0.1 --save-seconds 0 $inputs"

# --- without a fault
$run --out $here/whole >$here/output 2>&1
check "an undisturbed run" $?
grep -q '"unreadable": 3' $here/whole/manifest.json
check "unreadable records are counted" $?
for line in "b.jsonl:1: column 10" "b.jsonl:2: no \"text\"" "\"text\" is not a string"; do
    grep -q "$line" $here/whole/unreadable.txt
    check "unreadable.txt names $line" $?
done
(cd $here/whole && sed -n 's/.*"file": "\([^"]*\)".*"sha256": "\([0-9a-f]*\)".*/\2  \1/p' manifest.json | sha256sum -c --quiet)
check "the manifest's hashes" $?
$run --out $here/whole >$here/output 2>&1 && grep -q "finished by an earlier run" $here/output
check "a finished run is not done again" $?
$run --out $here/one_thread --threads 1 >$here/output 2>&1 && same_folders $here/whole $here/one_thread
check "one thread gives the same" $?

# --- killed again and again
for signal in KILL TERM; do # a shell makes its background jobs deaf to INT
    kills=0
    limit=0.2
    while :; do
        $run --out $here/killed_$signal >$here/output 2>&1 &
        pid=$!
        sleep "$(seconds $limit)"
        kill -$signal $pid 2>/dev/null
        wait $pid 2>/dev/null
        status=$?
        if [ $status -le 128 ]; then # it ended by itself
            [ $status = 0 ] || sed 's/^/    /' $here/output
            break
        fi
        kills=$((kills + 1))
        for shard in "$here/killed_$signal"/*.bin; do
            if [ -e "$shard" ] && ! cmp -s "$shard" "$here/whole/${shard##*/}"; then
                check "kill $kills by $signal: finished shard ${shard##*/}" 1
            fi
        done
        [ $kills -lt 15 ] || limit=2 # a slow machine gets on, too
    done
    echo "killed $kills times by $signal"
    same_folders $here/whole $here/killed_$signal
    check "killed by $signal and started again: the same files" $?
done

# --- two at once
$run --out $here/twice >$here/output 2>&1 &
pid=$!
sleep 0.1
refused 1 "another run is at work" $run --out $here/twice
wait $pid && same_folders $here/whole $here/twice
check "a second run in the same folder does no harm" $?

# --- the same through standard input
$tokenize --tokenizer $here/vocabulary --out $here/pipe_whole --save-seconds 0 - <$here/a.jsonl >$here/output 2>&1
mkfifo $here/fifo
cat $here/a.jsonl >$here/fifo 2>/dev/null &
$tokenize --tokenizer $here/vocabulary --out $here/pipe --save-seconds 0 - <$here/fifo >$here/output 2>&1 &
pid=$!
sleep 0.15
kill -KILL $pid 2>/dev/null
wait $pid 2>/dev/null
# shellcheck disable=SC2002
cat $here/a.jsonl | $tokenize --tokenizer $here/vocabulary --out $here/pipe --save-seconds 0 - >$here/output 2>&1
same_folders $here/pipe_whole $here/pipe
check "killed while reading standard input: the same files" $?

# --- no room: the run stops with a message, and goes on when there is room
refused 1 "goes on where it was" sh -c "ulimit -f 4000; exec $run --out $here/full"
$run --out $here/full >$here/output 2>&1 && same_folders $here/whole $here/full
check "after a full disk: the same files" $?
mkdir -p $here/device $here/device_vocabulary
ln -s /dev/full $here/device/train_000000.bin.partial
ln -s /dev/full $here/device_vocabulary/vocab.json
refused 1 "cannot write .*No space left" $run --out $here/device
refused 1 "cannot write .*No space left" $train --out $here/device_vocabulary data/sample.jsonl
echo x >$here/file
refused 1 "cannot write in the folder" $run --out $here/file/below
refused 1 "cannot write in the folder" $train --out $here/file/below data/sample.jsonl
if [ "$(id -u)" != 0 ]; then
    mkdir $here/locked
    chmod 555 $here/locked
    refused 1 "cannot write in the folder" $run --out $here/locked
fi

# --- another command's folder, and damaged states
refused 1 "shards of another command" $run --out $here/whole --val-fraction 0.2
mkdir $here/damaged
echo '{"job": 1' >$here/damaged/tokenize.state.json
refused 1 "not valid JSON" $run --out $here/damaged
echo '{"job": "other"}' >$here/damaged/tokenize.state.json
refused 1 "left by another command" $run --out $here/damaged

# --- damaged input
head -c 100000 $here/d.jsonl.zst >$here/cut.jsonl.zst 2>/dev/null
if command -v zstd >/dev/null; then
    refused 1 "damaged or cut" $tokenize --tokenizer $here/vocabulary --out $here/cut $here/cut.jsonl.zst
    refused 1 "zstd is not installed" env PATH=/nowhere $tokenize --tokenizer $here/vocabulary --out $here/no_zstd $here/cut.jsonl.zst
fi
refused 1 "cannot open .*missing.jsonl" $tokenize --tokenizer $here/vocabulary --out $here/x $here/missing.jsonl
mkdir $here/folder.txt
: >$here/empty.jsonl
refused 1 "cannot read" $tokenize --tokenizer $here/vocabulary --out $here/x $here/folder.txt
refused 1 "no document in the input" $train --out $here/x $here/empty.jsonl

# --- downloads, from file: URLs
if command -v curl >/dev/null; then
    from=file://$(pwd)/data/sample.jsonl
    hash=$(sha256sum data/sample.jsonl | cut -d ' ' -f 1)
    fetch() { # hash, url, folder
        sh -c ". data/download_common.sh; add $2 sample.jsonl $1; download $3"
    }
    mkdir -p $here/fetched $here/wrong
    head -c 1000 data/sample.jsonl >$here/fetched/sample.jsonl.part
    fetch "$hash" "$from" $here/fetched >$here/output 2>&1 && cmp -s data/sample.jsonl $here/fetched/sample.jsonl
    check "a download goes on where it was" $?
    grep -q "to fetch into .*0\.00 GB; free there" $here/output
    check "a download says how much before it starts" $?
    refused 1 "is not the published file" fetch "0$hash" "$from" $here/wrong
    [ ! -e $here/wrong/sample.jsonl ]
    check "a wrong file does not get its name" $?
    refused 1 "cannot reach" fetch "$hash" "$from.missing" $here/missing
else
    echo "skipped: downloads, for there is no curl"
fi

# --- the command line
refused 2 "unknown kind of file" $tokenize --tokenizer $here/vocabulary --out $here/x data/corpus.h
refused 2 "tokenizer is missing" $tokenize --out $here/x $here/a.jsonl
refused 2 "an input file is missing" $tokenize --tokenizer $here/vocabulary --out $here/x
refused 2 "shard-tokens expects an integer" $tokenize --tokenizer $here/vocabulary --out $here/x --shard-tokens 1e9x $here/a.jsonl
refused 2 "val-fraction expects a number" $tokenize --tokenizer $here/vocabulary --out $here/x --val-fraction 1.5 $here/a.jsonl
refused 2 "unrecognized option" $tokenize --tokeniser $here/vocabulary
refused 2 "vocab-size expects an integer" $train --vocab-size 256 --out $here/x $here/a.jsonl
refused 2 "out is missing" $train $here/a.jsonl
refused 0 "vocab-size N" $train --help
refused 0 "shard-tokens N" $tokenize --help

rm -rf $here
echo "test_data_faults: $passed passed, $failed failed"
[ $failed = 0 ]
