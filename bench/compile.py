"""Compile every shipped kernel configuration ahead of time, without a GPU, and read what the assembler says.

``python -m bench.compile`` prints registers, spills, shared memory, occupancy and matrix instructions of each;
``python -m bench.compile --json`` the same for a program; ``--target sm_90`` one target alone. Exits 1 if a kernel
spills, serialises its matrix instructions (ptxas C7515), has none, or does not load by TMA where it should.
"""

import argparse
import dataclasses
import itertools
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
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter's functions cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpo.kernels import backward_kernels, forward_kernels
from fastpo.kernels.configs import DECAY, FAMILIES, PASS, PASS_WARPS, REDUCE, SUM_ROWS, TileConfig, kept_constexprs

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
TMA_INSTRUCTION = r"cp\.async\.bulk\.tensor"
# Per multiprocessor: registers (gfx942: of one lane in each of four SIMDs), bytes of shared memory, most warps.
RESOURCES = {
    "sm_80": (65536, 163 * 1024, 64),
    "sm_90": (65536, 227 * 1024, 64),
    "sm_100": (65536, 227 * 1024, 64),
    "gfx942": (512, 64 * 1024, 32),
}
# What a pointer points to: the inputs' dtype, or as said here, else fp32.
OF_INPUTS = {"hidden", "ref_hidden", "weight", "bias", "grad_x", "stash", "scaled"}
POINTERS_INT = {"labels": "*i32", "offsets": "*i64", "keep": "*i8", "counts": "*i64", "tiles": "*i64"}
FLOATS = {"scale", "softcap", "inv_temperature"}
INTEGERS = {"N", "V", "D", "num_tiles", "first_col", "stash_rows"}


class Variant(NamedTuple):
    kernel: Any
    target: str
    dtype: str
    name: str
    constexprs: dict[str, Any]
    options: dict[str, int]


@dataclass
class Report:
    """What one compiled kernel needs. Registers are per thread, shared memory in bytes, spills in bytes."""

    kernel: str
    target: str
    dtype: str
    tile: str
    variant: str
    registers: int
    spills: int
    shared: int
    warps: int
    occupancy: float  # share of a multiprocessor's warps that fit at once
    matrix: bool
    tma: bool
    serialized: bool
    clean: bool


def variants(target: str) -> Iterator[Variant]:
    """Everything that can be launched on a target."""
    family = FAMILIES[target]
    for tma in {False, family.tma}:
        for config in family.wide:
            yield from _with_products(target, "bf16", config, light=True, tma=tma)
        for light in (True, False):
            yield from _with_products(target, "bf16", family.square, light=light, tma=tma, skips=True)
            yield from _with_products(
                target, "bf16", family.dual if light else family.small, light=light, tma=tma, dual=True
            )
    for light in (True, False):
        yield from _with_products(target, "fp32", family.single, light=light, tma=False, skips=True)
        yield from _with_products(target, "fp32", family.single_small, light=light, tma=False, dual=True)
    for dtype, skipping in (("bf16", family.square), ("fp32", family.single)):
        for kernel in (backward_kernels.kept_hidden_kernel, backward_kernels.kept_weight_kernel):
            yield Variant(kernel, target, dtype, "", kept_constexprs(skipping), skipping.options())
    for dtype, config in (("bf16", family.wide[0]), ("bf16", family.square), ("fp32", family.single)):
        yield from _without_products(target, dtype, config)


def _with_products(
    target: str, dtype: str, config: TileConfig, *, light: bool, tma: bool, dual: bool = False, skips: bool = False
) -> Iterator[Variant]:
    name = ("TMA" if tma else "pointers") + ("" if light else ", bias, softcap" + ("" if tma else ", odd D"))
    shape = {
        **config.constexprs(), "TMA": tma, "EVEN_D": light or tma, "HAS_BIAS": not light, "HAS_SOFTCAP": not light
    }  # fmt: skip
    forward = forward_kernels.joint_forward_kernel if dual else forward_kernels.forward_kernel
    for stash, slope in ((False, False), (True, False), *(((True, True),) * (not light))):
        label = name + (", slope" if slope else ", stash" if stash else "")
        flags = {"STASH": stash, "SLOPE": slope, "PERSISTENT": FAMILIES[target].persistent}
        yield Variant(forward, target, dtype, label, {**shape, **flags}, config.options())
    for entropy, skip in itertools.product((False, True), {False, skips}):
        flags = {"HAS_LOGPS": True, "HAS_ENTROPY": entropy, "HAS_KL": dual, "SKIPS": skip}
        label = name + ", entropy" * entropy + ", skips" * skip
        yield Variant(backward_kernels.backward_kernel, target, dtype, label, {**shape, **flags}, config.options())


