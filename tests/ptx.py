"""The accesses to global memory of a compiled kernel, from its PTX: its integers are computed, for all threads at once.

What is loaded, and all that follows from it, is not known here. An address, a mask or a branch that depends on it is an
error, so the accesses that are returned are those of a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
WARP = 32
SECTOR = 32  # bytes, what caches and memory move at the least
NOWHERE = -1  # instead of the address of a thread that does not take part

_STATEMENT = re.compile(r"^\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);")
_LABEL = re.compile(r"^(\$\w+):")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ACCESS = re.compile(r"^(ld|st)\.global\b.*?(?:\.v(\d))?\.[a-z](\d+)$")
_OTHER_ACCESS = re.compile(r"^(ld|st|cp|atom|red)\..*global")
_FLOATS = {"bf16", "bf16x2", "f16", "f16x2", "f32", "f32x2", "f64", "tf32"}
_ADDRESS = re.compile(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?\s*\]")
_COMPARE: dict[str, Callable[[Ints, Ints], Bools]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal
}  # fmt: skip


class Access(NamedTuple):
    """One execution of an instruction by all threads."""

    store: bool
    width: int  # bytes of a thread
    addresses: Ints  # [programs, threads], NOWHERE for those that do not take part

    def sectors_and_bytes(self) -> tuple[int, int]:
        """Return how many sectors its warps ask for, and how many different bytes in them."""
        of_warps = self.addresses.reshape(-1, WARP)
        return _different(of_warps // SECTOR), _different(of_warps) * self.width

    def bytes_of_programs(self) -> int:
        """Return how many different bytes its programs ask for, each by itself."""
        return _different(self.addresses) * self.width


class _Statement(NamedTuple):
    guard: str  # a predicate's name, or ""
    unless: bool
    operation: str
    operands: list[str]
    written: list[str]  # registers


def accesses(ptx: str, arguments: Sequence[int], programs: list[tuple[int, int]], threads: int) -> Iterator[Access]:
    """Yield the accesses of some programs of a kernel, which must take the same branches.

    Args:
        ptx: its text.
        arguments: its integers and the addresses of its tensors, in order.
        programs: the places of its programs in the grid.
        threads: of a program.

    Raises:
        ValueError: an address, a mask or a branch depends on what the kernel loads, or memory is accessed by more than
            loads and stores.
    """
    statements, labels = _parse(ptx)
    ids = np.arange(threads)
    x, y = (np.repeat([program[axis] for program in programs], threads) for axis in (0, 1))
    machine = _Machine({"%tid.x": np.tile(ids, len(programs)), "%ctaid.x": x, "%ctaid.y": y}, arguments)
    at = 0
    while at < len(statements):
        statement = statements[at]
        at += 1
        name = statement.operation
        if found := _ACCESS.match(name):
            addresses = machine.addresses(statement).reshape(len(programs), threads)
            machine.forget(statement)
            if (addresses != NOWHERE).any():
                yield Access(found[1] == "st", int(found[2] or 1) * int(found[3]) // 8, addresses)
        elif name in ("bra", "bra.uni"):
            if machine.jumps(statement):
                at = labels[statement.operands[0]]
        elif name == "ret":
            if machine.jumps(statement):
                return
        elif _OTHER_ACCESS.match(name):
            raise ValueError(f"accesses of this kind are not counted: {statement}")
        else:
            machine.compute(statement)


def _different(rows: Ints) -> int:
    """How many different numbers the rows have, NOWHERE apart."""
    ordered = np.sort(rows, 1)
    first = np.ones_like(ordered, dtype=np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return int((first & (ordered >= 0)).sum())


def _parse(ptx: str) -> tuple[list[_Statement], dict[str, int]]:
    """The statements, and where the labels are among them."""
    statements: list[_Statement] = []
    labels: dict[str, int] = {}
    for line in ptx[ptx.index(".entry") :].splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(statements)
        elif found := _STATEMENT.match(line):
            unless, guard, operation, text = found.groups()
            operands = _OPERAND.findall(text)
            written = re.findall(r"%\w+", operands[0]) if operands and operands[0][0] in "%{" else []
            statements.append(_Statement(guard or "", bool(unless), operation, operands, written))
    return statements, labels


class _Machine:
    """The registers that are known, a number a thread. Integers are kept as signed numbers of 64 bits."""

    def __init__(self, registers: dict[str, Ints], arguments: Sequence[int]) -> None:
        self.registers: dict[str, Ints | None] = dict(registers)
        self.arguments = arguments
        self.lanes = len(registers["%tid.x"])

    def read(self, operand: str) -> Ints | None:
        """The numbers of an operand, None where they are not known."""
        if operand.startswith("%"):
            return self.registers.get(operand)
        if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)", operand):
            return np.full(self.lanes, int(operand, 0))
        return None

    def takes_part(self, statement: _Statement) -> Bools:
        """Which threads execute a statement."""
        if not statement.guard:
            return np.ones(self.lanes, dtype=np.bool_)
        guard = self.read(statement.guard)
        if guard is None:
            raise ValueError(f"who takes part depends on what the kernel loads: {statement}")
        return (guard != 0) != statement.unless

    def jumps(self, statement: _Statement) -> bool:
        """Whether the threads, all of them, go elsewhere."""
        taken = self.takes_part(statement)
        if taken.any() != taken.all():
            raise ValueError(f"the threads part here: {statement}")
        return bool(taken.all())

    def addresses(self, statement: _Statement) -> Ints:
        """The addresses of an access."""
        taken = self.takes_part(statement)
        address = next(_ADDRESS.match(operand) for operand in statement.operands if operand.startswith("["))
        assert address is not None
        base = self.read(address[1])
        if base is None:
            raise ValueError(f"an address depends on what the kernel loads: {statement}")
        return np.where(taken, base + int(address[2] or 0), NOWHERE)

    def forget(self, statement: _Statement) -> None:
        """Write registers with numbers that are not known here."""
        for register in statement.written:
            self.registers[register] = None

    def compute(self, statement: _Statement) -> None:
        """Write a register, if its number is known."""
        name, *how = statement.operation.split(".")
        to, *operands = statement.operands or [""]
        values = [value for operand in operands if (value := self.read(operand)) is not None]
        self.forget(statement)
        if name == "ld" and how[0] == "param":
            place = operands[0].rstrip("]").rsplit("_", 1)[1]
            self.registers[to] = np.full(self.lanes, self.arguments[int(place)])
        elif name in _OPERATIONS and len(values) == len(operands) and not statement.guard and not _FLOATS & {*how}:
            self.registers[to] = _OPERATIONS[name](how, values)


def _as(kind: str, x: Ints) -> Ints:
    """The number that a type makes of bits: s32, u64, b16 ..."""
    if kind == "pred":
        return (x != 0).astype(np.int64)
    bits = int(kind[1:])
    if bits == 64:
        return x
    x = x & ((1 << bits) - 1)
    return x if kind[0] == "u" else x - ((x >> (bits - 1)) << bits)


def _typed(function: Callable[..., Ints]) -> Callable[[list[str], list[Ints]], Ints]:
    """An operation whose operands and result have one type."""

    def apply(how: list[str], values: list[Ints]) -> Ints:
        return _as(how[-1].replace("u", "s"), np.asarray(function(*(_as(how[-1], x) for x in values)), dtype=np.int64))

    return apply


def _multiply(how: list[str], values: list[Ints]) -> Ints:
    """mul and mad; of two numbers of 32 bits the product is exact here."""
    part, kind = how
    product = _as(kind, values[0]) * _as(kind, values[1])
    product = product >> int(kind[1:]) if part == "hi" else product
    total = product + values[2] if len(values) > 2 else product
    return total if part == "wide" else _as("s" + kind[1:], total)


def _bits(how: list[str], values: list[Ints]) -> Ints:
    """bfe, some bits of a number, as a signed number where the type is."""
    x, start, bits = (_as("u" + how[0][1:], value) for value in values)
    found = (x >> start) & ((1 << bits) - 1)
    return found - ((found >> (bits - 1)) << bits) if how[0][0] == "s" else _as("s" + how[0][1:], found)


def _divide(x: Ints, y: Ints) -> Ints:
    return np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))


_OPERATIONS: dict[str, Callable[[list[str], list[Ints]], Ints]] = {
    "mov": _typed(np.positive),
    "cvt": lambda how, values: _as(how[-2].replace("u", "s"), _as(how[-1], values[0])),
    "add": _typed(np.add),
    "sub": _typed(np.subtract),
    "neg": _typed(np.negative),
    "min": _typed(np.minimum),
    "max": _typed(np.maximum),
    "div": _typed(_divide),
    "rem": _typed(lambda x, y: x - y * _divide(x, y)),
    "mul": _multiply,
    "mad": _multiply,
    "and": _typed(np.bitwise_and),
    "or": _typed(np.bitwise_or),
    "xor": _typed(np.bitwise_xor),
    "not": lambda how, values: 1 - _as("pred", values[0]) if how == ["pred"] else ~values[0],
    "shl": _typed(np.left_shift),
    "shr": _typed(np.right_shift),
    "bfe": _bits,
    "setp": lambda how, values: _COMPARE[how[0]](*(_as(how[-1], x) for x in values)).astype(np.int64),
    "selp": lambda how, values: np.where(values[2] != 0, values[0], values[1]),
}
