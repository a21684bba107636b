#!/bin/sh
# Refine a generator by what experts like, in rounds. Each round draws images with the adapter, keeps those that
# the selector finds good, mixes them with real ones, and trains on from the adapter: a kept image counts by its
# quality (reward-weighted regression), a real one as the mean. What is drawn is evaluated before the first round
# and after each. The selector comes from ratings: filter.py --rating-page, then filter.py --fit.
#
#   SELECTOR=selector.safetensors LORA=runs/dfu/lora.safetensors BASE=sd21-base DATA=wounds/ \
#       RUN=runs/dfu NUM_IMAGES=50 STEPS=500 TRAIN="--resolution 256 --lr 5e-5" OUT=runs/refined sh tests/refine.sh
#
# Typed again, it continues where it was stopped. Paths begin at the repository. More flags of train.py go into TRAIN, of
# sample.py into SAMPLE, values without spaces; rank and targets must be those of LORA. Without LORA the first round
# trains a new adapter. RUN, the run of LORA, keeps what it held out for evaluation alone, and prepares real images as it
# did. Without RUN the reports also compare with images that were trained on, and look too good.
set -eu
if [ $# -gt 0 ]; then  # settings are variables: print the lines above
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] || exit 2
    exit
fi
CDPATH= cd "$(dirname "$0")/.."
SELECTOR=${SELECTOR:?is missing: write one with filter.py --fit, see README.md}
ROUNDS=${ROUNDS:-2}
BASE=${BASE:-tiny}
LORA=${LORA:-}
RUN=${RUN:-}
DATA=${DATA:-runs/quickstart/data}  # real images with captions
OUT=${OUT:-runs/refined}
NUM_IMAGES=${NUM_IMAGES:-1}   # drawn in a round, of each caption of DATA
STEPS=${STEPS:-100}           # trained in a round
SHARE=${SHARE:-50}            # per cent of what is trained on that is drawn

# Draw with the adapter in $LORA into $1/drawn and evaluate it.
draw_and_evaluate() {
    python sample.py --base "$BASE" ${LORA:+--lora "$LORA"} --labels-from "$DATA" --num-images "$NUM_IMAGES" \
        --grid ${SAMPLE:-} --out "$1/drawn"
    python evaluate.py "$DATA" "$1/drawn" ${RUN:+--run "$RUN"} --out "$1/report.html" --json "$1/report.json"
}

draw_and_evaluate "$OUT/round-0"
round=1
while [ "$round" -le "$ROUNDS" ]; do
    before=$OUT/round-$((round - 1))
    here=$OUT/round-$round
    python filter.py "$before/drawn" --reference "$DATA" --selector "$SELECTOR" --drop-copies \
        --mix "$DATA" --share "$SHARE" ${RUN:+--run "$RUN"} --out "$here/kept"
    if [ -z "$(ls "$here/kept/generated" 2>/dev/null)" ]; then
        echo "error: round $round keeps no image, see $here/kept/filter.html; rate more, or draw better ones" >&2
        exit 2
    fi
    python train.py --base "$BASE" --data "$here/kept" ${LORA:+--init-lora "$LORA"} --weight-column quality \
        --steps "$STEPS" ${TRAIN:-} --out "$here/train"
    LORA=$here/train/lora.safetensors
    draw_and_evaluate "$here"
    round=$((round + 1))
done

echo "
Look at:
  $OUT/round-0/report.html         how good the images were before
  $OUT/round-$ROUNDS/report.html         and after
  $OUT/round-$ROUNDS/kept/filter.html    what was kept in the last round, and why
Use: --lora $LORA"
