"""The machine that runs PTX on the CPU: what its instructions give, and that it sees each kind of mistake."""

import math
import re
import struct
from fractions import Fraction

import numpy as np
import pytest

from tests.helpers.building import needs_compiler
from tests.helpers.ptx.assembler import assemble
from tests.helpers.ptx.machine import Fault, run

pytestmark = needs_compiler
HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<20>;
    .reg .b64 %d<20>;
"""


def entry(body, shared=""):
    head = f"{HEAD}.visible .entry k(.param .u64 a, .param .u64 b)\n"
    return f"{head}{{{REGISTERS}{shared}\n{body}\n    ret;\n}}\n"


def launch(body, *, block=32, grid=1, inputs=None, outputs=None, shared="", **options):
    """Run a body with the addresses of two arrays as parameters; what was counted."""
    inputs = np.zeros(64, np.uint64) if inputs is None else inputs
    outputs = np.zeros(64, np.uint64) if outputs is None else outputs
    kernel = assemble(entry(body, shared))["k"]
    memory = {
        "readable": [(inputs.ctypes.data, inputs.nbytes)],
        "writable": [(outputs.ctypes.data, outputs.nbytes)],
    }
    return run(kernel, (grid,), (block,), (inputs.ctypes.data, outputs.ctypes.data), **memory, **options)


COMPUTE = """
    ld.param.u64 %d0, [a];
    ld.param.u64 %d1, [b];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %d2, %r0, 32, %d0;
    ld.global.u64 %d10, [%d2];
    ld.global.u64 %d11, [%d2+8];
    ld.global.u64 %d12, [%d2+16];
    ld.global.u32 %r10, [%d2];
    ld.global.u32 %r11, [%d2+8];
    ld.global.u32 %r12, [%d2+16];
    ld.global.u16 %h1, [%d2];
    mul.wide.u32 %d3, %r0, 8;
    add.s64 %d1, %d1, %d3;
    mov.u64 %d13, 0;
    INSTRUCTION
    st.global.u64 [%d1], %d13;
