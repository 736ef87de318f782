"""Counts what a GPU kernel executes, from its machine code: instructions weighted by loops, barriers, time by count.

    cuobjdump -sass kernels.so | python tools/count_sass.py --function conv_ffn --trips 16 --warps 16
    python tools/count_sass.py spread.sass --warps 2 --grid 6272

Reads the listings of cuobjdump, nvdisasm and Triton (`asm["sass"]`). A loop is a branch back to an instruction that
all ways to the branch pass; --trips gives how often each runs, in the order of their first instructions. The time is
instructions x warps x programs / (multiprocessors x 4 schedulers x clock): what issuing alone takes, one instruction a
cycle and scheduler, on an H200 unless told otherwise.

Counted, not measured. It sees no stall, latency or memory. Every warp is taken to execute each instruction outside of
loops once, also if that is predicated off, jumped over or meant for other warps. Subroutines, such as the slow path of
a division, are left out.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from svit import processes

ARCHITECTURE = re.compile(r"\s*arch = (\w+)")
FUNCTION = re.compile(r"\s*Function\s*:\s*(\w+)|\.text\.(\w+):")
LABEL = re.compile(r"(\.?L\w+):")
# An address (cuobjdump, nvdisasm) or scheduling and a tab (Triton), perhaps a predicate, the instruction.
INSTRUCTION = re.compile(
    r"(?:\s+/\*(?P<at>[0-9a-f]{4,})\*/|\S+:\S+\t)\s*(?P<if>@!?\w+\s+)?(?P<op>[A-Z][\w.]*)(?P<args>[^;]*);"
)


class Instruction(NamedTuple):
    op: str  # with its modifiers: LDG.E.128
    conditional: bool
    target: int | None  # index of the instruction that it may branch to


class Count(NamedTuple):
    loops: list[tuple[int, int]]  # indices of their first and last instructions
    ops: Counter  # opcode with modifiers -> how often a warp executes it

    def total(self, *starts: str) -> int:
        """Executed instructions, of all kinds or of those that begin with one of `starts`."""
        return sum(n for op, n in self.ops.items() if not starts or op.startswith(starts))


def parse(listing: str) -> dict[str, list[Instruction]]:
    """The functions of a listing; their names end with the architecture where the listing tells it."""
    functions, code, places, architecture = {}, [], {}, ""
    for line in listing.splitlines():
        if match := ARCHITECTURE.match(line):
            architecture = f" {match[1]}"
        elif match := FUNCTION.match(line):
            code, places = functions.setdefault((match[1] or match[2]) + architecture, ([], {}))
        elif match := LABEL.match(line):
            places[match[1]] = len(code)
        elif match := INSTRUCTION.match(line):
            if match["at"]:
                places[hex(int(match["at"], 16))] = len(code)
            args = re.sub(r"[`()]", "", match["args"]).split(",")
            target = args[-1].strip() if match["op"].startswith(("BRA", "CALL")) else None
            code.append(Instruction(match["op"], bool(match["if"]) or len(args) > 1, target))
    for name, (code, places) in functions.items():
        code = [i._replace(target=places.get(i.target)) for i in code]
        functions[name] = [i._replace(target=None) if returns(code, i) else i for i in code]
    return functions


def returns(code: list[Instruction], call: Instruction) -> bool:
    """Whether a call is one: some compilers jump by a call that never returns."""
    found = call.op.startswith("CALL") and call.target is not None
    return found and any(code[at].op.startswith("RET") for at in reachable(code, call.target))


def reachable(code: list[Instruction], start: int = 0, without: int | None = None) -> set[int]:
    """Indices of the instructions that `start` leads to, on ways that avoid `without`."""
    seen, ways = {without}, [start]
    while ways:
        at = ways.pop()
        if at in seen or at >= len(code):
            continue
        seen.add(at)
        op, conditional, target = code[at]
        if target is not None:
            ways.append(target)
        if conditional or (target is None and not op.startswith(("EXIT", "RET"))):
            ways.append(at + 1)
    return seen - {without}


def count(code: list[Instruction], trips: list[int] | tuple[int, ...] = ()) -> Count:
    """Loops, and executed instructions if loop i runs trips[i] times (once where trips end)."""
    alive, ends = reachable(code), {}
    for at in sorted(alive):
        target = code[at].target
        if target is not None and target < at and at not in reachable(code, without=target):
            ends[target] = at  # the last branch back to it
    loops = sorted(ends.items())
    if len(trips) > len(loops):
        raise ValueError(f"trips: expected at most {len(loops)}, one for each loop, got {len(trips)}")
    ops = Counter()
    for at in alive:
        weight = 1
        for (first, last), n in zip(loops, trips, strict=False):
            weight *= n if first <= at <= last else 1
        ops[code[at].op] += weight
    return Count(loops, ops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("listing", nargs="?", type=Path, help="file; standard input if left out")
    parser.add_argument("--function", default="", help="part of the name; all functions if left out")
    parser.add_argument("--trips", type=int, nargs="+", default=[], help="of each loop; 1 if left out")
    parser.add_argument("--warps", type=int, default=1, help="of a program (thread block)")
    parser.add_argument("--grid", type=int, help="programs; needed for the time")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--clock", type=float, default=1.755, help="GHz")
    args = parser.parse_args()
    if args.listing and not args.listing.is_file():
        parser.error(f"no such file: {args.listing}")
    listing = args.listing.read_text() if args.listing else sys.stdin.read()
    for name, code in parse(listing).items():
        if args.function not in name:
            continue
        try:
            counted = count(code, args.trips)
        except ValueError as error:
            parser.error(f"{name}: {error}")
        issued = counted.total() * args.warps
        print(f"{name}: {len(code)} instructions in the listing")
        for i, (first, last) in enumerate(counted.loops):
            print(f"  loop {i}: {first} to {last}, {last - first + 1} instructions, x {[*args.trips, *[1] * 99][i]}")
        print(f"  executed: {counted.total():,} a warp, {issued:,} a program of {args.warps} warps")
        print(f"  barriers (BAR): {counted.total('BAR.')}, local memory (LDL, STL): {counted.total('LDL', 'STL')}")
        print("  most:", ", ".join(f"{op} {n}" for op, n in counted.ops.most_common(12)))
        if args.grid:
            time = issued * args.grid / (args.multiprocessors * 4 * args.clock * 1e3)
            print(f"  time by count: {time:.1f} us ({args.multiprocessors} multiprocessors, {args.clock} GHz)")


if __name__ == "__main__":
    processes.run(main)
