#!/usr/bin/env bash
# A learned scheduler from nothing, on the embedded model: dataset, training, and runs of 24 test
# prompts under it beside simple policies and the oracle. About 10 minutes on two cores.
# The model is nested without calibration data, so that 2 bits hurt and there is something to learn.
# usage: experiments/learn.sh [OUT [PROMPTS]]
set -euo pipefail
cd "$(dirname "$0")/.."
source experiments/setup.sh

out=${1:-results/learn}
n=${2:-480}
mkdir -p "$out"
say "quantising the embedded model (nested, 2 to 4 bits, without calibration)"
"$pmpd" quantize experiments/tiny "$out/nested" --bits 2,3,4 --group 64 --force
# answers have 20 to 255 tokens: steps 0, 20, 40, 80 and 120 of at most 240
candidates=(--candidates "0 1/12 1/6 1/3 1/2")
common=(--set model.path="$out/nested" --set decode.slots=8)

say "$n prompts to learn from, labelled: the earliest switch from 4 to 2 bits that loses nothing"
"$python" experiments/learn/write_prompts.py "$n" "$out/prompts.jsonl"
mpirun -n 2 "$pmpd" dataset configs/tiny.cfg --out "$out/data.h5" --high 4 --low 2 --reference experiments/tiny \
    "${common[@]}" "${candidates[@]}" --set prompts.path="$out/prompts.jsonl"

say "training the classifier of K and V after prefill (27 trials), and that of the steps' signals"
mpirun -n 2 "$pmpd" train "$out/data.h5" --out "$out/learned.h5" --trials 27 --test
mpirun -n 2 "$pmpd" train "$out/data.h5" --out "$out/step.h5" --kind step --trials 27 --test

say "the oracle: the same labels for the test prompts themselves"
mpirun -n 2 "$pmpd" dataset configs/tiny.cfg --out "$out/test.h5" --high 4 --low 2 --reference experiments/tiny \
    "${common[@]}" "${candidates[@]}"
"$python" experiments/learn/oracle_plans.py "$out/test.h5" "$out/oracle.jsonl"

runs=()
run() { # NAME MODEL setting...
    local name=$1 model=$2 sets=() s
    shift 2
    for s in "$@"; do sets+=(--set "$s"); done
    say "run $name"
    rm -rf "$out/$name"
    mpirun -n 2 "$pmpd" run configs/tiny.cfg --set decode.slots=8 --set model.path="$model" \
        --set output.dir="$out/$name" --set run.name="$name" "${sets[@]}" >"$out/$name.log"
    runs+=("$name=$out/$name")
}
pair=(policy.prefill=4 "policy.levels=4 2")
run fp16 experiments/tiny policy.name=fixed policy.prefill=max policy.level=max
run 4-bit "$out/nested" policy.name=fixed policy.prefill=4 policy.level=4
run prefill-high "$out/nested" policy.name=fixed policy.prefill=4 policy.level=2
run static "$out/nested" policy.name=static policy.prefill=4 "policy.switches=0:4 80:2"
run random "$out/nested" policy.name=random "${pair[@]}"
run learned "$out/nested" policy.name=learned "${pair[@]}" policy.classifier="$out/learned.h5"
run step-learned "$out/nested" policy.name=step-learned "${pair[@]}" policy.classifier="$out/step.h5"
run oracle "$out/nested" policy.name=oracle "${pair[@]}" policy.oracle="$out/oracle.jsonl"
echo
"$python" experiments/report/compare.py --tasks experiments/tasks/tiny_mixed.jsonl "${runs[@]}"
