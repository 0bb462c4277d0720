"""What Triton's kernels take of a GPU and what they move, without a GPU: `python -m tests.kernel_report`.

It compiles them for three GPUs, counts in their PTX the accesses to memory, and writes docs/results/kernels.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.conftest import ROOT
from tests.ptx import SECTOR, Access, accesses
from tests.triton_kernels import (
    Launch,
    Resources,
    chain_launches,
    compiled,
    recorded,
    resources,
    torch_launches,
    tssa_launches,
    tssa_passes,
)

GPUS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
TOKENS, HEADS, WIDTH = 1024, 12, 64  # of the operator, in bf16
CHAIN = (16, 64, 64, 64)  # steps, their tokens, and a state's rows and columns
WIDER = ((16, 128), (4, 256))  # heads and their channels
# Bytes of a token and channel in bf16: w, and backward the gradient of y, are read in each of three phases, or in the
# one that the scans of a pass do not allow, and y or the gradient of w is written.
FLOOR = {"forward": 4 * 2, "backward": 7 * 2}
ONE_PHASE = {"forward": 2 * 2, "backward": 3 * 2}
FILE = ROOT / "docs" / "results" / "kernels.md"


class Figures(NamedTuple):
    """What is known of one launch."""

    name: str
    resources: Resources
    sectors: float  # the share of the sectors that its warps ask for, that they use
    once: int  # bytes that it moves if all that it read or wrote stays in a cache
    each: int  # bytes that it moves if nothing does from one access of a program to the next


def launches() -> dict[str, list[Launch]]:
    """Return what is reported, by pass; the forward pass of one token and chains are passes too."""
    passes = {name: recorded(run) for name, run in tssa_passes(1, TOKENS, HEADS, WIDTH, True).items()}
    one_token = recorded(tssa_passes(1, 1, HEADS, WIDTH, True)["forward"])
    return {**passes, "one token": one_token, "chains": chain_launches(*CHAIN)}


def measure(launch: Launch, capability: int) -> Figures:
    """Compile a launch for a GPU and count what it moves."""
    kernel = compiled(launch, capability)
    moved = Counter[str]()
    touched: dict[bool, list[np.ndarray[Any, np.dtype[np.int64]]]] = {False: [], True: []}
    for access in _accesses(launch, kernel):
        sectors, used = access.sectors_and_bytes()
        moved.update(sectors=sectors * SECTOR, used=used, each=access.bytes_of_programs())
        touched[access.store].append(np.unique(access.addresses[access.addresses >= 0] // SECTOR))
    once = sum(SECTOR * len(np.unique(np.concatenate(found))) for found in touched.values() if found)
    return Figures(_name(launch), resources(kernel), moved["used"] / moved["sectors"], once, moved["each"])


def _accesses(launch: Launch, kernel: Any) -> list[Access]:
    """Every tensor is given memory of its own, in which addresses begin at a multiple of 4 GiB."""
    given = [(i + 1) << 32 if isinstance(value, torch.Tensor) else int(value) for i, value in enumerate(launch.passed)]
    columns, rows = (*launch.grid, 1)[:2]
    return [
        access
        for row in range(rows)
        for access in accesses(
            kernel.asm["ptx"], given, [(x, row) for x in range(columns)], 32 * kernel.metadata.num_warps
        )
    ]


def _name(launch: Launch) -> str:
    """The kernel's, and what its compiled forms differ in."""
    name = launch.name.removesuffix("_kernel")
    if name == "carry":
        name += " of two sums" if launch.arguments["mass_sums"] is not None else ""
        name += ", back" if launch.arguments["REVERSE"] else ""
    elif name == "chain":
        name += " fp64" if launch.arguments["first"].dtype == torch.float64 else ""
    return name


def bytes_of(figures: Sequence[Figures]) -> tuple[float, float]:
    """Return the bytes that a pass moves of a token and channel: with a cache that holds all, and with none."""
    numbers = TOKENS * HEADS * WIDTH
    return sum(x.once for x in figures) / numbers, sum(x.each for x in figures) / numbers


def report() -> str:
    """Return the page."""
    found = {gpu: {name: [measure(x, gpu) for x in some] for name, some in launches().items()} for gpu in GPUS}
    by_name = [{x.name: x for some in passes.values() for x in some} for passes in found.values()]
    kernels = [(f"`{name}`", *(_cell(some[name]) for some in by_name)) for name in by_name[0]]
    moved = []
    for name, run in tssa_passes(1, TOKENS, HEADS, WIDTH, True).items():
        once, each = bytes_of(found[90][name])
        counts = f"{len(found[90][name])} + {torch_launches(run)}"
        moved.append((name, counts, f"{once:.1f}", f"{each:.1f}", str(FLOOR[name]), str(ONE_PHASE[name])))
    return PAGE.format(
        kernels=_table(("kernel", *GPUS.values()), kernels),
        wider=_table(("heads", "kernel", *GPUS.values()), _wider()),
        moved=_table(("pass", "launches", "once", "each", "floor", "in one phase"), moved),
    )


def _wider() -> list[tuple[str, ...]]:
    """Rows of the kernels that spill with wider heads."""
    rows = []
    for heads, width in WIDER:
        for launch in {x.name: x for x in tssa_launches(1, TOKENS, heads, width, True)}.values():
            of = [resources(compiled(launch, gpu)) for gpu in GPUS]
            if any(x.spilled for x in of):
                rows.append((f"{heads} x {width}", f"`{_name(launch)}`", *map(_taken, of)))
    return rows


def _cell(x: Figures) -> str:
    return f"{_taken(x.resources)}, {100 * x.sectors:.0f}%"


def _taken(x: Resources) -> str:
    return f"{x.registers}, {x.spilled} B, {x.warps}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


PAGE = f"""# Triton's kernels, without a GPU

Written by `python -m tests.kernel_report`; `tests/test_kernel_report.py` holds its floors. No kernel has run on a GPU
yet: these are what the compiler made of them and counts, not times.

## What they take

Registers of a thread, bytes that it spills, warps that a multiprocessor holds at once (of 64), and how much is used of
the 32-byte sectors that a warp asks for. TSSA of {TOKENS} tokens, {HEADS} heads of {WIDTH} channels, bf16, with
forgetting, documents and a bias; chains of states of {CHAIN[2]} x {CHAIN[3]}. The first three are what cuxray reads in
the machine code of the assemblers that Triton uses. Sectors are counted from the addresses of all threads, which
`tests/ptx.py` computes from PTX.

{{kernels}}

Kernels of TSSA that go over their inputs and keep few tiles hold 32 warps or more, all others 16 or more. With wider
heads some spill:

{{wider}}

Heads of more than 128 channels are the limit: a thread has twice as much of each tile, and one kernel spills a lot.

## What they move

Launches of a pass and, after the plus, torch's own beside them: they make the gradients of `temp` and `rho` of a number
a chunk and head. Then the bytes that the launches move of a token and channel: "once" counts each sector that a launch
touches once, as if a cache held all of them; "each" counts every access of a program by itself, as if there were no
cache. The floor is w, and backward the gradient of y, read in each of three phases, and the result written; in one
phase is what an operator without scans would move.

{{moved}}
"""

if __name__ == "__main__":
    FILE.write_text(report())
