#!/bin/sh
# The main job in one go: train, sample, evaluate, filter. With nothing set it runs on the embedded tiny base and drawn
# images, in minutes on two cores. For one's own data:
#   DATA=wounds/ BASE=sd21-base PROMPT="a diabetic foot ulcer" STEPS=1500 NUM_IMAGES=200 OUT=runs/dfu sh tests/quickstart.sh
set -eu
cd "$(dirname "$0")/.."
DATA=${DATA:-tests/phantoms} BASE=${BASE:-tiny} STEPS=${STEPS:-150} OUT=${OUT:-runs/quickstart}
NUM_IMAGES=${NUM_IMAGES:-1}   # of each caption
VAL_SPLIT=${VAL_SPLIT:-0.3}   # of the images, held out: what the drawn ones are evaluated against
set --
if [ -n "${PROMPT:-}" ]; then set -- --prompt "$PROMPT"; fi

python train.py --base "$BASE" --data "$DATA" "$@" --steps "$STEPS" --val-split "$VAL_SPLIT" --out "$OUT/train"
python sample.py --lora "$OUT/train/lora.safetensors" --labels-from "$DATA" "$@" --num-images "$NUM_IMAGES" --grid \
    --overwrite --out "$OUT/samples"
python evaluate.py "$DATA" "$OUT/samples" --run "$OUT/train" --out "$OUT/report.html" --json "$OUT/report.json"
python filter.py "$OUT/samples" --reference "$DATA" --run "$OUT/train" --calibrate 0.05 --drop-copies --drop-duplicates \
    --out "$OUT/kept"

echo "
Look at:
  $OUT/samples/grid.png     what was drawn
  $OUT/report.html          how good it is
  $OUT/kept/filter.html     what was kept and why"
