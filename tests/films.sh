#!/bin/sh
# Chest films by finding and patient: train one generator on all findings, draw each finding, and ask whether the films
# help a classifier.
#
#   DATA=xray/ BASE=sd15 NUM_IMAGES=20 OUT=runs/films sh tests/films.sh
#
# DATA holds metadata.csv with file_name, label (several joined by |) and patient_id. No patient with an id is on both
# sides of the split: the generator never sees the films on which the classifier is tested. Paths begin at
# the repository. More flags of train.py go into TRAIN, of sample.py into SAMPLE, values without spaces. With nothing set
# it runs on the embedded base and on drawn films, in some minutes on two cores. Typed again, it continues where it was
# stopped.
set -eu
if [ $# -gt 0 ]; then  # settings are variables: print the lines above
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] || exit 2
    exit
fi
CDPATH= cd "$(dirname "$0")/.."
DATA=${DATA:-} BASE=${BASE:-tiny} OUT=${OUT:-runs/films} TRAIN=${TRAIN:-} SAMPLE=${SAMPLE:-}
NUM_IMAGES=${NUM_IMAGES:-20}  # of each caption
SHARE=${SHARE:-25}            # per cent of the mixed set that is generated

if [ -z "$DATA" ]; then
    DATA=$OUT/data
    TRAIN="--resolution 128 --batch-size 8 --accumulate 1 --steps 200 --lr 1e-3 $TRAIN"
    python tests/phantoms.py "$DATA" --kinds "normal chest,pleural effusion,lung nodule" --count "${PHANTOMS:-120}" \
        --seed 1000000
fi

python train.py @tests/recipes/chest-xray.txt --base "$BASE" --data "$DATA" $TRAIN --out "$OUT/train"
python sample.py --lora "$OUT/train/lora.safetensors" --labels-from "$DATA" --num-images "$NUM_IMAGES" --grid $SAMPLE \
    --out "$OUT/drawn"
# What the run held out is the reference, and the test set of the classifiers.
python evaluate.py "$DATA" "$OUT/drawn" --run "$OUT/train" --utility --out "$OUT/report.html" --json "$OUT/report.json"
# A film that looks like another finding than its own is refused, if the real films of both can be told apart.
python filter.py "$OUT/drawn" --reference "$DATA" --run "$OUT/train" --calibrate 0.05 --drop-copies --drop-duplicates \
    --mix "$DATA" --share "$SHARE" --out "$OUT/kept"

mixed="The mixed training set: $OUT/kept"
if [ -z "$(ls "$OUT/kept/generated" 2>/dev/null)" ]; then
    mixed="No mixed training set: no generated image was kept, see $OUT/kept/filter.html"
fi
echo "
Look at:
  $OUT/drawn/grid.png          what was drawn of each finding
  $OUT/report.html             how good they are, by finding, and whether a classifier learns more with all that was drawn
  $OUT/kept/filter.html        what was kept and why
$mixed"
