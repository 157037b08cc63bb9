#!/usr/bin/env bash
# The paper's run on CIFAR-10, from the data to the released weights: pre-training, linear evaluation,
# release, check. Finished steps are skipped, interrupted ones resumed. PYTHON is the interpreter.
#
# --seeds N             run seeds 0 to N - 1 (1)
# --max_minutes M       stop after M minutes; the same command continues
# --data_root DIR       data folder, relative to this script; downloaded into if missing (data)
# --gpu N               index of the CUDA GPU, or none (the first, else the CPU)
# --name NAME           runs are in experiments/NAME, logs go to logs/NAME-seedN (paper)
# --entry NAME          torch.hub entry of the released weights (simsiam_resnet18_cifar10)
# --pretrain "OPTIONS"  options of main.py
# --linear "OPTIONS"    options of main_lincls.py
set -euo pipefail
# The words of options are to be split: shellcheck disable=SC2086
seeds=1 max_minutes='' data_root=data gpu='' name=paper entry=simsiam_resnet18_cifar10 pretrain='' linear=''
refuse() { echo "reproduce.sh: error: $*; see bash reproduce.sh --help" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
    --seeds | --max_minutes | --data_root | --gpu | --name | --entry | --pretrain | --linear) ;;
    *) refuse "unrecognized argument $1" ;;
    esac
    [ $# -gt 1 ] || refuse "$1 requires a value"
    printf -v "${1#--}" %s "$2" # --seeds 3 sets seeds=3
    shift 2
done
cd "$(dirname "$0")"
[[ "$seeds $max_minutes" =~ ^[1-9][0-9]*\ (0|[1-9][0-9]*)?$ ]] || refuse "--seeds, --max_minutes: whole numbers"
grep -q "^def $entry(" hubconf.py || refuse "--entry $entry: not in hubconf.py"
device=${gpu:+--gpu $gpu} exp=experiments/$name stop=0

# Signals are passed on to the running command, which saves its checkpoint, and end the script after it.
set -m # a command in the background would ignore Ctrl-C
for signal in INT TERM HUP; do
    trap "stop=$((128 + $(kill -l $signal))); kill -s $signal \${!-} 2>/dev/null || exit \$stop" $signal
done
run() { # a Python command; ends the script if it fails
    "${PYTHON:-python3}" "$@" &
    while code=0 && { wait $! || code=$?; } && kill -0 $! 2>/dev/null; do :; done # a signal ends wait
    [ $code = 0 ] && code=$stop
    [ $code = 0 ] || exit $code
}
train() { # a script and its options, for the minutes that are left
    local left=$((${max_minutes:-0} - SECONDS / 60))
    run "$@" --resume auto $device ${max_minutes:+--max_minutes $((left > 0 ? left : 0))}
    [ -n "$max_minutes" ] && [ $SECONDS -ge $((60 * max_minutes - 1)) ] || return 0
    echo "Stopped after $max_minutes minutes. The same command continues."
    exit 0
}

for ((seed = 0; seed < seeds; seed++)); do
    one=$exp/seed$seed log=logs/$name-seed$seed
    runs+=("$one")
    if [ ! -e "$one-linear/results.json" ]; then
        train main.py --data_root "$data_root" $pretrain --seed $seed --exp_dir "$exp" --trial seed$seed
        train main_lincls.py $linear --pretrained "$one/backbone.pt" --exp_dir "$exp" \
            --trial seed$seed-linear "$data_root"
    fi
    mkdir -p "$log" "$log-linear"
    cp "$one"/{config.json,log.jsonl} "$log"
    cp "$one-linear"/{config.json,log.jsonl,results.json} "$log-linear"
done
run export.py release "$exp/seed0" --linear "$exp/seed0-linear" --name "$entry" --data_root "$data_root" $device
run export.py check "$entry" --data_root "$data_root" $device
run -m utils.plot "${runs[@]}" --output "$exp"
run -m utils.plot "${runs[@]/%/-linear}"