def _without_products(target: str, dtype: str, config: TileConfig) -> Iterator[Variant]:
    options = {"num_warps": PASS_WARPS, "num_stages": 2}
    for gap in (False, True):
        yield Variant(forward_kernels.reduce_kernel, target, dtype, "KL" * gap, {**REDUCE, "HAS_GAP": gap}, options)
    yield Variant(forward_kernels.sequence_sum_kernel, target, dtype, "", {"BLOCK_R": SUM_ROWS}, options)
    tile = {**PASS, "TILE_V": config.BLOCK_V}
    yield Variant(backward_kernels.settle_kernel, target, dtype, "", tile, options)
    yield Variant(backward_kernels.decay_rows_kernel, target, dtype, "", dict(DECAY), options)
    for entropy, softcap in itertools.product((False, True), repeat=2):
        flags = {"HAS_LOGPS": True, "HAS_ENTROPY": entropy, "HAS_SOFTCAP": softcap}
        label = ", ".join(["entropy"] * entropy + ["softcap"] * softcap)
        yield Variant(backward_kernels.stash_backward_kernel, target, dtype, label, {**tile, **flags}, options)


def compile_variant(variant: Variant) -> Report:
    """Compile one variant for contiguous, 16-byte-aligned inputs, as a training run launches it."""
    kernel, target, dtype, name, constexprs, options = variant
    signature, aligned = {}, {}
    tma = constexprs.get("TMA", False)
    for position, argument in enumerate(kernel.arg_names):
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif tma and argument in ("hidden", "ref_hidden", "weight"):
            rows = constexprs["BLOCK_V" if argument == "weight" else "BLOCK_N"]
            signature[argument] = f"tensordesc<{dtype}[{rows}, {constexprs['BLOCK_D']}]>"
        elif argument in FLOATS:
            signature[argument] = "fp32"
        elif argument in INTEGERS or argument.startswith("stride_"):
            signature[argument] = "i32"
        else:
            of_inputs = argument in OF_INPUTS or (argument == "out" and "weight" in kernel.__name__)
            signature[argument] = POINTERS_INT.get(argument, "*" + dtype if of_inputs else "*fp32")
        strided = argument.startswith("stride_")
        if signature[argument].startswith("*") or strided or (argument == "D" and constexprs.get("EVEN_D", True)):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    usage = _nvidia_usage(compiled) if target.startswith("sm_") else _amd_usage(compiled)
    text = compiled.asm["ptx" if target.startswith("sm_") else "amdgcn"]
    matrix = re.search(MATRIX_INSTRUCTION[target], text) is not None
    loads_by_tma = re.search(TMA_INSTRUCTION, text) is not None
    multiplies = "PRECISION" in constexprs
    clean = not usage["spills"] and not usage["serialized"] and matrix >= multiplies and loads_by_tma >= tma
    tile = [str(constexprs[key]) for key in ("BLOCK_N", "BLOCK_V", "BLOCK_D") if key in constexprs]
    return Report(
        kernel.__name__, target, dtype, "x".join(tile), name, shared=compiled.metadata.shared,
        warps=options["num_warps"], occupancy=_occupancy(target, usage["registers"], compiled.metadata.shared, options),
        matrix=matrix, tma=loads_by_tma, clean=clean, **usage,
    )  # fmt: skip


def _occupancy(target: str, registers: int, shared: int, options: dict[str, int]) -> float:
    all_registers, all_shared, most_warps = RESOURCES[target]
    warps = options["num_warps"]
    if target == "gfx942":
        by_registers = 4 * min(8, all_registers // max(registers, 1)) // warps
    else:
        by_registers = all_registers // (max(registers, 1) * 32 * warps)
    by_shared = all_shared // shared if shared else most_warps
    return min(by_registers, by_shared, most_warps // warps) * warps / most_warps


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
    parser.add_argument("--target", choices=TARGETS, help="compile for one target alone")
    arguments = parser.parse_args()
    targets = [arguments.target] if arguments.target else list(TARGETS)
    # ptxas and lld run outside Python's lock, so threads help.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(compile_variant, [variant for target in targets for variant in variants(target)]))
    if arguments.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports]))
    else:
        print(
            f"{'kernel':21} {'target':6} {'dtype':5} {'tile':10} {'variant':42} "
            "regs spills shared warps occupancy matrix TMA   verdict"
        )
        for r in reports:
            print(
                f"{r.kernel:21} {r.target:6} {r.dtype:5} {r.tile:10} {r.variant:42} {r.registers:4} {r.spills:6} "
                f"{r.shared:6} {r.warps:5} {r.occupancy:9.0%} {r.matrix!s:6} {r.tma!s:5} "
                f"{'clean' if r.clean else 'BAD' + ' (serialised)' * r.serialized}"
            )
    return 0 if all(report.clean for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