"""
INTERESTING = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    63,
    64,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]


def signed(value, bits):
    value %= 2**bits
    return value - 2**bits if value >> (bits - 1) else value


def shift(value, by, bits, is_signed=False):
    """To the right."""
    value = signed(value, bits) if is_signed else value % 2**bits
    return value >> min(by % 2**32, 2 * bits)


def truncated(a, b):
    """The quotient as C rounds it."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permute(a, b, selector):
    whole = (a % 2**32 | b % 2**32 << 32).to_bytes(8, "little")
    out = []
    for nibble in range(4):
        choice = selector >> 4 * nibble & 15
        byte = whole[choice & 7]
        out.append((255 if byte & 128 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def funnel(low, high, by):
    return ((high % 2**32) << 32 | low % 2**32) >> by


def to_f32(bits):
    return struct.unpack("<f", struct.pack("<I", bits % 2**32))[0]


def to_f64(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def of_f32(value):
    return int(np.float32(value).view(np.uint32))


def of_f64(value):
    return int(np.float64(value).view(np.uint64))


WIDE = "cvt.u64.u32 %d13, %r13;"
INTEGERS = {  # instruction: what it gives of three operands
    "add.s32 %r13, %r10, %r11; " + WIDE: lambda a, b, c: (a + b) % 2**32,
    "sub.s64 %d13, %d10, %d11;": lambda a, b, c: a - b,
    "mul.lo.s32 %r13, %r10, %r11; " + WIDE: lambda a, b, c: a * b % 2**32,
    "mul.hi.s32 %r13, %r10, %r11; " + WIDE: lambda a, b, c: signed(a, 32) * signed(b, 32) >> 32 & (2**32 - 1),
    "mul.hi.u64 %d13, %d10, %d11;": lambda a, b, c: a * b >> 64,
    "mul.wide.s32 %d13, %r10, %r11;": lambda a, b, c: signed(a, 32) * signed(b, 32),
    "mul.wide.u32 %d13, %r10, %r11;": lambda a, b, c: (a % 2**32) * (b % 2**32),
    "mad.wide.s32 %d13, %r10, %r11, %d12;": lambda a, b, c: signed(a, 32) * signed(b, 32) + c,
    "mad.lo.s32 %r13, %r10, %r11, %r12; " + WIDE: lambda a, b, c: (a * b + c) % 2**32,
    "min.s32 %r13, %r10, %r11; " + WIDE: lambda a, b, c: min(signed(a, 32), signed(b, 32)) % 2**32,
    "max.u64 %d13, %d10, %d11;": lambda a, b, c: max(a, b),
    "abs.s64 %d13, %d10;": lambda a, b, c: abs(signed(a, 64)),
    "neg.s32 %r13, %r10; " + WIDE: lambda a, b, c: -a % 2**32,
    "and.b64 %d13, %d10, %d11;": lambda a, b, c: a & b,
    "or.b32 %r13, %r10, %r11; " + WIDE: lambda a, b, c: (a | b) % 2**32,
    "xor.b64 %d13, %d10, %d11;": lambda a, b, c: a ^ b,
    "not.b64 %d13, %d10;": lambda a, b, c: ~a,
    "shl.b32 %r13, %r10, %r11; " + WIDE: lambda a, b, c: (a << min(b % 2**32, 64)) % 2**32,
    "shr.u64 %d13, %d10, %r11;": lambda a, b, c: shift(a, b, 64),
    "shr.s32 %r13, %r10, %r11; " + WIDE: lambda a, b, c: shift(a, b, 32, True) % 2**32,
    "shf.r.wrap.b32 %r13, %r10, %r11, %r12; " + WIDE: lambda a, b, c: funnel(a, b, c % 32) % 2**32,
    "shf.l.wrap.b32 %r13, %r10, %r11, %r12; " + WIDE: lambda a, b, c: funnel(a, b, 32 - c % 32) % 2**32,
    "shf.r.clamp.b32 %r13, %r10, %r11, %r12; " + WIDE: lambda a, b, c: funnel(a, b, min(c % 2**32, 32)) % 2**32,
    "prmt.b32 %r13, %r10, %r11, %r12; " + WIDE: lambda a, b, c: permute(a, b, c),
    "dp2a.lo.u32.u32 %r13, %r10, %r11, %r12; " + WIDE: lambda a, b, c: (
        (c + (a & 0xFFFF) * (b & 255) + (a >> 16 & 0xFFFF) * (b >> 8 & 255)) % 2**32
    ),
    "dp2a.hi.u32.u32 %r13, %r10, %r11, %r12; " + WIDE: lambda a, b, c: (
        (c + (a & 0xFFFF) * (b >> 16 & 255) + (a >> 16 & 0xFFFF) * (b >> 24 & 255)) % 2**32
    ),
    "dp4a.u32.u32 %r13, %r10, %r11, %r12; " + WIDE: lambda a, b, c: (
        (c + sum((a >> i & 255) * (b >> i & 255) for i in (0, 8, 16, 24))) % 2**32
    ),
    "bfe.u32 %r13, %r10, 5, 9; " + WIDE: lambda a, b, c: a >> 5 & 511,
    "bfe.s32 %r13, %r10, 5, 9; " + WIDE: lambda a, b, c: signed(a >> 5, 9) % 2**32,
    "bfi.b32 %r13, %r10, %r11, 5, 9; " + WIDE: lambda a, b, c: (b & ~(511 << 5) | (a & 511) << 5) % 2**32,
    "lop3.b32 %r13, %r10, %r11, %r12, 0xE2; " + WIDE: lambda a, b, c: (a & b | c & ~b) % 2**32,
    "popc.b64 %r13, %d10; " + WIDE: lambda a, b, c: bin(a).count("1"),
    "clz.b32 %r13, %r10; " + WIDE: lambda a, b, c: 32 - (a % 2**32).bit_length(),
    "brev.b32 %r13, %r10; " + WIDE: lambda a, b, c: int(f"{a % 2**32:032b}"[::-1], 2),
    "div.s32 %r13, %r10, 7; " + WIDE: lambda a, b, c: truncated(signed(a, 32), 7) % 2**32,
    "rem.u32 %r13, %r10, 7; " + WIDE: lambda a, b, c: a % 2**32 % 7,
    "cvt.s64.s32 %d13, %r10;": lambda a, b, c: signed(a, 32),
    "cvt.u32.u64 %r13, %d10; " + WIDE: lambda a, b, c: a % 2**32,
    "cvt.s32.s16 %r13, %h1; " + WIDE: lambda a, b, c: signed(a, 16) % 2**32,
    "cvt.u32.u16 %r13, %h1; " + WIDE: lambda a, b, c: a % 2**16,
    "cvt.sat.u8.s32 %r13, %r10; " + WIDE: lambda a, b, c: min(max(signed(a, 32), 0), 255),
    "mov.b64 {%r13, %r14}, %d10; mov.b64 %d13, {%r14, %r13};": lambda a, b, c: a >> 32 | a % 2**32 << 32,
    "setp.lt.s32 %p1, %r10, %r11; selp.u64 %d13, 5, 6, %p1;": lambda a, b, c: 5 if signed(a, 32) < signed(b, 32) else 6,
    "setp.lt.u32 %p1, %r10, %r11; selp.u64 %d13, 5, 6, %p1;": lambda a, b, c: 5 if a % 2**32 < b % 2**32 else 6,
    "setp.eq.s64 %p2, %d11, 0; setp.ge.and.s64 %p1|%p3, %d10, %d11, !%p2; @%p1 mov.u64 %d13, 4;": (
        lambda a, b, c: 4 if signed(a, 64) >= signed(b, 64) and b != 0 else 0
    ),
    "setp.eq.s64 %p2, %d11, 0; setp.ge.or.s64 %p1|%p3, %d10, %d11, %p2; @%p3 mov.u64 %d13, 3;": (
        lambda a, b, c: 3 if signed(a, 64) < signed(b, 64) or b == 0 else 0
    ),
    "setp.eq.s64 %p1, %d10, %d11; not.pred %p2, %p1; @!%p2 mov.u64 %d13, 9;": lambda a, b, c: 9 if a == b else 0,
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_instructions_on_whole_numbers(instruction):
    random = np.random.default_rng(len(instruction))
    numbers = random.integers(0, 2**64, (32 * 8, 4), np.uint64)
    numbers[:, :3] = np.where(
        random.random((256, 3)) < 0.6, random.choice(np.array(INTERESTING, np.uint64), (256, 3)), numbers[:, :3]
    )
    expected = [INTEGERS[instruction](*map(int, row[:3])) % 2**64 for row in numbers]
    assert len(set(expected)) > 1
    found = np.zeros(256, np.uint64)
    launch(COMPUTE.replace("INSTRUCTION", instruction), block=256, inputs=numbers, outputs=found)
    assert found.tolist() == expected


FLOATS = {
    "add.rn.f32 %r13, %r10, %r11; " + WIDE: lambda a, b, c: of_f32(np.float32(to_f32(a)) + np.float32(to_f32(b))),
    "mul.f32 %r13, %r10, %r11; " + WIDE: lambda a, b, c: of_f32(np.float32(to_f32(a)) * np.float32(to_f32(b))),
    "sub.f64 %d13, %d10, %d11;": lambda a, b, c: of_f64(to_f64(a) - to_f64(b)),
    "div.rn.f64 %d13, %d10, %d11;": lambda a, b, c: of_f64(to_f64(a) / to_f64(b)),
    "rcp.rn.f64 %d13, %d10;": lambda a, b, c: of_f64(1 / to_f64(a)),
    "abs.f64 %d13, %d10; sqrt.rn.f64 %d13, %d13;": lambda a, b, c: of_f64(math.sqrt(abs(to_f64(a)))),
    "fma.rn.f64 %d13, %d10, %d11, %d12;": lambda a, b, c: of_f64(
        float(Fraction(to_f64(a)) * Fraction(to_f64(b)) + Fraction(to_f64(c)))
    ),
    "max.f64 %d13, %d10, %d11;": lambda a, b, c: of_f64(max(to_f64(a), to_f64(b))),
    "neg.f64 %d13, %d10;": lambda a, b, c: of_f64(-to_f64(a)),
    "cvt.rzi.s32.f64 %r13, %d10; " + WIDE: lambda a, b, c: int(to_f64(a)) % 2**32,
    "cvt.rni.f32.f32 %r13, %r10; " + WIDE: lambda a, b, c: of_f32(np.rint(np.float32(to_f32(a)))),
    "cvt.rmi.f64.f64 %d13, %d10;": lambda a, b, c: of_f64(math.floor(to_f64(a))),
    "cvt.rpi.s64.f64 %d13, %d10;": lambda a, b, c: math.ceil(to_f64(a)),
    "cvt.rn.f32.f64 %r13, %d10; " + WIDE: lambda a, b, c: of_f32(to_f64(a)),
    "cvt.f64.f32 %d13, %r10;": lambda a, b, c: of_f64(to_f32(a)),
    "cvt.rn.f64.s32 %d13, %r10;": lambda a, b, c: of_f64(signed(a, 32)),
    "cvt.rn.f32.s32 %r13, %r10; " + WIDE: lambda a, b, c: of_f32(signed(a, 32)),
    "setp.lt.f64 %p1, %d10, %d11; selp.u64 %d13, 5, 6, %p1;": lambda a, b, c: 5 if to_f64(a) < to_f64(b) else 6,
    "setp.geu.f32 %p1, %r10, %r11; selp.u64 %d13, 5, 6, %p1;": lambda a, b, c: 5 if to_f32(a) >= to_f32(b) else 6,
    "add.f64 %d13, %d10, 0d3FE0000000000000;": lambda a, b, c: of_f64(to_f64(a) + 0.5),
}


@pytest.mark.parametrize("instruction", FLOATS)
def test_instructions_on_floats(instruction):
    random = np.random.default_rng(len(instruction))
    numbers = np.zeros((64, 4), np.uint64)
    values = (
        random.choice([-2.5, -0.5, 0.5, 1.5, 1e-3, 3.0, 7.25, 1000.75], (64, 3)) * random.random((64, 3)).round(3)
        + 0.001
    )
    numbers[:, :3] = values.view(np.uint64)
    if "32 %r13, %r10" in instruction or "f32 %p1" in instruction or "f64.f32" in instruction:
        numbers[:, :3] = values.astype(np.float32).view(np.uint32)
    expected = [FLOATS[instruction](*map(int, row[:3])) % 2**64 for row in numbers]
    assert len(set(expected)) > 1
    found = np.zeros(64, np.uint64)
    launch(COMPUTE.replace("INSTRUCTION", instruction), block=64, inputs=numbers, outputs=found)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("instruction", "kept", "flushed"),
    [
        ("mul.f32 %r13, %r10, %r11; " + WIDE, 0x00400000, 0),
        ("add.f32 %r13, %r12, %r12; " + WIDE, 0x80000002, 0x80000000),
        ("cvt.f64.f32 %d13, %r12;", of_f64(-(2.0**-149)), of_f64(-0.0)),
        ("setp.lt.f32 %p1, %r12, 0f00000000; selp.u64 %d13, 5, 6, %p1;", 5, 6),
        ("add.f64 %d13, %d9, %d9;", 2, 2),
    ],
)
def test_numbers_too_small_to_be_normal(instruction, kept, flushed):
    """The product of the smallest normal number and a half, and the smallest of all, negative."""
    numbers = np.zeros((32, 4), np.uint64)
    numbers[:, :3] = (0x00800000, of_f32(0.5), 0x80000001)
    for text, expected in (
        (instruction, kept),
        (re.sub(r"(\w+)((?:\.lt)?)\.(f32|f64\.f32)", r"\1\2.ftz.\3", instruction), flushed),
    ):
        found = np.zeros(32, np.uint64)
        launch(COMPUTE.replace("INSTRUCTION", "mov.u64 %d9, 1;\n" + text), inputs=numbers, outputs=found)
        assert set(found.tolist()) == {expected}, text


def test_what_the_machine_does_not_know_is_refused():
    for instruction in ("ex2.approx.f32 %r1, %r2;", "add.rz.f32 %r1, %r2, %r3;", "call foo;", "bar.sync 1, 64;"):
        with pytest.raises(ValueError, match="this machine does not know it"):
            assemble(entry(instruction))
    with pytest.raises(ValueError, match="local memory"):
        assemble(entry("ret;", ".local .align 4 .b8 depot[8];"))


SHARED = ".shared .align 16 .b8 tile[1024];"
BEGIN = """
    ld.param.u64 %d0, [a];
    ld.param.u64 %d1, [b];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, tile;
    mad.lo.s32 %r2, %r0, 4, %r1;
    mul.wide.u32 %d2, %r0, 4;
    add.s64 %d3, %d1, %d2;
"""
NEIGHBOUR = """
    xor.b32 %r3, %r0, DISTANCE;
    mad.lo.s32 %r4, %r3, 4, %r1;
    ld.shared.u32 %r5, [%r4];
    st.global.u32 [%d3], %r5;
"""
ONE_BYTE = "st.shared.u8 [%r2], %r0; ld.shared.u32 %r5, [%r2];"
LOOK_UP = "ld.shared.u8 %r5, [%r2]; mad.lo.s32 %r6, %r5, WIDTH, %r1; add.s32 %r6, %r6, 8; ld.shared.u16 %r5, [%r6];"
EXCHANGE = BEGIN + "st.shared.u32 [%r2], %r0;\n BARRIER\n" + NEIGHBOUR
COPY = (
    BEGIN
    + """
    mad.lo.s32 %r2, %r0, 16, %r1;
    mul.wide.u32 %d4, %r0, 16;
    add.s64 %d5, %d0, %d4;
    cp.async.cg.shared.global [%r2], [%d5], 16;
    WAIT
    ld.shared.u32 %r5, [%r2+4];
    st.global.u32 [%d3], %r5;
"""
)


def test_threads_exchange_by_way_of_a_barrier_and_lanes_by_one_of_their_warp():
    found = np.zeros(64, np.uint32)
    for seed in range(5):
        launch(
            EXCHANGE.replace("BARRIER", "bar.sync 0;").replace("DISTANCE", "33"),
            block=64,
            outputs=found,
            shared=SHARED,
            seed=seed,
        )
        assert found.tolist() == [i ^ 33 for i in range(64)]
    launch(
        EXCHANGE.replace("BARRIER", "bar.warp.sync -1;").replace("DISTANCE", "3"),
        block=64,
        outputs=found,
        shared=SHARED,
    )
    assert found.tolist() == [i ^ 3 for i in range(64)]
    body = BEGIN + "shfl.sync.bfly.b32 %r5, %r0, 5, 31, -1;\n st.global.u32 [%d3], %r5;"
    launch(body, block=64, outputs=found, shared=SHARED)
    assert found.tolist() == [i ^ 5 for i in range(64)]


@pytest.mark.parametrize(
    ("barrier", "distance", "message"),
    [
        ("", "33", "races with a (write|read) of thread|depends on memory nobody wrote|nobody wrote"),
        ("", "1", "races with a write of thread"),
        ("bar.warp.sync -1;", "33", "races with a (write|read)|nobody wrote"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra L; bar.sync 0; bra M; L: bar.sync 0; M:", "33", "wait at two barriers"),
        ("bar.sync 0; L: bra L;", "33", "does not end"),
        ("bar.sync 0; trap;", "33", "is a trap"),
    ],
)
def test_threads_that_do_not_wait_for_each_other_are_seen(barrier, distance, message):
    body = EXCHANGE.replace("BARRIER", barrier.replace(";", ";\n").replace(":", ":\n")).replace("DISTANCE", distance)
    for seed in range(4):
        with pytest.raises(Fault, match=message):
            launch(body, block=64, outputs=np.zeros(64, np.uint32), shared=SHARED, seed=seed, limit=10**5)


def test_a_barrier_that_some_threads_do_not_reach_is_seen():
    for first in (7, 32, 63):
        with pytest.raises(Fault, match=f"a barrier that {64 - first} of 64 threads do not reach"):
            launch(BEGIN + f"setp.lt.u32 %p1, %r0, {first};\n @%p1 bar.sync 0;", block=64, shared=SHARED)


def test_a_copy_takes_place_when_it_is_waited_for():
    inputs, found = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    for wait in ("cp.async.wait_all;", "cp.async.commit_group; cp.async.wait_group 0;"):
        counted = launch(COPY.replace("WAIT", wait.replace(";", ";\n")), inputs=inputs, outputs=found, shared=SHARED)
        assert found.tolist() == list(range(1, 128, 4))
        assert counted.totals == {
            "barriers": 0,
            "most_in_flight": 512,
            "sectors_read": 16 + (inputs.ctypes.data % 32 > 0),
            "sectors_written": 4 + (found.ctypes.data % 32 > 0),
        }


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        ("", "meets a copy that nobody waited for"),
        ("cp.async.commit_group; cp.async.wait_group 1;", "meets a copy that nobody waited for"),
        ("cp.async.wait_group 0;", "meets a copy that nobody waited for"),  # it is of no group yet
        ("cp.async.wait_all; bar.sync 0; st.shared.u32 [%r2], %r0; bar.sync 0; mov.u32 %r2, %r1;", None),
        ("ret;", "ends with copies that nobody waited for"),
    ],
)
def test_copies_that_nobody_waits_for_are_seen(wait, message):
    inputs = np.arange(128, dtype=np.uint32)
    body = COPY.replace("WAIT", wait.replace(";", ";\n"))
    if message is None:
        launch(body, inputs=inputs, outputs=np.zeros(32, np.uint32), shared=SHARED)
        return
    with pytest.raises(Fault, match=message):
        launch(body, inputs=inputs, outputs=np.zeros(32, np.uint32), shared=SHARED)


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ("ld.global.u32 %r5, [%d3+4];", r"reads beyond the end of its memory, by 4 bytes|reads outside of all memory"),
        ("st.global.u32 [%d0], %r0;", "writes to memory that is only to be read"),
        ("ld.global.u32 %r5, [%d0+-4];", "reads outside of all memory"),
        ("ld.global.u64 %d5, [%d0+4];", "not a multiple of its 8 bytes"),
        ("ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%d0+8];", "not a multiple of its 16 bytes"),
        ("ld.shared.u32 %r5, [%r2+1024];", "reads outside of the block's 1024 bytes of shared memory"),
        ("st.shared.u32 [%r1+-4], %r0;", "writes outside of the block's 1024 bytes of shared memory"),
        ("st.global.u32 [%d1], %r0;", "races for a byte of global memory"),
        ("ld.shared.u32 %r5, [%r2]; st.global.u32 [%d3], %r5;", "stores what depends on memory that nobody wrote"),
        ("ld.shared.u32 %r5, [%r2]; setp.eq.u32 %p1, %r5, 0; @%p1 trap;", "decides by memory that nobody wrote"),
        ("ld.shared.u32 %r5, [%r2]; cvt.u64.u32 %d5, %r5; ld.global.u32 %r5, [%d5];", "address that depends on memory"),
        ("ld.shared.u32 %r5, [%r2]; and.b32 %r5, %r5, 0; st.global.u32 [%d3], %r5;", None),
        (f"{ONE_BYTE} and.b32 %r5, %r5, 255; st.global.u32 [%d3], %r5;", None),
        (
            f"{ONE_BYTE} prmt.b32 %r5, %r5, 0, 0x4440; st.global.u32 [%d3], %r5;",
            None,
        ),
        (
            f"{ONE_BYTE} prmt.b32 %r5, %r5, 0, 0x4410; st.global.u32 [%d3], %r5;",
            "nobody wrote",
        ),
        # What is multiplied by 0 does not matter.
        (f"{ONE_BYTE} mov.u32 %r6, 0; dp4a.u32.u32 %r6, %r5, 255, %r6; st.global.u32 [%d3], %r6;", None),
        (f"{ONE_BYTE} mov.u32 %r6, 0; dp4a.u32.u32 %r6, %r5, 256, %r6; st.global.u32 [%d3], %r6;", "nobody wrote"),
        (f"{ONE_BYTE} mov.u32 %r6, 0; dp2a.lo.u32.u32 %r6, 7, %r5, %r6; st.global.u32 [%d3], %r6;", None),
        (f"{ONE_BYTE} mov.u32 %r6, 0; dp2a.hi.u32.u32 %r6, 7, %r5, %r6; st.global.u32 [%d3], %r6;", "nobody wrote"),
        # A known byte beside unknown ones: in a sum or product it stays known if no carry can reach it.
        (f"{ONE_BYTE} shl.b32 %r6, %r5, 8; add.s32 %r6, %r6, 7; st.global.u8 [%d3], %r6;", None),
        (f"{ONE_BYTE} mad.lo.s32 %r6, %r5, 256, %r0; st.global.u8 [%d3], %r6;", None),
        (f"{ONE_BYTE} shr.u32 %r5, %r5, 7; mul.lo.s32 %r6, %r5, 3; st.global.u8 [%d3], %r6;", "nobody wrote"),
        (f"{ONE_BYTE} add.s32 %r6, %r5, %r5; shr.u32 %r6, %r6, 16; st.global.u8 [%d3], %r6;", "nobody wrote"),
        (f"{ONE_BYTE} shr.u32 %r6, %r5, 4; st.global.u8 [%d3], %r6;", "nobody wrote"),
        # A look-up by a byte that nobody wrote: it stays in shared memory, and what it gives must not be needed.
        (LOOK_UP.replace("WIDTH", "2"), None),
        (LOOK_UP.replace("WIDTH", "8"), "reads outside of the block's 1024 bytes"),
        (
            LOOK_UP.replace("WIDTH", "2") + "st.global.u32 [%d3], %r5;",
            "stores what depends on memory that nobody wrote",
        ),
        ("mov.u64 %d5, tile; st.u32 [%d5+64], 7; ld.shared.u32 %r5, [%r1+64];", "races with a write"),
    ],
)
def test_accesses_that_are_wrong_are_seen(access, message):
    aligned = np.zeros(96, np.uint32)
    inputs = aligned[-aligned.ctypes.data // 4 % 4 :][:64]
    outputs = np.zeros(32, np.uint32)
    body = BEGIN + access.replace(";", ";\n")
    if message is None:
        launch(body, inputs=inputs, outputs=outputs, shared=SHARED)
        return
    with pytest.raises(Fault, match=message):
        launch(body, inputs=inputs, outputs=outputs, shared=SHARED)


def test_lanes_that_part_meet_again_and_each_issue_is_counted():
    body = (
        BEGIN
        + """
    mov.u32 %r5, 0;
    and.b32 %r6, %r0, 3;
LOOP:
    add.s32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, %r6;
    @%p1 bra LOOP;
    setp.eq.u32 %p2, %r6, 2;
    @%p2 bra TWO;
    add.s32 %r5, %r5, 100;
    bra END;
TWO:
    add.s32 %r5, %r5, 200;
END:
    st.global.u32 [%d3], %r5;
"""
    )
    kernel, found = assemble(entry(body, SHARED))["k"], np.zeros(32, np.uint32)
    counts = launch(body, outputs=found, shared=SHARED).counts
    assert found.tolist() == [max(i % 4, 1) + (200 if i % 4 == 2 else 100) for i in range(32)]
    by_text = {text: (int(row["issues"]), int(row["lanes"])) for text, row in zip(kernel.texts, counts, strict=True)}
    assert by_text["add.s32 %r5, %r5, 1"] == (3, 32 + 16 + 8)
    assert by_text["add.s32 %r5, %r5, 100"] == (1, 24) and by_text["add.s32 %r5, %r5, 200"] == (1, 8)
    assert by_text["st.global.u32 [%d3], %r5"] == (1, 32)


@pytest.mark.parametrize(
    ("address", "width", "wavefronts", "fewest"),
    [
        ("mad.lo.s32 %r4, %r0, 4, %r1;", "u32", 1, 1),
        ("mad.lo.s32 %r4, %r0, 8, %r1;", "u32", 2, 1),
        ("mad.lo.s32 %r4, %r0, 0, %r1;", "u32", 1, 1),  # one word for all
        ("shl.b32 %r5, %r0, 5; mad.lo.s32 %r4, %r5, 1, %r1;", "u32", 8, 1),
        ("mad.lo.s32 %r4, %r0, 16, %r1;", "v4.u32", 4, 4),
        ("mad.lo.s32 %r4, %r0, 8, %r1;", "u64", 2, 2),
    ],
)
def test_conflicts_over_banks_of_shared_memory(address, width, wavefronts, fewest):
    registers = "{%r6, %r7, %r8, %r9}" if width.startswith("v4") else "%d6" if width == "u64" else "%r6"
    body = BEGIN + f"{address.replace(';', ';' + chr(10))}\n ld.shared.{width} {registers}, [%r4];"
    counts = launch(body, shared=SHARED).counts
    asked = counts[counts["fewest"] > 0]
    assert asked[["wavefronts", "fewest"]].tolist() == [(wavefronts, fewest)]


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors_of_global_memory(stride, sectors):
    memory = np.zeros(2048, np.uint8)
    inputs = memory[-memory.ctypes.data % 32 :][:1024]
    body = BEGIN + f"mad.wide.u32 %d4, %r0, {stride}, %d0;\n ld.global.nc.u32 %r5, [%d4];"
    counted = launch(body, inputs=inputs, shared=SHARED)
    assert counted.counts["sectors"].sum() == sectors == counted.totals["sectors_read"]
