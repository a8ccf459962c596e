#!/usr/bin/env bash
# Facts score and perplexity of the embedded model at float16, 4, 3 and 2 bits, on all 300 test prompts:
# the table "Measured by pmpd" of README.md. About ten minutes on two cores. usage: scores.sh [OUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/../.."
source experiments/setup.sh

out=${1:-results/tiny-scores}
mkdir -p "$out"
tasks=(experiments/tasks/tiny_{summary,translation,story}.jsonl)
cat "${tasks[@]}" >"$out/prompts.jsonl"
"$pmpd" quantize experiments/tiny "$out/nested" --bits 2,3,4 --group 64 --force >"$out/quantize.log"

for level in float16 4 3 2; do
    model=$out/nested bits=$level
    [ $level = float16 ] && model=experiments/tiny bits=max
    mpirun -n 2 "$pmpd" run configs/tiny.cfg --set model.path="$model" --set output.dir="$out/$level" \
        --set prompts.path="$out/prompts.jsonl" --set prompts.split=test --set decode.slots=4 \
        --set policy.name=fixed --set policy.prefill=$bits --set policy.level=$bits >"$out/$level.log"
    echo "== $level"
    "$python" experiments/tasks/score_facts.py "$out/$level/answers.jsonl" "${tasks[@]}"
    "$pmpd" perplexity "$model" experiments/tasks/tiny_test_ids.json --bits $bits | head -n 1
done
