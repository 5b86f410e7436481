#!/bin/sh
# The Pile without its copyrighted parts: 30 files of JSON Lines, each about 11 GB as .zst. Any of them is a
# fair sample of the whole. The shards need about twice the room of the files they are made of.
#     data/download_pile.sh [DIR] [FIRST] [LAST]       (default: data/pile 0 29)
# shellcheck source=data/download_common.sh
. "$(dirname "$0")/download_common.sh"
[ $# -le 3 ] || usage_error "more than 3 arguments"
dir=${1:-data/pile}
i=${2:-0}
last=${3:-29}
number FIRST "$i"
number LAST "$last"
base=https://huggingface.co/datasets/monology/pile-uncopyrighted/resolve/main
while [ "$i" -le "$last" ]; do
    name=$(printf 'train/%02d.jsonl.zst' "$i")
    add "$base/$name" "$name"
    i=$((i + 1))
done
download "$dir"
echo "next: data/download_gpt2.sh"
echo "      build/tokenize --tokenizer data/gpt2 --out $dir --val-fraction 0.001 $dir/train/*.jsonl.zst"
