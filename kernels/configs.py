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
        return {
            "BLOCK_N": self.BLOCK_N,
            "BLOCK_V": self.BLOCK_V,
            "BLOCK_D": self.BLOCK_D,
            "GROUP": self.GROUP,
            "PRECISION": self.PRECISION,
        }


# family -> (16-bit inputs, fp32 inputs)
CONFIGS: dict[str, tuple[TileConfig, TileConfig]] = {
    "sm_80": (
        TileConfig(128, 128, 32, GROUP=16, num_warps=8, num_stages=4),
        TileConfig(64, 64, 32, GROUP=16, num_warps=4, num_stages=3, PRECISION="tf32x3"),
    ),
    "sm_90": (
        TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=4),
        TileConfig(64, 64, 32, GROUP=16, num_warps=4, num_stages=3, PRECISION="tf32x3"),
    ),
    "sm_100": (
        TileConfig(128, 128, 64, GROUP=16, num_warps=8, num_stages=3),
        TileConfig(64, 64, 32, GROUP=16, num_warps=4, num_stages=3, PRECISION="tf32x3"),
    ),
    "gfx942": (
        TileConfig(128, 128, 64, GROUP=16, num_warps=4, num_stages=2),
        TileConfig(64, 64, 32, GROUP=16, num_warps=4, num_stages=2),
    ),
    # Small, so that short tests reach tails and several tiles.
    "interpreter": (TileConfig(16, 32, 16, GROUP=2, num_warps=1, num_stages=1),) * 2,
}
REDUCE_CONSTEXPRS = {"BLOCK_R": 32, "BLOCK_T": 32}
REDUCE_WARPS = 4


def hardware_family(device: torch.device) -> str:
    """The key of `CONFIGS` for a device; a CPU means Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 10:
        return "sm_100"
    return "sm_90" if major == 9 else "sm_80"


def tile_config(device: torch.device, dtype: torch.dtype) -> TileConfig:
    half, single = CONFIGS[hardware_family(device)]
    return single if dtype == torch.float32 else half
