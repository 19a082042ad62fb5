"""Lists the functions that a run of `vmm` enters, one mangled name a line; order makes src/cli/start.ld of them.

    gdb -batch -x tests/weight/entered.py --args VMM ARG...         # into the file $ENTERED

Each function has a breakpoint that is gone once it was hit.
"""

import os
import subprocess

import gdb


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
symbols = subprocess.run(["nm", "--defined-only", program], check=True, capture_output=True, text=True).stdout
functions = {}
for line in symbols.splitlines():
    address, kind, name = line.split(maxsplit=2)
    if kind in "tTwW":
        functions.setdefault(int(address, 16), name)

entry = next(address for address, name in functions.items() if name == "_start")
base = int(gdb.parse_and_eval("$pc")) - entry
for address, name in functions.items():
    Entry(name, base + address)
gdb.execute("continue")

with open(os.environ["ENTERED"], "w", encoding="ascii") as out:
    out.writelines(f"{name}\n" for name in Entry.seen)
print(f"{len(Entry.seen)} of {len(functions)} functions")
