#!/bin/sh
# Make the model and the task files from nothing:
#
#     train.sh OUT_DIR [option of train.py ...]
#
# OUT_DIR/tiny  the Hugging Face folder      OUT_DIR/tasks       the task files
# OUT_DIR/build virtual environment, checkpoint, log   OUT_DIR/evaluation  answers and figures
#
# Needs Debian 12 (or the packages below from elsewhere). Started again, it goes on from the last
# checkpoint in OUT_DIR/build.
set -eu
[ $# -ge 1 ] || { echo "usage: $0 OUT_DIR [option of train.py ...]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift

# PyTorch and an OpenBLAS that shares its threads with PyTorch (the default one fights over them).
packages="python3-torch libopenblas0-openmp python3-venv"
missing=""
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" ||
        missing="$missing $package"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "missing:$missing; as root: apt-get install --no-install-recommends$missing" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -o DPkg::Lock::Timeout=300 update
    # shellcheck disable=SC2086
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $missing
fi

[ -x "$out/build/venv/bin/pip" ] ||
    /usr/bin/python3 -m venv --system-site-packages "$out/build/venv"
python="$out/build/venv/bin/python"
"$python" -m pip install --quiet --requirement "$here/requirements.txt"

# Large blocks are kept instead of being returned to the system after each step.
export MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000
export MALLOC_TOP_PAD_=268435456
LD_LIBRARY_PATH="/usr/lib/$(uname -m)-linux-gnu/openblas-openmp"
export LD_LIBRARY_PATH
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY=passive
export TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1

cd "$here"
[ -e "$out/build/tokenizer.json" ] || "$python" make_tokenizer.py "$out/build"
"$python" train.py "$out/build" "$@" >>"$out/build/train.log" 2>&1 ||
    { tail -n 5 "$out/build/train.log" >&2; exit 1; }
"$python" export.py "$out/build" "$out/tiny"
"$python" check_folder.py "$out/tiny"
"$python" write_tasks.py "$out/tasks"
"$python" write_ids.py "$out/tiny/tokenizer.json" "$out/tasks"
cp "$here/../../tasks/score_facts.py" "$out/tasks/"
"$python" evaluate.py "$out/tiny" "$out/tasks" "$out/evaluation"
