#!/usr/bin/env bash
# From a bare machine to a table: packages, build, the embedded model quantised, and seven runs of
# 24 prompts on four MPI ranks (2 replicas x 2 tensor ranks).
set -euo pipefail
cd "$(dirname "$0")/.."
source experiments/setup.sh

out=${1:-results/quickstart}
mkdir -p "$out"
say "quantising the embedded model (nested: 2, 3 and 4 bits in one model)"
"$pmpd" quantize experiments/tiny "$out/nested" --bits 2,3,4 --head-bits 2,3,4 --group 64 --force

# The switch at step 74 gives each level half of all steps: half of the fp16 answers' tokens come before it.
run() { # NAME MODEL [setting...]
    local name=$1 model=$2 sets=() s
    shift 2
    for s in "$@"; do sets+=(--set "$s"); done
    say "run $name"
    rm -rf "$out/$name"
    mpirun -n 4 "$pmpd" run configs/tiny.cfg --set model.path="$model" --set parallel.tensor_ranks=2 \
        --set output.dir="$out/$name" --set run.name="$name" "${sets[@]}" >"$out/$name.log"
}
run fp16 experiments/tiny policy.name=fixed policy.prefill=max policy.level=max
for bits in 4 3 2; do
    run "$bits-bit" "$out/nested" policy.name=fixed policy.prefill=$bits policy.level=$bits
done
run prefill-high "$out/nested" policy.name=fixed policy.prefill=4 policy.level=2
run static "$out/nested" policy.name=static policy.prefill=4 "policy.switches=0:4 74:2"
run reversed "$out/nested" policy.name=reversed policy.prefill=4 "policy.switches=0:4 74:2"

echo
"$python" experiments/report/compare.py --tasks experiments/tasks/tiny_mixed.jsonl fp16="$out/fp16" \
    4-bit="$out/4-bit" 3-bit="$out/3-bit" 2-bit="$out/2-bit" prefill-high="$out/prefill-high" \
    static="$out/static" reversed="$out/reversed"
echo
echo "run file: $out/static/run.h5   (pmpd inspect $out/static/run.h5 shows what it holds)"
