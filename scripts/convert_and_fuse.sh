#!/usr/bin/env bash
# From a Hugging Face folder to a quantized, fused, verified GGUF:
#
#   scripts/convert_and_fuse.sh MODEL_FOLDER OUT.gguf [TYPE]
#
# Needs llama.cpp: LLAMA_CPP names its source folder (for convert_hf_to_gguf.py), and
# llama-quantize is in the PATH or in $LLAMA_CPP/build/bin.
#
# Quantize first, fuse then: llama-quantize treats attn_qkv like attn_v, so fusing first gives
# larger files. --pure keeps Q, K and V of one type; without it, mixed layers stay as they are.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$1 output=$2 type=${3:-Q4_0}
: "${LLAMA_CPP:?set LLAMA_CPP to the folder of llama.cpp}"
PATH=$PATH:$LLAMA_CPP/build/bin

scratch=$(mktemp -d "$(dirname "$output")/convert-and-fuse.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

python3 "$LLAMA_CPP/convert_hf_to_gguf.py" "$model" --outtype f16 --outfile "$scratch/f16.gguf"
llama-quantize --pure "$scratch/f16.gguf" "$scratch/quantized.gguf" "$type"
rm "$scratch/f16.gguf"
gguf-fuse --fuse-qkv-weights --on-mismatch skip "$scratch/quantized.gguf" "$output"
gguf-fuse verify "$scratch/quantized.gguf" "$output"
