#!/usr/bin/env bash
# The paper's run on CIFAR-10, from the data to the released weights: pre-training, linear evaluation, release, check.
# Finished steps are skipped, interrupted ones resumed.
#
# --seeds N             run seeds 0 to N - 1 (1)
# --max_minutes M       stop after M minutes; the same command continues
# --data_root DIR       folder that has or gets cifar-10-batches-py, relative to this script (data)
# --gpu N               index of the CUDA GPU, or none (0)
# --name NAME           runs are in experiments/NAME, logs go to logs/NAME-seedN (paper)
# --entry NAME          torch.hub entry of the released weights (simsiam_resnet18_cifar10)
# --weights DIR         folder of the released weights, relative to this script (weights)
# --pretrain "OPTIONS"  options of main.py
# --linear "OPTIONS"    options of main_lincls.py
#
# PYTHON in the environment is the interpreter. Exit code: 0, that of the command that failed, or 2 for a wrong option.
set -euo pipefail
# The words of options are to be split: shellcheck disable=SC2086
PYTHON=${PYTHON:-python3}
SEEDS=1 MINUTES='' DATA=data GPU=0 NAME=paper ENTRY=simsiam_resnet18_cifar10 WEIGHTS=weights PRETRAIN='' LINEAR=''
while [ $# -gt 0 ]; do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" && exit 0 ;;
    --seeds) SEEDS=${2-} ;;
    --max_minutes) MINUTES=${2-} ;;
    --data_root) DATA=${2-} ;;
    --gpu) GPU=${2-} ;;
    --name) NAME=${2-} ;;
    --entry) ENTRY=${2-} ;;
    --weights) WEIGHTS=${2-} ;;
    --pretrain) PRETRAIN=${2-} ;;
    --linear) LINEAR=${2-} ;;
    *) echo "reproduce.sh: error: unrecognized argument $1; see bash reproduce.sh --help" >&2 && exit 2 ;;
    esac
    [ $# -gt 1 ] || { echo "reproduce.sh: error: $1 requires a value" >&2 && exit 2; }
    shift 2
done
cd "$(dirname "$0")"
if ! [[ $SEEDS =~ ^[1-9][0-9]*$ && $MINUTES =~ ^(0|[1-9][0-9]*)?$ && $NAME =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] ||
    ! grep -q "^def $ENTRY(" hubconf.py; then
    echo "reproduce.sh: error: --seeds, --max_minutes take a whole number, --name a plain name, --entry a hub entry" >&2
    exit 2
fi
EXP=experiments/$NAME
DEVICE="--gpu $GPU"
[ "$GPU" != none ] || { DEVICE='' && export CUDA_VISIBLE_DEVICES=; }

slice() { # a script and its options, for the minutes that are left
    local limit=''
    [ -z "$MINUTES" ] || limit="--max_minutes $((MINUTES > SECONDS / 60 ? MINUTES - SECONDS / 60 : 0))"
    "$PYTHON" "$@" $limit
    if [ -n "$MINUTES" ] && [ "$SECONDS" -ge $((60 * MINUTES - 1)) ]; then
        echo "Stopped after $MINUTES minutes. The same command continues."
        exit 0
    fi
}

RUNS=()
for ((seed = 0; seed < SEEDS; seed++)); do
    run=$EXP/seed$seed
    RUNS+=("$run")
    [ ! -e "$run-linear/results.json" ] || continue
    slice main.py --data_root "$DATA" $DEVICE $PRETRAIN --seed $seed --exp_dir "$EXP" --trial seed$seed --resume auto
    slice main_lincls.py $DEVICE $LINEAR --pretrained "$run/backbone.pt" --exp_dir "$EXP" --trial "seed$seed-linear" \
        --resume auto "$DATA"
    mkdir -p "logs/$NAME-seed$seed" "logs/$NAME-seed$seed-linear"
    cp "$run"/{config.json,log.jsonl} "logs/$NAME-seed$seed"
    cp "$run-linear"/{config.json,log.jsonl,results.json} "logs/$NAME-seed$seed-linear"
done
"$PYTHON" export.py release "$EXP/seed0" --linear "$EXP/seed0-linear" --name "$ENTRY" --weights "$WEIGHTS" \
    --data_root "$DATA" $DEVICE
"$PYTHON" export.py check "$ENTRY" --weights "$WEIGHTS" --data_root "$DATA" $DEVICE
"$PYTHON" -m utils.plot "${RUNS[@]}" --output "$EXP"
"$PYTHON" -m utils.plot "${RUNS[@]/%/-linear}"
