#!/bin/sh
# `towards_monosemanticity` in sizes nearer to the paper's, for one GPU: a model trained on 2 billion tokens, a dictionary of 4,096
# features trained on 1 billion activations (the paper: 100 and 8 billion). TEXT is a corpus of that size.
#
#   TEXT=texts OUT=runs/mono sh recipes/towards_monosemanticity_gpu.sh
set -eu
: "${TEXT:?what to train on, as for microtome train --corpus}"
OUT=${OUT:-runs/mono}

microtome replicate towards_monosemanticity --report "$OUT/report" --set corpus="$TEXT" device=cuda \
    d_vocab=32768 lm_tokens=2000000000 lm_batch=256 lm_lr=3e-3 \
    d_sae=4096 sae_tokens=1000000000 sae_batch=8192 sae_lr=5e-4 resample_every=12500 dead_after=10000000 \
    loss_tokens=1000000 table_tokens=1000000 compared=100 runs="$OUT/models" sheets="$OUT/sheets"
