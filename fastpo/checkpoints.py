"""Checkpoints and models that are whole or not there, at whatever moment the process ends."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.serialization import register_package
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from fastpo.architecture import HEADS, load_heads
from fastpo.files import flush, flush_tree, replacing, writing

logger = logging.getLogger(__name__)

# Several processes on CPUs resume on the device "cpu:0", onto which torch.load does not know how to load.
register_package(11, lambda storage: None, lambda storage, location: storage if location == "cpu:0" else None)

STAGING = ".incomplete"  # in output_dir: what is being written, replaced or deleted
REPLACED = "replaced"
# A saved model loads by its config; these are the weights that belong to each.
WEIGHTS = {
    "config.json": (
        *("model.safetensors*", "model-*-of-*.safetensors"),
        *("pytorch_model.bin*", "pytorch_model-*-of-*.bin"),
    ),
    "adapter_config.json": ("adapter_model.*",),
}
HEAD_FILES = tuple(f"{name}{suffix}" for name in HEADS for suffix in (".safetensors", "_config.json"))


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is a whole checkpoint: transformers finishes with trainer_state.json."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder, or None."""
    paths = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [(int(number), path) for path in paths if (number := path.name.rpartition("-")[2]).isdigit()]
    return next((path for _, path in sorted(numbered, reverse=True) if is_complete(path)), None)


def clear_staging(output_dir: str | Path) -> None:
    """Remove what a killed run left half-written or half-deleted; a checkpoint it was about to replace comes back."""
    output_dir = Path(output_dir)
    for replaced in (output_dir / STAGING / REPLACED).glob("*"):
        if not (output_dir / replaced.name).exists():
            replaced.rename(output_dir / replaced.name)
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)


def put_in_place(staged: Path, checkpoint: Path) -> None:
    """Make OUTPUT/.incomplete/checkpoint-N into OUTPUT/checkpoint-N, in place of one that is there."""
    flush_tree(staged)
    if checkpoint.exists():
        (staged.parent / REPLACED).mkdir(exist_ok=True)
        checkpoint.rename(staged.parent / REPLACED / checkpoint.name)
    staged.rename(checkpoint)
    flush(checkpoint.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def discard(checkpoints: list[Path]) -> None:
    """Delete checkpoints: each disappears at once, for one that lacks some of its files would load wrong."""
    for checkpoint in checkpoints:
        staging = checkpoint.parent / STAGING
        try:
            staging.mkdir(exist_ok=True)
            checkpoint.rename(staging / checkpoint.name)
        except OSError as error:
            logger.warning("cannot delete %s: %s", checkpoint, error.strerror)
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """A folder to save a model into, which then takes the place of the one in `folder`.

    The config goes first and comes last: at no moment does a mixture of two models load.

    Raises:
        SaveError: it could not be written; what is in `folder` has not been touched.
    """
    staged = folder / STAGING / "model"
    with writing(folder, clean=lambda: clear_staging(folder)):
        clear_staging(folder)
        staged.mkdir(parents=True)
        yield staged
        flush_tree(staged)
        new = {path.name: path for path in staged.iterdir()}
        configs = [name for name in WEIGHTS if name in new]
        for config in configs:
            (folder / config).unlink(missing_ok=True)
        flush(folder)
        for pattern in (*HEAD_FILES, *(pattern for config in configs for pattern in WEIGHTS[config])):
            for old in folder.glob(pattern):
                old.unlink()
        for name in sorted(new, key=configs.__contains__):
            if name in configs:
                flush(folder)
            if new[name].is_dir():
                shutil.rmtree(folder / name, ignore_errors=True)
            new[name].replace(folder / name)
        flush(folder)
        shutil.rmtree(staged.parent)


class LoadsHeads(Trainer):
    """With the model of a checkpoint come the heads that are saved beside it."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_heads(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_heads(self.model, self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Heads are not missing: they have files of their own."""
        missing = [key for key in load_result.missing_keys if not set(key.split(".")) & set(HEADS)]
        super()._issue_warnings_after_load(_IncompatibleKeys(missing, load_result.unexpected_keys))


class AtomicTrainer(Trainer):
    """transformers' Trainer, but for how it saves: no moment leaves a checkpoint or a model that loads wrong.

    A checkpoint is written by all processes into OUTPUT/.incomplete and renamed by the main one when it is whole;
    only then are older ones deleted. What fails is a `SaveError` and leaves the older ones as they are.
    """

    _staging = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        with self.args.main_process_first(local=False, desc="clearing what a killed run left"):
            clear_staging(self.args.output_dir)
        if resume_from_checkpoint is True:
            newest = newest_checkpoint(self.args.output_dir)
            if newest is None:
                raise ValueError(f"resume_from_checkpoint needs a complete checkpoint in {self.args.output_dir!r}")
            resume_from_checkpoint = str(newest)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers would make one more step of a run that is resumed after its last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return str(Path(run_dir) / STAGING) if self._staging else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run_dir / STAGING / checkpoint.name
        with writing(checkpoint, clean=lambda: clear_staging(run_dir)):
            self._staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = False
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(checkpoint)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                put_in_place(staged, checkpoint)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        limit = self.args.save_total_limit or 0
        if self.args.should_save and limit > 0:
            self._keep(run_dir, limit)

    def _keep(self, run_dir: Path, limit: int) -> None:
        """Delete the oldest checkpoints but for so many, the newest and the best."""
        best = self.state.best_model_checkpoint
        paths = [Path(path) for path in sort_checkpoints(str(run_dir), use_mtime=True, best_model_checkpoint=best)]
        protected = {paths[-1], *([Path(best)] if best else [])}  # the last ones of `paths`
        discard(paths[: -max(limit, len(protected))])

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None:
            # As transformers does there, which deletes file by file.
            paths = map(Path, sort_checkpoints(self._get_output_dir(trial)))
            discard([path for path in paths if not path.samefile(best)])
        return super()._finalize_training(trial, *args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # while it is, the folder is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self._staging:
            super()._save(output_dir, state_dict)
            return
        with replacing_model(Path(output_dir)) as staged:
            super()._save(str(staged), state_dict)
            # PEFT's blank model card, which would take the place of a filled one.
            (staged / "README.md").unlink(missing_ok=True)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            with replacing(Path(self.args.output_dir) / TRAINER_STATE_NAME) as path:
                self.state.save_to_json(str(path))
