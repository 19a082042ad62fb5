# `make run`: a shell inside a VM. `make test`: everything that CI runs. `make bench`: VM against container.
SHELL := /bin/bash
GUESTS := target/guests
# What the tests said.
LOGS := target/test-logs
# Without shared libraries (see .cargo/config.toml).
BIN := target/x86_64-unknown-linux-gnu/release
VMM := $(BIN)/vmm
BENCH := $(BIN)/vmm-bench
# The rig runs a command where /dev/kvm boots Linux: right here if it does, else inside an emulated AMD-V machine.
RIG := $(BIN)/rig
STOCK := $(VMM) --kernel $(GUESTS)/stock-bzImage --initrd $(GUESTS)/stock.cpio --mem 512M --cpus 2 --rng
SESSION := uname -srm; nproc; head -1 /proc/meminfo; ls /sys/bus/virtio/drivers; cat /proc/uptime
SAY = @printf '\n\033[1m== %s\033[0m\n'

.PHONY: run test lints bundle tests-here tests-of-guests kvm-unit-tests compared weighed skips failures bench bench-net bench-net-counted tuned bench-compare weight \
	start-order tools build compilers calls vtx vsock-tests reboots net-whole agent-whole plug-whole pci-whole snapshot-whole share-whole share-judges bench-share copies clean-guests

run: build
	$(SAY) 'the kernel: Debian stock, fetched as a package, not installed'
	@$(BIN)/guest bundle --only stock --out $(GUESTS)
	$(SAY) 'a VM: $(STOCK)'
	@if [ -t 0 ] && [ -t 1 ]; then \
		echo 'Ctrl-A h shows the escape keys; leave the VM by: exit'; \
		$(RIG) --tty -- $(STOCK) --cmdline 'console=hvc0 quiet'; \
	else \
		echo 'input is not a terminal: a short scripted session'; \
		$(RIG) -- $(STOCK) --cmdline 'console=hvc0 quiet vmm.run="$(SESSION)"' </dev/null; \
	fi

build: compilers
	$(SAY) 'build vmm (release; a minute or two the first time)'
	@cargo static --quiet
	@$(BIN)/guest agent --out $(BIN)/vmm-agent >/dev/null

compilers:
	@command -v cargo >/dev/null || { echo 'cargo is missing: install Rust 1.90 or later (https://rustup.rs)'; exit 1; }
	@command -v cc >/dev/null || { echo 'cc is missing: installing gcc'; apt-get install -qq -y gcc libc6-dev; }

# What the tests call. The rig and the guest builder install what they need by themselves.
TOOLS := qemu-system-x86:qemu-system-x86_64 e2fsprogs:e2fsck dosfstools:mkfs.vfat mtools:mcopy fdisk:sfdisk xfsprogs:mkfs.xfs btrfs-progs:mkfs.btrfs grub-common:grub-editenv binutils:objcopy zstd:zstd acpica-tools:iasl cpio:cpio crun:crun runc:runc bubblewrap:bwrap chromium:chromium gdb:gdb tmux:tmux socat:socat tshark:tshark \
	memtest86+:/boot/memtest86+x64.bin ipxe:/boot/ipxe.lkrn seabios:/usr/share/seabios/bios-microvm.bin
# Installs the packages of PACKAGE:PROGRAM pairs whose program, or file, is missing.
install = missing=; for pair in $(1); do command -v "$${pair\#*:}" >/dev/null || [ -e "$${pair\#*:}" ] || missing="$$missing $${pair%:*}"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; fi
tools:
	$(SAY) 'tools for the tests'
	@$(call install,$(TOOLS))

# Each part is tried, whatever became of those before it: one run tells all that fails.
test: tools
	@$(MAKE) --no-print-directory --keep-going --jobs=1 lints bundle tests-here tests-of-guests kvm-unit-tests compared weighed skips failures

lints:
	$(SAY) 'format, lints, docs'
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --workspace --no-deps

bundle:
	$(SAY) 'the guests: Debian stock kernel, tuned kernel (built once: 5 minutes or so), initramfs, root disk'
	cargo guest bundle --out $(GUESTS)

