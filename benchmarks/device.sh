#!/bin/sh
# shellcheck disable=SC2086 # Options are several words.
# Runs all that a machine with a GPU is needed for, in less than 10 minutes: the tests of
# tests/device, a model of Mistral 7B's shape beside Transformers, int8, training steps, a profile.
#
#     PYTHON=python3 OUT=runs/device sh benchmarks/device.sh
#
# Each step has its own limit of time, and one that fails does not end the others. OUT gets
# tests.txt, device.jsonl, train.jsonl, errors.txt and profile.tgz. On a CPU, MODEL=nano rehearses it.
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/device} MODEL=${MODEL:-mistral-7b-v0.3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
device="$PYTHON benchmarks/device.py --model $MODEL" train="$PYTHON benchmarks/train_step.py --device"
if [ "$MODEL" = nano ]; then
    few="--case 1x64 2x32 --tokens 8" long=64 full=nano
else
    few='' long=4096 full=1B
fi

step() { # SECONDS FILE COMMAND...
    limit=$1 file=$2
    shift 2
    echo "# $*" | tee -a "$OUT/errors.txt"
    timeout "$limit" "$@" >>"$OUT/$file" 2>>"$OUT/errors.txt" || echo "# exit code $?"
}

step 120 tests.txt $PYTHON -m pytest --noconftest -c /dev/null --rootdir . -q tests/device
step 240 device.jsonl $device $few --hardware H200 --transformers --seconds 150 --profile "$OUT/profile"
step 80 device.jsonl $device ${few:---case 1x512 32x512} --quantize int8 --seconds 40
step 60 train.jsonl $train --model $full --train full --context $long --rounds 3
step 80 train.jsonl $train --model $MODEL --train lora --context $long --rounds 3
tar -C "$OUT" -czf "$OUT/profile.tgz" profile && rm -r "$OUT/profile"
tail -n 30 "$OUT/tests.txt" "$OUT/device.jsonl" "$OUT/train.jsonl"
