"""Lists the functions that a run of `vmm` enters, for .cargo/start-order.txt, where its build puts them side by side.

    cargo static; truncate -s 1M target/disk.img
    V=target/x86_64-unknown-linux-gnu/release
    $V/rig -- gdb -batch -x tests/bench/start-order.py --args $V/vmm --kernel target/guests/tuned-vmlinux \
        --initrd target/guests/tiny.cpio --mem 128M --cmdline 'console=hvc0 quiet' --disk target/disk.img \
        --serial file=target/serial.log --debug-exit

Each function has a breakpoint that is gone once it was hit. Two minutes in the rig.
"""

import subprocess

import gdb

OUT = ".cargo/start-order.txt"
HEAD = """\
# What the linker of `cargo static` puts first, so that a start touches few pages of the program: the functions that
# tests/bench/start-order.py saw in one. Names that are not there (another compiler, a function that is gone) do no harm.
"""


class Entry(gdb.Breakpoint):
    """A function's first instruction."""

    seen = []

    def __init__(self, name, address):
        super().__init__(f"*{address:#x}", internal=True)
        self.name = name

    def stop(self):
        Entry.seen.append(self.name)
        self.enabled = False
        return False


for command in (
    "set confirm off",
    "set breakpoint always-inserted on",
    "set detach-on-fork on",
    "handle all nostop noprint pass",
    "handle SIGTRAP nopass",
    "starti",
):
    gdb.execute(command, to_string=True)

program = gdb.current_progspace().filename
elf = subprocess.run(["nm", "--defined-only", program], check=True, capture_output=True, text=True).stdout
functions = {}
for line in elf.splitlines():
    address, kind, name = line.split(maxsplit=2)
    if kind in "tTwW":
        functions.setdefault(int(address, 16), name)

entry = next(address for address, name in functions.items() if name == "_start")
base = int(gdb.parse_and_eval("$pc")) - entry
for address, name in functions.items():
    Entry(name, base + address)
gdb.execute("continue")

with open(OUT, "w", encoding="ascii") as out:
    out.write(HEAD)
    out.writelines(f"{name}\n" for name in sorted(Entry.seen))
print(f"{len(Entry.seen)} of {len(functions)} functions in {OUT}")
