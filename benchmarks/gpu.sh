#!/usr/bin/env bash
# What has to be measured on a CUDA GPU, in parts of less than ten minutes each on an H100:
#
#     bash benchmarks/gpu.sh OUT DATA [PART...]
#
# DATA has cifar-10-batches-py. Each PART (default: all, in the order below) writes OUT/PART.txt and, if it measures
# speed, OUT/PART*.json. The exit code is 1 if a part failed. PYTHON: the interpreter (default: python3).
set -uo pipefail
OUT=${1:?usage: gpu.sh OUT DATA [PART...]} DATA=${2:?usage: gpu.sh OUT DATA [PART...]}
[ -d "$DATA/cifar-10-batches-py" ] || { echo "gpu.sh: $DATA has no cifar-10-batches-py" >&2; exit 2; }
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && DATA=$(cd "$DATA" && pwd) && SCRATCH=$(mktemp -d) || exit 2
trap 'rm -rf "$SCRATCH"' EXIT
cd "$(dirname "$0")/.." && PYTHON=${PYTHON:-python3} failed=0

pretrain() { "$PYTHON" main.py --gpu 0 --data_root "$DATA" --exp_dir "$SCRATCH" "$@"; }
speed() { "$PYTHON" benchmarks/speed.py --gpu 0 --data_root "$DATA" "$@"; }
training_speed() { speed --what end_to_end --rounds 2 --json "$OUT/$1.json" "${@:2}"; }

part() {
    case $1 in
    tests) "$PYTHON" -m pytest -q -rs -m "not slow" tests ;;
    profile) speed --profile "$SCRATCH/profile" && cat "$SCRATCH/profile" ;;
    main) TORCH_LOGS=graph_breaks,recompiles pretrain --epochs 4 --trial main && cat "$SCRATCH/main/log.jsonl" ;;
    speed) speed --json "$OUT/speed.json" ;;
    precision) training_speed precision-fp32 --precision fp32 && training_speed precision-fp16 --precision fp16 ;;
    eager) training_speed eager --no-compile ;;
    linear) pretrain --epochs 1 --trial backbone && "$PYTHON" main_lincls.py --gpu 0 --epochs 5 --exp_dir "$SCRATCH" \
        --trial linear --pretrained "$SCRATCH/backbone/backbone.pt" "$DATA" && cat "$SCRATCH/linear/log.jsonl" ;;
    *) echo "gpu.sh: no part $1"; return 2 ;;
    esac
}

[ $# -gt 2 ] || set -- "$1" "$2" tests profile main speed precision eager linear
for name in "${@:3}"; do
    SECONDS=0
    part "$name" > "$OUT/$name.txt" 2>&1; code=$?
    echo "$name: exit code $code, $SECONDS s, $(tail -n 1 "$OUT/$name.txt")"; failed=$((failed || code))
done
exit $failed
