#!/usr/bin/env bash
# From a Hugging Face folder to a quantized, fused, verified GGUF:
#
#   scripts/convert_and_fuse.sh MODEL_FOLDER OUT.gguf [TYPE]
#
# Needs llama.cpp: LLAMA_CPP names its source folder (for convert_hf_to_gguf.py), and
# llama-quantize is in the PATH or in $LLAMA_CPP/build/bin.
#
# Quantize first, fuse then: llama-quantize treats attn_qkv like attn_v, so fusing first gives
# larger files. IMATRIX names an importance matrix, which some types need. Where the mix of TYPE
# leaves no layer that can be fused (IQ4_XS, Q3_K_M, Q2_K, ...), Q and K get V's type, as
# `gguf-fuse recipe` says, from the F16 model once more.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
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
llama-quantize ${IMATRIX:+--imatrix "$IMATRIX"} \
    "$scratch/f16.gguf" "$scratch/quantized.gguf" "$type"

status=0
gguf-fuse --fuse-qkv-weights "$scratch/quantized.gguf" "$output" || status=$?
if [ "$status" = 3 ]; then
    status=0
    gguf-fuse recipe "$scratch/quantized.gguf" "$output" --run --from "$scratch/f16.gguf" \
        ${IMATRIX:+--imatrix "$IMATRIX"} || status=$? # it verifies what it writes
    verified=yes
fi
if [ "$status" = 3 ]; then
    rm "$scratch/f16.gguf"
    mv "$scratch/quantized.gguf" "$output"
    rmdir "$scratch"
    echo "$output is quantized, but not fused: there was nothing to fuse" >&2
    exit 3
elif [ "$status" != 0 ]; then
    echo "the quantized model is $scratch/quantized.gguf" >&2
    exit "$status"
fi
[ "${verified-}" ] || gguf-fuse verify "$scratch/quantized.gguf" "$output"
rm -r "$scratch"
