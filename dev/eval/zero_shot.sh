#!/usr/bin/env bash
# The paper's seven zero-shot tasks (its Table 2), without Python or a network: scores prepared files with --score and prints
# their accuracies in the table's order, in %, each with its standard error; last the mean, if all seven are there.
#     dev/eval/zero_shot.sh RUN DIR [the trainer's options...]       RUN: what --load takes; options: --batch, --gpus, ...
# DIR holds TASK.jsonl or TASK.jsonl.zst for each TASK of arc_challenge arc_easy boolq hellaswag lambada piqa race: a document
# a line, {"query", "choices", "gold"}, the harness's strings (llmc/run/score_block.h). What is missing is left out. Between
# query and choice stands a space, but for lambada, whose choices bring their own.
#     OUT      folder for the log likelihoods of each document (zero_shot/NAME of RUN). The same command again goes on there
#     TRAINER  the program (./train_remoecu, if it has been built, or ./train_remoe)
# Paths are relative to the folder where it is called.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
    printf 'error: %s\n  ---> %s\n' "$1" "$2" >&2
    exit "${3:-1}"
}

[ $# -ge 2 ] || fail 'RUN and DIR are missing' 'dev/eval/zero_shot.sh RUN DIR [options]' 2
run=$1 dir=$2
shift 2
[ -d "$dir" ] || fail "there is no folder $dir" 'name one with TASK.jsonl files'
trainer=${TRAINER:-$root/train_remoe}
[ -n "${TRAINER:-}" ] || [ ! -x "$root/train_remoecu" ] || trainer=$root/train_remoecu
[ -x "$trainer" ] || fail "there is no $trainer" 'make'
name=$(basename "$(realpath -m "$run")")
[ "$name" != latest ] || name=$(basename "$(dirname "$(realpath -ms "$run")")")
out=${OUT:-zero_shot/$name}
mkdir -p "$out"
rows=$(mktemp)
trap 'rm -f "$rows"' EXIT

requests_of() { # requests_of TASK: the file that --score reads, which must be a plain one; nothing where there is none
    if [ -f "$dir/$1.jsonl" ]; then
        echo "$dir/$1.jsonl"
    elif [ -f "$dir/$1.jsonl.zst" ]; then
        zstd -dcq "$dir/$1.jsonl.zst" >"$out/$1.requests.jsonl" || fail "cannot read $dir/$1.jsonl.zst" 'is zstd installed?'
        echo "$out/$1.requests.jsonl"
    fi
}

for task in arc_challenge arc_easy boolq hellaswag lambada piqa race; do
    requests=$(requests_of $task)
    delimiter=' '
    [ $task != lambada ] || delimiter=''
    if [ -z "$requests" ]; then
        echo "$task missing" >>"$rows"
        continue
    fi
    echo "$task" >&2
    row=$("$trainer" --load "$run" --score "$requests" --out "$out/$task.jsonl" --delimiter="$delimiter" "$@")
    echo "$task $row" >>"$rows"
done

awk '
    function value(name,   i) { for (i = 1; i < NF; i++) if ($i == name) return $(i + 1); return "" }
    function error(name,   i) { for (i = 1; i < NF; i++) if ($i == name) return $(i + 2) == "+-" ? $(i + 3) : ""; return "" }
    function cell(x) { return x == "" ? sprintf("%10s", "-") : sprintf("%10.2f", 100 * x) }
    {
        acc = acc cell(value("acc")); errors = errors cell(error("acc")); norm = norm cell(value("acc_norm"))
        n = n sprintf("%10s", value("n") == "" ? "-" : value("n"))
        if (value("acc") != "") { sum += value("acc"); tasks++ }
        if (value("perplexity") != "") perplexity = value("perplexity") (error("perplexity") == "" ? "" : " +- " error("perplexity"))
    }
    END {
        printf "%-9s%10s%10s%10s%10s%10s%10s%10s%10s\n", "", "ARC-c", "ARC-e", "BoolQ", "HellaSwag", "LAMBADA", "PIQA", "RACE", "Avg."
        printf "%-9s%s%s\n", "acc", acc, cell(tasks == 7 ? sum / 7 : "")
        printf "%-9s%s\n%-9s%s\n%-9s%s\n", "+-", errors, "acc_norm", norm, "n", n
        if (perplexity != "") printf "LAMBADA: perplexity %s\n", perplexity
    }' "$rows"
