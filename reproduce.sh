#!/usr/bin/env bash
# The paper's run on CIFAR-10, from the data to the released weights: pre-training, linear evaluation, release, check.
# Finished steps are skipped, interrupted ones resumed.
#
# --seeds N             run seeds 0 to N - 1 (1)
# --max_minutes M       stop after M minutes; the same command continues
# --data_root DIR       folder that has or gets cifar-10-batches-py, relative to this script (data)
# --gpu N[,N...]        CUDA GPUs, each for a seed at a time, or none (all)
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
SEEDS=1 MINUTES='' DATA=data GPU=all NAME=paper ENTRY=simsiam_resnet18_cifar10 WEIGHTS=weights PRETRAIN='' LINEAR=''
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
if ! [[ $SEEDS =~ ^[1-9][0-9]*$ && $MINUTES =~ ^(0|[1-9][0-9]*)?$ && $NAME =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ &&
    $GPU =~ ^(all|none|[0-9]+(,[0-9]+)*)$ ]] || ! grep -q "^def $ENTRY(" hubconf.py; then
    echo "reproduce.sh: error: --seeds, --max_minutes take a whole number, --gpu numbers, all or none, --name a plain" \
        "name, --entry a hub entry" >&2
    exit 2
fi
EXP=experiments/$NAME
[ "$GPU" != all ] || GPU=$("$PYTHON" -c 'import torch; print(*range(max(1, torch.cuda.device_count())), sep=",")')
IFS=, read -ra GPUS <<<"$GPU"
DEVICES=("${GPUS[@]/#/--gpu }")
[ "$GPU" != none ] || { DEVICES=('') && export CUDA_VISIBLE_DEVICES=; }
QUIET=''
[ $((SEEDS < ${#GPUS[@]} ? SEEDS : ${#GPUS[@]})) = 1 ] || QUIET=--quiet # several bars would overwrite each other

slice() { # a script and its options, for the minutes that are left
    local limit=''
    [ -z "$MINUTES" ] || limit="--max_minutes $((MINUTES > SECONDS / 60 ? MINUTES - SECONDS / 60 : 0))"
    "$PYTHON" "$@" $QUIET $limit
    [ -z "$MINUTES" ] || [ "$SECONDS" -lt $((60 * MINUTES - 1)) ] || exit 0
}

run_seed() { # number and options of the device
    local seed=$1 device=$2 run=$EXP/seed$1
    [ ! -e "$run-linear/results.json" ] || return 0
    slice main.py --data_root "$DATA" $device $PRETRAIN --seed $seed --exp_dir "$EXP" --trial seed$seed --resume auto
    slice main_lincls.py $device $LINEAR --pretrained "$run/backbone.pt" --exp_dir "$EXP" --trial "seed$seed-linear" \
        --resume auto "$DATA"
    mkdir -p "logs/$NAME-seed$seed" "logs/$NAME-seed$seed-linear"
    cp "$run"/{config.json,log.jsonl} "logs/$NAME-seed$seed"
    cp "$run-linear"/{config.json,log.jsonl,results.json} "logs/$NAME-seed$seed-linear"
}

JOBS=() RUNS=() CODE=0 STOP=0
for name in INT TERM HUP; do
    trap "STOP=1; for job in \${JOBS[@]}; do kill -s $name -- -\$job; done 2>/dev/null" $name
done
for ((first = 0; !STOP && first < SEEDS && first < ${#GPUS[@]}; first++)); do
    set -m # the job is a process group, to which signals are passed on, so that its command saves the checkpoint
    (
        for name in INT TERM HUP; do trap "exit $((128 + $(kill -l $name)))" $name; done # after the command
        for ((seed = first; seed < SEEDS; seed += ${#GPUS[@]})); do run_seed $seed "${DEVICES[first]}"; done
    ) &
    JOBS+=($!)
    set +m
    # It may have to download the data.
    while kill -0 $! 2>/dev/null && [ ! -e "$EXP/seed$first/config.json" ]; do sleep 0.2; done
done
for job in "${JOBS[@]}"; do
    while code=0 && { wait "$job" || code=$?; } && kill -0 "$job" 2>/dev/null; do :; done # a signal ends wait
    [ $code = 0 ] || CODE=$code
done
trap - INT TERM HUP
[ $CODE = 0 ] || exit $CODE
for ((seed = 0; seed < SEEDS; seed++)); do
    RUNS+=("$EXP/seed$seed")
    if [ ! -e "$EXP/seed$seed-linear/results.json" ]; then
        echo "Stopped after $MINUTES minutes. The same command continues."
        exit 0
    fi
done
DEVICE=${DEVICES[0]}
"$PYTHON" export.py release "$EXP/seed0" --linear "$EXP/seed0-linear" --name "$ENTRY" --weights "$WEIGHTS" \
    --data_root "$DATA" $DEVICE
"$PYTHON" export.py check "$ENTRY" --weights "$WEIGHTS" --data_root "$DATA" $DEVICE
"$PYTHON" -m utils.plot "${RUNS[@]}" --output "$EXP"
"$PYTHON" -m utils.plot "${RUNS[@]/%/-linear}"
