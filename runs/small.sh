#!/usr/bin/env bash
# SEA beside its baseline on one GPU of 24 GB: Qwen3-0.6B, CLIP-L/14@336, a tenth of LLaVA-1.5's steps.
#
# By hand before it: data/2of12.txt, a list of the 12dicts. Started again, it continues.
# PAPER: not a run of the paper. N of Eq. 11 is that of 8 images: 1,152 at most.
set -euo pipefail
cd "$(dirname "$0")/.."
captions=data/small.jsonl

# The data of runs/llava15.sh. Of its good captions a random tenth: 218 steps of 256.
bash runs/download_llava15.sh
if [ ! -f $captions ]; then
    [ -f data/checked_captions.jsonl ] ||
        python -m tools.check_data data/checked_captions.jsonl --stage pretrain --llm qwen3-0.6b
    shuf -n 55808 --random-source=data/checked_captions.jsonl data/checked_captions.jsonl >$captions.part
    mv $captions.part $captions
fi

# Words and labels.
[ -f data/words.txt ] ||
    python labels.py words --data $captions --extra data/2of12.txt --out data/words.txt
python labels.py extract --data $captions --image_folder data/images --words data/words.txt --out data/labels

for suffix in "" _baseline; do
    run=pretrain_qwen3-0.6b$suffix
    flags=()
    [ -z "$suffix" ] || flags+=(--sea_weight 0)

    # Stage 1.
    [ -d "out/$run/model" ] ||
        python train.py --stage pretrain --data $captions --llm qwen3-0.6b --batch_size 8 --grad_accum 32 \
            --no-grad_checkpoint "${flags[@]}" --resume

    # Stage 2: 520 steps of 128 conversations.
    [ -d "out/${run}_finetune/model" ] ||
        python train.py --stage finetune --init "out/$run" --batch_size 4 --grad_accum 32 --max_steps 520 --resume
done
