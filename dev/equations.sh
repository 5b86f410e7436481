#!/usr/bin/env bash
# The README's table of equations: for each the lines that compute it, in C and in CUDA. Rewritten in place, or with --check only
# compared. A line counts if it is code that ends with a comment that cites (Eq. n), or such a comment within a function, above code.
set -eu
cd "$(dirname "$0")/.."
places() { # places NUMBER FILE...: links to at most four lines
    local cited="\(Eq\. ([0-9]+, )*$1(, [0-9]+)*\)"
    shift
    grep -nE "^( *[^ /*#].*|  +)// .*$cited" "$@" |
        sed -E 's/^([^:]*):([0-9]+):.*/[\1:\2](\1#L\2)/' | head -n 4 | paste -sd ' ' -
}
rows() {
    printf '| Equation of the paper | What | C | CUDA |\n|---|---|---|---|\n'
    while IFS='|' read -r number what; do
        c=$(places "$number" llmc/*.h llmc/*/*.h train_remoe.c)
        cuda=$(places "$number" llmc/*.cuh llmc/*/*.cuh train_remoe.cu)
        echo "| $number | $what | $c | ${cuda:-the same} |"
    done <<'ROWS'
1|an MoE layer is the gated sum of its experts
2|TopK routing
3|TopK as a threshold: where it jumps
4|ReLU instead of a threshold
5|ReLU routing
6|the loss: language model plus lambda times the regulariser
7|lambda's update
8|sparsity S
9|L1 regulariser without load balance
10|L1 regulariser with load balance
11|the load f of an expert
12|fine-grained experts: width
13|fine-grained experts: count
14|flip rate: what one update changes in the routing
15|flip count
ROWS
}
awk -v rows="$(rows)" '
    /^<!-- equations -->$/ { print; print rows; skip = 1; next }
    skip && /^\|/ { next }
    { skip = 0; print }' README.md >README.md.new
if [ "${1:-}" = --check ]; then
    cmp README.md README.md.new || { rm README.md.new; echo "README.md is out of date ---> dev/equations.sh"; exit 1; }
    rm README.md.new
else
    mv README.md.new README.md
fi
