"""Runs that are killed, stopped, out of disk: what they leave is whole, and they go on as if nothing had happened."""

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import survival_child
import torch
import yaml
from tiny import SHAPE, tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from transformers import TrainerCallback

from fastpo.checkpoints import clear_staging, discard, newest_checkpoint, put_in_place, replacing_model
from fastpo.cli import main
from fastpo.files import SaveError, append_line, replacing
from fastpo.planted import planted_preferences
from fastpo.preemption import SaveOnSigterm
from fastpo.reporting import MetricsFile, read_metrics
from fastpo.run import run_training
from fastpo.trainer import PreferenceTrainer

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("FASTPO_KILLS", "3"))  # of each kind; 20 take some minutes
SAVE_STEPS = 2
RECIPE: dict[str, Any] = {
    "stage": "dpo",
    "model_config": {"model_type": "qwen3", **SHAPE},
    "tokenizer_vocab_size": 300,
    "dtype": "float32",
    "use_cpu": True,
    "max_length": 64,
    "eval_fraction": 0.25,
    "per_device_train_batch_size": 4,
    "learning_rate": "1e-2",
    # Five steps an epoch, a log every third, a checkpoint every second: nothing ends where something else does.
    "max_steps": 12,
    "logging_steps": 3,
    "save_steps": SAVE_STEPS,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "add_beta_head": True,
    "beta_mode": "dynamic_scaling",
}
RESUME = ["--resume_from_checkpoint", "true"]
STATE = ("model.safetensors", "beta_head.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")

processes = multiprocessing.get_context("forkserver")


def start(recipe: Path, run: Path, *overrides: str, **how: Any) -> Any:
    arguments = (str(recipe), ["--output_dir", str(run), *overrides], str(run.with_suffix(".log")))
    process = processes.Process(target=survival_child.train, args=arguments, kwargs=how)
    process.start()
    return process


def trainer_for(output_dir: Path, *, callbacks: Any = None, eval_dataset: Any = None, **fields: Any) -> Any:
    return PreferenceTrainer(
        tiny_model(), args=tiny_args(output_dir, **fields), train_dataset=tiny_pairs(8), eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(), callbacks=callbacks,
    )  # fmt: skip


def finish(process: Any, run: Path) -> tuple[int, str]:
    """Exit status and output."""
    process.join()
    return process.exitcode, run.with_suffix(".log").read_text()


def rows(run: Path) -> list[dict[str, float]]:
    """What was logged, without what the clock and the memory of one run say."""
    timed = ("runtime", "per_second", "measured_gb")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in read_metrics(run / "metrics.jsonl")]


def same_state(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in STATE)


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """One process that imports, from which all runs are forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        forkserver.set_forkserver_preload(["survival_child"])
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in planted_preferences(24, seed=1)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "dataset": str(folder / "pairs.jsonl")}))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The uninterrupted run, with all its checkpoints."""
    run = recipe.parent / "whole"
    status, output = finish(start(recipe, run), run)
    assert status == 0, output[-2000:]
    return run


def assert_nothing_loads_wrong(run: Path, whole: Path, old: dict[str, bytes]) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        assert same_state(checkpoint, whole / checkpoint.name), checkpoint
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert f"checkpoint-{state['global_step']}" == checkpoint.name
    if (run / "config.json").exists():
        there = {name: (run / name).read_bytes() for name in old if (run / name).exists()}
        assert there in (old, {name: (whole / name).read_bytes() for name in old if (whole / name).exists()})


def assert_ends_as(run: Path, whole: Path, recipe: Path) -> None:
    status, output = finish(start(recipe, run, "--save_total_limit", "1", *RESUME), run)
    assert status == 0, output[-2000:]
    assert rows(run) == rows(whole)
    # What was killed before it deleted the last checkpoint but one has nothing left to save.
    assert {path.name for path in run.glob("checkpoint-*")} in ({"checkpoint-12"}, {"checkpoint-10", "checkpoint-12"})
    assert same_state(run / "checkpoint-12", whole / "checkpoint-12")
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (run / "disco_head.safetensors").exists() and not (run / ".incomplete").exists()


def with_an_old_model(run: Path) -> dict[str, bytes]:
    """Another model lies where the run will leave its own."""
    tiny_model(hidden_size=16).save_pretrained(run)
    (run / "disco_head.safetensors").write_bytes(b"of the old model")
    names = ("config.json", "model.safetensors", "disco_head.safetensors")
    return {name: (run / name).read_bytes() for name in names}


