"""What the linker makes of PTX, and, if ``nvdisasm`` is available, how often each of its instructions is issued.

    PTX instruction, issued n times ──▶ line of the PTX text ──▶ machine instructions made from that line

An instruction that was moved out of a loop still has the loop's line. So a block of machine code, from label or branch
to branch, is taken to be issued as often as the median of its instructions says.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

DISASSEMBLER = "nvidia-cuda-nvdisasm"  # the package
LABEL = "label"


class Resources(NamedTuple):
    """Of a kernel: registers of a thread, bytes of static shared memory of a block, bytes of spills."""

    registers: int
    shared: int
    spills: int


class Code(NamedTuple):
    """Machine code of a text's kernels.

    Attributes:
        cubin: as the driver takes it, with the lines of the PTX.
        resources: by kernel.
    """

    cubin: bytes
    resources: dict[str, Resources]


@functools.cache
def link(ptx: str, architecture: str) -> Code:
    """Machine code for "80", "90" and so on."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=f"sm_{architecture}", lineinfo=True, ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    cubin = bytes(linker.link("cubin").code)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
        r"([^\n]*)",
        linker.get_info_log(),
        re.DOTALL,
    )
    resources = {}
    for name, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        resources[name] = Resources(int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads))
    return Code(cubin, resources)


def disassembler() -> str | None:
    """The path of ``nvdisasm``: a package's, or the one on the PATH; None if there is none."""
    try:
        for file in files(DISASSEMBLER) or ():
            if file.name == "nvdisasm":
                return str(file.locate())
    except PackageNotFoundError:
        pass
    return shutil.which("nvdisasm")


@functools.cache
def listing(ptx: str, architecture: str) -> dict[str, list[list[tuple[int | None, str]]]] | None:
    """For each kernel its blocks of machine code: instructions and the PTX lines they were made from."""
    program = disassembler()
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(link(ptx, architecture).cubin)
        run = subprocess.run([program, "-c", "-gp", path], capture_output=True, text=True, check=True)
    kernels: dict[str, list[list[tuple[int | None, str]]]] = {}
    blocks, line = [[]], None
    for row in run.stdout.splitlines():
        if begun := re.match(r"\.text\.(\w+):", row):
            blocks, line = kernels.setdefault(begun[1], [[]]), None
        elif told := re.search(r'nv_debug_ptx_txt[.\d]*", line (\d+)', row):
            line = int(told[1])
        elif re.match(r"\.L_x_\d+:", row):
            blocks.append([])
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", row):
            blocks[-1].append((line, code[1]))
            if re.match(r"(@!?U?P\w+ )?(BRA|EXIT|BRX|RET|CALL)", code[1]):
                blocks.append([])
    return kernels


def issues_of(kernel, counts, ptx: str, architecture: str) -> Counter[str] | None:
    """How often a launch issued machine instructions, by their names; None without a disassembler.

    Args:
        kernel: ``assembler.Kernel`` of the text.
        counts: of its launch, ``machine.Counted.counts``.
    """
    kernels = listing(ptx, architecture)
    if kernels is None:
        return None
    of_line = dict(zip(kernel.lines.tolist(), counts["issues"].tolist(), strict=True))
    issues: Counter[str] = Counter()
    for block in kernels[kernel.name]:
        known = sorted(of_line[line] for line, _ in block if line in of_line)
        if known:
            for _, text in block:
                issues[re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]] += known[len(known) // 2]
    return issues
