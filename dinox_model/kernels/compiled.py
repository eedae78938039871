"""Compiles kernels for architectures that are not there, and reads what came out: spills, registers, shared memory,
matrix instructions, width of loads.

Needs Triton, no GPU, and a process that does not interpret (TRITON_INTERPRET unset when the kernels are imported). The
figures are read from the machine code itself: AMD's from the assembly's metadata, NVIDIA's by disassembling with the
programs that come with Triton. Invariant: a launch is compiled with the arguments' types, alignment and options that it
has at run time.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinox_model.kernels.architecture import ARCHITECTURES, Architecture
from dinox_model.kernels.language import INTERPRETED, triton
from dinox_model.kernels.tiles import Launch


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What one launch became on one architecture. Instructions are counted where they stand in the code, not as often
    as they run."""

    spills: int
    """AMD: vector registers spilled; NVIDIA: stores to local memory."""
    registers: int
    """Of one lane (AMD's .vgpr_count with accumulators; NVIDIA's REG)."""
    shared_bytes: int
    """Shared memory of one program."""
    private_bytes: int
    """Stack of one lane: spilled registers and arrays."""
    matrix: dict[str, int]
    """Matrix instructions by name: v_wmma…, v_mfma…, HMMA…, HGMMA…, UTC…MMA."""
    loads: int
    """Loads from global memory, of any width (asynchronous copies count)."""
    wide_loads: int
    """Those of 128 bits a lane, or of whole tiles (TMA)."""
    narrow_loads: int
    """Those of 8 or 16 bits a lane."""
    shared_loads: int
    """Loads from shared memory."""
    hot_loop: dict[str, int]
    """AMD: what the loop with most matrix instructions issues each time: matrix, vector, transcendental, shared (loads
    and stores), memory. Empty on NVIDIA, and where no loop has any."""

    def faults(self, launch: Launch, arch: str) -> list[str]:
        """What breaks the rule of shipped kernels (empty: nothing). All: shared memory within the architecture's.
        16-bit dot kernels also: no spills, matrix instructions, 128-bit loads, and none of 16 bits or less."""
        limit = ARCHITECTURES[arch].shared_bytes
        found = [f"{self.shared_bytes} bytes of shared memory, {limit} are there"] * (self.shared_bytes > limit)
        if launch.uses_dot and launch.dtype != "fp32":
            found += [f"{self.spills} spills"] * (self.spills > 0)
            found += ["no matrix instructions"] * (not self.matrix)
            found += ["no 128-bit loads"] * (self.wide_loads == 0)
            found += [f"{self.narrow_loads} loads of 16 bits or less"] * (self.narrow_loads > 0)
        return found


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compiles `launch` for `arch` (a name of ARCHITECTURES) and reads the result; from Triton's cache where it is.

    RuntimeError: no Triton, or this process interprets. ValueError: an unknown architecture, or arguments of the
    kernel that the launch doesn't give. What the compiler itself raises is passed on.
    """
    if triton is None or INTERPRETED:
        raise RuntimeError("compiling needs Triton, and a process started without TRITON_INTERPRET=1")
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture {arch!r} is none of {', '.join(ARCHITECTURES)}")
    target = ARCHITECTURES[arch]
    with _environment(target):
        kernel = triton.compile(_source(launch), target=_target(target), options=_options(launch, target))
    shared = int(kernel.metadata.shared)
    if target.vendor == "amd":
        return _read_amd(kernel.asm["amdgcn"], shared)
    return _read_nvidia(kernel.asm["cubin"], shared)


def source_digest(launch: Launch, arch: str) -> str:
    """16 hex digits of all that decides what comes out, but Triton's version: the kernel's source and that of what it
    calls, the types of its arguments, constants and options. The process must not interpret."""
    target = ARCHITECTURES[arch]
    text = f"{_source(launch).hash()} {sorted(_options(launch, target).items())} {target}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(launch: Launch) -> Any:
    """What the JIT would compile: each argument's type, and that pointers and strides are multiples of 16."""
    from triton.compiler import ASTSource

    names = list(launch.function.arg_names)
    constants = {**launch.constants, **launch.tiles.sizes}
    lost = [name for name in names if name not in constants and name not in launch.signature]
    extra = [name for name in (*constants, *launch.signature, *launch.aligned) if name not in names]
    if lost or extra:
        what = f"doesn't say {', '.join(lost)}" if lost else f"names {', '.join(extra)}, which it doesn't take"
        raise ValueError(f"launch of {launch.kernel}: it {what}")
    signature = {name: "constexpr" if name in constants else launch.signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    return ASTSource(launch.function, signature=signature, constexprs=constants, attrs=attributes)


def _target(target: Architecture) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.vendor == "amd":
        return GPUTarget("hip", target.name, target.warp)
    return GPUTarget("cuda", target.capability, target.warp)


def _options(launch: Launch, target: Architecture) -> dict[str, Any]:
    tiles = launch.tiles
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True}
    return {**options, "waves_per_eu": tiles.waves_per_eu} if target.vendor == "amd" else options


