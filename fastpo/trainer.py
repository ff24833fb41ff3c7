"""`PreferenceTrainer`: transformers' Trainer with the loss computed from statistics, never from logits."""

import contextlib
import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from fastpo.arguments import PreferenceTrainingArguments
from fastpo.backbone import causal_lm, head_parameters, install_stats_forward, sequence_stats
from fastpo.data import PreferenceCollator, tokenize_dataset
from fastpo.stages import StepTotals, dpo_stage, sft_stage
from fastpo.types import LossOutput, SequenceStats

logger = logging.getLogger(__name__)


class PreferenceTrainer(Trainer):
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
        self.objective = args.preference_config
        _refuse_what_is_not_built(args)
        if args.n_gpu > 1:
            logger.warning(
                "One process drives one GPU here: using the first of %d. See `accelerate launch`.", args.n_gpu
            )
            args._n_gpu = 1
        model, ref_model, processing_class = _load(model, ref_model, processing_class, full=peft_config is None)
        if args.disable_dropout:
            _disable_dropout(model)
        has_adapter = hasattr(model, "disable_adapter")
        if peft_config is not None:
            if has_adapter:
                raise ValueError("peft_config must be None for a model that already has an adapter")
            model = _add_adapter(model, peft_config, args)
            has_adapter = True

        self.uses_reference = args.stage == "dpo" and self.objective.needs_reference
        if self.uses_reference and ref_model is None and not has_adapter:
            ref_model = copy.deepcopy(model)
        self.ref_model = ref_model if self.uses_reference else None
        self.vocab_size = head_parameters(causal_lm(model))[0].shape[0]
        _check_vocabulary(processing_class, causal_lm(model).get_input_embeddings().num_embeddings)
        if data_collator is None:
            pad = processing_class.pad_token_id
            data_collator = PreferenceCollator(processing_class.eos_token_id if pad is None else pad, args.stage)
        with args.main_process_first(desc="tokenizing"):
            train_dataset = self._tokenize(train_dataset, "train_dataset", args, processing_class)
            eval_dataset = (
                {name: self._tokenize(part, name, args, processing_class) for name, part in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else self._tokenize(eval_dataset, "eval_dataset", args, processing_class)
            )
        self._meters = {"train": _Meter(), "eval": _Meter()}
        super().__init__(
            model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, compute_metrics=compute_metrics,
            callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        self.add_callback(_EarlierLoss(self))
        # The loss is divided by the whole step's rows and tokens here, so the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        # After the Trainer, which may replace the forward itself (use_liger_kernel), and before it wraps the model.
        install_stats_forward(self.model)
        if self.ref_model is not None:
            install_stats_forward(self.ref_model)
            self.ref_model.requires_grad_(False)
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)

    @staticmethod
    def _tokenize(dataset: Dataset | None, source: str, args: PreferenceTrainingArguments, tokenizer: Any) -> Any:
        if dataset is None:
            return None
        if not isinstance(dataset, Dataset):
            raise TypeError(f"{source} must be a datasets.Dataset, got {type(dataset).__name__}")
        rows = tokenize_dataset(
            dataset, tokenizer, stage=args.stage, max_length=args.max_length, source=source,
            skip_bad_rows=args.skip_bad_rows, num_proc=args.dataset_num_proc,
        )  # fmt: skip
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
        return rows

    # --- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Any:
        """The stage's loss of a batch; with `return_outputs` also {"rewards": (B, 2)}."""
        output = self.loss_output(model, inputs, num_items_in_batch)
        self._stop_at_bad_loss(output, inputs["index"])
        self._meters["train" if model.training else "eval"].add(output.metrics, len(inputs["index"]))
        if not return_outputs:
            return output.loss
        return output.loss, {"rewards": torch.stack((output.chosen_rewards, output.rejected_rewards), dim=1)}

    def loss_output(self, model: nn.Module, inputs: dict[str, Any], totals: StepTotals | None = None) -> LossOutput:
        """The stage's `LossOutput` for a `PreferenceBatch` on the model's device."""
        policy = self._stats(model, inputs)
        if self.args.stage == "sft":
            return sft_stage(policy, totals=totals)
        reference = None
        if self.uses_reference:
            with torch.no_grad(), self._reference(model) as reference_model:
                reference = self._stats(reference_model, inputs)
        return dpo_stage(
            policy, reference, self.objective, vocab_size=self.vocab_size,
            context_scale=inputs.get("context_scale"), totals=totals,
        )  # fmt: skip

    @staticmethod
    def _stats(model: nn.Module, inputs: dict[str, Any]) -> SequenceStats:
        return sequence_stats(model, inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])

    @contextlib.contextmanager
    def _reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference in evaluation mode: a second model, or the policy with its adapter disabled."""
        if self.ref_model is not None:
            yield self.ref_model.eval()
            return
        training = model.training
        model.eval()
        try:
            with self.accelerator.unwrap_model(model).disable_adapter():
                yield model
        finally:
            model.train(training)

    def _stop_at_bad_loss(self, output: LossOutput, index: Tensor) -> None:
        finite = torch.isfinite(output.losses)
        if bool(finite.all() & torch.isfinite(output.loss)):  # one wait for the device, not two
            return
        rows = index[~finite].tolist() or index.tolist()
        values = output.losses[~finite].tolist()[:5]
        raise FloatingPointError(
            f"loss is not finite at step {self.state.global_step}: dataset rows {rows}, losses {values}. "
            "Look at those rows; then at learning_rate, max_grad_norm and the precision (bf16 rather than fp16)."
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> StepTotals | None:
        """What the whole optimiser step averages over; see `StepTotals`."""
        if not batch_samples:
            return None
        rows = sum(len(batch["index"]) for batch in batch_samples)
        # Chosen rows come first; their completion tokens are what a token mean divides by.
        tokens = sum(int(batch["completion_mask"][: len(batch["index"])].sum()) for batch in batch_samples)
        counts = torch.tensor([rows, tokens], dtype=torch.float64, device=device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "mean")
        rows_total, tokens_total = counts.clamp(min=1e-9).float()
        return StepTotals(rows_total, tokens_total)

    # --- evaluation and logging -------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if isinstance(eval_dataset, Dataset):
            eval_dataset = self._tokenize(eval_dataset, "eval_dataset", self.args, self.processing_class)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> Any:
        return super().get_test_dataloader(
            self._tokenize(test_dataset, "test_dataset", self.args, self.processing_class)
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss and, where metrics are computed from them, rewards (B, 2) with labels 0: the first should be higher."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["rewards"], torch.zeros_like(inputs["index"])

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._meters["eval"] = _Meter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self._meters["eval"].collect(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._meters["train"].collect(self.accelerator))
            self._meters["train"] = _Meter()
        super().log(logs, start_time)


class _EarlierLoss(TrainerCallback):
    """Makes train_loss of a resumed run the mean over all its steps; transformers counts those since the resumption."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = 0
        for row in state.log_history:
            if "loss" in row:
                self.trainer._total_loss_scalar += row["loss"] * (row["step"] - before)
                before = row["step"]


