#!/usr/bin/env bash
# Runs each test of the given test binaries in a rig of its own, two at a time, and each once:
#     tests/linux-guests.sh RIG BINARY...
set -u
[ $# -gt 1 ] || { echo 'no test binaries' >&2; exit 1; }
rig=$1
shift
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export VMM_REQUIRE_LINUX_GUESTS=1 rig logs

one() {
    local binary=$1 test=$2 log="$logs/${2//:/_}" code start=$SECONDS
    "$rig" --quiet --mem 3072 --timeout 900 -- "$binary" --exact "$test" --nocapture >"$log" 2>&1 </dev/null
    code=$?
    if [ $code = 0 ] && grep -q '^test result: ok. 1 passed' "$log" && ! grep -q SKIP "$log"; then
        echo "test $test ... ok ($((SECONDS - start)) s)"
        return
    fi
    {
        echo "test $test ... FAILED (code $code)"
        # What a panic says comes first; behind it may be a long backtrace.
        { grep -m 1 -A 60 'panicked at' "$log" || tail -60 "$log"; } | cut -c1-400 | sed "s/^/    /"
        touch "$logs/failed"
    }
}
export -f one

for binary in "$@"; do
    "$binary" --list --format terse 2>/dev/null | sed -n 's/: test$//p' | grep -vxFf <("$binary" --list --ignored --format terse 2>/dev/null | sed -n 's/: test$//p') |
        sed "s#^#$binary #"
done | xargs -P 2 -L 1 bash -c 'one "$@"' -
[ ! -e "$logs/failed" ]
