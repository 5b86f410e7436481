#!/usr/bin/env bash
# Two runs of the same options, step by step: dev/compare_logs.sh A/log.jsonl B/log.jsonl
# Prints the largest relative difference of the loss, where stage II began, and the mean S of the last 50 steps of both; exit 1
# unless the loss is within 1 % at every step, stage II within 2 steps, and S within 0.003.
set -eu
value() { sed -n "s/.*\"$1\": \([-0-9.e+]*\).*/\1/p"; }
column() { grep '"lm_loss"' "$2" | value "$1"; }
paste <(column lm_loss "$1") <(column lm_loss "$2") <(column sparsity "$1") <(column sparsity "$2") \
    <(column stage "$1") <(column stage "$2") | awk '
    function abs(x) { return x < 0 ? -x : x }
    NF == 6 {
        off = abs($2 - $1) / $1
        if (off > worst) { worst = off; at = n }
        if ($5 >= 2 && !a2) a2 = n + 1
        if ($6 >= 2 && !b2) b2 = n + 1
        sa[n] = $3; sb[n] = $4
        if (n % 50 == 0) printf "step %5d  loss %.5f %.5f  S %.4f %.4f\n", n, $1, $2, $3, $4
        n++
    }
    END {
        for (i = n - 50; i < n; i++) { a += sa[i] / 50; b += sb[i] / 50 }
        printf "%d steps: loss at most %.3f %% apart (step %d), stage II at step %d and %d, mean S of the last 50 %.4f and %.4f\n",
            n, 100 * worst, at, a2 - 1, b2 - 1, a, b
        exit !(n >= 50 && worst <= 0.01 && abs(a2 - b2) <= 2 && abs(a - b) <= 0.003)
    }'
