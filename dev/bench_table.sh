#!/usr/bin/env bash
# README's table of GPU figures: dev/bench_table.sh [TSV ...]; by default what dev/bench_gpu.sh has left in build/gpu/bench.tsv.
# A line of the same name is replaced, a new one goes last, all others stay. Rewritten in place.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- build/gpu/bench.tsv
awk -F '\t' '
    FILENAME != "README.md" {
        if (NF == 12) {
            if (!($1 in line)) order[n++] = $1
            line[$1] = "|"
            for (i = 1; i <= NF; i++) line[$1] = line[$1] " " $i " |"
        }
        next
    }
    /^<!-- gpu-bench -->$/ { inside = 1 }
    /^<!-- \/gpu-bench -->$/ {
        inside = 0
        for (i = 0; i < n; i++) if (order[i] in line) print line[order[i]]
    }
    inside && split($0, cell, " [|] ") > 1 && substr(cell[1], 3) in line {
        print line[substr(cell[1], 3)]
        delete line[substr(cell[1], 3)]
        next
    }
    { print }' "$@" README.md >README.md.new
mv README.md.new README.md
