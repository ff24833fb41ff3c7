"""Every shipped kernel configuration compiles, ahead of time and without a GPU, to code worth running."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpo.kernels import configs
from fastpo.kernels.configs import FAMILIES, TileConfig

ROOT = Path(__file__).resolve().parents[1]
# target -> bytes of shared memory that one block can have; a launch that asks for more fails
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
GEMMS = {"forward_kernel", "joint_forward_kernel", "backward_kernel", "kept_hidden_kernel", "kept_weight_kernel"}


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    # Triton's interpreter, which conftest.py switches on, cannot compile.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def report_of(target: str) -> tuple[list[dict[str, Any]], int]:
    done = run(["-m", "bench.compile", "--json", "--target", target])
    assert done.stdout.startswith("["), done.stderr
    return json.loads(done.stdout), done.returncode


def kernels() -> set[str]:
    """Every kernel that the launchers can launch: what Triton compiles and no other of its functions calls."""
    names, called = set(), set()
    for file in ("device", "forward_kernels", "backward_kernels"):
        tree = ast.parse((ROOT / "kernels" / f"{file}.py").read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        names |= {function.name for function in functions}
        called |= {
            node.func.id for function in functions for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }  # fmt: skip
    return names - called


def tile_of(config: TileConfig) -> str:
    return f"{config.BLOCK_N}x{config.BLOCK_V}x{config.BLOCK_D}"


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_target(target: str) -> None:
    """One target a test, so that the suite's processes share the work."""
    reports, status = report_of(target)
    assert {report["target"] for report in reports} == {target}
    bad = [report for report in reports if not report["clean"]]
    assert not bad and status == 0
    gemms = [report for report in reports if report["kernel"] in GEMMS]
    assert not [report for report in reports if report["spills"] != 0 or report["serialized"]]
    assert not [report for report in gemms if not report["matrix"]]
    assert not [report for report in reports if not 0 < report["registers"] <= REGISTERS[target]]
    assert not [report for report in reports if report["shared"] > SHARED_MEMORY[target]]
    assert not [report for report in reports if not 0 < report["occupancy"] <= 1]
    _check_coverage(target, reports)
    _check_tma(target, gemms)


def _check_coverage(target: str, reports: list[dict[str, Any]]) -> None:
    compiled = {(r["kernel"], r["dtype"], r["tile"], r["warps"]) for r in reports}
    assert len({json.dumps(r, sort_keys=True) for r in reports}) > len(compiled)  # several variants of each
    for dtype, products, light in [(d, p, w) for d in ("bf16", "fp32") for p in (1, 2) for w in (True, False)]:
        dtypes = {"bf16": configs.torch.bfloat16, "fp32": configs.torch.float32}
        for config in configs.candidates(FAMILIES[target], dtypes[dtype], light=light, products=products):
            forward = "forward_kernel" if products == 1 else "joint_forward_kernel"
            for kernel in (forward, "backward_kernel"):
                assert (kernel, dtype, tile_of(config), config.num_warps) in compiled, (kernel, config)
    for dtype in ("bf16", "fp32"):
        config = configs.skipping_config(FAMILIES[target], dtypes[dtype])
        skipping = [r for r in reports if r["kernel"] == "backward_kernel" and "skips" in r["variant"]]
        assert (dtype, tile_of(config)) in {(r["dtype"], r["tile"]) for r in skipping}
    for kernel in ("forward_kernel", "joint_forward_kernel"):
        names = [r["variant"] for r in reports if r["kernel"] == kernel]
        for part in ("bias, softcap", "stash", "slope"):
            assert any(part in name for name in names), (kernel, part)
    entropies = [r for r in reports if r["kernel"] == "backward_kernel" and "entropy" in r["variant"]]
    assert {r["tile"] for r in entropies} == {r["tile"] for r in reports if r["kernel"] == "backward_kernel"}


def _check_tma(target: str, gemms: list[dict[str, Any]]) -> None:
    """Where a family loads by TMA, each of its 16-bit tiles does; the pointer path is compiled beside it."""
    projecting = [r for r in gemms if not r["kernel"].startswith("kept")]
    for report in projecting:
        assert report["tma"] == report["variant"].startswith("TMA"), report
    by_tma = {(r["kernel"], r["tile"]) for r in projecting if r["tma"]}
    by_pointers = {(r["kernel"], r["tile"]) for r in projecting if r["dtype"] == "bf16" and not r["tma"]}
    assert by_tma == (by_pointers if FAMILIES[target].tma else set())
    assert FAMILIES[target].tma == (target in ("sm_90", "sm_100"))


def test_every_family_but_the_interpreters_is_a_target() -> None:
    assert set(FAMILIES) - {"interpreter"} == set(SHARED_MEMORY)


@pytest.fixture(scope="module")
def listed() -> set[tuple[str, str, str]]:
    """Target, kernel and dtype of all that the command compiles, without compiling it."""
    code = (
        "import json, bench.compile as c; "
        "print(json.dumps([[t, v.kernel.__name__, v.dtype] for t in c.TARGETS for v in c.variants(t)]))"
    )
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr
    return {tuple(entry) for entry in json.loads(done.stdout)}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_kernel_is_compiled_for_both_dtypes(target: str, listed: set[tuple[str, str, str]]) -> None:
    expected = {(target, kernel, dtype) for kernel in kernels() for dtype in ("bf16", "fp32")}
    assert not expected - listed


def test_no_kernel_is_left_out(listed: set[tuple[str, str, str]]) -> None:
    """A new kernel must be in the report too."""
    assert not {(target, kernel) for target in SHARED_MEMORY for kernel in kernels()} - {entry[:2] for entry in listed}


def test_one_command_prints_a_line_for_each_kernel() -> None:
    """The same as a table, for people: registers, spills, shared memory, occupancy."""
    code = (
        "import sys, bench.compile as c; full = c.variants; "
        "c.variants = lambda target: [v for v in full(target) if v.kernel.__name__ == 'reduce_kernel'][:2]; "
        "sys.argv = ['compile', '--target', 'sm_90']; sys.exit(c.main())"
    )
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split() == [
        "kernel", "target", "dtype", "tile", "variant", "regs", "spills", "shared", "warps", "occupancy", "matrix",
        "TMA", "verdict",
    ]  # fmt: skip
    assert len(lines) == 2 and all(line.endswith("clean") and "%" in line for line in lines)


def test_a_kernel_that_spills_is_reported_and_fails() -> None:
    """The report itself: a tile that is known to spill (256x256 with 8 warps) is called bad and the command exits 1."""
    code = (
        "import sys, bench.compile as c; from fastpo.kernels.configs import TileConfig; "
        "tile = TileConfig(256, 256, 64, GROUP=16, num_warps=8, num_stages=2); "
        "c.variants = lambda target: list(c._with_products(target, 'bf16', tile, light=True, tma=True))[:1]; "
        "sys.argv = ['compile', '--target', 'sm_90', '--json']; sys.exit(c.main())"
    )
    done = run(["-c", code])
    (report,) = json.loads(done.stdout)
    assert done.returncode == 1 and report["spills"] > 0 and not report["clean"]
