#!/usr/bin/env bash
# A Debian that boots from its own disk gets a newer kernel by apt, inside, and boots that the next time: ten minutes or more
# where the machine is emulated.
#     tests/kernel-update.sh RIG VMM [PACKAGE]
# PACKAGE depends on the newer kernel's. It and that come to the guest on a second disk, since a rig has no network.
set -eu
rig=$1 vmm=$(realpath "$2") package=${3:-linux-image-cloud-amd64}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
disk=$work/debian.img packages=$work/packages.img

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# Runs a guest with the options given, types $1 when its shell is there, and shows what it prints.
guest() {
    local typed=$1
    shift
    # Not earlier: the menu takes what is typed, too.
    "$rig" --quiet --mem 3072 --timeout 3000 -- bash -c 'log=$1 typed=$2; shift 2; touch "$log"
        { until grep -q "guest:.*#" "$log"; do sleep 1; done; echo "$typed"; } | "$@" >"$log"' - \
        "$work/log" "$typed" "$vmm" "$@" || fail "vmm $*: code $?"$'\n'"$(tail -40 "$work/log")"
    # bash marks its prompt for terminals that paste.
    sed -e 's/\r//g' -e 's/\x1b\[?2004[hl]//g' "$work/log"
}

echo "== a disk with a small Debian and its kernel"
cargo guest -- disk --out "$disk"
kernel=$(apt-cache depends --no-recommends --no-suggests "$package" | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p')
[ -n "$kernel" ] || fail "$package depends on no kernel (apt-get update?)"
mkdir "$work/packages"
(cd "$work/packages" && apt-get -q -o APT::Sandbox::User=root download "$package" "$kernel")
cat >"$work/packages/install" <<'END'
set -e
export DEBIAN_FRONTEND=noninteractive
apt-get -q -y install /mnt/*.deb
echo INSTALLED
END
mke2fs -q -F -t ext4 -d "$work/packages" "$packages" 256M >/dev/null

echo "== before the update: vmm --disk debian.img --mem 1G"
before=$(guest 'echo runs=$(uname -r); exit' --disk "$disk" --mem 1G)
echo "$before"
grep -q '^runs=[0-9]' <<<"$before" || fail "it did not say what it runs"
! grep -qx "runs=${kernel#linux-image-}" <<<"$before" || fail "the disk has $kernel already; give another PACKAGE, such as linux-image-6.12-cloud-amd64"

echo "== the update: apt-get install in the guest"
update=$(guest 'mount -o remount,rw /; mount -o ro /dev/vdb /mnt; sh /mnt/install; exit' --disk "$disk" --disk "$packages" --mem 1G)
echo "$update"
grep -qx INSTALLED <<<"$update" || fail "apt-get"

echo "== after it: vmm --disk debian.img --mem 1G"
after=$(guest 'echo runs=$(uname -r); exit' --disk "$disk" --mem 1G)
echo "$after"
grep -qx "runs=${kernel#linux-image-}" <<<"$after" || fail "it does not run $kernel"
echo "OK: ${kernel#linux-image-} after $(sed -n 's/^runs=//p' <<<"$before"), by --disk alone"
