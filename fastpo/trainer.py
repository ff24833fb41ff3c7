"""`PreferenceTrainer`: transformers' Trainer with the loss computed from statistics, never from logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from fastpo.adapters import check_adapter, has_reference_adapter
from fastpo.architecture import add_heads, check_optimizer, with_new_adapter, without_heads
from fastpo.arguments import PreferenceTrainingArguments
from fastpo.attention import use_path_attention
from fastpo.backbone import causal_lm, install_stats_forward, model_stats
from fastpo.callbacks import RunawayBeta
from fastpo.collation import PreferenceCollator
from fastpo.lm_head import head_shape
from fastpo.loading import copied_reference, disable_dropout, load_models, prepare_reference
from fastpo.loss_inputs import check_reads_column
from fastpo.pair_trainer import PairTrainer
from fastpo.reference_cache import cache_key, with_reference_columns
from fastpo.reference_model import Reference
from fastpo.stage_trainer import check_vocabulary, use_one_gpu
from fastpo.stages import sft_stage
from fastpo.types import LossOutput, StepTotals


class PreferenceTrainer(PairTrainer):
    """Train a causal LM on preferences (stage ``dpo``) or on their chosen responses (stage ``sft``).

    Args:
        model: a causal LM, possibly with PEFT adapters, or the name or path of one.
        ref_model: the reference model. None: the model with its adapter disabled where it has one, else a copy of
            the model as it is now, unless the objective reads no reference.
        args: `PreferenceTrainingArguments`.
        data_collator: default `PreferenceCollator`.
        train_dataset: a `datasets.Dataset` in any form of `fastpo.data`, or already tokenised.
        eval_dataset: the same, or a dictionary of several.
        processing_class: the tokenizer; default: the one saved beside the model.
        compute_metrics: gets predictions (pairs, 2), the chosen and rejected rewards.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: wraps the model in a new adapter.

    Raises:
        ValueError: model, data and objective do not fit together; before any training.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: PreferenceTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = PreferenceTrainingArguments() if args is None else args
        if not isinstance(args, PreferenceTrainingArguments):
            raise TypeError(f"args must be PreferenceTrainingArguments, got {type(args).__name__}")
        if args.stage not in ("sft", "dpo"):
            raise ValueError(f"args.stage must be sft or dpo for a PreferenceTrainer, got {args.stage!r}")
        use_one_gpu(args)
        source = model if isinstance(model, str) else getattr(causal_lm(model).config, "_name_or_path", None)
        model, ref_model, processing_class = load_models(model, ref_model, processing_class, full=peft_config is None)
        if args.disable_dropout:
            disable_dropout(model)
        model = with_new_adapter(model, peft_config, args.gradient_checkpointing)
        has_adapter = hasattr(model, "disable_adapter")
        self.objective = add_heads(model, ref_model, args.preference_config, source)
        check_optimizer(optimizers[0], model)

        self.vocab_size, _ = head_shape(causal_lm(model))
        check_vocabulary(processing_class, causal_lm(model).config.get_text_config().vocab_size)
        data_collator = _collator(data_collator, args, processing_class, model, ref_model)
        train_dataset, eval_dataset = self._tokenize_all(train_dataset, eval_dataset, args, processing_class)
        parts = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        columns = [rows.column_names for rows in parts if rows is not None] or [[]]  # none yet: they may lack all
        self.reference = Reference(self.objective, args.stage)
        reads_reference, live = any(map(self.reference.lacking, columns)), not args.precompute_ref_log_probs
        if reads_reference and ref_model is None and live and not has_adapter:
            with without_heads(model):
                ref_model = copied_reference(model)
        self.reference.model = ref_model if reads_reference else None
        check_adapter(model, is_reference=reads_reference and ref_model is None and has_adapter, always=live)
        super().__init__(
            model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, compute_metrics=compute_metrics,
            callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        self.add_callback(RunawayBeta(self))
        # After the Trainer, which may replace the forward itself (use_liger_kernel), and before it wraps the model.
        install_stats_forward(self.model)
        if self.ref_model is not None:
            install_stats_forward(self.ref_model)
        if args.precompute_ref_log_probs:
            self._precompute()
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False)
            self.reference.model = prepare_reference(self.ref_model, self.accelerator)

    @property
    def ref_model(self) -> Any:
        """The second model, where the reference is one."""
        return self.reference.model

    def _tokenize(self, dataset: Any, source: str, args: PreferenceTrainingArguments, tokenizer: Any) -> Any:
        rows = super()._tokenize(dataset, source, args, tokenizer)
        if rows is None:
            return None
        objective = args.preference_config
        scaled = "context_scale" in rows.column_names
        if (
            args.stage == "dpo"
            and objective.contextual_scaling == "mallows"
            and objective.reference_free
            and not scaled
        ):
            raise ValueError(
                f"contextual_scaling='mallows' with reference_free=True needs a context_scale column in {source}"
            )
        for name in {"context_scale", "pair_weight"} & set(rows.column_names) if args.stage == "dpo" else ():
            check_reads_column(name, objective, f"the column {name} of {source}")
        if objective.regularizers is not None and "confidence" in objective.regularizer_weights:
            for name in {"score_chosen", "score_rejected"} - set(rows.column_names):
                raise ValueError(f"regularizers names 'confidence', which needs a {name} column in {source}")
        return rows

    def loss_output(self, model: nn.Module, inputs: dict[str, Any], totals: StepTotals | None = None) -> LossOutput:
        """The stage's `LossOutput` for a `PreferenceBatch` on the model's device."""
        if self.args.stage == "sft":
            return sft_stage(model_stats(model, inputs).sequence_stats(), totals=totals)
        return self.preference_output(model, inputs, totals, one_side_at_a_time=self.args.split_responses)

    def precompute_reference(self, dataset: Dataset) -> Dataset:
        """The dataset, tokenised, with columns ref_* and prompt_* of what the objective reads of the reference.

        They are looked for, and kept, in `reference_cache_dir`. A trainer that is given such data needs no reference
        model.

        Raises:
            ValueError: the model is its own reference and has been trained, or the ref_model is gone.
        """
        rows = self._tokenize(dataset, "dataset", self.args, self.processing_class)
        lacking = self.reference.lacking(rows.column_names)
        if not lacking:
            return rows
        args, below_adapter = self.args, self.ref_model is None and hasattr(self.model, "disable_adapter")
        own = self.ref_model is None and not below_adapter
        if own and self.reference.let_go:
            raise ValueError("precompute_reference must be called before the ref_model is let go")
        if own and self.state.global_step:
            raise ValueError("precompute_reference must be called before training, or with a ref_model or an adapter")
        lm = causal_lm(self.model if self.ref_model is None else self.ref_model)
        if next(lm.parameters()).device != self.accelerator.device:
            lm.to(self.accelerator.device)
        settings = {**lacking._asdict(), "precision": self.accelerator.mixed_precision}
        key = cache_key(lm, rows, settings, below_adapter=below_adapter and not has_reference_adapter(self.model))
        parent = args.reference_cache_dir or Path(datasets.config.HF_CACHE_HOME).expanduser() / "fastpo" / "reference"

        def compute(listed: list[dict[str, Any]]) -> dict[str, Tensor]:
            inputs = self._prepare_inputs(self.data_collator(listed))
            with self.accelerator.autocast():
                return self.reference.columns(self.model, self.accelerator.unwrap_model(self.model), inputs, lacking)

        try:
            if own:
                self.reference.model = self.model
            return with_reference_columns(
                rows, compute, Path(parent) / key, batch_size=args.precompute_ref_batch_size or args.eval_batch_size,
                process=(args.process_index, args.world_size), wait=self.accelerator.wait_for_everyone,
            )  # fmt: skip
        finally:
            if own:
                self.reference.model = None

    def _precompute(self) -> None:
        """Give all data the reference's columns, and let the reference go."""
        if is_deepspeed_zero3_enabled():
            raise ValueError("precompute_ref_log_probs must be False with DeepSpeed ZeRO-3, which has cut the model up")
        if self.train_dataset is not None:
            self.train_dataset = self.precompute_reference(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self.precompute_reference(part) for name, part in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self.precompute_reference(self.eval_dataset)
        self.reference.let_go, self.reference.model = self.ref_model is not None, None


def _collator(own: Callable | None, args: PreferenceTrainingArguments, tokenizer: Any, *models: Any) -> Callable:
    """`own`, or a `PreferenceCollator` as the arguments want it.

    Raises:
        ValueError: the arguments want what only a `PreferenceCollator` does.
    """
    if own is None:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        sharing = _prefix_sharing(args, *models)
        return PreferenceCollator(pad, args.stage, args.padding_free, sharing, args.pad_to_multiple_of)
    for name in ("padding_free", "prefix_sharing", "precompute_ref_log_probs"):
        if getattr(args, name):
            raise ValueError(f"{name} is done by fastpo's own collator: data_collator must be None")
    return own


def _prefix_sharing(args: PreferenceTrainingArguments, *models: Any) -> bool | None:
    """`prefix_sharing` as far as the models allow it; where sequences shall lie in one row, they attend along paths."""
    lms = [causal_lm(model) for model in models if model is not None]
    if args.padding_free and (reason := use_path_attention(lms, shared=False)):
        raise ValueError(f"padding_free must be False: {reason}")
    # NEFTune scales its noise by the length of a row.
    needs_padding = args.split_responses or args.torch_compile or args.pad_to_multiple_of or args.neftune_noise_alpha
    if args.prefix_sharing is None and (needs_padding or args.stage != "dpo"):
        return False
    if args.prefix_sharing is not False and (reason := use_path_attention(lms, shared=True)):
        if args.prefix_sharing:
            raise ValueError(f"prefix_sharing must be False: {reason}")
        return False
    return args.prefix_sharing