tests-here:
	$(SAY) 'unit tests, device tests, and tests on this /dev/kvm'
	@# In the background a shell has its commands ignore some signals; the tests send them.
	@mkdir -p $(LOGS)
	set -o pipefail; env --default-signal cargo test --workspace --no-fail-fast -- --show-output 2>&1 | tee $(LOGS)/here.log

tests-of-guests:
	$(SAY) 'Linux guests, where KVM can run them'
	@mkdir -p $(LOGS)
	cargo build --quiet --package rig
	set -o pipefail; tests/linux-guests.sh target/debug/rig $$(cargo test --no-run --package vmm --test boot --test micro 2>&1 | sed -n 's/.*Executable .*(\(.*\))/\1/p') \
		2>&1 | tee $(LOGS)/guests.log

kvm-unit-tests:
	$(SAY) 'kvm-unit-tests, against QEMU'
	@mkdir -p $(LOGS)
	@set -o pipefail; if [ -n "$(KVM_UNIT_TESTS)" ]; then tests/kvm-unit-tests/run --rig target/debug/rig $(KVM_UNIT_TESTS); \
		else echo 'SKIP: kvm-unit-tests: no suite: build one and give its path, make test KVM_UNIT_TESTS=PATH (tests/kvm-unit-tests/README.md); ours is tests/micro.rs'; fi \
		2>&1 | tee $(LOGS)/kvm-unit-tests.log

compared:
	$(SAY) 'the work of a boot, counted, against the last baseline'
	@$(MAKE) --no-print-directory bench-compare

weighed:
	$(SAY) 'the weight of a VM, and whether what a start needs still lies side by side'
	@mkdir -p $(LOGS)
	@set -o pipefail; $(MAKE) --no-print-directory weight 2>&1 | tee $(LOGS)/weight.log

