#!/usr/bin/env bash
# SEA beside its baseline on one GPU of 24 GB: Qwen3-0.6B, CLIP-L/14@336, a tenth of LLaVA-1.5's steps.
#
# By hand before it: data/2of12.txt, a list of the 12dicts. Started again, it continues.
# PAPER: not a run of the paper. N of Eq. 11 is that of 8 images: 1,152 at most.
set -euo pipefail
cd "$(dirname "$0")/.."
all_captions=data/checked_captions.jsonl
captions=data/small.jsonl
chats=data/checked_chats.jsonl

# The data of runs/llava15.sh. All samples and images are read once. It stops if there are bad ones and says where they
# are listed; started again, it goes on with the good ones.
bash runs/download_llava15.sh
all_good=true
[ -f $all_captions ] || python -m tools.check_data $all_captions --stage pretrain --llm qwen3-0.6b ||
    { [ -f $all_captions ] || exit 1; all_good=false; }
[ -f $chats ] || python -m tools.check_data $chats --stage finetune --llm qwen3-0.6b ||
    { [ -f $chats ] || exit 1; all_good=false; }
$all_good

# Of the good captions a random tenth: 218 steps of 256.
if [ ! -f $captions ]; then
    shuf -n 55808 --random-source=$all_captions $all_captions >$captions.part
    mv $captions.part $captions
fi

# Words and labels.
[ -f data/words_small.txt ] ||
    python labels.py words --data $captions --extra data/2of12.txt --out data/words_small.txt
python labels.py extract --data $captions --image_folder data/images --words data/words_small.txt --out data/labels_small

for suffix in "" _baseline; do
    run=pretrain_qwen3-0.6b$suffix
    flags=(--labels data/labels_small)
    [ -z "$suffix" ] || flags=(--sea_weight 0)

    # Stage 1.
    [ -d "out/$run/model" ] ||
        python train.py --stage pretrain --data $captions --llm qwen3-0.6b --batch_size 8 --grad_accum 32 \
            --no-grad_checkpoint "${flags[@]}" --resume

    # Stage 2: 520 steps of 128 conversations.
    [ -d "out/${run}_finetune/model" ] ||
        python train.py --stage finetune --init "out/$run" --data $chats --batch_size 4 --grad_accum 32 \
            --max_steps 520 --resume
done
