#!/usr/bin/env bash
# What has to be measured on a CUDA GPU, in parts that stand alone and take less than ten minutes each on an H100:
#
#     bash benchmarks/gpu.sh OUT DATA [PART...]
#
# DATA has cifar-10-batches-py, or is the word shapes. Each PART (default: all, in the order below) writes OUT/PART.txt
# and OUT/PART*.json or OUT/PART/log.jsonl while it runs, and is ended after LIMIT seconds (570). The exit code is 1 if a
# part failed. PYTHON: interpreter (python3). GPU: index, or none for a rehearsal on the CPU. MAIN, SPEED: more options
# of main.py and speed.py.
set -uo pipefail
OUT=${1:?usage: gpu.sh OUT DATA [PART...]} DATA=${2:?usage: gpu.sh OUT DATA [PART...]} DATASET=cifar10
if [ "$DATA" = shapes ]; then DATASET=shapes
elif [ -d "$DATA/cifar-10-batches-py" ]; then DATA=$(cd "$DATA" && pwd)
else echo "gpu.sh: $DATA has no cifar-10-batches-py" >&2; exit 2; fi
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
cd "$(dirname "$0")/.." && failed=0 DEVICE="--gpu ${GPU:-0}" COMPILE=--compile
[ "${GPU:-0}" != none ] || { DEVICE='' COMPILE='' && export CUDA_VISIBLE_DEVICES=; }
# The words of options are to be split: shellcheck disable=SC2086

run() { timeout -k 9 $((${LIMIT:-570} > SECONDS ? ${LIMIT:-570} - SECONDS : 1)) "${PYTHON:-python3}" "$@"; }
pretrain() {
    rm -rf "$OUT/$1"
    run main.py --data_root "$DATA" --dataset $DATASET $DEVICE $COMPILE --exp_dir "$OUT" --trial "$@" ${MAIN-}
}
speed() { run benchmarks/speed.py --data_root "$DATA" $DEVICE --json "$OUT/$1.json" "${@:2}" ${SPEED-}; }
training_speed() { speed "$1" --what end_to_end --rounds 2 "${@:2}"; }

part() {
    case $1 in
    profile) speed profile --profile "$OUT/profile-table.txt" ;;
    main) TORCH_LOGS=graph_breaks,recompiles pretrain main --epochs 4 ;;
    speed) training_speed speed ;;
    views) speed views --what views ;;
    fp32 | fp16) training_speed "$1" --precision "$1" ;;
    eager) training_speed eager --no-compile ;;
    tuning) TORCHINDUCTOR_COORDINATE_DESCENT_TUNING=1 training_speed tuning ;;
    graphs) TORCHINDUCTOR_CUDAGRAPHS=1 training_speed graphs ;;
    linear) pretrain backbone --epochs 1 && rm -rf "$OUT/linear" && run main_lincls.py --dataset $DATASET $DEVICE \
        $COMPILE --epochs 5 --exp_dir "$OUT" --trial linear --pretrained "$OUT/backbone/backbone.pt" "$DATA" ;;
    tests) run -m pytest -q -rs -m "not slow" tests ;;
    *) echo "gpu.sh: no part $1"; return 2 ;;
    esac
}

[ $# -gt 2 ] || set -- "$1" "$2" profile main speed views eager tuning graphs fp16 fp32 linear tests
for name in "${@:3}"; do
    SECONDS=0
    part "$name" > "$OUT/$name.txt" 2>&1; code=$?
    echo "$name: exit code $code, $SECONDS s, $(tail -n 1 "$OUT/$name.txt")"; failed=$((failed || code))
done
exit $failed
