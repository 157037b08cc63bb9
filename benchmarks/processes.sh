#!/usr/bin/env bash
# N processes of torchrun with one thread each beside one process with N threads, on a CPU, in turns: views/s of the
# second epoch of main.py. Usage: bash benchmarks/processes.sh [N [ROUNDS]], default 2 and 3; about five minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} N=${1:-2} ROUNDS=${2:-3}
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
export CUDA_VISIBLE_DEVICES=
for sizes in "--width 16 --batch_size 512 --train_size 4096" "--width 16 --batch_size 128 --train_size 4096" \
    "--width 64 --batch_size 128 --train_size 512"; do
    for ((round = 0; round < ROUNDS; round++)); do
        for how in "1 -m torch.distributed.run --standalone --nproc_per_node $N" "$N"; do
            read -r threads launcher <<<"$how"
            # shellcheck disable=SC2086
            OMP_NUM_THREADS=$threads "$PYTHON" $launcher main.py --dataset shapes $sizes --test_size 10 --epochs 2 \
                --eval_freq 9 --quiet --exp_dir "$FOLDER" --trial "run$round$threads" >/dev/null
            views=$(tail -n 1 "$FOLDER/run$round$threads/log.jsonl" | sed 's/.*"views_per_s": \([0-9.]*\).*/\1/')
            echo "$sizes: ${launcher:+$N processes of }$threads thread(s): $views views/s"
        done
    done
    rm -rf "${FOLDER:?}"/run*
done
