"""`DPOTrainer`: TRL's arguments, data, metrics and habits on `PreferenceTrainer`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import TrainerCallback, set_seed
from trl.trainer.callbacks import SyncRefModelCallback

from fastpo.adapters import REFERENCE_ADAPTER, add_reference_adapter, has_reference_adapter
from fastpo.architecture import heads_of, without_heads
from fastpo.arguments import own_columns
from fastpo.backbone import causal_lm
from fastpo.data import NUMBER_COLUMNS, VECTOR_COLUMNS
from fastpo.integrations.trl.dpo_config import DPOConfig
from fastpo.integrations.trl.dpo_data import TOKENS, tokenize_as_trl
from fastpo.integrations.trl.loading import load_model, load_tokenizer
from fastpo.integrations.trl.metrics import FURTHER_STATISTICS, TokenCount, trl_metrics
from fastpo.loading import disable_dropout
from fastpo.reference_model import Reference
from fastpo.trainer import PreferenceTrainer
from fastpo.types import AnySequenceStats, LossOutput

logger = logging.getLogger(__name__)


class DPOTrainer(PreferenceTrainer):
    """TRL's DPOTrainer without logits, with fastpo's objectives and heads.

    Args:
        model: a causal LM, possibly with PEFT adapters, or the name or path of one.
        ref_model: the reference model. None: the model as it is now, that is below the new adapter of `peft_config`,
            with a frozen copy of the adapter that it has, or in a copy.
        args: `DPOConfig`; default: one with the output_dir ``<name of the model>-DPO``.
        data_collator: makes batches of prompt_ids, chosen_ids and rejected_ids; default: `PreferenceCollator`.
        train_dataset: a `datasets.Dataset`, or an `IterableDataset` with `max_steps`; see `tokenize_as_trl`.
        eval_dataset: the same, or a dictionary of several.
        processing_class: the tokenizer; default: the one saved beside the model.
        compute_metrics: gets predictions (pairs, 2), the chosen and rejected rewards. TRL's gets logits.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: how to quantise a model given by its name.
        peft_config: wraps the model in a new adapter.

    Raises:
        TypeError, ValueError: model, data and objective do not fit together, or are not supported; before training.
    """

    further_statistics = FURTHER_STATISTICS
    _tag_names = ("fastpo", "trl", "dpo")

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else causal_lm(model).config._name_or_path
            args = DPOConfig(f"{name.split('/')[-1]}-DPO")
        if not isinstance(args, DPOConfig):
            raise TypeError(f"args must be a DPOConfig of fastpo.integrations.trl, got {type(args)}")
        if train_dataset is None:
            raise ValueError("train_dataset must be given, got None")
        streams = (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,)))
        if any(isinstance(rows, IterableDataset) for rows in streams):
            if args.precompute_ref_log_probs:
                raise ValueError("precompute_ref_log_probs must be False with an IterableDataset, got True")
            args.accelerator_config.dispatch_batches = False  # rows of several lengths make no common batch
        set_seed(args.seed)  # of the new adapter
        model = load_model(model, args, quantization_config)
        processing_class = load_tokenizer(processing_class, model, args)
        if hasattr(model, "disable_adapter") and peft_config is None:
            read = Reference(args.preference_config, args.stage).lacking(())
            if ref_model is None and read:
                if has_reference_adapter(model):
                    raise ValueError(
                        f"model has an adapter {REFERENCE_ADAPTER!r}, the reference of another trainer; a reference as "
                        f"the model is now needs model.delete_adapter({REFERENCE_ADAPTER!r}) first"
                    )
                with without_heads(model):
                    add_reference_adapter(model)
        self.tokens = TokenCount()
        super().__init__(
            model=model, ref_model=ref_model, args=args,
            data_collator=None if data_collator is None else _Indexed(data_collator),
            train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class,
            compute_metrics=compute_metrics, callbacks=callbacks, optimizers=optimizers, peft_config=peft_config,
        )  # fmt: skip
        if args.disable_dropout:  # as TRL does, also in the new adapter
            disable_dropout(self.model)
        self.add_callback(self.tokens)
        if args.sync_ref_model:
            self.add_callback(self._sync_callback())
        self.model.add_model_tags(list(self._tag_names))

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        if self.args.sync_ref_model:
            logger.warning(
                "sync_ref_model: checkpoints do not hold the reference, so the run goes on from the ref_model that was "
                "given, not from where it had moved"
            )

    def _sync_callback(self) -> TrainerCallback:
        if self.ref_model is None:
            raise ValueError("sync_ref_model needs a second model to move: no adapter, and an objective that reads it")
        if heads_of(self.model):
            raise ValueError("sync_ref_model must be False with a Beta or Disco head, which the reference has not")
        return SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator)

    @staticmethod
    def tokenized(dataset: Any, source: str, args: Any, tokenizer: Any) -> Any:
        return tokenize_as_trl(
            dataset, tokenizer, max_length=args.max_length, source=source, skip_bad_rows=args.skip_bad_rows,
            num_proc=args.dataset_num_proc, own_columns=own_columns(args),
        )  # fmt: skip

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*TOKENS, "index", *NUMBER_COLUMNS, *VECTOR_COLUMNS]

    def further_metrics(
        self, output: LossOutput, policy: AnySequenceStats, inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        if self.model.training:
            self.tokens.add(inputs)
        return trl_metrics(output, policy, self.objective)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.args.precompute_ref_log_probs and isinstance(eval_dataset, Dataset):
            eval_dataset = self.precompute_reference(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = self.tokens.total(self.accelerator)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.create_model_card(model_name=Path(self.args.hub_model_id or self.args.output_dir).name)
        super()._save_checkpoint(model, trial)


class _Indexed:
    """A collator of the caller's own, whose batches get the rows' numbers, by which errors name them."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        index = torch.tensor([row["index"] for row in rows])
        return {"index": index, **self.collate(rows)}  # first: the Trainer reads the batch size off it
