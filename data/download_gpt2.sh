#!/bin/sh
# GPT-2's vocabulary (1.5 MB) from OpenAI.
#     data/download_gpt2.sh [DIR]       (default: data/gpt2)
# shellcheck source=data/download_common.sh
. "$(dirname "$0")/download_common.sh"
[ $# -le 1 ] || usage_error "more than 1 argument"
dir=${1:-data/gpt2}
base=https://openaipublic.blob.core.windows.net/gpt-2/encodings/main
add $base/encoder.json vocab.json 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
add $base/vocab.bpe merges.txt 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
download "$dir"
