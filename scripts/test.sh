#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All tests, in two lanes side by side, and after them those with containers. Arguments go to pytest.
#
# Most of what the tests do is wait, so one lane leaves more than half of two CPUs idle. A lane makes cgroups,
# network namespaces and BPF file systems of its own, and looks for leftovers among its own (tests/support/bpf.py).
# An engine in the third one has its pins in a mount namespace, where nobody else could tell whose they are.
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

.venv/bin/python -m pytest tests/kernel "$@" >"$output" 2>&1 &
beside=$!
.venv/bin/python -m pytest tests/unit tests/conformance tests/soak tests/apps -p no:cacheprovider "$@"
judge $?
wait "$beside"
code=$?
beside=
cat "$output"
judge $code
.venv/bin/python -m pytest tests/e2e -p no:cacheprovider "$@"
judge $?
exit "$status"
