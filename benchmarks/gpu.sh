#!/usr/bin/env bash
# All speed benchmarks on one CUDA GPU, in under eight minutes: bf16, channels_last, eager and compiled.
#   bash benchmarks/gpu.sh [OUTPUT_FOLDER]      (PYTHON=... to choose the interpreter)
# Each part has its own time limit; what has been measured when a limit strikes stays in its JSON file.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results/gpu}
python=${PYTHON:-python}
mkdir -p "$out"
failed=0

part() { # part SECONDS NAME ARGUMENTS...
    local limit=$1 name=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$python" "$@" >"$out/$name.log" 2>&1
    local code=$?
    tail -n 40 "$out/$name.log"
    if [ $code -ne 0 ]; then
        echo "== $name ended with $code (124: its time was up)"
        failed=1
    fi
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA GPU in use here"' || exit 2
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/device.csv"
part 130 step_time benchmarks/step_time.py --device cuda --precision bf16 --boundaries 0.5 0.75 --rounds 15 --output "$out/step_time.json"
part 100 step_time_compiled benchmarks/step_time.py --device cuda --precision bf16 --compile --no-parts --networks resnet18 resnet50 --modes "hebbian 1/8" --boundaries 0.75 --rounds 15 --output "$out/step_time_compiled.json"
part 80 overhead benchmarks/overhead.py --device cuda --precision bf16 --width 64 --batch 128 --workers 8 --rounds 7 --output "$out/overhead.json"
part 60 input benchmarks/input.py --device cuda --rounds 5 --output "$out/input.json"
part 80 quickstart -m locsgd_dist.train --config quickstart --train.device=cuda --run.dir="$out/quickstart" --run.resume=never --run.console=plain
exit $failed
