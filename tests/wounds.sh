#!/bin/sh
# Diabetic foot ulcers in two phases: from a folder of photographs to a mixed training set.
# Each phase gets a generator of its own, by its recipe. What it draws is evaluated and filtered. What is kept is mixed
# with the real photographs. At the end it tests a classifier of the two phases on photographs
# that a generator mostly saw: what it gains is an upper bound.
#
#   DATA=wounds/ BASE=sd21-base NUM_IMAGES=200 OUT=runs/wounds sh tests/wounds.sh
#
# DATA holds the folders inflammatory/ and remodelling/. Paths begin at the repository. More flags of train.py go into
# TRAIN, of sample.py into SAMPLE, values without spaces.
# With nothing set it runs on the embedded base and on drawn wounds, in some minutes on two cores. Typed again, it
# continues where it was stopped.
set -eu
if [ $# -gt 0 ]; then  # settings are variables: print the lines above
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] || exit 2
    exit
fi
CDPATH= cd "$(dirname "$0")/.."
DATA=${DATA:-} BASE=${BASE:-tiny} OUT=${OUT:-runs/wounds} TRAIN=${TRAIN:-} SAMPLE=${SAMPLE:-}
NUM_IMAGES=${NUM_IMAGES:-40}  # of each phase
SHARE=${SHARE:-50}            # per cent of the mixed set that is generated

if [ -z "$DATA" ]; then
    DATA=$OUT/data
    TRAIN="--resolution 128 --steps 200 --lr 1e-3 $TRAIN"
    for phase in inflammatory remodelling; do
        python tests/phantoms.py "$DATA/$phase" --kinds "$phase ulcer" --count "${PHANTOMS:-60}" --seed 1000000
    done
fi

mixed=
for phase in inflammatory remodelling; do
    run=$OUT/train/$phase
    python train.py @tests/recipes/dfu-$phase.txt --base "$BASE" --data "$DATA/$phase" $TRAIN --out "$run"
    python sample.py --lora "$run/lora.safetensors" --num-images "$NUM_IMAGES" --grid $SAMPLE --out "$OUT/drawn/$phase"
    python evaluate.py "$DATA/$phase" "$OUT/drawn/$phase" --run "$run" --out "$OUT/$phase.html"
    # Of 70 photographs hardly any is like another: a limit taken from them is better than one taken from a paper.
    python filter.py "$OUT/drawn/$phase" --reference "$DATA/$phase" --run "$run" --calibrate 0.05 --drop-copies \
        --drop-duplicates --mix "$DATA/$phase" --share "$SHARE" --out "$OUT/kept/$phase"
    if [ -n "$(ls "$OUT/kept/$phase/generated" 2>/dev/null)" ]; then
        mixed="$mixed $OUT/kept/$phase"
    fi
done

python evaluate.py "$DATA" "$OUT/drawn" --utility --out "$OUT/utility.html"

echo "
Look at:
  $OUT/inflammatory.html, $OUT/remodelling.html    how good each generator is
  $OUT/kept/inflammatory/filter.html               what was kept of one phase, and why
  $OUT/utility.html                                what a classifier of the two phases gains by all that was drawn, at most
Mixed training sets:${mixed:- none, as no generated image was kept}"
