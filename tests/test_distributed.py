"""Several processes give what one gives: the split LM head, DDP, FSDP2, DeepSpeed, and checkpoints of them."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_run import run, save_models
from filelock import FileLock
from sharded_head_cases import PROBLEMS, own_rows, tensors, truth
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from tolerance import assert_grads_close, assert_stats_close
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastpo import PreferenceTrainer, linear_logps, vocab_parallel_logps

GRID = [f"{objective}, {part}" for objective in ("sft", "dpo", "ledpo") for part in ("full", "lora")]
HEADS = [f"ddp: {objective}, full" for objective in ("no heads", "heads unused", "heads in use")]
RESUMED = ["fsdp2: ledpo, full, resumed", "fsdp2: ledpo, lora, resumed"]
ON_TWO = [f"{engine}: {case}" for engine in ("ddp", "fsdp2", "fsdp2 apart") for case in GRID]
ON_TWO.append("fsdp2: dpo, lora head")  # trained, and split
MEMORY = ["ddp: cached, full", "fsdp2: cached, lora", "ddp: split, lora", "fsdp2: split, full"]
IN_BF16 = ["fsdp2: bf16, lora", "fsdp2: bf16, full"]
ON_FOUR = ["ddp: ledpo, full", "fsdp2: dpo, full", "fsdp2: ledpo, lora", "fsdp2 apart: sft, full"]
ON_FOUR += ["fsdp2 apart: ledpo, full", "fsdp2: dpo, lora head"]
WITH_DEEPSPEED = [f"{engine}: {case}" for engine in ("zero2", "zero3") for case in ("dpo, full", "ledpo, lora")]
WITH_DEEPSPEED += ["zero3: sft, full", "zero3: dpo, lora head", "zero3: ledpo, full, resumed"]
Results = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """A case on one process."""
    folder = tmp_path_factory.mktemp("alone")
    save_models(folder)
    return cache(lambda case: run(case, folder))


def launched(
    tmp_path_factory: pytest.TempPathFactory, name: str, processes: int, *cases: str, **environment: str
) -> Results:
    """All cases in one start, whichever worker of pytest asks first; what a case gave in each process."""
    here, base = Path(__file__).parent, tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(here / "distributed_run.py"), str(folder)]
    paths = {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            save_models(folder)
            done = subprocess.run(
                [*command, *cases], env=os.environ | paths | environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
            (folder / "done").touch()
    return lambda case: [torch.load(folder / f"{case}.{process}") for process in range(processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launched(tmp_path_factory, "two", 2, "vocab_parallel", *ON_TWO, *MEMORY, *IN_BF16, *HEADS, *RESUMED)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launched(tmp_path_factory, "four", 4, "vocab_parallel", *ON_FOUR)


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return launched(tmp_path_factory, "deepspeed", 2, *WITH_DEEPSPEED, DS_ACCELERATOR="cpu")


# --- the head that is split over processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("processes", ["two", "four"])
def test_a_split_head_gives_what_the_whole_head_gives(
    name: str, processes: str, request: pytest.FixtureRequest
) -> None:
    problem, each = PROBLEMS[name], [found[name] for found in request.getfixturevalue(processes)("vocab_parallel")]
    expected, eager = truth(problem), truth(problem, problem.case.dtype)
    bias = tensors(problem)[2]
    max_logit = problem.case.max_logit + (0 if bias is None else float(bias.abs().max()))
    assert each[0].keys() == expected.keys()
    for process, found in enumerate(each):
        rows = own_rows(problem, process, len(each))
        for field in expected.keys() - {"d_hidden", "d_weight", "d_bias"}:
            assert_stats_close(field, found[field], expected[field][rows], eager[field][rows], max_logit)
        assert_grads_close("d_hidden", found["d_hidden"], expected["d_hidden"][rows], scale=1e-3, rtol=1e-5)
        for field in expected.keys() & {"d_weight", "d_bias"}:
            assert_grads_close(field, found[field], expected[field], rtol=1e-5)


def test_the_gradient_of_a_head_that_fsdp_shards_is_the_mean_of_the_processes(four: Results) -> None:
    expected = truth(PROBLEMS["own rows"])["d_weight"] / 4
    for found in four("vocab_parallel"):
        assert_grads_close("d_weight", found["mean"]["d_weight"], expected, rtol=1e-5)


def test_a_split_that_is_none_is_refused(tmp_path: Path) -> None:
    hidden, weight, labels = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="init_process_group"):
        vocab_parallel_logps(hidden, weight, labels)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"weight must have shape \(V_p, D\), got \(4,\)"):
            vocab_parallel_logps(hidden, weight[:, 0], labels)
        with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(5,\)"):
            vocab_parallel_logps(hidden, weight, labels, torch.ones(5))
        with pytest.raises(ValueError, match="impl='reference'"):
            vocab_parallel_logps(hidden, weight, labels, impl="reference")
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(ValueError, match=r"sharded by rows over one dimension of its mesh, got.*Shard\(dim=1\)"):
            linear_logps(hidden, distribute_tensor(weight, mesh, [Shard(1)]), labels)
        with pytest.raises(ValueError, match=r"bias must be sharded as weight, .* got Tensor"):
            linear_logps(hidden, distribute_tensor(weight, mesh, [Shard(0)]), labels, torch.ones(4))
    finally:
        dist.destroy_process_group()


# --- training ---------------------------------------------------------------------------------------------------------


def assert_same_run(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    for found in several:
        assert found["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert found["means"] == pytest.approx(one["means"], rel=1e-5, abs=1e-9)
        assert_same_tensors(one["weights"], found["weights"])
        if found["gradients"]:
            assert_same_tensors(one["gradients"], found["gradients"])


def assert_same_tensors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and any(x.any() for x in expected.values())
    for name, x in expected.items():
        assert (x - found[name]).norm() <= 1e-5 * max(x.norm().item(), 1e-3), name


@pytest.mark.parametrize("case", ON_TWO)
def test_two_processes_give_the_losses_and_gradients_of_one(case: str, two: Results, alone: Any) -> None:
    engine, _, name = case.partition(": ")
    found = two(case)
    assert_same_run(alone(name), found)
    for process in found:
        assert process["gradients"] and process["sharded"] == engine.startswith("fsdp2")
        # accelerate gathers the head of a full model beside its last norm, and shards that of an adapter's base apart.
        apart = {"ddp": False, "fsdp2": "lora" in name, "fsdp2 apart": True}[engine]
        assert bool(process["sharded_head_calls"]) == apart


@pytest.mark.parametrize("case", MEMORY)
def test_memory_savers_give_them_too(case: str, two: Results, alone: Any) -> None:
    assert_same_run(alone(case.partition(": ")[2]), two(case))


@pytest.mark.parametrize("case", IN_BF16)
def test_bf16_does_not_round_the_statistics(case: str, two: Results, alone: Any) -> None:
    for found in two(case):
        assert found["losses"] == pytest.approx(alone(case.partition(": ")[2])["losses"], abs=2e-2)
        assert not any(loss == torch.tensor(loss).bfloat16().item() for loss in found["losses"])


@pytest.mark.parametrize("case", ON_FOUR)
def test_four_processes_give_the_losses_and_gradients_of_one(case: str, four: Results, alone: Any) -> None:
    assert_same_run(alone(case.partition(": ")[2]), four(case))


@pytest.mark.parametrize("case", [case for case in WITH_DEEPSPEED if not case.endswith("resumed")])
def test_deepspeed_gives_the_losses_and_weights_of_one_process(case: str, deepspeed: Results, alone: Any) -> None:
    assert_same_run(alone(case.partition(": ")[2]), deepspeed(case))


def test_a_model_in_parts_is_no_reference(tmp_path: Path) -> None:
    model = tiny_model()
    model.lm_head.weight.ds_id = 0  # ZeRO-3's mark
    with pytest.raises(ValueError, match="ref_model must be given, or a peft_config, with DeepSpeed ZeRO-3"):
        PreferenceTrainer(
            model, args=tiny_args(tmp_path), train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer()
        )


def test_heads_are_the_first_process_s_everywhere_and_all_of_them_train(two: Results) -> None:
    first, second = two("ddp: heads in use, full")
    assert all(torch.equal(p, second["weights"][name]) for name, p in first["weights"].items())
    heads = {name: grad for name, grad in first["gradients"].items() if "head." in name and "lm_head" not in name}
    assert {name.split(".")[0] for name in heads} == {"beta_head", "disco_head"}
    assert all(grad.any() for grad in heads.values())


def test_unused_heads_change_nothing(two: Results) -> None:
    for plain, heads in zip(two("ddp: no heads, full"), two("ddp: heads unused, full"), strict=True):
        assert plain["weights"].keys() == heads["weights"].keys()
        assert all(torch.equal(p, heads["weights"][name]) for name, p in plain["weights"].items())


# --- checkpoints ------------------------------------------------------------------------------------------------------


def assert_resumed(runs: list[dict[str, Any]]) -> None:
    for process in runs:
        whole, resumed = process["whole"], process["resumed"]
        assert len(whole["losses"]) == 4 and resumed["losses"] == pytest.approx(whole["losses"], abs=1e-6)
        assert resumed["means"] == pytest.approx(whole["means"], rel=1e-6)
        for name, x in whole["weights"].items():
            torch.testing.assert_close(resumed["weights"][name], x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_fsdp2_checkpoint_continues_the_same_curve(case: str, two: Results) -> None:
    assert_resumed(two(case))


def test_a_resumed_zero3_checkpoint_continues_the_same_curve(deepspeed: Results) -> None:
    assert_resumed(deepspeed("zero3: ledpo, full, resumed"))
