#!/usr/bin/env bash
# README's table of GPU figures: dev/bench_table.sh [TSV ...]; by default what dev/bench_gpu.sh has left in build/gpu/bench.tsv.
# A line of the same name and card is replaced, a new one goes last, all others stay. Rewritten in place.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- build/gpu/bench.tsv
awk '
    FILENAME != "README.md" {
        if (split($0, cell, "\t") == 12) {
            key = cell[1] "|" cell[10]
            if (!(key in line)) order[n++] = key
            line[key] = "|"
            for (i = 1; i <= 12; i++) line[key] = line[key] " " cell[i] " |"
        }
        next
    }
    /^<!-- gpu-bench -->$/ { inside = 1 }
    /^<!-- \/gpu-bench -->$/ {
        inside = 0
        for (i = 0; i < n; i++) if (order[i] in line) print line[order[i]]
    }
    inside && split($0, cell, " [|] ") == 12 {
        key = substr(cell[1], 3) "|" cell[10]
        if (key in line) {
            print line[key]
            delete line[key]
            next
        }
    }
    { print }' "$@" README.md >README.md.new
mv README.md.new README.md
