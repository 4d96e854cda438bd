#!/usr/bin/env bash
# How the shipped demo was made: corpus, dictionary, metrics, feature index. Hours on two cores; every step resumes.
# Run it from the repository's root. The results go to runs/full; copy them to src/microtome/assets/demo to ship them.
set -euo pipefail

# 1. The demo corpus: about a million tokens sampled from the built-in model.
microtome generate --recipe recipes/demo_corpus.json --out runs/demo_corpus --dtype bf16

# 2. Real text beside it: speeches, mixed English, essays, manuals, code. It trains the dictionary and is not shipped.
python scripts/prose.py runs/prose

# 3. Activations of all of it. The last hundredth, which is demo text, is kept for the evaluation.
microtome harvest --corpus runs/prose,demo --tokens runs/full/tokens --part 0:0.99 \
    --hooks blocks.15.hook_resid_pre --out runs/full/activations

# 4. The dictionary, and what it is worth on the text it has not seen.
microtome train --store runs/full/activations --d-sae 4608 --k 32 --train-tokens 12000000 --lr 2e-3 \
    --warmup-steps 500 --decay-fraction 0.5 --out runs/full/dictionary
microtome evaluate runs/full/dictionary --tokens runs/full/tokens --part 0.99:1

# 5. The feature index, over the demo corpus alone.
microtome index runs/full/dictionary --corpus demo --tokens runs/full/demo-tokens --out runs/full/index
