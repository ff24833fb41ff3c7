"""Compile every shipped kernel configuration ahead of time, without a GPU, and read what the assembler says.

``python -m bench.compile`` prints registers, spills, shared memory and matrix instructions of each;
``python -m bench.compile --json`` the same for a program. Exits 1 if a kernel spills, serialises its matrix
instructions (ptxas C7515) or has none.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter's functions cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpo.kernels.configs import CONFIGS, REDUCE_CONSTEXPRS, REDUCE_WARPS
from fastpo.kernels.linear_logps import (
    linear_logps_bwd_kernel,
    linear_logps_fwd_kernel,
    linear_logps_reduce_kernel,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTION = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "gfx942": r"v_mfma",
}
POINTERS_16 = {"hidden", "weight", "bias", "grad_x"}  # in the inputs' dtype; other pointers are fp32 unless named here
POINTERS_INT = {"labels": "*i32", "offsets": "*i64"}
FLOATS = {"scale", "softcap", "inv_temperature"}
UNIT_STRIDES = {"stride_hd", "stride_wd"}


@dataclass
class Report:
    """What one compiled kernel needs. Registers are per thread, shared memory in bytes, spills in bytes."""

    kernel: str
    target: str
    dtype: str
    variant: str
    registers: int
    spills: int
    shared: int
    warps: int
    matrix: bool
    serialized: bool

    @property
    def clean(self) -> bool:
        needs_matrix = "reduce" not in self.kernel
        return self.spills == 0 and not self.serialized and (self.matrix or not needs_matrix)


def variants() -> Iterator[tuple[Any, str, str, str, dict[str, Any], dict[str, int]]]:
    """(kernel, target, dtype, variant, constexprs, options) of everything that can be launched."""
    for target in TARGETS:
        for dtype, config in zip(("bf16", "fp32"), CONFIGS[target], strict=True):
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            for name, flags in (
                ("plain", {"EVEN_D": True, "HAS_BIAS": False, "HAS_SOFTCAP": False}),
                ("odd D, bias, softcap", {"EVEN_D": False, "HAS_BIAS": True, "HAS_SOFTCAP": True}),
            ):
                shape = {**config.constexprs(), **flags}
                yield linear_logps_fwd_kernel, target, dtype, name, shape, options
                for entropy in (False, True):
                    grads = {"HAS_LOGPS": True, "HAS_ENTROPY": entropy}
                    label = name + (", entropy" if entropy else "")
                    yield linear_logps_bwd_kernel, target, dtype, label, {**shape, **grads}, options
        reduce_options = {"num_warps": REDUCE_WARPS, "num_stages": 2}
        yield linear_logps_reduce_kernel, target, "fp32", "plain", dict(REDUCE_CONSTEXPRS), reduce_options


def compile_kernel(
    kernel: Any, target: str, dtype: str, variant: str, constexprs: dict[str, Any], options: dict[str, int]
) -> Report:
    """Compile one variant for contiguous, 16-byte-aligned inputs, as a training run launches it."""
    signature, constants, aligned = {}, dict(constexprs), {}
    for position, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in UNIT_STRIDES:
            signature[name], constants[name] = "constexpr", 1
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in POINTERS_INT:
            signature[name] = POINTERS_INT[name]
        elif name in POINTERS_16:
            signature[name] = "*" + dtype
        elif name in ("N", "V", "D", "num_tiles", "first_col") or name.startswith("stride_"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
        if signature[name].startswith("*") or (name.startswith("stride_") and name not in UNIT_STRIDES):
            aligned[(position,)] = [["tt.divisibility", 16]]
        if name == "D" and constexprs.get("EVEN_D"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    usage = _nvidia_usage(compiled) if target.startswith("sm_") else _amd_usage(compiled)
    text = compiled.asm["ptx" if target.startswith("sm_") else "amdgcn"]
    return Report(
        kernel.__name__, target, dtype, variant, shared=compiled.metadata.shared, warps=options["num_warps"],
        matrix=re.search(MATRIX_INSTRUCTION[target], text) is not None, **usage,
    )  # fmt: skip


def _nvidia_usage(compiled: Any) -> dict[str, Any]:
    arch = compiled.metadata.target.arch
    suffix = "a" if arch >= 90 else ""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = folder / "ptxas-blackwell"
    ptxas = blackwell if arch >= 100 and blackwell.exists() else folder / "ptxas"
    with tempfile.TemporaryDirectory() as work:
        ptx = Path(work, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [str(ptxas), "-v", f"--gpu-name=sm_{arch}{suffix}", str(ptx), "-o", str(Path(work, "kernel.cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    return {"registers": int(registers.group(1)), "spills": spills, "serialized": "C7515" in log}


def _amd_usage(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    spills = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
    return {"registers": number("vgpr_count"), "spills": spills, "serialized": False}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    # ptxas and lld run outside Python's lock, so threads help.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda variant: compile_kernel(*variant), variants()))
    if arguments.json:
        print(json.dumps([dataclasses.asdict(report) | {"clean": report.clean} for report in reports]))
    else:
        print(f"{'kernel':28} {'target':7} {'dtype':5} {'variant':30} regs spills shared warps matrix verdict")
        for r in reports:
            print(
                f"{r.kernel:28} {r.target:7} {r.dtype:5} {r.variant:30} {r.registers:4} {r.spills:6} {r.shared:6} "
                f"{r.warps:5} {r.matrix!s:6} {'clean' if r.clean else 'BAD' + ' (serialised)' * r.serialized}"
            )
    return 0 if all(report.clean for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
