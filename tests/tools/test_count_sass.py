import subprocess
import sys
from pathlib import Path

import pytest

from count_sass import count, parse

TOOL = Path(__file__).parents[2] / "tools" / "count_sass.py"

# Two nested loops, the outer one left by a call that does not return; a subroutine; a block out of line, which branches
# back without being a loop; padding.
CODE = """
    LDG.E.128 R4, desc[UR4][R2.64]
outer: BAR.SYNC.DEFER_BLOCKING 0x0
    BRA.DIV UR4, {aside}
inner: HMMA.16816.F32 R0, R4, R8, RZ
    @!P0 CALL.REL.NOINC {slow}
    @P0 BRA {inner}
    STL [R1], R0
    @P1 CALL.REL.NOINC {leave}
    BRA {outer}
leave: STG.E desc[UR4][R2.64], R0
    EXIT
aside: WARPSYNC R0
    BRA {inner}
slow: MUFU.RCP R0, R0
    RET.REL.NODEC R2 0x0
end: BRA {end}
    NOP
"""


def listing(form: str) -> str:
    """CODE as a disassembler writes it."""
    rows = [row.strip().split(": ") for row in CODE.strip().splitlines()]
    places = {row[0]: i for i, row in enumerate(rows) if len(row) == 2}
    if form == "cuobjdump":
        names = {name: f"0x{16 * i:x}" for name, i in places.items()}
        text = 'arch = sm_90\n\t\tFunction : kernel\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    elif form == "nvdisasm":
        names = {name: f"`(.L_x_{i})" for name, i in places.items()}
        text = '\t.section\t.text.kernel,"ax",@progbits\n.text.kernel:\n'
    else:
        names = {name: f"LBB{i}" for name, i in places.items()}
        text = "Function:kernel\n"
    for i, row in enumerate(rows):
        if len(row) == 2 and form != "cuobjdump":
            text += f"{names[row[0]].strip('`()')}:\n"
        code = row[-1].format(**names)
        text += f"--:-:-:Y:2\t{code};\n" if form == "triton" else f"        /*{16 * i:04x}*/    {code} ;    /* 0x0 */\n"
    return text


@pytest.mark.parametrize("form", ["cuobjdump", "nvdisasm", "triton"])
def test_loops_and_weights(form):
    ((name, code),) = parse(listing(form)).items()
    assert name == ("kernel sm_90" if form == "cuobjdump" else "kernel")
    assert len(code) == 17
    assert count(code).total() == 13  # without the subroutine and the padding
    counted = count(code, [3, 5])
    assert counted.loops == [(1, 8), (3, 5)]
    assert counted.ops["HMMA.16816.F32"] == 15
    assert counted.ops["LDG.E.128"] == 1
    assert counted.total("BAR.") == counted.total("STL") == 3
    assert counted.total() == 5 + 5 * 3 + 3 * 15
    assert count(code, [3]).total("HMMA") == 3
    with pytest.raises(ValueError, match="trips: expected at most 2, one for each loop, got 3"):
        count(code, [3, 5, 7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.sass"], "error: no such file: none.sass"),
        (["--trips", "1", "2", "3"], "error: kernel sm_90: trips: expected at most 2, one for each loop, got 3"),
    ],
)
def test_what_cannot_be_counted(arguments, message):
    done = subprocess.run(
        [sys.executable, TOOL, *arguments], input=listing("cuobjdump"), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_command():
    options = ["--trips", "3", "5", "--warps", "4", "--grid", "132000", "--clock", "2"]
    command = [sys.executable, TOOL, *options]
    text = listing("cuobjdump") + listing("cuobjdump").replace("sm_90", "sm_80")
    done = subprocess.run([*command, "--function", "sm_80"], input=text, capture_output=True, text=True, check=True)
    assert "sm_90" not in done.stdout
    assert "kernel sm_80: 17 instructions in the listing" in done.stdout
    assert "loop 1: 3 to 5, 3 instructions, x 5" in done.stdout
    assert "executed: 65 a warp, 260 a program of 4 warps" in done.stdout
    assert "barriers (BAR): 3, local memory (LDL, STL): 3" in done.stdout
    assert "time by count: 32.5 us (132 multiprocessors, 2.0 GHz)" in done.stdout
