#!/usr/bin/env bash
# Everything that needs a CUDA GPU to be measured, in an estimated half hour of one:
#
#     bash benchmarks/gpu.sh OUT [DATA_ROOT [PART...]]
#
# OUT gets what each part prints, and the rows of the benchmarks. A part that fails does not stop the next.
#   main      four epochs of main.py, kNN after the last
#   graph     the same with --cuda_graph
#   speed     the benchmark at full size, and a profile of the step
#   switches-data  training with the optimizations of the data and of the loop turned, one at a time
#   switches-code  the step and training with those of the arithmetic turned; the start with and without compilation
#   memory    for batches of 128, 256, 512 and 1024
#   linear    100 epochs of linear evaluation on augmented features, of the backbone that main left
#   study-1, study-4  four runs of four epochs by ablate.py, one at a time and all at once: which is sooner done
#   tests     all of them, with pytest
# Where a command may not last that long: the parts one by one.
set -uo pipefail
OUT=${1:?usage: bash benchmarks/gpu.sh OUT [DATA_ROOT [PART...]]}
DATA=${2:-data}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
DATA=$(cd "$DATA" && pwd) || exit 2
PARTS=${*:3}
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

part() {  # name, command...: its output in OUT/name.txt, its time and exit status on the terminal
    local name=$1 start=$SECONDS
    shift
    case " ${PARTS:-$name} " in *" $name "*) ;; *) return ;; esac
    "$@" > "$OUT/$name.txt" 2>&1
    echo "$name: exit status $?, $((SECONDS - start)) s"
    tail -n 3 "$OUT/$name.txt"
}

train() {  # name, options...: a short run, whose log comes to OUT
    local name=$1
    shift
    TORCH_LOGS=graph_breaks,recompiles "$PYTHON" main.py --gpu 0 --data_root "$DATA" --epochs 4 --eval_freq 4 \
        --exp_dir "$OUT/runs" --trial "$name" "$@" &&
        cp "$OUT/runs/$name/log.jsonl" "$OUT/$name-log.jsonl"
}

linear() {
    "$PYTHON" main_lincls.py --gpu 0 --pretrained "$OUT/runs/main/backbone.pt" --exp_dir "$OUT/runs" --trial linear "$DATA" &&
        cp "$OUT/runs/linear/log.jsonl" "$OUT/linear-log.jsonl"
}

study() {  # jobs
    "$PYTHON" ablate.py batch_norm --gpu 0 --data_root "$DATA" --epochs 4 --eval_freq 4 --jobs "$1" --exp_dir "$OUT/runs/study-$1"
}

speed() {
    "$PYTHON" benchmarks/speed.py --gpu 0 --data_root "$DATA" "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$OUT/gpu.csv"
part main train main
part graph train graph --cuda_graph
part linear linear
part speed speed --json "$OUT/speed.json" --profile "$OUT/profile.txt"
part switches-data speed --seconds 1 --switches resident batched async --json "$OUT/switches-data.json"
part switches-code speed --seconds 1 --switches channels_last low_precision compile fused cuda_graph --json "$OUT/switches-code.json"
part memory speed --what memory --width 64 --batch 128 256 512 1024 --json "$OUT/memory.json"
part study-1 study 1
part study-4 study 4
part tests "$PYTHON" -m pytest -q -rs tests
rm -rf "$OUT/runs"
