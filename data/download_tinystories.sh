#!/bin/sh
# TinyStories, the GPT-4 part (about 2.2 GB of text; its shards need another 1 GB).
#     data/download_tinystories.sh [DIR]       (default: data/tinystories)
# shellcheck source=data/download_common.sh
. "$(dirname "$0")/download_common.sh"
[ $# -le 1 ] || usage_error "more than 1 argument"
dir=${1:-data/tinystories}
base=https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main
add $base/TinyStoriesV2-GPT4-train.txt TinyStoriesV2-GPT4-train.txt
add $base/TinyStoriesV2-GPT4-valid.txt TinyStoriesV2-GPT4-valid.txt
download "$dir"
echo "next: data/download_gpt2.sh"
echo "      build/tokenize --tokenizer data/gpt2 --out $dir --text-bytes 0 $dir/TinyStoriesV2-GPT4-train.txt"
