#!/usr/bin/env bash
# When to drop a plane: every policy on the embedded model, in one table. About ten minutes on two busy cores.
# Levels are 4 and 2 bits. Schedules come to 2.8 bits on average by a dial chosen on validation prompts; then the table
# is made on test prompts, once. NAME+budget is held at 2.8 bits by the budget's controller instead. OUT gets the table
# (table.txt, table.csv), a plot (bits.svg) and all runs with their provenance in one file (study.h5).
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
"$python" "$study" prompts validation 120 "$out/validation.jsonl" experiments/tasks/tiny_{summary,translation,story}.jsonl
"$python" "$study" prompts test "$n" "$out/test.jsonl" experiments/tasks/tiny_{summary,translation,story}.jsonl

say "480 other prompts, labelled with the earliest switch that loses nothing, and two classifiers trained on them"
"$python" experiments/learn/write_prompts.py 480 "$out/learn.jsonl"
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

# NAME setting...: tries six dials on validation prompts and runs the test prompts with the one that came nearest to the
# average bits; then NAME+budget
dial() {
    local name=$1 d
    shift
    rm -rf "${out:?}/validation/$name"
    for _ in 1 2 3 4 5 6; do
        d=$("$python" "$study" dial --bits "$bits" "$out/validation/$name")
        run validation "$name/$d" "$@" policy.dial="$d"
    done
    d=$("$python" "$study" dial --bits "$bits" --nearest "$out/validation/$name")
    run test "$name" "$@" policy.dial="$d"
    run test "$name+budget" "$@" budget.average_bits="$bits"
}

run test fp16 model.path=experiments/tiny policy.name=fixed policy.prefill=max policy.level=max
for b in 4 3 2; do run test "uniform-$b" policy.name=fixed policy.prefill=$b policy.level=$b; done
run test prefill-high policy.name=fixed policy.level=2
for s in 20 40 80 120; do run test "static-$s" policy.name=static "policy.switches=0:4 $s:2"; done

dial static policy.name=static "policy.switches=0:4 60:2"
dial static-3-2 policy.name=static "policy.switches=0:3 120:2"
dial reversed policy.name=reversed "policy.switches=0:4 90:2"
dial alternate policy.name=alternate "policy.alternate=4 2"
dial random policy.name=random "policy.classes=0 1/12 1/6 1/3 1/2 1" "policy.levels=4 2"
dial confidence policy.name=confidence "policy.levels=4 2"
dial activation policy.name=activation "policy.levels=4 2"
dial learned policy.name=learned policy.classifier="$out/learned.h5" "policy.levels=4 2"
dial step-learned policy.name=step-learned policy.classifier="$out/step.h5" "policy.levels=4 2"
dial error-feedback policy.name=error-feedback policy.every=4 "policy.levels=4 2"
# the learned ones as they were trained
run test learned-free policy.name=learned policy.classifier="$out/learned.h5" "policy.levels=4 2"
run test step-learned-free policy.name=step-learned policy.classifier="$out/step.h5" "policy.levels=4 2"

# the best single switch of each prompt among those tried above: as many bits as help, and within the budget
curve=("$out"/test/{prefill-high,static-20,static-40,static,static-80,static-120,uniform-4})
"$python" experiments/report/oracle.py --tasks "$out/test.jsonl" "$out/oracle.jsonl" "${curve[@]}"
"$python" experiments/report/oracle.py --tasks "$out/test.jsonl" --bits "$bits" "$out/oracle-budget.jsonl" "${curve[@]}"
run test oracle policy.name=oracle policy.oracle="$out/oracle.jsonl"
run test oracle-budget policy.name=oracle policy.oracle="$out/oracle-budget.jsonl"

rows=(fp16 uniform-4 uniform-3 uniform-2 prefill-high static reversed alternate random confidence activation learned
    step-learned error-feedback oracle oracle-budget static-3-2 learned-free step-learned-free
    {static,reversed,alternate,random,confidence,activation,learned,step-learned,error-feedback,static-3-2}+budget)
echo
"$python" "$study" table --tasks "$out/test.jsonl" --bits "$bits" --out "$out" \
    --curve "${curve[@]}" --runs "${rows[@]/#/$out/test/}"
