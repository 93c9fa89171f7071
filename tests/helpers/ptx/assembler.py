"""PTX text, as NVRTC and Numba emit it, in the form that ``machine.cpp`` runs.

An instruction that the machine does not have is a ``ValueError``: nothing is silently left out.
"""

import re
from dataclasses import dataclass

import numpy as np

from tests.helpers.ptx import machine_library

INSTRUCTION = np.dtype(
    [
        *((name, "u1") for name in ("operation", "type", "from", "space", "mode", "join", "count", "negated", "flush")),
        *((name, "i4") for name in ("guard", "target")),
        ("to", "i4", 4),
        ("of", "i4", 5),
        ("offset", "i8"),
    ],
    align=True,
)
SPECIAL = {
    **{
        f"%{name}.{axis}": 3 * i + k
        for i, name in enumerate(("tid", "ntid", "ctaid", "nctaid"))
        for k, axis in enumerate("xyz")
    },
    "%laneid": 12,
    "%dynamic_smem_size": 13,
}
RESERVED = 16  # registers that the machine sets
JOINS = ("", "and", "or", "xor")
HINTS = {
    "cs",
    "cg",
    "ca",
    "cv",
    "wb",
    "nc",
    "lu",
    "volatile",
    "relaxed",
    "weak",
    "uni",
    "L1::no_allocate",
    "L1::evict_last",
}
IGNORED = {"membar", "fence", "prefetch", "prefetchu", "discard"}
LOGIC = {"and", "or", "xor", "not", "shl", "shr", "brev", "popc", "clz"}
PLAIN = {"add", "sub", "div", "rem", "min", "max", "abs", "neg", "rcp", "sqrt", "fma"}


@dataclass
class Kernel:
    """An entry of a PTX text.

    Attributes:
        name: as it is launched.
        code: dtype ``INSTRUCTION`` [n].
        lines: int [n], of the PTX text, counted from 1.
        texts: of the instructions.
        register_bits: uint8 [registers], how wide they are; the machine's own come first.
        constants: of the last registers; a tuple holds an offset in shared memory, a string names a global array.
        parameters: (offset, bytes) each.
        shared: bytes of static shared memory.
        globals: arrays in global memory, by name; of all entries of the text.
    """

    name: str
    code: np.ndarray
    lines: np.ndarray
    texts: list[str]
    register_bits: np.ndarray
    constants: list
    parameters: list[tuple[int, int]]
    shared: int
    globals: dict[str, np.ndarray]


def size_of(kind):
    return 1 if kind == "pred" else int(kind[1:]) // 8


def plain(kind):
    """A type's name in the machine: bits are unsigned numbers."""
    return kind.replace("b", "u") if kind[0] == "b" else kind


