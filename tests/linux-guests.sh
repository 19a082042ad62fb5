#!/usr/bin/env bash
# Runs each test of the given test binaries in a rig of its own, two at a time:
#     tests/linux-guests.sh RIG BINARY...
# Where the emulated machine itself dies, so that the test came to no result, it is tried once more, and the output says so. So it
# is where a guest stands still, as one on four vCPUs does now and then on a busy machine (tests/rig/README.md, Limits). Any other failure is one.
set -u
rig=$1
shift
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export VMM_REQUIRE_LINUX_GUESTS=1 rig logs

one() {
    local binary=$1 test=$2 log="$logs/${2//:/_}" code
    for try in 1 2; do
        "$rig" --quiet --mem 3072 --timeout 900 -- "$binary" --exact "$test" --nocapture >"$log" 2>&1 </dev/null
        code=$?
        if [ $code = 0 ] && grep -q '^test result: ok. 1 passed' "$log" && ! grep -q SKIP "$log"; then
            echo "test $test ... ok"
            return
        fi
        if grep -q '^what it does:' "$log"; then
            [ $try = 1 ] && echo "FLAKY: a guest of $test stood still; trying once more. What it did:" &&
                grep -A30 '^what it does:' "$log" | cut -c1-200
            continue
        fi
        grep -q '^test result:' "$log" && break
        [ $try = 1 ] && echo "FLAKY: the machine of $test died (code $code); trying once more. What it said:" &&
            tail -25 "$log" | cut -c1-300
    done
    {
        echo "test $test ... FAILED"
        sed "s/^/    /" "$log" | cut -c1-400 | tail -60
        touch "$logs/failed"
    }
}
export -f one

for binary in "$@"; do
    "$binary" --list --format terse 2>/dev/null | sed -n 's/: test$//p' | grep -vxFf <("$binary" --list --ignored --format terse 2>/dev/null | sed -n 's/: test$//p') |
        sed "s#^#$binary #"
done | xargs -P 2 -L 1 bash -c 'one "$@"' -
[ ! -e "$logs/failed" ]
