"""What Triton's compiler makes of our kernels for NVIDIA chips, looked at without any GPU.

`compiled_kernels` compiles every kernel ahead of time, as a launch would specialise it, and reads
from the machine code: registers of a thread, bytes of local memory (spilled registers), shared
memory of a program, and of the instructions in the innermost loop which are floating-point
additions: in the L1 kernel those are the distances themselves. Tools and compiler are those that
come with triton. Refuses to run where TRITON_INTERPRET is set: nothing is compiled there.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from student_train.ops import l1_triton, logit_rows_triton

CHIPS = {"sm_80": 80, "sm_90": 90}
TYPES = ("fp32", "bf16", "fp16")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?!NOP)(.*?);", re.MULTILINE)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """One kernel for one chip.

    A program of the L1 kernel goes on in its loop, which the others do not have (zeros): these run
    all of their instructions once for `COLUMNS` columns.
    """

    kernel: str
    dtype: str
    chip: str
    registers: int
    local_bytes: int
    shared_bytes: int
    instructions: int
    loop_additions: int
    loop_instructions: int


class _Source(NamedTuple):
    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]


def compiled_kernels(
    dtypes: Sequence[str] = TYPES, chips: Sequence[str] = tuple(CHIPS)
) -> Iterator[Compiled]:
    """Every kernel, dtype and chip."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise ValueError("TRITON_INTERPRET is set, which compiles nothing: unset it")
    for dtype in dtypes:
        for source in _sources(dtype):
            for chip in chips:
                yield _compile(source, dtype, chip)


def _sources(dtype: str) -> Iterator[_Source]:
    tile = {"SPAN": l1_triton.SPAN, **l1_triton.TILE}
    yield _Source(
        "span_distances",
        l1_triton.span_distances,
        {"left": f"*{dtype}", "right": f"*{dtype}", "parts": "*fp32"},
        tile,
    )
    for estimated in (False, True):
        name = "with estimate" if estimated else "alone"
        estimate = "*fp32" if estimated else f"*{dtype}"
        rows = {"logits": f"*{dtype}", "bits": "*i32", "estimate": estimate}
        constants = {"ESTIMATED": estimated, "COLUMNS": logit_rows_triton.COLUMNS}
        read = {**rows, "found": "*fp32", "maxima": "*fp32"}
        grouped = {**constants, "GROUP": logit_rows_triton.GROUP}
        yield _Source(f"read_rows {name}", logit_rows_triton.read_rows, read, grouped)
        write = {**rows, "parts": "*fp32", "weights": "*fp32", "labels": "*i64"}
        yield _Source(f"write_gradient {name}", logit_rows_triton.write_gradient, write, constants)


def _compile(source: _Source, dtype: str, chip: str) -> Compiled:
    names: list[str] = source.kernel.arg_names
    signature = {name: source.types.get(name, "i32") for name in names}
    signature |= dict.fromkeys(source.constants, "constexpr")
    # As at a launch with rows of any whole number of 16 entries, and pointers from torch.
    even = [n for n in names if n in source.types or n.endswith(("stride", "columns", "size"))]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    text = ASTSource(source.kernel, signature, dict(source.constants), attributes)
    made = triton.compile(text, target=GPUTarget("cuda", CHIPS[chip], 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    additions, in_loop = _innermost_loop(code)
    return Compiled(
        kernel=source.name,
        dtype=dtype,
        chip=chip,
        registers=int(registers),
        local_bytes=int(stack),
        shared_bytes=made.metadata.shared,
        instructions=len(_INSTRUCTION.findall(code)),
        loop_additions=additions,
        loop_instructions=in_loop,
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _innermost_loop(code: str) -> tuple[int, int]:
    """Additions and instructions of the loop with most additions; zeros without a loop."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    loops = [(0, 0)]
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := _INSTRUCTION.match(line):
            lines.append(found[1])
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", found[1])
            if target and target[1] in labels:
                body = lines[labels[target[1]] :]
                loops.append((sum("FADD" in each for each in body), len(body)))
    return max(loop if loop[0] else (0, 0) for loop in loops)
