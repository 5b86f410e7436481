#!/bin/sh
# FineWeb's 10B-token sample as GPT-2 tokens in llm.c's shards (103 of 200 MB): they train as they are.
#     data/download_fineweb.sh [DIR] [SHARDS]       (default: data/fineweb 103)
# shellcheck source=data/download_common.sh
. "$(dirname "$0")/download_common.sh"
[ $# -le 2 ] || usage_error "more than 2 arguments"
dir=${1:-data/fineweb}
last=${2:-103}
number SHARDS "$last"
base=https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main
add $base/fineweb_val_000000.bin val.fineweb.bin
i=1
while [ "$i" -le "$last" ]; do
    name=$(printf 'fineweb_train_%06d.bin' "$i")
    add "$base/$name" "$name"
    i=$((i + 1))
done
download "$dir"
echo "next: data/download_gpt2.sh"
echo "      ./train_remoe --preset small --tokenizer data/gpt2 \\"
echo "          --train-data '$dir/fineweb_train_*.bin' --val-data '$dir/val.*.bin'"
