#!/usr/bin/env bash
# SEA-PRIME (Table 1): SigLIP at 384 pixels, Cambrian-1's data. Less than 4 days on 8 H800 in the paper.
#
#   bash runs/prime.sh                     Llama-3-8B
#   LLM=gemma-2b bash runs/prime.sh        another LLM (phi-3-mini, vicuna-7b, vicuna-13b)
#   GPUS=4 ACCUM=2 bash runs/prime.sh      the same global batches on 4 GPUs
#
# Before it, by hand: Cambrian-1's data (docs/reproduce.md), with alignment_2.5m.jsonl and
# Cambrian7M_withsystemprompt.jsonl in data/; 2of12.txt of the 12dicts there too; pip install spacy and
# python -m spacy download en_core_web_sm.
set -euo pipefail
cd "$(dirname "$0")/.."
llm=${LLM:-llama-3-8b}
gpus=${GPUS:-8}
accum=${ACCUM:-1}
alignment_images=${ALIGNMENT_IMAGES:-data/Cambrian-Alignment}
chat_images=${CHAT_IMAGES:-data/Cambrian-10M}
captions=data/alignment_2.5m.jsonl

# The word list of 2.5 million captions, many of them written by models: nouns, adjectives and verbs only.
[ -f data/words_prime.txt ] ||
    python labels.py words --data $captions --extra data/2of12.txt --tagger en_core_web_sm --out data/words_prime.txt

# Ten labels for each of SigLIP's 729 patches.
torchrun --nproc_per_node="$gpus" -- labels.py extract --data $captions --image_folder "$alignment_images" \
    --words data/words_prime.txt --encoder siglip-384 --out data/labels_prime

# Stage 1.
[ -d "out/prime_$llm/model" ] ||
    torchrun --nproc_per_node="$gpus" train.py --stage pretrain --preset prime --llm "$llm" \
        --labels data/labels_prime --image_folder "$alignment_images" --grad_accum "$accum" --resume

# Stage 2, with the vision tower.
[ -d "out/prime_${llm}_finetune/model" ] ||
    torchrun --nproc_per_node="$gpus" train.py --stage finetune --preset prime --fsdp --init "out/prime_$llm" \
        --image_folder "$chat_images" --grad_accum "$accum" --resume