skips:
	$(SAY) 'what did not run, and why'
	@tests/skips $(LOGS)/*.log

# Last, where whoever reads the end of a long log finds it.
failures:
	$(SAY) 'what failed, in short'
	@tests/failures $(LOGS)/guests.log $(LOGS)/here.log

# What is quick is measured here; what boots Linux, where KVM does, with fewer samples if that is an emulated machine. The tuned kernel
# takes longer to compile than all else does together: who has not made it gets the rest first, and is told.
OUT := target/bench
RIVALS := crun:crun runc:runc bubblewrap:bwrap qemu-system-x86:qemu-system-x86_64 qemu-utils:qemu-img
HERE := $(BENCH)
THERE := $(RIG) --quiet --mem 6144 --timeout 1200 -- $(BENCH)
TUNED := $(GUESTS)/tuned-vmlinux
bench: build
	$(SAY) 'rivals from Debian: crun, runc, bwrap, QEMU'
	@$(call install,$(RIVALS))
	$(SAY) 'the guests: Debian stock kernel, fetched as a package; the tuned one, if it was made before'
	@$(BIN)/guest bundle --only stock --out $(GUESTS)
	@[ ! -e $(TUNED) ] || $(BIN)/guest bundle --only tuned --out $(GUESTS)
	@mkdir -p $(OUT)
	$(SAY) 'here'
	@$(HERE) boot fork steps scale exits --at-most 2 --json $(OUT)/here.json >$(OUT)/here.txt
	@$(HERE) memory image --samples 3 --at-most 4 --json $(OUT)/memory.json >$(OUT)/memory.txt
	$(SAY) 'where KVM boots Linux'
	@$(THERE) boot exits --samples 6 --warm-up 0 --at-most 8 --json $(OUT)/boot-linux.json >$(OUT)/boot-linux.txt
	@parts=boot-linux; if [ -e $(TUNED) ]; then parts='boot-linux memory-linux linux'; \
		$(THERE) memory --samples 1 --warm-up 0 --at-most 45 --instances 10 --json $(OUT)/memory-linux.json >$(OUT)/memory-linux.txt && \
		$(THERE) cpu mem block console --samples 2 --warm-up 0 --at-most 20 --json $(OUT)/linux.json >$(OUT)/linux.txt || exit; fi; \
		$(HERE) $$(printf -- '--from $(OUT)/%s.json ' $$parts here memory) \
			--json $(OUT)/bench.json --csv $(OUT)/bench.csv --html $(OUT)/bench.html
	@echo 'with every sample drawn: $(OUT)/bench.html'
	@[ -e $(TUNED) ] || echo 'without the small kernel (our start, memory, disk and processor figures): make tuned (6 minutes on 2 idle CPUs, once), then make bench'

# Networks, container and monitors side by side: three minutes and more where KVM boots Linux.
bench-net: build
	@$(call install,qemu-system-x86:qemu-system-x86_64 passt:passt iproute2:ip)
	@$(BIN)/guest bundle --only tuned --out $(GUESTS)
	@$(THERE) net --samples 6 --warm-up 1 --json $(OUT)/net.json

tuned: compilers
	$(SAY) 'the tuned kernel: Debian source, compiled (6 minutes on 2 idle CPUs, once)'
	@cargo guest bundle --only tuned --out $(GUESTS)

# Writes into FILE, $(1), what the bench's words $(4) count on the rig's repeatable clock. Now and then QEMU's emulation hangs a run,
# which then hangs each time (tests/rig/README.md, Limits): one that takes longer than $(2) seconds is given up, and is said to be;
# another seed makes another run. $(3): more of the rig's options.
ICOUNT := --icount --quiet --with $(GUESTS)/tuned-vmlinux \
	--with $(VMM) --with /usr/bin/qemu-system-x86_64 --with /usr/share/qemu/bios-microvm.bin
counted = mkdir -p $(OUT); for seed in 42 43 44; do \
	$(RIG) $(ICOUNT) --seed $$seed --timeout $(2) $(3) -- $(BENCH) $(4) --icount --json - >$(1); code=$$?; [ $$code = 124 ] || break; \
	echo "counted run with seed $$seed: no end within $(2) s, given up (tests/rig/README.md, Limits)" >&2; done; \
	[ $$code = 0 ] || exit $$code

# Work done by one start, held against what it was when the baseline was last renewed: twenty seconds on an idle machine.
BASELINE := tests/bench/baseline.json
bench-compare: build
	@$(BIN)/guest bundle --only tuned --out $(GUESTS)
	@$(call counted,$(OUT)/icount.json,400,,boot)
	@$(BENCH) --from $(OUT)/icount.json --compare $(BASELINE)

# The same networks, counted: instructions of the whole host for each KiB, round trip and request. A minute or two.
bench-net-counted: build
	@$(call install,qemu-system-x86:qemu-system-x86_64 iproute2:ip)
	@$(BIN)/guest bundle --only tuned --out $(GUESTS)
	@$(call counted,$(OUT)/net-counted.json,900,--mem 4096 --with $$(command -v ip) --with $$(readlink -f $$(command -v ip)),net)
	@$(BENCH) --from $(OUT)/net-counted.json

# A shared folder beside virtiofsd's, counted in the same way. VIRTIOFSD=PATH: another one than Debian's.
VIRTIOFSD := /usr/lib/qemu/virtiofsd
bench-share: build
	@$(call install,qemu-system-x86:qemu-system-x86_64)
	@$(BIN)/guest bundle --only tuned --out $(GUESTS)
	@$(call counted,$(OUT)/share-counted.json,400,--mem 4096 --with $(VIRTIOFSD),share --with virtiofsd=$(VIRTIOFSD))
	@$(BENCH) --from $(OUT)/share-counted.json

weight: build
	@tests/weight/start-order check $(VMM) src/cli/start.ld

# What a start needs, seen anew. Three minutes; then look at the difference.
start-order: build
	@$(BIN)/guest bundle --only tuned --out $(GUESTS)
	@tests/weight/start-order make $(VMM) $(RIG) $(GUESTS) src/cli/start.ld

# Every lab on VT-x, which Bochs emulates: hardware's exit reasons against ours, into docs/vtx.md. Some minutes; no part of `make test`.
vtx: build
	@tests/vtx/run $(VMM)

# What threads of each role ask of the host's kernel, as strace sees it, against the sandbox's lists: what is allowed and never made. Tests
# that fail for being slow under strace do not matter. Half an hour; no part of `make test`.
CALLS := target/calls
CALLS_HERE := sandbox:: snapshot:: fork:: pool:: vsock:: net:: overlay:: device:: terminal:: top:: lives:: detached:: template:: \
	working_set:: memory_ways:: trace:: limits::
CALLS_THERE := net_user::a_guest_has_all_that_a_network_has agent::commands_run_in_a_tuned_guest \
	snapshot::our_kernel_goes_on_where_it_was_saved disk::debian_is_written_over_an_image_that_stays_as_it_is \
	vsock::the_tuned_kernel_and_the_host_reach_each_other plug::a_network_device_comes_and_goes \
	vhost::a_ring_that_is_broken_is_told_and_a_reset_brings_the_kernel_back \
	share::a_folder_is_worked_in_from_both_sides share::files_that_are_open_are_so_after_a_restore_and_in_a_copy \
	share::a_guest_its_copy_and_the_host_wait_for_each_others_locks share::programs_of_the_guest_hear_of_what_the_host_does \
	share::owners_modes_and_devices_that_are_kept_are_so_for_the_guest_alone
binary = $$(cargo test --no-run --package vmm --test $(1) 2>&1 | sed -n 's/.*Executable .*(\(.*\))/\1/p')
calls:
	@$(call install,strace:strace)
	@rm -f $(CALLS)
	@cargo build --quiet --package rig
	@here=$(call binary,cli); there=$(call binary,boot); \
	tests/calls/made $(CALLS) "$$here" $(CALLS_HERE) || true; \
	for test in $(CALLS_THERE); do VMM_REQUIRE_LINUX_GUESTS=1 target/debug/rig --quiet --mem 3072 --timeout 1200 -- \
		tests/calls/made $(CALLS) "$$there" --exact $$test || true; done
	@VMM_CALLS_MADE=$(CURDIR)/$(CALLS) cargo test --quiet --package vmm-monitor --lib nothing_is_allowed -- --ignored --nocapture

# The kernel's own vsock tests, one end in a guest and one on the host, in both roles; some two minutes; no part of `make test`.
vsock-tests:
	@tests/vsock/run

# Every way in which Linux resets a machine, on our kernel and on four of Debian's, directly and by firmware: some five minutes for each
# kernel. What a way came to is a line of a table (docs/reboot.md). Some of it is in `make test`.
REBOOTS := $(addprefix reboot::whole_,tuned stock cloud_6_12 generic_6_1 generic_6_12) without::debians_generic_kernel_ticks_without_acpi_and_apics
reboots:
	@cargo guest bundle --out $(GUESTS) --only tuned --only stock --only cloud-6.12 --only generic-6.1 --only generic-6.12
	@cargo build --quiet --package rig
	@boot=$$(cargo test --no-run --package vmm --test boot 2>&1 | sed -n 's/.*Executable .*(\(.*\))/\1/p'); failed=0; \
	for test in $(REBOOTS); do \
		VMM_REQUIRE_LINUX_GUESTS=1 target/debug/rig --quiet --mem 3072 --timeout 1800 -- \
			"$$boot" --exact $$test --ignored --nocapture >target/reboots.log 2>&1 || { failed=1; tail -40 target/reboots.log; }; \
		grep -a '^| \|^test result' target/reboots.log; \
	done; exit $$failed

# Runs the long tests SUBJECT_whole::whole_NAME of a list of names, each in a rig of its own.
whole = boot=$$(cargo test --release --no-run --package vmm --test boot 2>&1 | sed -n 's/.*Executable .*(\(.*\))/\1/p'); failed=0; \
	for way in $(2); do \
		VMM_REQUIRE_LINUX_GUESTS=1 target/debug/rig --quiet --mem 3072 --timeout 3600 -- \
			"$$boot" --exact $(1)_whole::whole_$$way --ignored --nocapture >target/$(1)-whole.log 2>&1 || { failed=1; tail -40 target/$(1)-whole.log; }; \
		grep -a '^==\|^ok \|Csum\|^test result' target/$(1)-whole.log; \
	done; exit $$failed

# Each back end of a network for minutes, with iperf3 in a Debian guest, and gigabytes whose checksums the guest computes
# (VMM_NET_MEGABYTES each way, 1000 unless said). Half an hour and more in the rig; no part of `make test`.
NET_WHOLE := user streams tap vhost socket switch
net-whole:
	@$(call install,iperf3:iperf3 passt:passt iproute2:ip debootstrap:debootstrap)
	@cargo guest bundle --out $(GUESTS) --only tuned
	@cargo guest -- rootfs --from debian --include iperf3,iputils-ping,iproute2,ethtool,apt,wget --size 1G --out $(GUESTS)/net.ext4
	@cargo build --quiet --package rig
	@$(call whole,net,$(NET_WHOLE))

# The agent for minutes: a gigabyte through a command, a thousand commands, a stock ssh server. In the rig; no part of `make test`.
AGENT_WHOLE := gigabyte thousand ssh
agent-whole:
	@$(call install,openssh-client:ssh socat:socat debootstrap:debootstrap)
	@cargo guest bundle --out $(GUESTS) --only tuned
	@[ -e $(GUESTS)/ssh.ext4 ] || cargo guest -- rootfs --from debian --include openssh-server,socat --size 1G --out $(GUESTS)/ssh.ext4
	@cargo build --quiet --package rig
	@$(call whole,agent,$(AGENT_WHOLE))

# A disk that comes and goes 600 times in Debian's kernel, and in others of theirs. Half an hour in the rig; no part of `make test`.
PLUG_WHOLE := rounds kernels
plug-whole:
	@cargo guest bundle --out $(GUESTS) --only stock --only cloud-6.12 --only generic-6.1 --only generic-6.12
	@cargo build --quiet --package rig
	@$(call whole,plug,$(PLUG_WHOLE))

# Copies of a machine whose kernel is another of Debian's. Minutes in the rig; no part of `make test`.
copies:
	@cargo guest bundle --out $(GUESTS) --only cloud-6.12 --only generic-6.1 --only generic-6.12
	@cargo build --quiet --package rig
	@boot=$$(cargo test --no-run --package vmm --test boot 2>&1 | sed -n 's/.*Executable .*(\(.*\))/\1/p'); \
	VMM_REQUIRE_LINUX_GUESTS=1 target/debug/rig --quiet --mem 3072 --timeout 1800 -- "$$boot" identity:: --ignored

# Each driver of a device on the PCI bus unbound and bound 200 times with traffic, in Debian's kernel; and the bus without ACPI. Half an
# hour in the rig; no part of `make test`.
PCI_WHOLE := drivers without_acpi
pci-whole:
	@cargo guest bundle --out $(GUESTS) --only stock --only generic-6.1
	@cargo build --quiet --package rig
	@$(call whole,pci,$(PCI_WHOLE))

# Debian's kernel and ours saved and restored at a hundred moments under load, with one, two and four processors, and at a hundred
# of their boots. Hours in the rig; no part of `make test`.
SNAPSHOT_WHOLE := one two four boot
snapshot-whole:
	@cargo guest bundle --out $(GUESTS) --only stock --only tuned
	@cargo build --quiet --package rig
	@$(call whole,snapshot,$(SNAPSHOT_WHOLE))

# Shared folders judged by pjdfstest in a guest, owners kept and not, by root and by an ordinary user. No part of `make test`.
SHARE_WHOLE := kept kept_by_a_user mapped
share-whole:
	@cargo guest bundle --out $(GUESTS)
	@cargo build --quiet --package rig
	@cargo install --quiet --locked --version 0.2.2 --root target/pjdfstest pjdfstest
	@$(call whole,share,$(SHARE_WHOLE))

# Shared folders that this host's kernel mounts, judged by what others wrote, each cache=, by root and by a user: pjdfstest, fsx, sqlite,
# PostgreSQL, cargo, npm; git's own tests and fsstress where a built tree of theirs is named. Needs root and /dev/fuse. Half an hour, and
# with git's an hour more; no part of `make test`.
#     make share-judges GIT_SOURCE=PATH XFSTESTS=PATH
share-judges:
	@$(call install,sqlite3:sqlite3 postgresql:pgbench npm:npm)
	@cargo install --quiet --locked --version 0.3.2 --root target/judges fsx
	@cargo install --quiet --locked --version 0.2.2 --root target/judges pjdfstest
	GIT_SOURCE=$(GIT_SOURCE) XFSTESTS=$(XFSTESTS) cargo test --package vmm-monitor --test share -- --ignored --nocapture --test-threads=1

clean-guests:
	rm -rf $(GUESTS)
