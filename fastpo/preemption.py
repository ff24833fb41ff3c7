"""SIGTERM, as a cluster sends it before it takes the machine away."""

import logging
import signal
import threading
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

STATUS = 128 + signal.SIGTERM  # what a shell says of a process that SIGTERM ended


class SaveOnSigterm(TrainerCallback):
    """On SIGTERM: finishes the optimiser step, saves a checkpoint, says how to go on and exits with status 143.

    One process that gets the signal is enough: all of a distributed run stop after the same step. Further SIGTERMs
    change nothing, since launchers and schedulers both send them. Outside of training the handler is that of before.

    Raises:
        SystemExit: 143, once the checkpoint is saved.
    """

    def __init__(self) -> None:
        self._asked = self._stopping = False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("training runs outside of the main thread: SIGTERM will not save a checkpoint")
            return
        self._asked = self._stopping = False
        self._previous = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked_anywhere(args):
            self._stopping = control.should_save = True

    def _asked_anywhere(self, args: Any) -> bool:
        if args.world_size == 1:
            return self._asked
        asked = torch.tensor(float(self._asked), device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._stopping:
            return
        self.restore()
        if state.is_world_process_zero:
            logger.warning(
                "stopped by SIGTERM after step %d, which is saved in %s/%s-%d. To go on: resume_from_checkpoint=True; "
                "the command: --resume_from_checkpoint true",
                state.global_step, args.output_dir, PREFIX_CHECKPOINT_DIR, state.global_step,
            )  # fmt: skip
        raise SystemExit(STATUS)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Put back the handler of before training; for training that an exception ended."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
