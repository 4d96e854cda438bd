#!/bin/sh
# A dictionary of the last MLP's 14,336 neurons of an 8B Llama (blocks.31.mlp.hook_post = silu(gate) * up), on one GPU of 80 GB.
# Activations are streamed from the model: nothing of them is on the disk. docs/large_models.md has the arithmetic.
#
#   MODEL=Sao10K/L3-8B-Stheno-v3.2 TEXT=texts/train.jsonl.zst HELD_OUT=texts/other.jsonl.zst sh recipes/llama_8b_mlp.sh
#
# Every size can be set in the same way; stopped, it goes on from the last checkpoint when run again.
set -eu

: "${MODEL:?the model: a Hugging Face id or a folder}" "${TEXT:?what to train on, as for microtome train --corpus}"
: "${HELD_OUT:?text to measure on, that is not in TEXT}"
OUT=${OUT:-runs/llama-8b-mlp}
LAYER=${LAYER:-31}
TOKENS=${TOKENS:-100000000}
MEASURED=${MEASURED:-2000000}
CONTEXT=${CONTEXT:-1024}
D_SAE=${D_SAE:-65536}
K=${K:-64}
BATCH=${BATCH:-4096}
DTYPE=${DTYPE:-bf16}
CHECKPOINT_EVERY=${CHECKPOINT_EVERY:-5000}

microtome train --model "$MODEL" --dtype "$DTYPE" --corpus "$TEXT" --context "$CONTEXT" --max-tokens "$TOKENS" \
    --hook "blocks.$LAYER.mlp.hook_post" --architecture batchtopk --d-sae "$D_SAE" --k "$K" \
    --train-tokens "$TOKENS" --batch-size "$BATCH" --dead-after "$((TOKENS / 10))" --checkpoint-every "$CHECKPOINT_EVERY" \
    --out "$OUT/dictionary"

# Features and neurons by the same measures; features.md and the sheets of the blind comparison.
microtome replicate towards_monosemanticity --model "$MODEL" --dtype "$DTYPE" --report "$OUT/report" \
    --set dictionary_folder="$OUT/dictionary" corpus="$HELD_OUT" max_tokens="$MEASURED" context="$CONTEXT" \
    runs="$OUT/measured" sheets="$OUT/sheets"