def assemble(text):
    """The kernels of a PTX text by their names.

    Raises:
        ValueError: it has something that the machine does not know.
    """
    text = re.sub(r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{(.*?)\n\}", text, re.DOTALL))
    outside, begin = [], 0
    for entry in entries:
        outside.append(text[begin : entry.start()])
        begin = entry.end()
    arrays, dynamic = _declared("".join([*outside, text[begin:]]))
    return {
        entry[1]: _Assembler(entry[1], _parameters(entry[2]), arrays, dynamic).kernel(
            entry[3], text.count("\n", 0, entry.start(3)) + 1
        )
        for entry in entries
    }


def _declared(text):
    """Arrays in global memory and the names of dynamic shared memory."""
    arrays = {}
    for found in re.finditer(
        r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?\s*(?:=\s*([^;]*))?;", text
    ):
        kind, name, count, values = found.groups()
        array = np.zeros(int(count or 1), f"u{size_of(kind)}")
        if values:
            numbers = [int(value, 0) for value in re.findall(r"-?\w+", values)]  # what is left out is 0
            array[: len(numbers)] = numbers
        arrays[name] = array
    return arrays, set(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.\w+\s+([\w$]+)\[\]", text))


def _parameters(text):
    """Name, offset and bytes of each."""
    parameters, offset = {}, 0
    for found in re.finditer(
        r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.\w+\s+(?:\.\w+\s+\d+\s+)?)?([\w$]+)", text
    ):
        size = size_of(found[1])
        offset = -(-offset // size) * size
        parameters[found[2]] = (offset, size)
        offset += size
    return parameters


class _Assembler:
    """The assembler of one entry."""

    def __init__(self, name, parameters, arrays, dynamic):
        self.name, self.parameters, self.arrays, self.dynamic = name, parameters, arrays, dynamic
        self.names = machine_library.names()
        self.bits = [64] * RESERVED
        self.registers, self.types = dict(SPECIAL), {}
        self.constants, self.constant_numbers = [], {}
        self.places = {}  # in shared memory
        self.labels, self.code, self.lines, self.texts, self.jumps = {}, [], [], [], []

    def kernel(self, body, line):
        self._declare(body)
        for number, row in enumerate(body.split("\n"), line):
            for statement in row.split(";"):
                self._statement(" ".join(statement.split()), number)
        for index, label in self.jumps:
            self.code[index]["target"] = self.labels[label]
        first = len(self.bits)  # of the constants
        code = np.concatenate(self.code)
        for column in ("to", "of"):
            code[column] = np.where(code[column] < -1, first - 2 - code[column], code[column])
        return Kernel(
            name=self.name,
            code=code,
            lines=np.array(self.lines),
            texts=self.texts,
            register_bits=np.array(self.bits + [64] * len(self.constants), np.uint8),
            constants=self.constants,
            parameters=list(self.parameters.values()),
            shared=self.shared,
            globals=self.arrays,
        )

    def _declare(self, body):
        for found in re.finditer(r"\.reg\s+\.(\w+)\s+([^;]+);", body):
            for name in found[2].split(","):
                family = re.fullmatch(r"(%?[\w$]+)(?:<(\d+)>)?", name.strip())
                numbers = [""] if family[2] is None else range(int(family[2]))
                for number in numbers:
                    self.registers[f"{family[1]}{number}"] = len(self.bits)
                    self.bits.append(1 if found[1] == "pred" else 8 * size_of(found[1]))
        shared = 0
        for found in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?;", body):
            align = int(found[1])
            shared = -(-shared // align) * align
            self.places[found[3]] = shared
            shared += size_of(found[2]) * int(found[4] or 1)
        self.shared = -(-shared // 16) * 16
        self.places.update(dict.fromkeys(self.dynamic, self.shared))
        if re.search(r"\.local\s", body):
            raise ValueError(f"{self.name} has local memory, which this machine does not")

    def _statement(self, text, line):
        text = text.strip("{} ") if re.fullmatch(r"[{} ]*", text) else re.sub(r"^[{}] *", "", text)
        while label := re.match(r"([$\w]+):\s*", text):
            self.labels[label[1]] = len(self.code)
            text = text[label.end() :]
        if not text or text.startswith("."):
            return
        guard = re.match(r"@(!?)(%?\w+)\s+", text)
        words = text[guard.end() :] if guard else text
        operation, _, rest = words.partition(" ")
        operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        found = np.zeros(1, INSTRUCTION)
        found["guard"], found["target"], found["to"], found["of"] = -1, -1, -1, -1
        if guard:
            found["guard"], found["negated"] = self.registers[guard[2]], 128 * bool(guard[1])
        try:
            self._encode(found[0], operation.split("."), operands)
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"line {line}, {text!r}: this machine does not know it ({error})") from error
        self.code.append(found), self.lines.append(line), self.texts.append(text)

    # --- operands -----------------------------------------------------------------------------------------------------

    def _constant(self, value):
        """A register that holds it; numbered from -2 down until all registers are known."""
        if value not in self.constant_numbers:
            self.constant_numbers[value] = len(self.constants)
            self.constants.append(value)
        return -2 - self.constant_numbers[value]

    def _operand(self, text):
        text = text.strip()
        if text in self.registers:
            return self.registers[text]
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
            return self._constant(int(found[1] or found[2], 16))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return self._constant(int(text.rstrip("U"), 0) % 2**64)
        if text in self.places:
            return self._constant((self.places[text],))
        if text in self.arrays:
            return self._constant(text)
        raise ValueError(f"operand {text}")

    def _address(self, text):
        """Register and offset; for a parameter, None and the offset."""
        base, offset = re.fullmatch(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\d+))?\s*\]", text).groups()
        if base in self.parameters:
            return None, self.parameters[base][0] + int(offset or 0)
        return self._operand(base), int(offset or 0)

    def _list(self, text):
        return [part.strip() for part in text.strip("{}").split(",")] if text.startswith("{") else [text]

    def _put(self, found, registers):
        found["to"][: len(registers)] = [-1 if name == "_" else self.registers[name] for name in registers]

    def _predicate(self, found, operand, position):
        """A predicate operand, which may be negated."""
        found["negated"] |= 4 * operand.startswith("!")
        found["of"][position] = self._operand(operand.lstrip("!"))

    # --- instructions -------------------------------------------------------------------------------------------------

    def _name(self, found, operation, kind="u32", **fields):
        found["operation"] = self.names["operations"][operation]
        found["type"] = self.names["types"][plain(kind)]
        for name, value in fields.items():
            found[name] = value

    def _encode(self, found, op, operands):
        name, kind = op[0], op[-1]
        if name in IGNORED:
            return self._name(found, "nop")
        if name in ("ld", "st", "ldu"):
            return self._memory(found, op, operands)
        if name in ("ret", "exit", "trap"):
            return self._name(found, "trap" if name == "trap" else "exit")
        if name == "bra":
            self.jumps.append((len(self.code), operands[0]))
            return self._name(found, "bra")
        if name in ("bar", "barrier"):
            if "warp" in op:
                return self._name(found, "bar_warp")
            if operands != ["0"] or "sync" not in op:
                raise ValueError("a barrier of some threads")
            return self._name(found, "bar_sync")
        if name == "cp":
            return self._copy(found, op, operands)
        if name == "mov" and (operands[0].startswith("{") or operands[1].startswith("{")):
            return self._vector(found, kind, operands)
        return self._compute(found, op, operands)

    def _compute(self, found, op, operands):
        name, kind = op[0], op[-1]
        found["flush"] = "ftz" in op
        op = [word for word in op if word != "ftz"]
        self._put(found, operands[0].split("|"))
        sources = operands[1:]
        if name == "setp":
            found["count"] = len(operands[0].split("|"))
            self._name(found, "setp", kind, mode=self.names["comparisons"][_comparison(op[1])])
            if op[2] in JOINS:
                found["join"] = JOINS.index(op[2])
                self._predicate(found, sources.pop(), 2)
        elif name == "selp":
            self._name(found, "selp", kind)
            self._predicate(found, sources.pop(), 2)
        elif name == "cvt":
            self._convert(found, op)
        elif name == "shfl":
            self._name(found, "shfl", kind, mode=self.names["shuffles"][op[2]], count=len(operands[0].split("|")))
        elif name == "isspacep":
            self._name(found, "isspacep", "u64", space=self.names["spaces"][op[1]])
        elif name in ("mul", "mad", "fma") and kind[0] == "f":
            self._check_float(op)
            self._name(found, "fma" if name == "mad" else name, kind)
        elif name in ("mul", "mad"):
            self._name(found, name + {"lo": "", "hi": "_hi", "wide": "_wide"}[op[1]], kind)
        elif name == "shf":
            self._name(found, f"shf_{op[1]}_{op[2]}")
        elif name == "dp2a":
            if op[2:] != ["u32", "u32"]:
                raise ValueError("signed products")
            self._name(found, f"dp2a_{op[1]}")
        elif name == "dp4a":
            if op[1:] != ["u32", "u32"]:
                raise ValueError("signed products")
            self._name(found, "dp4a")
        elif name in ("bfi", "bfe", "lop3", *LOGIC):
            self._name(found, name, kind)
        elif name == "prmt":
            if len(op) != 2:
                raise ValueError("mode of prmt")
            self._name(found, "prmt")
        elif name in ("mov", "cvta"):
            self._name(found, "mov", kind)
        elif name in PLAIN:
            if kind[0] == "f":
                self._check_float(op)
            self._name(found, name, kind)
        else:
            raise ValueError(name)
        for position, source in enumerate(sources):
            self._predicate(found, source, position) if source.startswith("!") else None
            found["of"][position] = self._operand(source.lstrip("!"))

    def _check_float(self, op):
        if {"rz", "rm", "rp", "approx", "sat", "full"} & set(op):
            raise ValueError("another rounding than to the nearest")

    def _convert(self, found, op):
        to, source = op[-2], op[-1]
        modes = [word for word in op[1:-2] if word != "sat"]
        if len(modes) > 1 or (modes and modes[0] not in self.names["roundings"]):
            raise ValueError("rounding")
        self._name(
            found,
            "cvt",
            to,
            mode=self.names["roundings"][modes[0] if modes else "none"],
            join="sat" in op,
        )
        found["from"] = self.names["types"][plain(source)]

    def _vector(self, found, kind, operands):
        whole, parts = operands if not operands[0].startswith("{") else operands[::-1]
        names = self._list(parts)
        if operands[0].startswith("{"):
            self._name(found, "unpack", kind, count=len(names))
            self._put(found, names)
            found["of"][0] = self._operand(whole)
        else:
            self._name(found, "pack", kind, count=len(names))
            self._put(found, [whole])
            found["of"][: len(names)] = [self._operand(part) for part in names]

    def _memory(self, found, op, operands):
        unknown = set(op[1:-1]) - HINTS - {"global", "shared", "param", "v2", "v4", "shared::cta"}
        if unknown:
            raise ValueError(f"{unknown}")
        load = op[0] != "st"
        address, values = operands if not load else operands[::-1]
        registers = self._list(values)
        base, offset = self._address(address)
        space = next(
            (word.split("::")[0] for word in op[1:-1] if word.split("::")[0] in self.names["spaces"]), "generic"
        )
        self._name(found, "ld" if load else "st", op[-1], space=self.names["spaces"][space], count=len(registers))
        found["offset"] = offset
        if base is not None:
            found["of"][0] = base
        if load:
            self._put(found, registers)
        else:
            found["of"][1 : 1 + len(registers)] = [self._operand(part) for part in registers]

    def _copy(self, found, op, operands):
        if "commit_group" in op:
            return self._name(found, "cp_commit")
        if "wait_group" in op or "wait_all" in op:
            return self._name(found, "cp_wait", target=int(operands[0]) if operands else -1)
        if op[:2] != ["cp", "async"] or not {"ca", "cg"} & set(op) or not operands[2].isdigit():
            raise ValueError("a copy of another kind")
        self._name(found, "cp_async", count=int(operands[2]))
        (found["of"][0], found["offset"]), (found["of"][1], found["target"]) = map(self._address, operands[:2])
        if len(operands) > 3:
            found["of"][2] = self._operand(operands[3])


def _comparison(word):
    """Unsigned comparisons have names of their own; the type says the same."""
    return {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(word, word)
