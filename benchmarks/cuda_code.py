"""What the CUDA kernels compile to, without a GPU: registers, spills, and instructions.

    python -m benchmarks.cuda_code                    every kernel, for sm_80 and sm_90a
    python -m benchmarks.cuda_code --kernels 16 plane --archs 90a

Compiles each .cu file for each architecture, and reads what ptxas reports and the disassembly
(nvdisasm on the path or in CUDA_HOME; without it there are no counts of instructions).
Instructions are those of DCNv3's loop over points: of one point, and of the 9 points and 16
channels of a (position, group), which takes 16 / C threads of C channels; of the forms on tensor
cores those of a warp's loop over ten pairs. Cold paths count. A multiprocessor issues for 128
threads a clock, so an 128th of them is a bound in clocks.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[1] / "xla_ops" / "csrc"
POINTS, CHANNELS = 9, 16
TEAM, WARP = 10, 32  # pairs that a warp does at once on tensor cores, and its threads


class Kernel(NamedTuple):
    """A compiled kernel; instructions are of one thread, None where nothing could disassemble."""

    name: str
    arch: str
    registers: int
    spilled: int  # bytes stored
    point: int | None  # instructions of the loop over points
    group: int | None  # of a (position, group) of 16 channels and 9 points


def tool(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(name, path=f"{home}/bin{os.pathsep}{os.environ['PATH']}" if home else None)


def short(symbol: str) -> str:
    """`forward<BFloat16, 16>` from a mangled name; the layers' begin with their own."""
    found = re.search(r"\d([a-z_]+)_kernelI(.+?)EEv", symbol)
    if not found:
        return symbol
    kind, parameters = found.groups()
    if adds := re.match(r"LNS\w*3AddE([012])E", parameters):  # a norm that may add before or after
        kind = ("{}", "add_{}", "{}_add")[int(adds[1])].format(kind)
        parameters = parameters[adds.end() :]
    types = {"f": "float", "d": "double"}
    letter = re.match(r"[fd]", parameters)
    half = re.search(r"(BFloat16|Float16)", parameters)
    kind += f"<{half[1] if half else types[letter[0]]}"  # type: ignore[index]
    kind += ", float" * bool(re.search(r"Float16Ef", parameters))  # parameters of a norm
    numbers = re.findall(r"L[ib](\d+)E", parameters + "E")
    kind = "dwconv_" * ("6dwconv" in symbol) + kind
    return ", ".join([kind, *numbers]) + ">"


def instructions(listing: str) -> int | None:
    """For a point, of the loop in a kernel's disassembly that rounds both coordinates down."""
    loops = loops_with(listing, "FLOOR")
    inner = [a for a in loops if not any(inside(b, a) for b in loops)]
    return max((each(loop) for _, loop in inner), default=None)


def of_a_team(listing: str) -> int | None:
    """Of the loop that multiplies on tensor cores."""
    return max((len(loop) for _, loop in loops_with(listing, "HMMA")), default=None)


Loop = tuple[tuple[int, int], list[str]]  # its first and last place, and what is there


def inside(a: Loop, b: Loop) -> bool:
    return a[0] != b[0] and b[0][0] <= a[0][0] and a[0][1] <= b[0][1]


def loops_with(listing: str, wanted: str) -> list[Loop]:
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1].strip())
    # Functions that the kernel calls follow its last EXIT.
    end = max((i for i, operation in enumerate(code) if "EXIT" in operation), default=-1) + 1
    loops = []
    for i, operation in enumerate(code[:end]):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", operation)
        first = labels.get(target[1], end) if target else end
        if first < i and any(wanted in other for other in code[first:i]):
            loops.append(((first, i), code[first : i + 1]))
    return loops


def each(loop: list[str]) -> int:
    """Instructions of a loop for each of the points that it walks at once."""
    return round(2 * len(loop) / sum("FLOOR" in operation for operation in loop))


def kernels(source: Path, arch: str, folder: Path) -> list[Kernel]:
    cubin = folder / f"{source.stem}.{arch}.cubin"
    nvcc = tool("nvcc")
    if nvcc is None:
        raise SystemExit("no nvcc on the path or in CUDA_HOME")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, "-std=c++17", "-O3", target, "-cubin", "-Xptxas=-v", f"-I{CSRC}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=True
    )
    report = re.findall(
        r"entry function '(\w+)'.*?\n.*?\n.*?, (\d+) bytes spill stores.*?\n"
        r".*?Used (\d+) registers",
        done.stderr,
    )
    listings: dict[str, str] = {}
    if disassemble := tool("nvdisasm"):
        text = subprocess.run([disassemble, "-c", cubin], capture_output=True, text=True).stdout
        for part in text.split("//--------------------- .text.")[1:]:
            listings[part.split()[0]] = part
    found = []
    for symbol, spilled, registers in report:
        name = short(symbol)
        listing = listings.get(symbol, "")
        channels = re.search(r", (\d+)", name)
        point = group = None
        if name.startswith(("tensor_forward<", "dots<")):
            if channels and (loop := of_a_team(listing)):
                group = round(loop * WARP / TEAM / int(channels[1]))
        elif not name.startswith("channels<") and (point := instructions(listing)):
            group = round(point * POINTS * (CHANNELS / int(channels[1]) if channels else 1))
        found.append(Kernel(name, arch, int(registers), int(spilled), point, group))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=["80", "90a"])
    parser.add_argument("--kernels", nargs="+", default=[""], help="parts of names")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            kernel
            for source in sorted(CSRC.glob("*.cu"))
            for arch in options.archs
            for kernel in kernels(source, arch, Path(folder))
            if all(part in kernel.name for part in options.kernels)
        ]
    print("| kernel | sm | registers | spilled, bytes | a point | (position, group) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for k in sorted(rows):
        cells = [f"`{k.name}`", k.arch, k.registers, k.spilled, k.point or "", k.group or ""]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
