#!/usr/bin/env bash
# The toy, from nothing: the world, captions only beside SEA, stage 2 of both, POPE. About five minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

# The world, the adapter on captions only and with SEA, and what the two look like: words.html.
python -m tools.toy

for name in toy_baseline toy; do
    # Stage 2: the LLM learns to answer questions. A finished run is not repeated.
    [ -d "out/${name}_finetune/model" ] ||
        python train.py --stage finetune --preset toy --init "out/$name" --resume

    # POPE: does it see objects that are not there?
    python eval.py pope --model "out/${name}_finetune" --data toy/pope --image_folder toy/images --prompt ""
done
