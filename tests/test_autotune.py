"""Choosing a tile: the default unless asked, measured once, remembered per GPU, never by what a capture holds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import GPU, Case, Inputs, check, evaluate

from fastpo import linear_logps
from fastpo.kernels import autotune, configs, fused
from fastpo.kernels.configs import FAMILIES, TileConfig

CANDIDATES = [TileConfig(16, 32, 16, GROUP=group, num_warps=1, num_stages=1) for group in (1, 2, 3)]


class Clock:
    """Stands for a GPU's clock: candidates take the given times; counts what was measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: tuple[float, ...] = (3, 1, 2)) -> None:
        self.times, self.launched, self.measured = dict(zip(CANDIDATES, times, strict=True)), [], 0
        monkeypatch.setenv("FASTPO_AUTOTUNE", "1")
        monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU 1")
        monkeypatch.setattr("triton.testing.do_bench", self.bench)

    def bench(self, launch: Callable[[], None], **options: int) -> float:
        self.measured += 1
        launch()
        return self.times[self.launched[-1]]

    def choose(self, key: str = "forward", *, may_measure: bool = True) -> TileConfig:
        return autotune.fastest(CANDIDATES, key, self.launched.append, may_measure=may_measure)


def test_off_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, tmp_path)
    for value in ("0", "", "true"):
        monkeypatch.setenv("FASTPO_AUTOTUNE", value)
        assert clock.choose() == CANDIDATES[0]
    monkeypatch.delenv("FASTPO_AUTOTUNE")
    assert clock.choose() == CANDIDATES[0] and clock.measured == 0 and not autotune.cache_file().exists()


def test_the_fastest_is_measured_once_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, tmp_path)
    assert clock.choose() == CANDIDATES[1] and clock.measured == 3
    clock.times = dict.fromkeys(CANDIDATES, 0.0)
    assert clock.choose() == CANDIDATES[1] and clock.measured == 3
    assert autotune.cache_file() == tmp_path / "cache" / "tiles.json"
    (entry,) = json.loads(autotune.cache_file().read_text()).items()
    assert entry[0].startswith("GPU 1, triton ") and TileConfig(**entry[1]) == CANDIDATES[1]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["tiles.json"]


def test_another_work_or_gpu_is_measured_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, tmp_path)
    clock.choose("forward")
    clock.times = dict(zip(CANDIDATES, (3, 2, 1), strict=True))
    assert clock.choose("backward") == CANDIDATES[2]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU 2")
    assert clock.choose("forward") == CANDIDATES[2] and clock.measured == 9
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU 1")
    assert clock.choose("forward") == CANDIDATES[1] and clock.measured == 9


def test_under_capture_only_what_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, tmp_path)
    assert clock.choose(may_measure=False) == CANDIDATES[0] and clock.measured == 0
    clock.choose()
    assert clock.choose(may_measure=False) == CANDIDATES[1]


def test_a_single_candidate_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, tmp_path)
    assert autotune.fastest(CANDIDATES[:1], "key", pytest.fail, may_measure=True) == CANDIDATES[0]
    assert clock.measured == 0


@pytest.mark.parametrize("text", ["", "{", "no json"])
def test_a_broken_file_is_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    clock = Clock(monkeypatch, tmp_path)
    autotune.cache_file().parent.mkdir()
    autotune.cache_file().write_text(text)
    assert clock.choose() == CANDIDATES[1]
    assert json.loads(autotune.cache_file().read_text())


def test_a_choice_that_is_no_longer_a_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From an older version: the default, and no tile that nobody ships."""
    clock = Clock(monkeypatch, tmp_path)
    clock.choose()
    known = json.loads(autotune.cache_file().read_text())
    for entry in known.values():
        entry["BLOCK_N"] = 999
    autotune.cache_file().write_text(json.dumps(known))
    assert clock.choose() == CANDIDATES[0]


@pytest.mark.skipif(GPU, reason="the interpreter stands for the GPU")
@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_whichever_is_chosen_the_result_is_right(kernel: str, choice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward may choose apart, and the trial runs leave nothing behind."""
    tiles = (TileConfig(16, 64, 16, 2, 1, 1), TileConfig(32, 32, 32, 1, 1, 1))
    family = FAMILIES["interpreter"]._replace(wide=tiles)
    seen = []

    def fastest(candidates: tuple, key: str, launch: Callable[[TileConfig], None], *, may_measure: bool) -> TileConfig:
        for config in candidates:
            launch(config)
        seen.append(key.split(",", maxsplit=1)[0])
        return candidates[choice if key.startswith(kernel) else 0]

    monkeypatch.setitem(FAMILIES, "interpreter", family)
    # fp32 has one candidate on every GPU; here it gets 16-bit's.
    monkeypatch.setattr(fused, "candidates", lambda family, dtype, **options: family.wide)
    monkeypatch.setattr(fused, "fastest", fastest)
    monkeypatch.setattr("cases.launched_as", lambda case: pytest.MonkeyPatch.context())
    case = Case(seed=51, n=40, d=24, v=150)
    check(case, "fused")
    stash = {"mode": "stash", "memory_budget": 10 * 150 * 5}
    check(case, "fused", **stash)
    assert set(seen) == {"forward", "backward"}
    first, second = (evaluate(case, "fused", torch.float32, **stash) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


@pytest.mark.skipif(GPU, reason="the interpreter stands for the GPU")
def test_a_whole_stash_leaves_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fastest(candidates: tuple, key: str, launch: Callable[[TileConfig], None], *, may_measure: bool) -> TileConfig:
        launch(candidates[0])
        return candidates[0]

    monkeypatch.setattr(fused, "fastest", fastest)
    check(Case(seed=53, n=20, d=8, v=70), "fused", mode="stash", memory_budget=1 << 30)


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_fit_together(family: str) -> None:
    """A forward's tile and a backward's may differ, so that what passes between them must suit every candidate."""
    tiles = FAMILIES[family]
    step = min(t.BLOCK_V for t in (*tiles.wide, tiles.square, tiles.dual, tiles.small))
    for tile in (*tiles.wide, tiles.square, tiles.dual, tiles.small):
        assert tile.BLOCK_V % step == 0 and fused.SLICE_STEP % tile.BLOCK_V == 0, tile
        assert configs.PASS["BLOCK_C"] >= tile.BLOCK_V or tile.BLOCK_V % configs.PASS["BLOCK_C"] == 0
    assert len(set(tiles.wide)) == len(tiles.wide)
    for tile in (tiles.single, tiles.single_small):
        assert fused.SLICE_STEP % tile.BLOCK_V == 0 and tile.BLOCK_V % tiles.single_small.BLOCK_V == 0


def test_no_choice_is_made_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTPO_AUTOTUNE", "1")
    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path))
    x = Inputs(Case(seed=52, n=5, d=8, v=40), "fused", torch.float32)
    linear_logps(x.hidden, x.weight, x.labels, impl="fused")
    assert GPU or not list(tmp_path.iterdir())
