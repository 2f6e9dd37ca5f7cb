"""What can be told from machine code without running it."""

import re
import subprocess
import tempfile

import triton

_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)\s+(.*?)\s*;", re.MULTILINE)
_UNIFORM = re.compile(r"\bUR(\d+)")


def unwritten(cubin: bytes) -> dict[int, str]:
    """Uniform registers that some instruction reads, shown beside them, and none writes.

    ptxas 12.8 makes such code of products whose operands lie in shared memory in two ways: an address of memory is then
    whatever the register held.
    """
    return unwritten_in(disassembled(cubin))


def disassembled(cubin: bytes) -> str:
    """What nvdisasm prints of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin + b"\0")  # cupy takes the last byte for the end of a string
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spills(cubin: bytes) -> list[str]:
    """Instructions that keep in memory what there is no register for."""
    return [line for line in disassembled(cubin).splitlines() if re.search(r"\b(STL|LDL)\b", line)]


def unwritten_in(disassembly: str) -> dict[int, str]:
    """The same of what nvdisasm prints."""
    written: set[int] = set()
    read: dict[int, str] = {}
    for operation, arguments in _LINE.findall(disassembly):
        result, *operands = re.split(r",\s*", arguments)
        width = 4 if ".128" in operation else 2 if ".64" in operation or ".WIDE" in operation else 1
        if (target := re.fullmatch(r"UR(\d+)", result)) and not operation.startswith("BAR"):
            written.update(range(int(target[1]), int(target[1]) + width))
        else:
            operands.insert(0, result)
        # Four registers describe both operands of a product; where one lies in registers, its half means nothing.
        skipped = 2 if "gdesc" in arguments and "gdesc" not in operands[0] else 0
        for operand in operands:
            for number in map(int, _UNIFORM.findall(operand)):
                read.setdefault(number + skipped * ("gdesc" in operand), f"{operation} {arguments}")
    return {number: line for number, line in read.items() if number not in written}
