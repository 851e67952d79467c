#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All tests, in two lanes side by side. Arguments go to pytest.
#
# Most of what the tests do is wait, so one lane leaves more than half of two CPUs idle. A lane makes cgroups,
# network namespaces and BPF file systems of its own, and tells its leftovers from what the other one has in use or
# has pinned, be it in a mount namespace of its own as the benchmark does (tests/support/bpf.py). It cannot where
# neither a process nor a pin holds a program, as while a test kills a daemon of its own. So all tests that make a
# Host are in one lane, and look for leftovers one after the other. The tests with containers, which build images
# first and look for no leftovers of this kind, follow at the end of the other lane, which has less to do.
set -uo pipefail
cd "$(dirname "$0")/.."
export SPLICER_KERNEL_TESTS=1 SPLICER_E2E_TESTS=1

NOTHING_COLLECTED=5 # pytest's exit code, as with -k NAME
status=$NOTHING_COLLECTED
output=$(mktemp)
beside=
end() {
	[[ -z $beside ]] || kill "$beside" 2>/dev/null
	wait
	rm -f "$output"
}
trap end EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

judge() { # the exit code of one lane
	(($1 == NOTHING_COLLECTED)) && return
	((status == NOTHING_COLLECTED)) && status=0
	(($1 == 0)) || status=$1
}

mapfile -t own < <(grep -lE '\bHost\(' tests/kernel/test_*.py)
mapfile -t shared < <(grep -LE '\bHost\(' tests/kernel/test_*.py)

.venv/bin/python -m pytest "${own[@]}" "$@" >"$output" 2>&1 &
beside=$!
.venv/bin/python -m pytest -p no:cacheprovider tests/unit "${shared[@]}" tests/conformance tests/soak tests/apps "$@"
judge $?
.venv/bin/python -m pytest tests/e2e -p no:cacheprovider "$@"
judge $?
wait "$beside"
code=$?
beside=
cat "$output"
judge $code
exit "$status"