@contextmanager
def _environment(target: Architecture) -> Iterator[None]:
    """In-thread transpose as it is set at run time on `target`, unless the user has set it."""
    name = "TRITON_HIP_USE_IN_THREAD_TRANSPOSE"
    if not target.in_thread_transpose or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _read_amd(assembly: str, shared: int) -> Compiled:
    def metadata(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"AMD's assembly has no .{name}: this Triton writes it in another way")
        return int(found.group(1))

    code = re.findall(r"^\s+([a-z]\w+)", assembly, re.MULTILINE)
    loads = [name for name in code if re.match(r"(global|buffer|flat)_load_", name)]
    matrix = [name for name in code if re.match(r"v_(wmma|swmmac|mfma|smfmac)_", name)]
    return Compiled(
        spills=metadata("vgpr_spill_count"),
        registers=metadata("vgpr_count"),
        shared_bytes=shared,
        private_bytes=metadata("private_segment_fixed_size"),
        matrix=_counts(matrix),
        loads=len(loads),
        wide_loads=sum(name.endswith(("_b128", "_dwordx4")) for name in loads),
        narrow_loads=sum(
            re.search(r"_(u8|i8|u16|i16|b16|[us]byte|[us]short|short)(_|$)", name) is not None for name in loads
        ),
        shared_loads=sum(name.startswith(("ds_load", "ds_read")) for name in code),
        hot_loop=_hot_loop(assembly),
    )


def _hot_loop(assembly: str) -> dict[str, int]:
    """Counts of the innermost loop with most matrix instructions; LLVM names the loop of each block in a comment."""
    loops: dict[str, list[str]] = {}
    loop = ""
    for line in assembly.splitlines():
        if label := re.match(r"\.L(BB\d+_\d+):|; %bb\.\d+:", line):
            loop = (label.group(1) or "") if "Loop Header" in line else ""
        if inside := re.search(r";\s+in Loop: Header=(BB\d+_\d+)", line):
            loop = inside.group(1)
        if loop and (code := re.match(r"\s+([a-z]\w+)", line)):
            loops.setdefault(loop, []).append(code.group(1))
    counts = [_issued(code) for code in loops.values()]
    return max((one for one in counts if one["matrix"]), key=lambda one: one["matrix"], default={})


def _issued(code: list[str]) -> dict[str, int]:
    kinds = {
        "matrix": r"v_(wmma|swmmac|mfma|smfmac)_",
        "transcendental": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
        "vector": r"v_",
        "shared": r"ds_",
        "memory": r"(global|buffer|flat|scratch)_",
    }
    found = dict.fromkeys(kinds, 0)
    for name in code:
        kind = next((kind for kind, pattern in kinds.items() if re.match(pattern, name)), None)
        if kind is not None:
            found[kind] += 1
    return found


def _read_nvidia(binary: bytes, shared: int) -> Compiled:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary)
        usage = _run(str(knobs.nvidia.cuobjdump.path), "--dump-resource-usage", str(cubin))
        code = _run(str(knobs.nvidia.nvdisasm.path), "-c", str(cubin))
    figures = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    if figures is None:
        raise RuntimeError("cuobjdump --dump-resource-usage gave no REG and STACK")
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    loads = [name for name in names if name.split(".")[0] in {"LDG", "LDGSTS", "UTMALDG", "LD"}]
    matrix = [name for name in names if re.match(r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)", name)]
    return Compiled(
        spills=sum(name.split(".")[0] == "STL" for name in names),
        registers=int(figures.group(1)),
        shared_bytes=shared,
        private_bytes=int(figures.group(2)),
        matrix=_counts(matrix),
        loads=len(loads),
        wide_loads=sum(".128" in name or name.startswith("UTMALDG") for name in loads),
        narrow_loads=sum(re.search(r"\.[US](8|16)\b", name) is not None for name in loads),
        shared_loads=sum(name.split(".")[0] in {"LDS", "LDSM"} for name in names),
        hot_loop={},
    )


def _counts(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
