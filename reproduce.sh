#!/usr/bin/env bash
# The paper's run on CIFAR-10, from the data to the table: pre-training, linear evaluation, weights in fp16, a check of them, figures.
#
#     bash reproduce.sh                       seed 0, on the first CUDA GPU
#     bash reproduce.sh --seeds 3             seeds 0, 1, 2: what is done is left out
#     bash reproduce.sh --max_minutes 25      in slices: the same command goes on
#
# The same at a CPU's size, in minutes:
#
#     bash reproduce.sh --gpu none --name small --weights simsiam_resnet18_w16_cifar10 --pretrain "--width 16 --train_size 2000 --test_size 2000 --batch_size 64 --epochs 4" --linear "--features cached --train_size 2000 --test_size 2000"
#
# --seeds N             runs, with seeds from 0 on (1)
# --max_minutes M       stop after M minutes as Ctrl-C does, with exit code 0; the release and its check are not cut short
# --data_root DIR       folder that has, or gets, cifar-10-batches-py, seen from this one (data)
# --gpu N               number of the CUDA GPU, or none for the CPU (0)
# --name NAME           all goes to experiments/NAME (paper)
# --weights NAME        what the weights of seed 0 are called (simsiam_resnet18_cifar10)
# --pretrain "OPTIONS"  more options of main.py
# --linear "OPTIONS"    more options of main_lincls.py
# --publish             in the end also: logs, weights and figures into logs/, weights/ and imgs/, tables into README.md
#
# PYTHON in the environment is the interpreter (python3). Exit code: 0; of the command that failed; 2 for a wrong option.
set -euo pipefail
set -m # each command has a process group of its own: Ctrl-C and other signals reach it once, from here
BEGIN=$SECONDS
PYTHON=${PYTHON:-python3}
case $PYTHON in
/*) ;;
*/*) PYTHON=$PWD/$PYTHON ;;
esac

refuse() {
    echo "reproduce.sh: error: $1" >&2
    exit 2
}

SEEDS=1 MINUTES='' DATA=data GPU=0 NAME=paper WEIGHTS='' PRETRAIN='' LINEAR='' PUBLISH=''
while [ $# -gt 0 ]; do
    case $1 in
    --publish)
        PUBLISH=yes
        shift
        continue
        ;;
    --*=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
    --help | -h)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    --seeds | --max_minutes | --data_root | --gpu | --name | --weights | --pretrain | --linear) ;;
    *) refuse "unrecognized argument $1; bash reproduce.sh --help lists them" ;;
    esac
    [ $# -gt 1 ] || refuse "$1 needs a value"
    case $1 in
    --seeds) SEEDS=$2 ;;
    --max_minutes) MINUTES=$2 ;;
    --data_root) DATA=$2 ;;
    --gpu) GPU=$2 ;;
    --name) NAME=$2 ;;
    --weights) WEIGHTS=$2 ;;
    --pretrain) PRETRAIN=$2 ;;
    --linear) LINEAR=$2 ;;
    esac
    shift 2
done
[[ $SEEDS =~ ^[1-9][0-9]{0,2}$ ]] || refuse "--seeds $SEEDS: a whole number from 1 to 999 is needed"
[[ $MINUTES =~ ^([0-9]{1,7}|[0-9]{0,7}\.[0-9]+)?$ ]] || refuse "--max_minutes $MINUTES: a number of minutes is needed"
[[ $GPU =~ ^([0-9]+|none)$ ]] || refuse "--gpu $GPU: the number of a GPU, or none"
for own in help seed exp_dir trial resume max_minutes gpu data_root pretrained evaluate; do
    if [[ " $PRETRAIN $LINEAR " =~ " --$own"[\ =] ]]; then
        refuse "--pretrain and --linear: --$own is set by reproduce.sh itself; leave it out there"
    fi
done
if [ -z "$WEIGHTS" ]; then
    if [[ " $PRETRAIN" =~ " --"(width|arch) ]]; then
        refuse "--pretrain \"$PRETRAIN\": another network than the paper's; say by --weights what its weights are to be called"
    fi
    WEIGHTS=simsiam_resnet18_cifar10
