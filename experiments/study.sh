#!/usr/bin/env bash
# When to drop a plane: every policy on the embedded model, in one table. Some six minutes on two cores.
# Levels are 4 and 2 bits. Policies with a dial get a budget of 2.8 bits on average; static, reversed and alternate come
# to the same average by their settings. Settings are chosen on validation prompts, the table is made on test prompts
# once. OUT gets the table (table.txt, table.csv), a plot (bits.svg) and all runs in one file (study.h5).
# The model is nested without calibration data, so that 2 bits hurt and there is something to decide.
# usage: experiments/study.sh [OUT [TEST_PROMPTS]]
set -euo pipefail
cd "$(dirname "$0")/.."
source experiments/setup.sh

out=${1:-results/study}
n=${2:-200}
bits=2.8
study=experiments/report/study.py
mkdir -p "$out"
say "quantising the embedded model (nested, 2 to 4 bits, without calibration)"
"$pmpd" quantize experiments/tiny "$out/nested" --bits 2,3,4 --group 64 --force >"$out/quantize.log"
"$python" "$study" prompts validation 90 "$out/validation.jsonl" experiments/tasks/tiny_{summary,translation,story}.jsonl
"$python" "$study" prompts test "$n" "$out/test.jsonl" experiments/tasks/tiny_{summary,translation,story}.jsonl

say "300 other prompts, labelled with the earliest switch that loses nothing, and two classifiers trained on them"
"$python" experiments/learn/write_prompts.py 300 "$out/learn.jsonl"
mpirun -n 2 "$pmpd" dataset configs/tiny.cfg --out "$out/data.h5" --high 4 --low 2 --reference experiments/tiny \
    --candidates "0 1/12 1/6 1/3 1/2" --set model.path="$out/nested" --set decode.slots=8 --set backend.threads=1 \
    --set prompts.path="$out/learn.jsonl" >"$out/dataset.log"
mpirun -n 2 "$pmpd" train "$out/data.h5" --out "$out/learned.h5" --trials 9 >"$out/learned.log"
mpirun -n 2 "$pmpd" train "$out/data.h5" --out "$out/step.h5" --kind step --trials 9 >"$out/step.log"

run() { # SPLIT NAME setting...
    local split=$1 name=$2 sets=() s
    shift 2
    for s in "$@"; do sets+=(--set "$s"); done
    say "$split: $name"
    rm -rf "${out:?}/$split/$name"
    mpirun -n 2 "$pmpd" run configs/tiny.cfg --set model.path="$out/nested" --set backend.threads=1 --set decode.slots=8 \
        --set prompts.path="$out/$split.jsonl" --set output.dir="$out/$split/$name" --set run.name="$name" \
        --set log.level=warn --set policy.prefill=4 "${sets[@]}" >/dev/null
}

# POLICY SETTING VALUE... -- the other settings: tries the values on validation prompts, then runs the test prompts with
# the value of the best score among those that come to the average bits.
choose() {
    local name=$1 key=$2 values=() tried=() v best
    shift 2
    while [ "$1" != -- ]; do values+=("$1"); shift; done
    shift
    for v in "${values[@]}"; do
        run validation "$name-${v//[: ]/_}" "$@" "$key=$v"
        tried+=("$out/validation/$name-${v//[: ]/_}")
    done
    best=$("$python" "$study" best --tasks "$out/validation.jsonl" --bits "$bits" "${tried[@]}" 2>>"$out/chosen.log")
    run test "$name" "$@" "$key=${values[$best]}"
}
: >"$out/chosen.log"

run test fp16 model.path=experiments/tiny policy.name=fixed policy.prefill=max policy.level=max
for b in 4 3 2; do run test "uniform-$b" policy.name=fixed policy.prefill=$b policy.level=$b; done
run test prefill-high policy.name=fixed policy.level=2
for s in 20 40 80 120; do run test "static-$s" policy.name=static "policy.switches=0:4 $s:2"; done

choose static policy.switches "0:4 45:2" "0:4 55:2" "0:4 65:2" -- policy.name=static
choose static-3-2 policy.switches "0:3 120:2" "0:3 135:2" "0:3 150:2" -- policy.name=static
choose reversed policy.switches "0:4 80:2" "0:4 95:2" "0:4 110:2" -- policy.name=reversed
run test alternate policy.name=alternate "policy.alternate=4 2 4 2 2"

pair=("policy.levels=4 2" budget.average_bits=$bits)
run test static-budget policy.name=static "policy.switches=0:4 60:2" budget.average_bits=$bits
run test random policy.name=random "policy.classes=0 1/12 1/6 1/3 1/2 1" "${pair[@]}"
choose confidence policy.window 5 10 20 -- policy.name=confidence "${pair[@]}"
choose activation policy.activation last all -- policy.name=activation "${pair[@]}"
run test learned policy.name=learned policy.classifier="$out/learned.h5" "${pair[@]}"
choose step-learned policy.every 4 8 16 -- policy.name=step-learned policy.classifier="$out/step.h5" "${pair[@]}"
choose error-feedback policy.every 4 8 16 -- policy.name=error-feedback "${pair[@]}"
# the learned ones once more as they were trained, without a budget
run test learned-free policy.name=learned policy.classifier="$out/learned.h5" "policy.levels=4 2"
run test step-learned-free policy.name=step-learned policy.classifier="$out/step.h5" "policy.levels=4 2"

# the best single switch of each prompt among those tried above
"$python" experiments/report/oracle.py --tasks "$out/test.jsonl" "$out/oracle.jsonl" \
    "$out"/test/{prefill-high,static-20,static-40,static,static-80,static-120,uniform-4}
run test oracle policy.name=oracle policy.oracle="$out/oracle.jsonl"

rows=(fp16 uniform-4 uniform-3 uniform-2 prefill-high static reversed alternate random confidence activation learned
    step-learned error-feedback oracle static-budget static-3-2 learned-free step-learned-free)
echo
"$python" "$study" table --tasks "$out/test.jsonl" --bits "$bits" --out "$out" \
    --curve "$out"/test/{prefill-high,static-20,static-40,static,static-80,static-120,uniform-4} \
    --runs "${rows[@]/#/$out/test/}"
