#!/usr/bin/env bash
# How the shipped demo was made: corpus, dictionary, metrics, feature index. Hours on two cores; every step resumes.
# Run it from the repository's root. The results go to runs/full; copy them to src/microtome/assets/demo to ship them.
set -euo pipefail

# 1. The demo corpus: about a million tokens sampled from the built-in model.
microtome generate --recipe recipes/demo_corpus.json --out runs/demo_corpus --dtype bf16

# 2. Real text beside it: speeches, mixed English, essays, manuals, code. It trains the dictionary and is not shipped.
#    Other documents of the same kinds, and the end of the demo corpus, are kept for the evaluation.
python scripts/prose.py runs/prose
python scripts/prose.py runs/prose_held_out --held-out
python - <<'PYTHON'
import json, microtome as mt
documents = list(mt.open_corpus("demo"))
with open("runs/demo_tail.jsonl", "w") as file:
    for document in documents[int(len(documents) * 0.96) :]:
        file.write(json.dumps({"text": document.text, "source": document.source}) + "\n")
PYTHON

# 3. Activations of all but that end, which is less than the last hundredth of the whole.
microtome harvest --corpus runs/prose,demo --tokens runs/full/tokens --part 0:0.99 \
    --hooks blocks.15.hook_resid_pre --out runs/full/activations

# Which architecture: five of them at several sparsities on one stream, then a table and the figures of the docs.
microtome train --store runs/full/activations --configs recipes/demo_pareto.json --train-tokens 3000000 --lr 2e-3 \
    --warmup-steps 200 --decay-fraction 0.5 --out runs/pareto
microtome compare runs/pareto/* --corpus runs/prose_held_out,runs/demo_tail.jsonl --tokens runs/held_out_union \
    --function-tokens 8192 --out runs/pareto_compared

# 4. The dictionary, and what it is worth on the text it has not seen.
microtome train --store runs/full/activations --d-sae 4608 --k 32 --train-tokens 36000000 --lr 2e-3 \
    --warmup-steps 500 --decay-fraction 0.5 --out runs/full/dictionary_long
microtome evaluate runs/full/dictionary_long --corpus runs/prose_held_out,runs/demo_tail.jsonl --tokens runs/held_out_union

# 5. The feature index, over the demo corpus alone.
microtome index runs/full/dictionary_long --corpus demo --tokens runs/full/demo-tokens --out runs/full/index_long
