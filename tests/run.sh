#!/usr/bin/env bash
# Everything tested, from a bare machine: packages, build, then all tests. Ends with one line
# "N passed, N failed, N skipped"; skipped tests are listed with their reason in build/Testing.
# PMPD_TEST_DATA may name a folder with models trained elsewhere; by default ../shared/data when it is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source experiments/setup.sh

data=${PMPD_TEST_DATA:-$top/../shared/data}
[ -d "$data" ] && export PMPD_TEST_DATA=$data
report=$build/tests.xml
failed=0
ctest --test-dir "$build" --output-on-failure --output-junit "$report" "$@" || failed=1
"$python" - "$report" <<'PY'
import sys
import xml.etree.ElementTree as tree

suite = tree.parse(sys.argv[1]).getroot()
count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "skipped", "disabled")}
skipped = [case.get("name") for case in suite.iter("testcase") if case.find("skipped") is not None]
if skipped:
    print("skipped:", ", ".join(skipped))
n_skipped = count["skipped"] + count["disabled"]
print(f"{count['tests'] - count['failures'] - n_skipped} passed, {count['failures']} failed, {n_skipped} skipped")
PY
exit $failed