class _Meter:
    """Row-weighted means of metrics between two logs; names that end in /min or /max keep their extreme."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._weights: list[int] = []

    def add(self, metrics: dict[str, Tensor], weight: int) -> None:
        self._weights.append(weight)
        for name, value in metrics.items():
            self._values[name].append(value)

    def collect(self, accelerator: Any) -> dict[str, float]:
        """Over all processes; every process must call it with the same names."""
        found = {}
        for name, values in self._values.items():
            stacked = torch.stack(values).double()
            weights = torch.tensor(self._weights, dtype=torch.float64, device=stacked.device)
            if name.endswith("/min"):
                found[name] = accelerator.gather(stacked.min()).min().item()
            elif name.endswith("/max"):
                found[name] = accelerator.gather(stacked.max()).max().item()
            else:
                totals = torch.stack(((stacked * weights).sum(), weights.sum()))
                total, weight = accelerator.reduce(totals, "sum").tolist()
                found[name] = total / weight
        return found


def _load(model: Any, ref_model: Any, tokenizer: Any, full: bool) -> tuple[Any, Any, Any]:
    """Names become models, and a missing tokenizer the one saved beside the model.

    A model trained in full is loaded in fp32: AdamW's steps at preference learning rates are below the resolution of
    16-bit weights and would be lost.
    """
    dtype = "float32" if full else "auto"
    model, ref_model = (
        AutoModelForCausalLM.from_pretrained(x, dtype=dtype) if isinstance(x, str) else x for x in (model, ref_model)
    )
    if ref_model is not None and ref_model is model:
        raise ValueError("ref_model must be another object than model, got the same one")
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(causal_lm(model).config._name_or_path)
    return model, ref_model, tokenizer


def _check_vocabulary(tokenizer: Any, embeddings: int) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("processing_class must have an eos_token, got None")
    if len(tokenizer) > embeddings:
        raise ValueError(f"processing_class has {len(tokenizer)} tokens, more than the model's {embeddings} embeddings")


def _refuse_what_is_not_built(args: PreferenceTrainingArguments) -> None:
    for name in ("add_beta_head", "add_disco_head", "regularizers", "beta_schedule"):
        if getattr(args, name):
            raise ValueError(f"{name} is not supported by the trainer of this version, got {getattr(args, name)!r}")


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _add_adapter(model: Any, peft_config: Any, args: PreferenceTrainingArguments) -> Any:
    from peft import get_peft_model

    if args.gradient_checkpointing:
        # Checkpointed blocks of a frozen backbone have no gradient to follow unless their input asks for one.
        model.enable_input_require_grads()
    return get_peft_model(model, peft_config)
