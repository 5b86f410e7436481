#!/bin/sh
# What data/'s programs do when things go wrong: killed at any moment, disk full, folder not writable, input
# damaged or changed, streams closed, command line mistyped. A restart goes on, finished shards are never harmed,
# and every refusal says why. And what they take for text: folders, byte order marks, carriage returns, frames of
# zstd. About half a minute.
# usage: dev/test/test_data_faults.sh          (after make data-tools)
# shellcheck disable=SC2086 # $run is a command of many words
cd "$(dirname "$0")/../.." || exit 1
. dev/test/check.sh
here=build/test/data_faults
documents=$(wc -l <data/sample.jsonl) # of the sample, of which most inputs here are made
tokenize=build/tokenize
train=build/train_tokenizer
trap '' XFSZ # writing beyond the limit is then an error, not a signal

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
for line in "b.jsonl:1: column 10" "b.jsonl:2: no \"text\", but \"title\"" "\"text\" is not a string"; do
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

# --- a run that was killed in its second file of three; then its state, or its inputs, are not what they were
parts="$here/p1.jsonl $here/p2.jsonl $here/p3.jsonl"
two="$tokenize --tokenizer $here/vocabulary --val-fraction 0.1 --save-seconds 0 --threads 1"
cc -shared -fPIC dev/test/fault_at.c -o $here/fault_at.so -ldl
head -n 2700 $here/a.jsonl >$here/p1.jsonl
tail -n 2700 $here/a.jsonl >$here/p2.jsonl
cp data/sample.jsonl $here/p3.jsonl
mkdir $here/good
cp -p $parts $here/good

fault() { # fault KIND N COMMAND...: the command, with a fault at its n-th operation on files
    kind=$1
    at=$2
    shift 2
    ( (LD_PRELOAD=$here/fault_at.so FAULT_AT=$at FAULT=$kind "$@") >$here/output 2>&1
        exit $?) 2>/dev/null # the shell's "Killed" is no news
}

killed() { # killed TEXT COMMAND...: killed at the first operation on files at which the state in $here/k holds TEXT
    text=$1
    shift
    at=10
    while [ $at -lt 400 ] && ! grep -q "$text" $here/k/tokenize.state.json 2>/dev/null; do
        rm -rf $here/k
        fault kill $at "$@"
        at=$((at + 5))
    done
    grep -q "$text" $here/k/tokenize.state.json
    check "a run killed at $text" $?
}

go_on() { # go_on: the run of $here/killed goes on, in $here/r
    rm -rf $here/r
    cp -r $here/killed $here/r
    $two --out $here/r $parts >$here/output 2>&1
}

