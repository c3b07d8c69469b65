"""The reader of machine code, on snippets as nvdisasm prints them."""

from __future__ import annotations

from sass import Kernel, Loop, kernels

HEAD = """
//--------------------- .text._Z6kernelv --------------------------
	.section	.text._Z6kernelv,"ax",@progbits
.text._Z6kernelv:
	//## File "/a.cu", line 30
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
.L_x_0:
	//## File "/a.cu", line 10 inlined at "/a.cu", line 20
	//## File "/a.cu", line 20 inlined at "/a.cu", line 30
	//## File "/a.cu", line 30
"""
TAIL = """
        /*0400*/              @!P0 BRA `(.L_x_0) ;
        /*0410*/                   EXIT ;
.L_x_1:
        /*0420*/                   BRA `(.L_x_1);
"""
# Two packs of each operand: live at R4, shadow at R6.
LOADS = """
        /*0010*/               @P0 LDG.E.128 R8, desc[UR4][R4.64] ;
        /*0020*/               @P0 LDG.E.128 R12, desc[UR4][R6.64] ;
        /*0030*/               @P1 LDG.E.128 R16, desc[UR4][R4.64+0x1000] ;
        /*0040*/               @P1 LDG.E.128 R20, desc[UR4][R6.64+0x1000] ;
"""
STORES = """
        /*0080*/               @P0 STG.E.128 desc[UR4][R6.64], R12 ;
        /*0090*/               @P1 STG.E.128 desc[UR4][R6.64+0x1000], R20 ;
"""
USE = """
        /*0050*/                   FADD R30, R11, -R12 ;
"""


def kernel(body: str) -> Kernel:
    (found,) = kernels(HEAD + body + TAIL)
    return found


def loop(body: str) -> Loop:
    (found,) = kernel(body).loops
    return found


def test_a_loop_has_its_loads_its_stores_and_the_lines_it_comes_from() -> None:
    found = loop(LOADS + USE + STORES)
    assert found.loads_before_first_use == found.widths(is_load=True) == {16: 4}
    assert found.widths(is_load=False) == {16: 2}
    assert found.spaces == {"global"} and found.store_stride == 16
    assert found.instructions[0].lines == (10, 20, 30)
    assert kernel(LOADS).name == "_Z6kernelv"
    assert kernel(LOADS).instructions[0].lines == (30,)


def test_a_use_between_the_loads_ends_what_is_in_flight() -> None:
    lines = LOADS.strip("\n").splitlines()
    assert loop("\n".join([*lines[:2], USE, *lines[2:], STORES])).loads_before_first_use == {16: 2}
    assert loop("\n".join([*lines[:1], "        /*0014*/    LOP3.LUT P4, RZ, R10, 0x1, RZ, 0xc0, !PT ;", *lines[1:]])).loads_before_first_use == {16: 1}  # fmt: skip # noqa: E501
    # What overwrites a register is no use of it, and neither is a register of another name.
    harmless = "        /*0044*/                   IMAD.MOV.U32 R40, RZ, RZ, UR8 ;"
    assert loop("\n".join([*lines, harmless, STORES])).loads_before_first_use == {16: 4}


def test_an_address_that_is_loaded_in_the_loop_is_a_use() -> None:
    pointer = "        /*0008*/                   LDG.E.64 R6, desc[UR4][R2.64] ;"
    assert loop(pointer + LOADS + STORES).loads_before_first_use == {8: 1, 16: 1}


def test_a_store_waits_for_all_registers_of_its_value() -> None:
    assert loop(LOADS.replace("R20,", "R24,") + STORES).instructions[5].read == {6, 20, 21, 22, 23}


def test_stores_beside_each_other_are_strided() -> None:
    assert loop(LOADS + STORES.replace("R6.64+0x1000", "R6.64+0x10")).store_stride == 32
    halves = STORES + STORES.replace("R6.64]", "R6.64+0x10]").replace("R6.64+0x1000]", "R6.64+0x1010]")
    assert loop(LOADS + halves).store_stride == 32


def test_address_spaces_and_widths_of_every_architecture() -> None:
    # Turing prints neither a descriptor nor a 64-bit suffix; a spill is an access to local memory.
    found = loop("""
        /*0010*/                   LDG.E.128.SYS R8, [R4] ;
        /*0020*/                   LDG.E.U16.SYS R12, [R6+-0x2] ;
        /*0030*/                   LD.E R13, [R6.64+0x8] ;
        /*0040*/                   LDL.LU R3, [R1+0x4] ;
        /*0050*/                   STG.E.U8 desc[UR4][R6.64], R13 ;
    """)
    assert found.widths(is_load=True) == {16: 1, 2: 1, 4: 2} and found.widths(is_load=False) == {1: 1}
    assert found.spaces == {"global", "generic", "local"}
    assert [access.offset for access in found.accesses] == [0, -2, 8, 4, 0]


def test_only_innermost_loops_with_memory_accesses_count() -> None:
    inner = ".L_x_5:" + LOADS + "        /*0100*/              @!P0 BRA `(.L_x_5) ;\n"
    idle = (
        ".L_x_6:\n        /*0200*/                   IADD3 R1, R1, 0x1, RZ ;\n        /*0210*/  @P1 BRA `(.L_x_6) ;\n"
    )
    (found,) = kernel(inner + STORES + idle).loops
    assert found.widths(is_load=True) == {16: 4} and not found.widths(is_load=False)


def test_what_is_rare_is_left_out_of_a_loop_and_is_none_itself() -> None:
    rare = """
	//## File "/a.cu", line 15 inlined at "/a.cu", line 40
	//## File "/a.cu", line 40
.L_x_7:
        /*0050*/                   LDG.E R40, desc[UR4][R4.64] ;
        /*0060*/               @P2 BRA `(.L_x_7) ;
	//## File "/a.cu", line 30
"""
    (without,) = next(kernels(HEAD + LOADS + rare + STORES + TAIL, rare=[40])).loops
    (innermost,) = next(kernels(HEAD + LOADS + rare + STORES + TAIL)).loops
    assert without.widths(is_load=True) == {16: 4} and innermost.widths(is_load=True) == {4: 1}