def saved_step(run: Path) -> int:
    newest = newest_checkpoint(run)
    return 0 if newest is None else int(newest.name.rpartition("-")[2])


def wait_for(run: Path, step: int) -> float:
    """When training has begun and, if it is not 0, the checkpoint of a step is there."""
    while not (run / "metrics.jsonl").exists() or saved_step(run) < step:
        time.sleep(0.001)
    return time.perf_counter()


def test_killed_at_random_moments_every_resume_ends_as_the_uninterrupted_run(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    timed = start(recipe, tmp_path / "timed")
    between = (-wait_for(tmp_path / "timed", 0) + wait_for(tmp_path / "timed", 12)) / 6  # two checkpoints
    timed.join()
    chance = random.Random(0)
    killed_after = []
    for kill in range(KILLS):
        run = tmp_path / f"run{kill}"
        old = with_an_old_model(run)
        process = start(recipe, run, "--save_total_limit", "1")
        # Somewhere after a checkpoint, or before the first, each in turn.
        wait_for(run, kill * 7 // KILLS * SAVE_STEPS)
        time.sleep(chance.random() * between)
        process.kill()
        process.join()
        killed_after.append(saved_step(run))
        assert_nothing_loads_wrong(run, whole, old)
        assert_ends_as(run, whole, recipe)
    print(f"killed after the checkpoints of steps {killed_after}; {between:.3f} s between two")


def test_killed_between_any_two_file_operations_nothing_loads_wrong(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "counted"
    with_an_old_model(run)
    _, output = finish(start(recipe, run, "--save_total_limit", "1"), run)
    operations = int(output.split()[-3])
    newest = 0
    for kill in range(KILLS):
        before = int(operations * (kill + 0.5) / KILLS)
        run = tmp_path / f"run{kill}"
        old = with_an_old_model(run)
        status, output = finish(start(recipe, run, "--save_total_limit", "1", kill_before=before), run)
        assert status == -signal.SIGKILL, output[-2000:]
        assert_nothing_loads_wrong(run, whole, old)
        # The only checkpoint is deleted once the next one is in place.
        assert saved_step(run) >= newest
        newest = saved_step(run)
        assert_ends_as(run, whole, recipe)
    assert newest == RECIPE["max_steps"]


# --- SIGTERM ----------------------------------------------------------------------------------------------------------


def test_sigterm_saves_after_the_step_says_how_to_go_on_and_exits_with_143(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    status, output = finish(start(recipe, run, terminate_at="checkpoint-4"), run)
    assert status == 143 and "Traceback" not in output
    [line] = [line for line in output.splitlines() if "SIGTERM" in line]
    assert f"stopped by SIGTERM after step 5, which is saved in {run}/checkpoint-5" in line
    assert "--resume_from_checkpoint true" in line
    assert not (run / "config.json").exists()
    status, output = finish(start(recipe, run, *RESUME), run)
    assert status == 0, output[-2000:]
    assert same_state(run / "checkpoint-12", whole / "checkpoint-12")
    summary, evaluation, memory = rows(run)[-3:]
    assert [evaluation, memory] == rows(whole)[-2:]
    assert summary["train_loss"] == pytest.approx(rows(whole)[-3]["train_loss"], rel=1e-6)
    assert [row["step"] for row in rows(run) if "loss" in row] == [2, 3, 4, 5, 6, 8, 9, 10, 12]


class Terminate(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # at each step: a second one must change nothing


def test_the_handler_of_before_comes_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopped = trainer_for(tmp_path / "stopped", callbacks=[SaveOnSigterm(), Terminate()])
    with pytest.raises(SystemExit) as exit_:
        stopped.train()
    assert exit_.value.code == 143 and (tmp_path / "stopped" / "checkpoint-1").is_dir()
    assert signal.getsignal(signal.SIGTERM) is before
    trainer_for(tmp_path / "through", callbacks=[SaveOnSigterm()]).train()
    assert signal.getsignal(signal.SIGTERM) is before

    class Fail(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert signal.getsignal(signal.SIGTERM) is not before
            raise RuntimeError("by a callback")

    with pytest.raises(RuntimeError, match="by a callback"):
        run_training(trainer_for(tmp_path / "failed", callbacks=[SaveOnSigterm(), Fail()]))
    assert signal.getsignal(signal.SIGTERM) is before


# --- a full disk, a path that cannot be written -----------------------------------------------------------------------


@pytest.mark.parametrize("too_large", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_cannot_be_written_is_one_clear_line_and_leaves_the_others(
    recipe: Path, whole: Path, tmp_path: Path, too_large: str
) -> None:
    """safetensors and torch.save report it in different ways, neither as an OSError."""
    run = tmp_path / "run"
    size = (whole / "checkpoint-4" / too_large).stat().st_size
    status, output = finish(start(recipe, run, limit=("checkpoint-4", size - 1)), run)
    assert status == 1 and "Traceback" not in output, output[-2000:]
    complaint = [line for line in output.splitlines() if line.startswith("fastpo: error:")]
    assert complaint == [f"fastpo: error: cannot write {run}/checkpoint-4: File too large"]
    assert {path.name for path in run.iterdir()} == {"checkpoint-2", "metrics.jsonl"}
    assert same_state(run / "checkpoint-2", whole / "checkpoint-2")


def test_a_model_that_cannot_be_written_leaves_the_one_that_is_there(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    old = with_an_old_model(run)
    limit = (".incomplete/model", (whole / "model.safetensors").stat().st_size - 1)
    status, output = finish(start(recipe, run, "--save_strategy", "no", limit=limit), run)
    assert status == 1 and f"fastpo: error: cannot write {run}: File too large" in output
    assert {name: (run / name).read_bytes() for name in old} == old
    assert not (run / ".incomplete").exists()


def test_a_folder_that_cannot_be_written_any_more_is_named(tmp_path: Path) -> None:
    class Lose(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shutil.rmtree(args.output_dir, ignore_errors=True)
            Path(args.output_dir).write_text("a file where the folder was")

    trainer = trainer_for(tmp_path / "run", callbacks=[Lose()], save_strategy="steps", save_steps=1)
    with pytest.raises(SaveError, match=r"cannot write .*/run/checkpoint-1: Not a directory"):
        trainer.train()


def test_eval_metrics_that_cannot_be_written_are_one_clear_line(
    recipe: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    (run / "eval_metrics.json").mkdir()
    assert main(["eval", str(recipe), "--output_dir", str(run)]) == 1
    assert f"fastpo: error: cannot write {run}/eval_metrics.json: Is a directory" in capsys.readouterr().err
    assert not list(run.glob(".incomplete*"))


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, "first")
    append_line(path, "second")
    assert path.read_text() == "first\nsecond\n"
    with pytest.raises(SaveError, match="cannot write /dev/full: No space left on device"):
        append_line(Path("/dev/full"), "third")
    with pytest.raises(SaveError, match=r"cannot write .*lines/below: Not a directory"):
        append_line(path / "below", "third")


def test_a_disk_that_is_full_in_the_middle_of_a_line_keeps_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, "first")
    unlimited, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, unlimited[1]))
        with pytest.raises(SaveError, match=r"cannot write .*lines: File too large"):
            append_line(path, "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "first\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with replacing(path) as aside:
        aside.write_text("old")
    assert path.read_text() == "old"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(SaveError, match=r"cannot write .*table.json: No space left"), replacing(path) as aside:
        aside.write_text("half of the n")
        raise full
    with pytest.raises(ZeroDivisionError), replacing(path) as aside:  # not about writing: as it is
        aside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- folders ----------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int, content: str = "", complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model").write_text(content)
    (path / "trainer_state.json").write_text("{}" if complete else "{")
    return path


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    expected = [checkpoint(tmp_path, step) for step in (2, 9, 10)][-1]
    checkpoint(tmp_path, 11, complete=False)
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    checkpoint(tmp_path / ".incomplete", 12)
    assert newest_checkpoint(tmp_path) == expected


def test_a_checkpoint_takes_the_place_of_another_of_the_same_step(tmp_path: Path) -> None:
    target = checkpoint(tmp_path, 4, "old")
    put_in_place(checkpoint(tmp_path / ".incomplete", 4, "new"), target)
    assert (target / "model").read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_checkpoint_about_to_be_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = checkpoint(tmp_path, 4, "old")
    staged = checkpoint(tmp_path / ".incomplete", 4, "new")
    rename = Path.rename

    def killed(self: Path, other: Path) -> Any:
        if self == staged:
            raise KeyboardInterrupt
        return rename(self, other)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        put_in_place(staged, target)
    assert not target.exists()
    clear_staging(tmp_path)
    assert (target / "model").read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_checkpoint_disappears_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, gone = checkpoint(tmp_path, 4), checkpoint(tmp_path, 2)

    def before_deleting(path: Path, **kwargs: Any) -> None:
        assert not gone.exists() and newest_checkpoint(tmp_path) == kept

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", before_deleting)
        discard([gone])
    clear_staging(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_no_moment_has_a_mixture_of_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-1-of-2.safetensors")
    old, new = {*names[:2], "beta_head.safetensors"}, {names[0], *names[2:]}  # in shards this time
    for name in old:
        (tmp_path / name).write_text("old")

    def checked(change: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = change(*args, **kwargs)
            there = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
            assert "config.json" not in there or there in (dict.fromkeys(old, "old"), dict.fromkeys(new, "new"))
            return result

        return wrapped

    with monkeypatch.context() as patch, replacing_model(tmp_path) as staged:
        for name in new:
            (staged / name).write_text("new")
        for change in ("replace", "rename", "unlink"):
            patch.setattr(Path, change, checked(getattr(Path, change)))
    assert {path.name for path in tmp_path.iterdir()} == new


def test_an_adapter_leaves_the_model_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("of the base")
    (tmp_path / "model.safetensors").write_text("of the base")
    (tmp_path / "adapter_model.bin").write_text("of the old adapter")
    with replacing_model(tmp_path) as staged:
        (staged / "adapter_config.json").write_text("new")
        (staged / "adapter_model.safetensors").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "config.json": "of the base", "model.safetensors": "of the base",
        "adapter_config.json": "new", "adapter_model.safetensors": "new",
    }  # fmt: skip


# --- the Trainer's own ------------------------------------------------------------------------------------------------


def test_the_best_and_the_newest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    fields |= {"load_best_model_at_end": True, "save_total_limit": 2}
    fields |= {"metric_for_best_model": "rewards/margins", "greater_is_better": False}  # so the best is the first
    trainer = trainer_for(tmp_path, eval_dataset=tiny_pairs(4, seed=2), **fields)
    trainer.train()
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    trainer._keep(tmp_path, limit=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-5"}
    # In the end transformers keeps the best alone, and deletes the other file by file: not if it has gone at once.
    gone: list[Path] = []
    monkeypatch.setattr("fastpo.checkpoints.discard", lambda paths: (gone.extend(paths), discard(paths)))
    alone = trainer_for(tmp_path, eval_dataset=tiny_pairs(4, seed=2), **(fields | {"save_total_limit": 1}))
    alone.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1"} and gone == [tmp_path / "checkpoint-5"]


def test_resuming_asks_for_a_complete_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3, complete=False)
    with pytest.raises(ValueError, match="resume_from_checkpoint needs a complete checkpoint in"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_resumed_after_its_last_step_makes_no_more(tmp_path: Path) -> None:
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}  # in the middle of an epoch
    trainer_for(tmp_path, **fields).train()
    again = trainer_for(tmp_path, callbacks=[MetricsFile(str(tmp_path))], **fields)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == 3
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 3]
    assert math.isfinite(output.training_loss)


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """All runs of ddp_survival in one start of two processes: their folder, and what each process found."""
    folder, here = tmp_path_factory.mktemp("ddp"), Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(here / "ddp_survival.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"found.{process}") for process in range(2)]


def test_two_processes_stop_after_the_same_step_and_go_on(two_processes: Any) -> None:
    folder, found = two_processes
    assert [(process["stopped"]["ended"], process["stopped"]["step"]) for process in found] == [("143", 2)] * 2
    saved = {path.name for path in (folder / "stopped" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= saved
    assert not (folder / "stopped" / ".incomplete").exists()
    for process in found:
        assert process["resumed"]["losses"] == process["whole"]["losses"]
        assert all(torch.equal(process["resumed"]["weights"][k], p) for k, p in process["whole"]["weights"].items())


def test_two_processes_decide_alike_on_a_bad_step(two_processes: Any) -> None:
    """The bad row is the second process's."""
    first, second = two_processes[1]
    assert first["bad"]["ended"] == second["bad"]["ended"] and first["bad"]["step"] == second["bad"]["step"] == 2
    assert "loss is not finite at step 2: dataset rows [11], losses [nan]" in first["bad"]["ended"]
    assert first["skipped"]["step"] == second["skipped"]["step"] == 4
    assert len(first["skipped"]["losses"]) == 3
    for name, p in first["skipped"]["weights"].items():
        assert p.isfinite().all() and torch.equal(p, second["skipped"]["weights"][name]), name
