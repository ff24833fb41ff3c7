"""Histograms of beta_eff(x) for the trackers that show them: TensorBoard, Weights & Biases, trackio.

A tracker is given them in place of the scalars `beta/histogram/LOW-HIGH`, which log_history and metrics.jsonl keep.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback, rewrite_logs

from fastpo.stages import HISTOGRAM, HISTOGRAM_EDGES, HISTOGRAM_NAMES


class Histogram(NamedTuple):
    """Shares of the prompts in n bins, which add up to 1, and the bins' n + 1 edges."""

    shares: list[float]
    edges: list[float]


def show_beta_histograms(callbacks: Iterable[Any], beta: float) -> None:
    """Have those of transformers' tracker callbacks that are among `callbacks` show histograms at the next log.

    Args:
        beta: the base value then.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            show = partial(_add_to_tensorboard, callback)
        elif isinstance(callback, WandbCallback | TrackioCallback):
            tracker = importlib.import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
            if not hasattr(tracker, "Histogram"):  # an older trackio: it goes on with scalars
                continue
            show = partial(_log_to, tracker)
        else:
            continue
        # From its class, where an earlier log has not been: callbacks outlive steps and trainers.
        callback.on_log = partial(_on_log, partial(type(callback).on_log, callback), show, beta)


def _on_log(
    plain: Callable[..., None], show: Callable[[str, Histogram, int], None], beta: float, args: Any, state: Any,
    control: Any, logs: Mapping[str, float], **kwargs: Any,
) -> None:  # fmt: skip
    plain(args, state, control, logs={name: x for name, x in logs.items() if HISTOGRAM not in name}, **kwargs)
    if state.is_world_process_zero:
        for name, histogram in beta_histograms(logs, beta):
            [shown] = rewrite_logs({name: None})
            show(shown, histogram, state.global_step)


def beta_histograms(logs: Mapping[str, float], beta: float) -> Iterator[tuple[str, Histogram]]:
    """Name (``beta/histogram``, ``eval_beta/histogram``, ...) and histogram of each set of bins among the logs.

    Args:
        logs: what the trainer logs.
        beta: the base value, of which the bins are multiples.
    """
    for first in logs:
        if first.endswith(HISTOGRAM_NAMES[0]):
            prefix = first.removesuffix(HISTOGRAM_NAMES[0])
            edges = [beta * edge for edge in HISTOGRAM_EDGES]
            # The outer bins are open.
            edges[0] = min(edges[0], logs[f"{prefix}beta/min"])
            edges[-1] = max(edges[-1], logs[f"{prefix}beta/max"])
            shares = [logs[prefix + name] for name in HISTOGRAM_NAMES]
            yield f"{prefix}{HISTOGRAM}", Histogram(shares, edges)


def _add_to_tensorboard(callback: TensorBoardCallback, name: str, histogram: Histogram, step: int) -> None:
    if callback.tb_writer is None:
        return
    shares, edges = histogram
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    callback.tb_writer.add_histogram_raw(
        name, min=edges[0], max=edges[-1], num=1,
        sum=sum(share * x for share, x in zip(shares, centres, strict=True)),
        sum_squares=sum(share * x * x for share, x in zip(shares, centres, strict=True)),
        # A bucket ends at its limit: the first, which ends where the bins begin, is empty.
        bucket_limits=edges, bucket_counts=[0.0, *shares], global_step=step,
    )  # fmt: skip
    callback.tb_writer.flush()


def _log_to(tracker: Any, name: str, histogram: Histogram, step: int) -> None:
    """Of wandb, and of trackio, which has wandb's interface."""
    tracker.log({name: tracker.Histogram(np_histogram=tuple(histogram)), "train/global_step": step})
