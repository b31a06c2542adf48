#!/usr/bin/env bash
# Table 2 of the paper, from an empty disk: SEA-LLaVA and its baseline, on one node of 8 GPUs.
#
#   bash runs/llava15.sh                       Vicuna-7B, CLIP-L/14@336
#   LLM=gemma-2b bash runs/llava15.sh          another LLM (vicuna-13b, phi-3-mini, llama-3-8b)
#   GPUS=4 ACCUM=2 bash runs/llava15.sh        the same global batches on 4 GPUs
#
# By hand before it: data/2of12.txt, a list of the 12dicts (http://wordlist.aspell.net/12dicts/). It stops at the first
# error. Started again, it skips what is done and continues what was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
llm=${LLM:-vicuna-7b}
gpus=${GPUS:-8}
accum=${ACCUM:-1}
captions=data/checked_captions.jsonl
chats=data/checked_chats.jsonl
name=pretrain
[ "$llm" = vicuna-7b ] || name=pretrain_$llm

# 1. Downloads: 97 GB of images and their samples (docs/reproduce.md says what and under which licences).
bash runs/download_llava15.sh

# 2. All samples and images are read once. It stops if there are bad ones and says where they are listed; started again,
#    it goes on with the good ones.
all_good=true
[ -f $captions ] || python -m tools.check_data $captions --stage pretrain --llm "$llm" ||
    { [ -f $captions ] || exit 1; all_good=false; }
[ -f $chats ] || python -m tools.check_data $chats --stage finetune --llm "$llm" ||
    { [ -f $chats ] || exit 1; all_good=false; }
$all_good

# 3. The word list (Appendix C), then ten labels for each patch of each image (Sec. 3.1).
[ -f data/words.txt ] ||
    python labels.py words --data $captions --extra data/2of12.txt --out data/words.txt
torchrun --nproc_per_node="$gpus" -- labels.py extract --data $captions --image_folder data/images \
    --words data/words.txt --out data/labels

# 4. Stage 1: the adapter. Stage 2: the LLM too. With SEA, then without.
for suffix in "" _baseline; do
    run=$name$suffix
    flags=()
    [ "$llm" = vicuna-7b ] || flags+=(--llm "$llm")
    [ "$llm" != gemma-2b ] || flags+=(--no-grad_checkpoint) # of 80 GB it takes 54
    [ -z "$suffix" ] || flags+=(--sea_weight 0)
    [ -d "out/$run/model" ] ||
        torchrun --nproc_per_node="$gpus" train.py --stage pretrain --data $captions "${flags[@]}" \
            --grad_accum "$accum" --resume
    [ -d "out/${run}_finetune/model" ] ||
        torchrun --nproc_per_node="$gpus" train.py --stage finetune --fsdp --init "out/$run" --data $chats \
            --grad_accum "$accum" --resume
done

# 5. POPE on val2014, as LLaVA asks it. For the other benchmarks see docs/reproduce.md.
for run in "$name" "${name}_baseline"; do
    python eval.py pope --model "out/${run}_finetune" --data data/pope --image_folder data/val2014
done
