#!/bin/sh
# The main job in one go: train, draw before and after, evaluate, filter. With nothing set it draws phantoms as its real
# images and teaches the embedded base a kind that it never saw, in minutes on two cores. For one's own images:
#
#   DATA=wounds/ BASE=sd21-base PROMPT="a diabetic foot ulcer" STEPS=1500 NUM_IMAGES=200 OUT=runs/dfu sh tests/quickstart.sh
#
# More flags of train.py go into TRAIN, of sample.py into SAMPLE, values without spaces:
# TRAIN="--resolution 256 --batch-size 4". Paths begin at the repository. Typed again, it continues where it was stopped.
set -eu
if [ $# -gt 0 ]; then  # settings are variables: print the lines above
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] || exit 2
    exit
fi
CDPATH= cd "$(dirname "$0")/.."
DATA=${DATA:-}                # real images: a folder or a table
BASE=${BASE:-tiny}            # what is adapted to them
PROMPT=${PROMPT:-}            # their caption; without it the table of DATA says what each shows
STEPS=${STEPS:-800}           # of training
NUM_IMAGES=${NUM_IMAGES:-2}   # drawn of each caption
VAL_SPLIT=${VAL_SPLIT:-0.4}   # of the patients, held out: what the drawn images are evaluated against
OUT=${OUT:-runs/quickstart}   # everything is written here
TRAIN=${TRAIN:-}
SAMPLE=${SAMPLE:-}

if [ -n "$DATA" ]; then
    REFERENCE=$DATA           # what the filter compares with: the images that were trained on
    RUN=$OUT/train
else
    DATA=$OUT/data            # of the kind that `tiny` never saw
    REFERENCE=$OUT/reference  # of that kind and of three others, so that labels can be checked; never trained on
    RUN=
    COUNT=${COUNT:-288}
    echo "drawing $((2 * COUNT)) phantoms in place of real images"
    python tests/phantoms.py "$DATA" --count "$COUNT" --seed 1000000 --kinds "mpox lesion"
    python tests/phantoms.py "$REFERENCE" --count "$COUNT" --seed 1500000 \
        --kinds "mpox lesion,inflammatory ulcer,normal fundus,normal chest"
    export HF_HUB_OFFLINE=1   # nothing is downloaded
fi
if [ "$BASE" = tiny ]; then   # so small a model learns at a higher rate, and needs fewer denoising steps and less guidance
    TRAIN="--lr 3e-3 --targets all --snr-gamma 5 --val-samples 0 --validate-every 200 $TRAIN"
    SAMPLE="--scheduler dpm --steps 20 --guidance-scale 2 $SAMPLE"
fi

# Draw into folder $1 with the adapter at weight $2.
draw() {
    python sample.py --lora "$OUT/train/lora.safetensors:$2" --labels-from "$DATA" ${PROMPT:+--prompt "$PROMPT"} \
        --num-images "$NUM_IMAGES" $SAMPLE --grid --overwrite --out "$1"
}

python train.py --base "$BASE" --data "$DATA" ${PROMPT:+--prompt "$PROMPT"} --steps "$STEPS" --val-split "$VAL_SPLIT" \
    $TRAIN --out "$OUT/train"
draw "$OUT/before" 0  # the base alone: the same captions from the same noise
draw "$OUT/after" 1
python evaluate.py "$DATA" "$OUT/before" "$OUT/after" --run "$OUT/train" --out "$OUT/report.html" --json "$OUT/report.json"
for stage in before after; do
    python filter.py "$OUT/$stage" --reference "$REFERENCE" ${RUN:+--run "$RUN" --drop-copies} --calibrate 0.05 \
        --drop-duplicates --out "$OUT/kept-$stage"
done
python tests/before_after.py "$DATA" "$OUT/before" "$OUT/after" "$OUT/before-after.png"

echo "
Look at:
  $OUT/before-after.png           what was learnt: real images, drawn ones before training, and after it
  $OUT/report.html                how good both are, against images that were not trained on
  $OUT/kept-before/filter.html    what was kept of those before, and why the others were not
  $OUT/kept-after/filter.html     the same after
  $OUT/train/report.html          how training went
Use: --lora $OUT/train/lora.safetensors"
