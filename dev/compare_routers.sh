#!/usr/bin/env bash
# Routers side by side on your own text, at equal active size and equal data order:
#     dev/compare_routers.sh OUT INPUT...        whatever build/tokenize takes: .jsonl, .txt, folders; a domain each
# Trains a vocabulary of VOCAB tokens and makes shards (once), trains relu, topk and dense (ROUTERS: any that --router takes,
# and dense_x8, eight times as wide, or all) for STEPS steps each with TRAINER, and prints their validation loss per domain,
# last in one table. The model is the tiny preset's; further options go into OPTIONS. Everything stays under OUT, one
# comparison per folder: given again, the same command goes on with the routers that are missing; another one is refused, and so
# is a router whose run was broken off, for nothing here removes a run. Exit 1 when a trainer fails.
set -eu -o pipefail
VOCAB=${VOCAB:-4096}
STEPS=${STEPS:-400}
ROUTERS=${ROUTERS:-relu topk dense}
OPTIONS=${OPTIONS:-}
TRAINER=${TRAINER:-train_remoe}
root=$(cd "$(dirname "$0")/.." && pwd)

refuse() { # refuse WHAT REMEDY
    printf 'error: %s\n  ---> %s\n' "$1" "$2" >&2
    exit 1
}

case ${1:-} in
-h | --help)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
if [ $# -lt 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=${1%/}
shift
case $out in
*[][*?,]*) refuse "$out has a character that means something in --train-data" "name a folder without [ ] * ? and comma" ;;
esac
absolute=() # the same command in another folder is another one
for input in "$@"; do
    [[ $input == /* ]] && absolute+=("$input") || absolute+=("$PWD/$input")
    [ "$input" != - ] || refuse 'standard input is read once, and this reads its input twice' 'put it into a file'
    [ -e "$input" ] || refuse "no file or folder $input" 'paths are taken from the folder that you are in'
done

# what the folder is about: only the same again may use what is there
job="vocabulary of $VOCAB, $STEPS steps, options '$OPTIONS', inputs:$(printf ' %q' "${absolute[@]}")"
if [ -e "$out/job.txt" ]; then
    [ "$(cat "$out/job.txt")" = "$job" ] ||
        refuse "$out holds another comparison: $(cat "$out/job.txt")
this one is: $job" "name another folder than $out"
elif [ -d "$out" ] && [ -n "$(ls -A "$out")" ]; then
    refuse "$out is there, and holds no comparison" 'name another folder'
fi

make -C "$root" "$(basename "$TRAINER")" data-tools >/dev/null
[ "$ROUTERS" != all ] || ROUTERS="$("$root/$TRAINER" --help | sed -n 's/.*tokens find their experts.*one of: \(.*\) \[.*/\1/p') dense_x8"
mkdir -p "$out/data"
printf '%s\n' "$job" >"$out/job.txt"
# build/tokenize refuses shards of other text; a vocabulary that they are made with must not change under them
if [ ! -f "$out/data/vocab.json" ]; then
    "$root/build/train_tokenizer" --vocab-size "$VOCAB" --out "$out/data" "$@"
fi
"$root/build/tokenize" --tokenizer "$out/data" --out "$out/data" --val-fraction 0.05 "$@"

router_options() { # router_options NAME
    case $1 in
    dense_x8) echo --router dense --ffn-mult 32 ;;
    *) echo --router "$1" ;;
    esac
}

for router in $ROUTERS; do
    if [ ! -e "$out/$router.done" ]; then
        [ ! -e "$out/$router" ] || refuse "$out/$router was broken off" "rm -r $out/$router, and give the same command"
        # shellcheck disable=SC2046,SC2086 # many words
        "$root/$TRAINER" $OPTIONS $(router_options "$router") --vocab-size "$VOCAB" --steps "$STEPS" --train-data "$out/data/train_*.bin" \
            --val-data "$out/data/val.*.bin" --tokenizer "$out/data" --out "$out/$router" >"$out/$router.txt" ||
            refuse "the trainer failed with --router $router; its output is $out/$router.txt" "see there"
        : >"$out/$router.done"
    fi
    grep -E '^(params|stage|val|[0-9]+ steps)' "$out/$router.txt" | sed "s/^/$router: /"
done

# the last validation of each: | router | domain loss ... | all loss |
for router in $ROUTERS; do
    sed -n "s/^val  *[0-9]* | \(.*\)/| $router | \1 |/p" "$out/$router.txt" | tail -n 1
done
