#!/usr/bin/env bash
# From a Hugging Face folder to a quantized, fused, verified GGUF:
#
#   scripts/convert_and_fuse.sh MODEL_FOLDER OUT.gguf [TYPE]
#
# Needs llama.cpp: LLAMA_CPP names its source folder (for convert_hf_to_gguf.py), and
# llama-quantize is in the PATH or in $LLAMA_CPP/build/bin.
#
# Quantize first, fuse then: llama-quantize treats attn_qkv like attn_v, so fusing first gives
# larger files. --pure makes all matrices TYPE (embedding and output too), so that Q, K and V are of
# one type everywhere; set QUANTIZE_OPTIONS to something else to keep the usual mix, whose mixed
# layers then stay separate.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$1 output=$2 type=${3:-Q4_0}
: "${LLAMA_CPP:?set LLAMA_CPP to the folder of llama.cpp}"
PATH=$PATH:$LLAMA_CPP/build/bin

if [ -e "$output" ]; then
    echo "$output exists already" >&2 # said now, not after hours of work
    exit 1
fi
scratch=$(mktemp -d "$(dirname "$output")/convert-and-fuse.XXXXXX")

python3 "$LLAMA_CPP/convert_hf_to_gguf.py" "$model" --outtype f16 --outfile "$scratch/f16.gguf"
# shellcheck disable=SC2086 # several options
llama-quantize ${QUANTIZE_OPTIONS---pure} "$scratch/f16.gguf" "$scratch/quantized.gguf" "$type"
rm "$scratch/f16.gguf"

status=0
gguf-fuse --fuse-qkv-weights "$scratch/quantized.gguf" "$output" || status=$?
if [ "$status" = 3 ]; then
    mv "$scratch/quantized.gguf" "$output"
    rmdir "$scratch"
    echo "$output is quantized, but not fused: there was nothing to fuse" >&2
    exit 3
elif [ "$status" != 0 ]; then
    echo "the quantized model is $scratch/quantized.gguf" >&2
    exit "$status"
fi
gguf-fuse verify "$scratch/quantized.gguf" "$output"
rm -r "$scratch"