restore() { # the inputs as they were, their dates too; but not their times of change
    cp -p $here/good/*.jsonl $here
}

killed '"file": 1, ' $two --out $here/k $parts
mv $here/k $here/killed
go_on && grep -q 'going on at .*p2.jsonl, line [0-9]*$' $here/output
check "a killed run goes on where it was" $?
mv $here/r $here/undisturbed

edited() { # edited SED-SCRIPT TEXT: the state, edited, is refused
    rm -rf $here/e
    cp -r $here/killed $here/e
    sed "$1" $here/killed/tokenize.state.json >$here/e/tokenize.state.json
    refused 1 "$2" $two --out $here/e $parts
}
edited 's/"file": 1/"file": 4/' '"file" is no number from 0 to 3'
edited 's/"file": 1/"file": 3000000000/' '"file" is no number from 0 to 3'
edited 's/"offset": /&9999999/' 'is shorter than it was'
edited 's/"val": /&99999999999/' '"val" is no number from 0 to 2147483647'
edited 's/"train": /&-/' '"train" is no number'
edited 's/"train": [0-9]/&999999999/' 'cannot rename\|is shorter than'
edited 's/"name": "python"/"name": "..\/python"/' "is no domain"
edited 's/"name": "python"/"name": "c"/' "stands there twice"
edited 's/"digest": "../"digest": "/' '"digest" is none'

restore # which touches all
go_on && grep -q 'read again first' $here/output && same_folders $here/undisturbed $here/r
check "inputs that were touched are read again, and found the same" $?
head -n 50 data/sample.jsonl >$here/p3.jsonl
printf '{"text": "more"}\n' >>$here/p2.jsonl
go_on && $two --out $here/fresh $parts >$here/output 2>&1 && same_folders $here/fresh $here/r
check "what was not read yet may change" $?
restore
sed '1s/"text": "./"text": "x/' $here/good/p1.jsonl >$here/p1.jsonl
[ "$(wc -c <$here/p1.jsonl)" = "$(wc -c <$here/good/p1.jsonl)" ] && ! cmp -s $here/p1.jsonl $here/good/p1.jsonl
check "another file of the same size" $?
refused 1 "or of other input" $two --out $here/undisturbed $parts
refused 1 "is another than in the earlier run" go_on
restore
head -n 5 $here/good/p2.jsonl >$here/p2.jsonl
refused 1 "p2.jsonl is shorter than it was" go_on
restore
$two --out $here/undisturbed $parts >$here/output 2>&1 && grep -q "finished by an earlier run" $here/output
check "a finished run whose inputs were touched is not done again" $?

$two --out $here/pipe_fresh - <$here/p1.jsonl >$here/output 2>&1
killed '"file": 0, "offset": [1-9]' sh -c "exec $two --out $here/k - <$here/p1.jsonl"
cp -r $here/k $here/k2
refused 1 "is shorter than it was" sh -c "head -c 100000 $here/p1.jsonl | $two --out $here/k -"
refused 1 "is shorter than it was" sh -c "head -c 100000 $here/p1.jsonl >$here/short; $two --out $here/k - <$here/short"
refused 1 "is another than in the earlier run" sh -c "$two --out $here/k - <$here/p2.jsonl"
# shellcheck disable=SC2002
cat $here/p1.jsonl | $two --out $here/k - >$here/output 2>&1 && same_folders $here/pipe_fresh $here/k
check "standard input, the same again" $?
refused 1 "or of other input" sh -c "$two --out $here/k - <$here/p2.jsonl"

# --- names of any bytes
odd="$here/caf$(printf '\351') \\x41 [1]*,a:3"
mkdir "$odd"
cp $here/p1.jsonl "$odd/p1.jsonl"
fault kill 60 $two --out "$odd/out" "$odd/p1.jsonl"
[ -f "$odd/out/tokenize.state.json" ] && $two --out "$odd/out" "$odd/p1.jsonl" >$here/output 2>&1 &&
    grep -q "going on" $here/output && grep -qF 'caf\\xE9 \\x5Cx41 [1]*,a:3/p1.jsonl' "$odd/out/manifest.json" &&
    $two --out "$odd/out" "$odd/p1.jsonl" >$here/output 2>&1 && grep -q "finished by" $here/output
check "a path that is no UTF-8: killed, gone on with, and found finished" $?

# --- streams that are closed, or full
$run --out $here/closed <&- >&- 2>&-
same_folders $here/whole $here/closed
check "standard streams closed: the same files" $?
$train --vocab-size 1024 --out $here/closed_vocabulary data/sample.jsonl <&- >&- 2>&-
same_folders $here/vocabulary $here/closed_vocabulary
check "standard streams closed: the same vocabulary" $?
refused 1 "no document in the input" sh -c "$two --out $here/closed_input - <&-"
for main in data/*.c dev/compare_dumps.c train_remoe.c train_remoe.cu; do
    grep -A 1 '^int main(' "$main" | grep -q '^    streams_open();'
    check "$main opens its streams first" $?
done
refused 1 "cannot write standard output: No space left" sh -c "$tokenize --help >/dev/full"
refused 1 "cannot write standard output: No space left" sh -c "$train --help >/dev/full"
refused 1 "cannot write standard output: No space left" sh -c "$two --out $here/full_output $parts >/dev/full"

# --- a vocabulary's two files: no two programs at once, and none half old, half new
mkfifo $here/text_fifo
$train --out $here/pair - <$here/text_fifo >$here/output.first 2>&1 &
pid=$!
exec 3>$here/text_fifo
while [ ! -d $here/pair ]; do
    sleep 0.02
done
sleep 0.1
refused 1 "another run is at work" $train --out $here/pair data/sample.jsonl
cat data/sample.jsonl >&3
exec 3>&-
wait $pid && $train --out $here/pair_alone data/sample.jsonl >$here/output 2>&1 && same_folders $here/pair_alone $here/pair
check "a second vocabulary in the same folder does no harm" $?
tail -n 20 data/sample.jsonl >$here/other.jsonl
$train --vocab-size 1024 --out $here/new_vocabulary $here/other.jsonl >$here/output 2>&1
for fault in kill full; do
    at=1
    status=1
    while [ $status != 0 ] && [ $at -lt 40 ]; do
        rm -rf $here/pair
        cp -r $here/vocabulary $here/pair
        fault $fault $at $train --vocab-size 1024 --out $here/pair $here/other.jsonl
        status=$?
        rm -f $here/pair/*.tmp
        [ ! -e $here/pair/vocab.json ] || diff -rq $here/vocabulary $here/pair >/dev/null || same_folders $here/new_vocabulary $here/pair
        check "fault '$fault' at operation $at: a vocabulary of one piece, or none" $?
        at=$((at + 1))
    done
    [ $status = 0 ] && [ $at -gt 8 ]
    check "fault '$fault' at every operation" $?
done

blocks=$((($(wc -c <$here/new_vocabulary/vocab.json) + 511) / 512))
while [ $blocks -gt 1 ]; do
    blocks=$((blocks * 3 / 4)) # too few for vocab.json, then for merges.txt, too
    rm -rf $here/pair
    cp -r $here/vocabulary $here/pair
    refused 1 "cannot write .*File too large" sh -c "ulimit -f $blocks; exec $train --vocab-size 1024 --out $here/pair $here/other.jsonl"
    same_folders $here/vocabulary $here/pair
    check "no room beyond $blocks blocks: the earlier vocabulary is still there" $?
done

# --- folders and files that are closed to the user; file systems without locks
if [ "$(id -u)" = 0 ] && command -v setpriv >/dev/null; then
    user="setpriv --reuid=65534 --regid=65534 --clear-groups"
elif [ "$(id -u)" != 0 ]; then
    user='env --'
else
    user=
fi
if [ -n "$user" ] && $user true 2>/dev/null && $user test -x $tokenize; then
    mkdir -p $here/locked_parent/open $here/locked_input
    cp $here/vocabulary/* $here/locked_input
    echo '{"text": "one"}' >$here/locked_input/x.jsonl
    chmod 000 $here/locked_input/*
    chmod 555 $here/locked_parent
    refused 1 "locked_parent/a/b: Permission denied" $user $tokenize --tokenizer $here/vocabulary --out $here/locked_parent/a/b data/sample.jsonl
    refused 1 "locked_parent/a/b: Permission denied" $user $train --out $here/locked_parent/a/b data/sample.jsonl
    for name in x.jsonl merges.txt .; do
        $user $train --out $here/locked_parent/a $here/locked_input/$name >$here/output 2>&1
        grep -q 'cannot open .*: Permission denied' $here/output && grep -q -e '---> check its permissions' $here/output
        check "$name may not be read: said so" $?
    done
    $user $tokenize --tokenizer $here/locked_input --out $here/x data/sample.jsonl >$here/output 2>&1
    grep -q 'cannot open .*vocab.json: Permission denied' $here/output && grep -q -e '---> check its permissions' $here/output
    check "a vocabulary that may not be read: said so" $?
    chmod 644 $here/locked_input/*
    chmod 755 $here/locked_parent
else
    echo "skipped: permissions, for there is no other user to be"
fi
printf '#include <errno.h>\nint flock(int fd, int how) { (void)fd; (void)how; errno = ENOLCK; return -1; }\n' |
    cc -shared -fPIC -x c - -o $here/no_locks.so
(LD_PRELOAD=$here/no_locks.so $two --out $here/no_locks $parts) >$here/output 2>&1 && grep -q "cannot be locked" $here/output &&
    same_folders $here/undisturbed $here/no_locks
check "a file system without locks: a warning" $?

# --- damaged input
head -c 100000 $here/d.jsonl.zst >$here/cut.jsonl.zst 2>/dev/null
if command -v zstd >/dev/null; then
    refused 1 "damaged or cut" $tokenize --tokenizer $here/vocabulary --out $here/cut $here/cut.jsonl.zst
    refused 1 "zstd is not installed" env PATH=/nowhere $tokenize --tokenizer $here/vocabulary --out $here/no_zstd $here/cut.jsonl.zst
fi
refused 1 "cannot open .*missing.jsonl" $tokenize --tokenizer $here/vocabulary --out $here/x $here/missing.jsonl
mkdir $here/folder.txt
: >$here/empty.jsonl
refused 1 "folder.txt holds no text" $tokenize --tokenizer $here/vocabulary --out $here/x $here/folder.txt
refused 1 "no document in the input" $tokenize --tokenizer $here/vocabulary --out $here/empty $here/empty.jsonl
refused 1 "no document in the input" $train --out $here/x $here/empty.jsonl

# a damaged file that is fetched again: the work so far is not lost
if command -v zstd >/dev/null; then
    od -v -An -tx1 -N6000000 /dev/urandom | sed 's/.*/{"text": "&"}/' >$here/random.jsonl # zstd makes many blocks of it
    zstd -q $here/random.jsonl -o $here/whole.zst
    size=$(wc -c <$here/whole.zst)
    head -c $((size * 9 / 10)) $here/whole.zst >$here/q2.jsonl.zst
    refused 1 "damaged or cut" $two --out $here/refetched $here/p1.jsonl $here/q2.jsonl.zst
    cp $here/whole.zst $here/q2.jsonl.zst
    $two --out $here/refetched $here/p1.jsonl $here/q2.jsonl.zst >$here/output 2>&1 && grep -q "going on at" $here/output &&
        $two --out $here/refetched_whole $here/p1.jsonl $here/q2.jsonl.zst >$here/output 2>&1 &&
        same_folders $here/refetched_whole $here/refetched
    check "a damaged file that is fetched again: gone on with" $?
fi

# --- what is text
shards() { # shards NAME OPTIONS...: the SHA-256 of the training shard that they give, with no document for validation
    name=$1
    shift
    $tokenize --tokenizer $here/vocabulary --val-fraction 0 --out $here/text_$name "$@" >$here/output 2>&1 &&
        sha256sum <$here/text_$name/train_000000.bin
}
same_text() { # same_text WHAT OPTIONS-OF-ONE -- OPTIONS-OF-OTHER
    what=$1
    one=$2
    other=$3
    rm -rf $here/text_a $here/text_b
    first=$(shards a $one)
    [ -n "$first" ] && [ "$first" = "$(shards b $other)" ]
    check "$what" $?
}
mark=$(printf '\357\273\277')
printf '%s' "$mark" | cat - data/sample.jsonl >$here/mark.jsonl
same_text "JSON Lines with a byte order mark" data/sample.jsonl $here/mark.jsonl
cat $here/mark.jsonl $here/mark.jsonl >$here/marks.jsonl
cat data/sample.jsonl data/sample.jsonl >$here/no_marks.jsonl
same_text "joined files with byte order marks" $here/no_marks.jsonl $here/marks.jsonl
printf '%s' "$mark" | cat - $here/c.txt >$here/mark.txt
same_text "text with a byte order mark" $here/c.txt $here/mark.txt
sed 's/$/\r/' data/sample.jsonl >$here/returns.jsonl
same_text "JSON Lines with carriage returns" data/sample.jsonl $here/returns.jsonl
sed 's/$/\r/' $here/c.txt >$here/returns.txt
for file in c returns; do
    rm -rf $here/text_$file
    shards $file --text-bytes 1000 $here/$file.txt >/dev/null
    sed -n 's/.*"documents": \([0-9]*\), "tokens".*/\1/p' $here/text_$file/manifest.json >$here/$file.count
done
# the same documents, but that some begin a paragraph earlier, for the returns count as bytes
awk 'NR == 1 { a = $1 } NR == 2 { exit !(a > 30 && $1 > 0.8 * a) }' $here/c.count $here/returns.count
check "text with carriage returns is cut at blank lines" $?
printf '\377\376a\000' >$here/utf16.txt
printf '\376\377\000{' >$here/utf16.jsonl
for file in utf16.txt utf16.jsonl; do
    refused 1 "$file is UTF-16" $tokenize --tokenizer $here/vocabulary --out $here/x_$file $here/$file
done
if command -v zstd >/dev/null; then
    {
        printf '\120\052\115\030\005\000\000\000hello'
        zstd -qc data/sample.jsonl
        printf '\137\052\115\030\003\000\000\000abc'
        zstd -q --long=31 -c <data/sample.jsonl
        printf '\137\052\115\030\003\000\000\000abc'
    } >$here/frames.jsonl.zst
    same_text "zstd: frames, skippable ones, a window of 2 GiB" $here/no_marks.jsonl $here/frames.jsonl.zst
fi

# another name for the text; and no text at all is no success
sed 's/"text": /"content": /' data/sample.jsonl >$here/content.jsonl
same_text "--text-key" data/sample.jsonl "--text-key content $here/content.jsonl"
refused 1 "no \"text\", but \"content\", \"meta\"" $tokenize --tokenizer $here/vocabulary --out $here/content $here/content.jsonl
refused 1 "none of the $documents records is a document" $tokenize --tokenizer $here/vocabulary --out $here/content $here/content.jsonl
[ ! -e $here/content/manifest.json ] && [ "$(wc -l <$here/content/unreadable.txt)" = "$documents" ]
check "no text: no manifest, and unreadable.txt says why" $?
$tokenize --tokenizer $here/vocabulary --text-key content --out $here/content $here/content.jsonl >$here/output 2>&1
check "the same folder takes the command that is right" $?
sed 's/"text": /"content": /' $here/a.jsonl >$here/content.jsonl # so many that states are written
for i in 1 2; do
    refused 1 "none of the $((60 * documents)) records is a document" $two --out $here/content2 $here/content.jsonl
done
killed '"unreadable": [1-9]' $two --out $here/k $here/content.jsonl
$two --text-key content --out $here/k $here/content.jsonl >$here/output 2>&1
check "a run that was killed before its first document binds no other" $?
sed 's/"text": /"content": /' data/sample.jsonl >$here/content.jsonl
refused 1 "none of the $documents records is a document" $train --out $here/x $here/content.jsonl
[ "$(grep -c 'line .* is no document' $here/output)" = 10 ]
check "the first ten are named" $?
$train --vocab-size 1024 --text-key content --out $here/content_vocabulary $here/content.jsonl >$here/output 2>&1 &&
    same_folders $here/vocabulary $here/content_vocabulary
check "train_tokenizer --text-key" $?

# folders
mkdir -p $here/tree/src/deep $here/tree/.git $here/tree/docs
printf 'int a;\n' >$here/tree/src/a.c
printf 'int b;\n' >$here/tree/src/deep/b.py
printf 'read me\n' >$here/tree/docs/README
printf 'hidden\n' >$here/tree/.git/HEAD
printf 'PNG\000\001' >$here/tree/docs/image.png
printf '[{"text": "x"}]' >$here/tree/docs/data.json
printf '{"text": "line"}\n{"text": "named", "meta": {"pile_set_name": "Own Name"}}\n{}\n' >$here/tree/docs/more.jsonl
: >$here/tree/docs/nothing
ln -s .. $here/tree/docs/circle
ln -s nowhere $here/tree/docs/dangling
$tokenize --tokenizer $here/vocabulary --val-fraction 0 --out $here/tree/out $here/tree/docs/ $here/tree/src >$here/output 2>&1
check "folders" $?
grep -q "2 files of the folders are left out.*data.json" $here/output &&
    grep -q '^ "documents": 5, "tokens"' $here/tree/out/manifest.json && grep -q '"name": "docs", "documents": 2' $here/tree/out/manifest.json &&
    grep -q '"name": "own_name", "documents": 1' $here/tree/out/manifest.json &&
    grep -q '"name": "src", "documents": 2' $here/tree/out/manifest.json
check "folders: what is text in them, and its domains" $?
rm -r $here/tree/out
for i in 1 2; do # what it wrote, unreadable.txt too, is no input
    $tokenize --tokenizer $here/vocabulary --val-fraction 0 --out $here/tree/out2 $here/tree >$here/output 2>&1
    check "a folder that holds the output, time $i" $?
done
grep -q "finished by" $here/output && [ -e $here/tree/out2/unreadable.txt ]
check "a folder that holds the output: the same input again" $?
grep -q '^ "documents": 5, "tokens"' $here/tree/out2/manifest.json
check "a folder with all that is in it, but hidden files" $?
refused 1 "holds no text" $tokenize --tokenizer $here/vocabulary --out $here/tree/out2 $here/tree/out2
$train --vocab-size 300 --out $here/tree_vocabulary $here/tree >$here/output 2>&1
check "train_tokenizer takes folders" $?
$tokenize --tokenizer $here/vocabulary --out $here/text_any README.md Makefile data/tokenize.c >$here/output 2>&1 &&
    grep -q '"name": "makefile"' $here/text_any/manifest.json
check "any file of text" $?

# a domain of two documents validates one of them, and its copies; of equal ones, none
i=0
while [ $i -lt 40 ]; do
    echo "{\"text\": \"first\", \"meta\": {\"pile_set_name\": \"d$i\"}}"
    echo "{\"text\": \"second\", \"meta\": {\"pile_set_name\": \"d$i\"}}"
    [ $i -lt 20 ] || echo "{\"text\": \"second\", \"meta\": {\"pile_set_name\": \"d$i\"}}"
    echo "{\"text\": \"alone $i\", \"meta\": {\"pile_set_name\": \"one$i\"}}"
    printf '{"text": "twice %d", "meta": {"pile_set_name": "equal%d"}}\n' $i $i $i $i
    i=$((i + 1))
done >$here/domains.jsonl
$tokenize --tokenizer $here/vocabulary --val-fraction 1e-9 --out $here/domains $here/domains.jsonl >$here/output 2>&1
[ "$(find $here/domains -name 'val.d*.bin' | wc -l)" = 40 ] && [ "$(find $here/domains -name 'val.*.bin' | wc -l)" = 40 ]
check "every domain of two documents has one for validation" $?
long=$(wc -c <$here/domains/val.d30.bin)
short=$(wc -c <$here/domains/val.d10.bin)
[ $((long - 1024)) = $((2 * (short - 1024))) ]
check "the copies of it go with it" $?

# training shards a domain
split="$tokenize --tokenizer $here/vocabulary --shard-tokens 30000 --val-fraction 0.1 --split-domains --save-seconds 0 --threads 1"
$split --out $here/split $here/p1.jsonl >$here/split_output 2>&1
check "--split-domains" $?
$tokenize --tokenizer $here/vocabulary --val-fraction 0.1 --out $here/unsplit $here/p1.jsonl >$here/output 2>&1
sed -n 's/.*"train_tokens": \([0-9]*\).*/\1/p' $here/unsplit/manifest.json | awk '{ n += $1 } END { print n }' >$here/expected
for shard in "$here"/split/train_*.bin; do
    od -An -j8 -N4 -td4 "$shard"
done | awk '{ n += $1; if ($1 > 30000) bad = 1 } END { print bad ? "too long" : n }' | cmp -s - $here/expected
check "shards a domain: all tokens, at most as many as asked for" $?
[ -e $here/split/train_c.000001.bin ] && cmp -s $here/split/val.c.bin $here/unsplit/val.c.bin && [ ! -e $here/split/train_000000.bin ]
check "shards a domain: their names, and the same validation" $?
at=12
status=1
while [ $status != 0 ] && [ $at -lt 400 ]; do # each time killed a little later, and gone on with
    fault kill $at $split --out $here/split_killed $here/p1.jsonl
    status=$?
    at=$((at + 7))
done
[ $status = 0 ] && same_folders $here/split $here/split_killed
check "shards a domain: killed and started again, the same files" $?
if [ -x train_remoe ]; then
    mix=$(sed -n "s/.*--train-data '\(.*\)'/\1/p" $here/split_output)
    ./train_remoe --layers 1 --hidden 32 --heads 2 --kv-heads 1 --experts 2 --vocab-size 1024 --seq-len 32 --batch 2 --steps 1 \
        --sample-tokens 0 --train-data "$mix" --val-data '' --tokenizer $here/vocabulary --out $here/mix >$here/output 2>&1
    check "the mix that is printed can be given to the trainer" $?
else
    echo "skipped: the trainer, which is not built"
fi

# --- routers side by side: in a folder of their own, from any folder, and no failure is a success
if [ -x train_remoe ]; then
    root=$(pwd)
    mkdir -p $here/elsewhere
    cp data/sample.jsonl $here/elsewhere/mine.jsonl
    tiny='--layers 1 --hidden 32 --heads 2 --kv-heads 1 --experts 2 --seq-len 32 --batch 2 --sample-tokens 0'
    side_by_side() { # side_by_side OPTIONS ROUTERS OUT INPUT...: called from another folder
        options=$1
        routers=$2
        shift 2
        (cd $here/elsewhere && VOCAB=512 STEPS=2 OPTIONS=$options ROUTERS=$routers "$root/dev/compare_routers.sh" "$@")
    }
    refused 0 "^hash: val " side_by_side "$tiny" hash out mine.jsonl
    cp -r $here/elsewhere/out $here/elsewhere/before
    refused 0 "^dense: val " side_by_side "$tiny" "hash dense" out mine.jsonl
    cmp -s $here/elsewhere/before/hash/log.jsonl $here/elsewhere/out/hash/log.jsonl
    check "the same comparison again keeps the runs that are there" $?
    cp data/sample.jsonl $here/elsewhere/other.jsonl
    refused 1 "holds another comparison" side_by_side "$tiny" hash out other.jsonl
    refused 1 "holds another comparison" side_by_side "$tiny --seed 3" hash out mine.jsonl
    refused 1 "holds no comparison" side_by_side "$tiny" hash before/data mine.jsonl
    refused 1 "means something in --train-data" side_by_side "$tiny" hash 'out[1]' mine.jsonl
    refused 1 "no file or folder data/sample.jsonl" side_by_side "$tiny" hash out2 data/sample.jsonl
    refused 1 "the trainer failed with --router relu" side_by_side "--layers -1" relu out3 mine.jsonl
    rm $here/elsewhere/out/hash.done
    refused 1 "out/hash was broken off" side_by_side "$tiny" hash out mine.jsonl
    [ -e $here/elsewhere/out/hash/log.jsonl ]
    check "and no run is removed" $?
    refused 0 "INPUT..." side_by_side "" "" --help
    refused 2 "INPUT..." side_by_side "" "" only_out
fi

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

# --- the scripts' own help, and what they refuse before they reach for the network
for script in data/download_*.sh data/make_sample.sh; do
    [ "$script" != data/download_common.sh ] || continue
    for option in --help -h; do
        (cd $here && "$OLDPWD/$script" $option) >$here/output 2>&1 && grep -q "$script" $here/output && [ ! -e "$here/$option" ]
        check "$script $option" $?
    done
    "$script" --no-such-option >$here/output 2>&1
    [ $? = 2 ]
    check "$script refuses an option that it does not have" $?
done
refused 2 "no option --out" data/download_gpt2.sh --out
refused 2 "more than 1 argument" data/download_gpt2.sh a b
refused 2 "SHARDS expects a number" data/download_fineweb.sh $here/x many
refused 2 "LAST expects a number" data/download_pile.sh $here/x 0 1x

# --- the command line
echo '{"text": "one"}' >$here/what.json
cp $here/what.json $here/what.zst
for file in $here/what.json $here/what.zst /dev/null; do
    refused 2 "unknown kind of file" $tokenize --tokenizer $here/vocabulary --out $here/x $file
done
refused 2 "is no text" $tokenize --tokenizer $here/vocabulary --out $here/x $here/whole/train_000000.bin
refused 2 "out expects a name, not ''" $tokenize --tokenizer $here/vocabulary --out '' $here/a.jsonl
refused 2 "tokenizer expects a name, not ''" $tokenize --tokenizer '' --out $here/x $here/a.jsonl
refused 2 "out expects a name, not ''" $train --out '' $here/a.jsonl
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
