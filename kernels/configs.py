"""Tile configurations of the Triton kernels, by hardware family. The test suite compiles every one of them."""

from typing import NamedTuple

import torch


class TileConfig(NamedTuple):
    """Shape of one program's tile and how Triton schedules it. GROUP row tiles share a slice of the head in cache."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    GROUP: int
    num_warps: int
    num_stages: int
    PRECISION: str = "ieee"  # of fp32 products: ieee, or tf32x3 (three tensor-core passes, fp32's accuracy to 1e-6)

    def constexprs(self) -> dict[str, int | str]:
        return {name: value for name, value in self._asdict().items() if name.isupper()}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class Family(NamedTuple):
    """What one kind of hardware runs.

    Attributes:
        wide: candidates for one product and a light epilogue; the first is the default, the rest is for tuning.
        square: one product and a heavy epilogue (bias, softcap, odd D).
        dual: two products and a light epilogue.
        small: two products and a heavy epilogue.
        single, single_small: fp32 inputs, one product and two.
        persistent: whether a forward runs a fixed number of programs, each of which walks over tiles.
        tma: whether operands come through tensor descriptors where their strides allow it (16-bit inputs only).
    """

    wide: tuple[TileConfig, ...]
    square: TileConfig
    dual: TileConfig
    small: TileConfig
    single: TileConfig
    single_small: TileConfig
    persistent: bool = False
    tma: bool = False


_SINGLE = TileConfig(64, 64, 32, GROUP=16, num_warps=4, num_stages=3, PRECISION="tf32x3")
_SINGLE_SMALL = TileConfig(64, 32, 32, GROUP=16, num_warps=4, num_stages=3, PRECISION="tf32x3")
# Small, so that short tests reach tails and several tiles.
_INTERPRETED = TileConfig(16, 32, 16, GROUP=2, num_warps=1, num_stages=1)

FAMILIES: dict[str, Family] = {
    "sm_80": Family(
        wide=(
            TileConfig(128, 128, 32, GROUP=16, num_warps=8, num_stages=4),
            TileConfig(128, 128, 32, GROUP=32, num_warps=8, num_stages=3),
        ),
        square=TileConfig(128, 128, 32, GROUP=16, num_warps=8, num_stages=4),
        dual=TileConfig(64, 128, 32, GROUP=16, num_warps=8, num_stages=4),
        small=TileConfig(64, 64, 32, GROUP=16, num_warps=4, num_stages=4),
        single=_SINGLE,
        single_small=_SINGLE_SMALL,
    ),
    "sm_90": Family(
        wide=(
            TileConfig(128, 256, 64, GROUP=16, num_warps=8, num_stages=3),
            TileConfig(256, 128, 64, GROUP=16, num_warps=8, num_stages=3),
            TileConfig(128, 256, 64, GROUP=32, num_warps=8, num_stages=4),
            TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=4),
        ),
        square=TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=4),
        dual=TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=4),
        small=TileConfig(64, 128, 64, GROUP=16, num_warps=8, num_stages=3),
        single=_SINGLE,
        single_small=_SINGLE_SMALL,
        persistent=True,
        tma=True,
    ),
    "sm_100": Family(
        wide=(
            TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=3),
            TileConfig(128, 128, 64, GROUP=32, num_warps=8, num_stages=4),
        ),
        square=TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=3),
        dual=TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=3),
        small=TileConfig(128, 64, 64, GROUP=16, num_warps=8, num_stages=3),
        single=_SINGLE,
        single_small=_SINGLE_SMALL,
        persistent=True,
        tma=True,
    ),
    "gfx942": Family(
        wide=(
            TileConfig(128, 128, 64, GROUP=16, num_warps=4, num_stages=2),
            TileConfig(128, 256, 64, GROUP=16, num_warps=8, num_stages=2),
        ),
        square=TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=2),
        dual=TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=2),
        small=TileConfig(64, 64, 64, GROUP=16, num_warps=4, num_stages=2),
        single=TileConfig(64, 64, 32, GROUP=16, num_warps=4, num_stages=2),
        single_small=TileConfig(32, 32, 32, GROUP=16, num_warps=4, num_stages=2),
    ),
    "interpreter": Family((_INTERPRETED,), *(_INTERPRETED,) * 5, persistent=True, tma=True),
}
# Kernels without a product.
REDUCE = {"BLOCK_R": 32, "BLOCK_T": 32}
PASS = {"BLOCK_R": 16, "BLOCK_C": 128}
DECAY = {"BLOCK_D": 1024}
SUM_ROWS = 1024
PASS_WARPS = 4


def kept_constexprs(config: TileConfig) -> dict[str, int | str]:
    """Of the two products that skip tiles: BLOCK_D columns of the result, BLOCK_K of the sum at a time."""
    single = config.PRECISION != "ieee"
    depth = {"BLOCK_D": 64 if single else 128, "BLOCK_K": min(32, config.BLOCK_N, config.BLOCK_V)}
    return {"BLOCK_N": config.BLOCK_N, "BLOCK_V": config.BLOCK_V, **depth, "PRECISION": config.PRECISION}


def hardware_family(device: torch.device) -> str:
    """The key of `FAMILIES` for a device; a CPU means Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 10:
        return "sm_100"
    return "sm_90" if major == 9 else "sm_80"


def skipping_config(family: Family, dtype: torch.dtype) -> TileConfig:
    """The tile of a call that skips: one for its forward and its backward, whatever their epilogues."""
    return family.single if dtype == torch.float32 else family.square


def candidates(family: Family, dtype: torch.dtype, *, light: bool, products: int) -> tuple[TileConfig, ...]:
    """What may run a kernel with so many products a tile, the default first."""
    if dtype == torch.float32:
        return (family.single if products == 1 else family.single_small,)
    if light:
        return family.wide if products == 1 else (family.dual,)
    return (family.square if products == 1 else family.small,)
