#!/bin/sh
# Tiny Shakespeare (1.1 MB of plays).
#     data/download_tinyshakespeare.sh [DIR]       (default: data/tinyshakespeare)
# shellcheck source=data/download_common.sh
. "$(dirname "$0")/download_common.sh"
[ $# -le 1 ] || usage_error "more than 1 argument"
dir=${1:-data/tinyshakespeare}
base=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare
add $base/input.txt tinyshakespeare.txt \
    86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
download "$dir"
echo "next: build/train_tokenizer --vocab-size 4096 --out $dir $dir/tinyshakespeare.txt"
echo "      build/tokenize --tokenizer $dir --out $dir --val-fraction 0.1 $dir/tinyshakespeare.txt"
