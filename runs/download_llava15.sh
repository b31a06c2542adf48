#!/usr/bin/env bash
# What runs/llava15.sh reads: LLaVA-1.5's data of both stages, and POPE. By hand before it: data/2of12.txt.
#
# Started again, it continues. An archive can be removed once it is unpacked; ARCHIVE.unpacked says so.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p data/images data/pope
if [ ! -f data/2of12.txt ]; then
    echo "put 2of12.txt of the 12dicts (http://wordlist.aspell.net/12dicts/) into data/" >&2
    exit 1
fi

# get URL ARCHIVE FOLDER: download an archive into data/, unpack it in FOLDER.
get() {
    if [ ! -f "data/$2.unpacked" ] && [ ! -f "data/$2" ]; then
        wget -c -O "data/$2.part" "$1"
        mv "data/$2.part" "data/$2"
    fi
    unpack "$2" "$3"
}
unpack() {
    if [ ! -f "data/$1.unpacked" ]; then
        unzip -qo "data/$1" -d "$2"
        touch "data/$1.unpacked"
    fi
}
# get_hf REPO FILE: download a file of a dataset of the hub into data/.
get_hf() {
    if [ ! -f "data/$2.unpacked" ]; then
        hf download "$1" "$2" --repo-type dataset --local-dir data
    fi
}

# Stage 1: 558,128 captioned images, 27 GB.
get_hf liuhaotian/LLaVA-Pretrain blip_laion_cc_sbu_558k.json
get_hf liuhaotian/LLaVA-Pretrain images.zip
unpack images.zip data/images

# Stage 2: 665,298 conversations, 1 GB, and their images: COCO 19 GB, GQA 20, OCR-VQA 9, TextVQA 7, Visual Genome 15.
get_hf liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json
get_hf weizhiwang/llava_v15_instruction_images ocr_vqa_images_llava_v15.zip
unpack ocr_vqa_images_llava_v15.zip data/images/ocr_vqa
get http://images.cocodataset.org/zips/train2017.zip train2017.zip data/images/coco
get https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip gqa.zip data/images/gqa
get https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip textvqa.zip data/images/textvqa
get https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip vg.zip data/images/vg
get https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip vg2.zip data/images/vg

# POPE: the questions of the version that LLaVA asks, and COCO's val2014, 6 GB.
pope=https://raw.githubusercontent.com/AoiDragon/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco
for kind in random popular adversarial; do
    wget -O data/pope/coco_pope_$kind.json $pope/coco_pope_$kind.json
done
get http://images.cocodataset.org/zips/val2014.zip val2014.zip data