fi
for each in "$NAME" "$WEIGHTS"; do
    [[ $each =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] || refuse "$each: a plain name is needed, of letters, digits, '_', '-' and '.'"
done

cd "$(dirname "$0")"
EXP=experiments/$NAME
LIMIT=$(LC_ALL=C awk -v m="$MINUTES" 'BEGIN { print int(60 * m) }') # seconds
DEVICE="--gpu $GPU"
if [ "$GPU" = none ]; then
    export CUDA_VISIBLE_DEVICES=
    DEVICE=''
elif ! "$PYTHON" -c "import torch; assert torch.cuda.device_count() > $GPU" 2>/dev/null; then
    refuse "--gpu $GPU: $PYTHON has no PyTorch that sees this CUDA GPU; --gpu none is for the CPU, where the paper's run takes weeks"
fi

refuse_another() { # a file of the repository, and what would replace it
    if [ -e "$1" ] && ! cmp -s "$1" "$2"; then
        refuse "$1 is of another run, which --publish does not replace: remove it, or take another --name or --weights"
    fi
}
if [ -n "$PUBLISH" ]; then
    refuse_another "weights/$WEIGHTS.json" "$EXP/weights/$WEIGHTS.json"
    for log in logs/"$NAME"-seed*/log.jsonl; do
        refuse_another "$log" "$EXP/${log#"logs/$NAME-"}"
    done
fi

set -f # the words of --pretrain and --linear are no patterns of file names

# Seeds that are done keep their settings; those to come shall have the same.
if [ -e "$EXP/options" ]; then
    [ "$(cat "$EXP/options")" = "$PRETRAIN | $LINEAR" ] ||
        refuse "$EXP was begun with --pretrain and --linear \"$(cat "$EXP/options")\"; give the same, or take another --name"
fi

# ---------------------------------------------------------------------------------------------------
# Running a command

CHILD='' STARTING='' SIGNAL=''
on_signal() { # name, number: pass it on, and the command ends as after Ctrl-C
    SIGNAL=$1
    if [ -n "$CHILD" ]; then
        kill -s "$1" -- "-$CHILD" 2>/dev/null || true
    elif [ -z "$STARTING" ]; then
        exit $((128 + $2))
    fi
}
trap 'on_signal INT 2' INT
trap 'on_signal TERM 15' TERM
trap 'on_signal HUP 1' HUP
trap 'on_signal QUIT 3' QUIT
trap 'on_signal STOP 0; kill -s STOP $$; on_signal CONT 0' TSTP # Ctrl-Z, then fg

run() { # a command, to its end; a failure ends this script
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    local status=0
    STARTING=yes SIGNAL=''
    "$@" </dev/null &
    CHILD=$! STARTING=''
    [ -z "$SIGNAL" ] || on_signal "$SIGNAL" 0 # it came before there was a number to send it to
    wait "$CHILD" || status=$?
    while kill -0 "$CHILD" 2>/dev/null; do # a signal ended the waiting, not the command
        sleep 0.2
        status=0
        wait "$CHILD" || status=$?
    done
    CHILD=''
    [ "$status" = 0 ] || exit "$status"
}

run_slice() { # a command that takes --max_minutes: for the time that is left
    stop_if_time_is_up
    run "$@" $(max_minutes)
    stop_if_time_is_up
}

max_minutes() { # the option, where there is a limit
    [ -z "$MINUTES" ] || LC_ALL=C awk -v m="$MINUTES" -v s=$((SECONDS - BEGIN)) 'BEGIN { printf "--max_minutes %.4f", m - s / 60 }'
}

stop_if_time_is_up() {
    if [ -n "$MINUTES" ] && [ $((SECONDS - BEGIN)) -ge "$LIMIT" ]; then
        echo "stopped after $MINUTES minutes; the same command goes on"
        exit 0
    fi
}

# ---------------------------------------------------------------------------------------------------
# The runs: of each seed pre-training and linear evaluation, of the first one the weights

mkdir -p "$EXP"
echo "$PRETRAIN | $LINEAR" >"$EXP/options"
RUNS=()
for ((seed = 0; seed < SEEDS; seed++)); do
    RUNS+=("$EXP/seed$seed")
    if [ "$EXP/seed$seed-linear/results.json" -nt "$EXP/seed$seed/backbone.pt" ]; then
        echo "$EXP/seed$seed: done before"
        continue
    fi
    run_slice "$PYTHON" main.py --data_root "$DATA" $DEVICE $PRETRAIN --seed "$seed" --exp_dir "$EXP" --trial "seed$seed" --resume auto
    run_slice "$PYTHON" main_lincls.py $DEVICE $LINEAR --pretrained "$EXP/seed$seed/backbone.pt" --exp_dir "$EXP" --trial "seed$seed-linear" --resume auto "$DATA"
done

FILE=$EXP/weights/$WEIGHTS
run "$PYTHON" export.py release "$EXP/seed0" --linear "$EXP/seed0-linear" --name "$WEIGHTS" --weights "$EXP/weights" --data_root "$DATA" $DEVICE
if ! [ "$FILE.checked" -nt "$FILE.json" ]; then
    rm -rf "$EXP/released"
    run "$PYTHON" main_lincls.py $DEVICE $LINEAR --evaluate "$FILE-linear.pt" --pretrained "$FILE.pt" --exp_dir "$EXP" --trial released "$DATA"
    run "$PYTHON" export.py check "$WEIGHTS" --weights "$EXP/weights" --evaluation "$EXP/released" --data_root "$DATA" $DEVICE
    touch "$FILE.checked"
fi

run "$PYTHON" -m utils.results "${RUNS[@]}" --figures "$EXP"

# ---------------------------------------------------------------------------------------------------
# Into the repository

if [ -n "$PUBLISH" ]; then
    for folder in "${RUNS[@]}"; do
        log=logs/$NAME-$(basename "$folder")
        mkdir -p "$log" "$log-linear" weights
        cp "$folder"/{config.json,log.jsonl} "$log"
        cp "$folder-linear"/{config.json,log.jsonl,results.json} "$log-linear"
    done
    cp "$FILE"{.pt,-linear.pt,.json} weights
    run "$PYTHON" -m utils.results --update README.md logs/README.md --figures imgs
fi
printf '\ndone: %s\n' "$EXP"
