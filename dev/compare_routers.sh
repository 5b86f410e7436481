#!/usr/bin/env bash
# Routers side by side on your own text, at equal active size and equal data order:
#     dev/compare_routers.sh OUT FILE...            JSON Lines (.jsonl, .jsonl.zst) or text; a domain a file
# Trains a vocabulary of VOCAB tokens and makes shards (once), trains relu, topk and dense for STEPS steps each, and prints their
# validation loss a domain. The model is the tiny preset's; further options go into OPTIONS. Everything stays under OUT.
set -eu
if [ $# -lt 2 ]; then
    sed -n '2,5p' "$0"
    exit 2
fi
cd "$(dirname "$0")/.."
out=$1
shift
VOCAB=${VOCAB:-4096}
STEPS=${STEPS:-400}
ROUTERS=${ROUTERS:-relu topk dense}
OPTIONS=${OPTIONS:-}
make train_remoe build/train_tokenizer build/tokenize >/dev/null
mkdir -p "$out/data"
if [ ! -f "$out/data/manifest.json" ]; then
    build/train_tokenizer --vocab-size "$VOCAB" --out "$out/data" "$@"
    build/tokenize --tokenizer "$out/data" --out "$out/data" --val-fraction 0.05 "$@"
fi
for router in $ROUTERS; do
    rm -rf "${out:?}/$router"
    ./train_remoe $OPTIONS --router "$router" --vocab-size "$VOCAB" --steps "$STEPS" --train-data "$out/data/train_*.bin" \
        --val-data "$out/data/val.*.bin" --tokenizer "$out/data" --out "$out/$router" | tee "$out/$router.txt" |
        grep -E '^(params|stage|val|[0-9]+ steps)' | sed "s/^/$router: /"
done
