"""`RewardTrainer`: transformers' Trainer on pairs, for a reward model: a score, or a Gaussian by the Disco head."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback

from fastpo.adapters import check_adapter
from fastpo.architecture import add_reward_head, check_optimizer, heads_of, with_new_adapter
from fastpo.arguments import PreferenceTrainingArguments
from fastpo.backbone import causal_lm
from fastpo.calibration import expected_calibration_error, log_preference
from fastpo.collation import PreferenceCollator
from fastpo.loading import disable_dropout
from fastpo.loss_inputs import summed_variance
from fastpo.pair_trainer import PairTrainer
from fastpo.reference_model import Reference
from fastpo.reward_loading import load_reward_model, settle_pad_token
from fastpo.reward_model import answers_by_head, check_reward_model, install_reward_forward, install_score_forward
from fastpo.stage_trainer import check_vocabulary, use_one_gpu
from fastpo.stages import rm_stage
from fastpo.types import LossOutput, StepTotals


class RewardTrainer(PairTrainer):
    """Train a reward model on preferences (stage ``rm``).

    The loss is `fastpo.reward_model_loss` of rewards at the end of each response. With ``pref_loss_type="disco"`` the
    Disco head gives them, as means and variances; the model's score then is not trained, and saved as a copy of the
    head's mean without its constant.

    Args:
        model: the name or path of a causal LM, of a reward model or of an adapter of one; or a sequence classification
            model with num_labels=1, possibly with PEFT adapters.
        args: `PreferenceTrainingArguments` with stage ``rm``.
        data_collator: default `PreferenceCollator`.
        train_dataset: a `datasets.Dataset` in any form of `fastpo.data`, or already tokenised; a column margin (B,)
            holds m of each pair, in place of `home_advantage`.
        eval_dataset: the same, or a dictionary of several.
        processing_class: the tokenizer; default: the one saved beside the model.
        compute_metrics: gets predictions (pairs, 2), the chosen and rejected rewards.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: wraps the model in a new adapter, of task_type SEQ_CLS.

    Raises:
        TypeError, ValueError: model, data and objective do not fit together; before any training.
    """

    def __init__(
        self,
        model: Any,
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
        args = PreferenceTrainingArguments(stage="rm") if args is None else args
        if not isinstance(args, PreferenceTrainingArguments):
            raise TypeError(f"args must be PreferenceTrainingArguments, got {type(args).__name__}")
        if args.stage != "rm":
            raise ValueError(f"args.stage must be rm for a RewardTrainer, got {args.stage!r}")
        use_one_gpu(args)
        self.objective = args.preference_config
        source = model if isinstance(model, str) else getattr(causal_lm(model).config, "_name_or_path", None)
        if isinstance(model, str):
            # As in `fastpo.loading.load_models`: steps of AdamW are below the resolution of 16-bit weights.
            dtype = "float32" if peft_config is None else "auto"
            model = load_reward_model(model, trainable=True, dtype=dtype)
        check_reward_model(model)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(source)
        check_vocabulary(processing_class, causal_lm(model).config.get_text_config().vocab_size)
        settle_pad_token(model, processing_class)
        if args.disable_dropout:
            disable_dropout(model)
        model = _with_adapter(model, peft_config, args)
        self._prepare_answers(model, source)
        check_optimizer(optimizers[0], model)
        self.reference = Reference(self.objective, args.stage)
        train_dataset, eval_dataset = self._tokenize_all(train_dataset, eval_dataset, args, processing_class)
        if data_collator is None:
            pad = processing_class.pad_token_id
            pad = processing_class.eos_token_id if pad is None else pad
            data_collator = PreferenceCollator(pad, args.stage, pad_to_multiple_of=args.pad_to_multiple_of)
        # Of the pairs of an evaluation, on all processes.
        self._log_preferences: list[Tensor] | None = None
        super().__init__(
            model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, compute_metrics=compute_metrics,
            callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        self.add_callback(_KeepPadding(causal_lm(self.model).config.get_text_config()))

    @property
    def gaussian(self) -> bool:
        """Whether the Disco head answers."""
        return "disco" in self.objective.comparisons

    def _prepare_answers(self, model: Any, source: str | None) -> None:
        add_reward_head(model, self.objective, source)
        score = causal_lm(model).score
        if self.gaussian:
            # Without a part in the loss, a trainable parameter would stop DistributedDataParallel.
            score.requires_grad_(False)
            install_reward_forward(model)
            return
        if answers_by_head(model):
            raise ValueError(
                "model answers with its Disco head, which only pref_loss_type='disco' trains: load it anew"
            )
        head = heads_of(model).get("disco_head")
        if head is not None and bool(head.linear.weight.any()):
            # Saved beside the new score it would be taken for what was trained.
            raise ValueError(
                "model has a trained Disco head, which only pref_loss_type='disco' trains further: leave the head "
                "behind (add_disco_head=False and the model's name)"
            )
        install_score_forward(model)

    def loss_output(self, model: nn.Module, inputs: dict[str, Any], totals: StepTotals | None = None) -> LossOutput:
        """The stage's `LossOutput` for a `PreferenceBatch` on the model's device."""
        answer = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        chosen, rejected = answer["logits"][:, 0].chunk(2)
        of_chosen, of_rejected = answer["variance"].chunk(2) if self.gaussian else (None, None)
        output = rm_stage(
            chosen, rejected, self.objective, chosen_variance=of_chosen, rejected_variance=of_rejected,
            margin=inputs.get("margin"), center_rewards_coefficient=self.args.center_rewards_coefficient,
            totals=totals,
        )  # fmt: skip
        with torch.no_grad():
            variance = summed_variance(self.objective, of_chosen, of_rejected, output.margins)
            found = log_preference(output.margins, variance)
        if self._log_preferences is not None:
            self._log_preferences.append(self.accelerator.gather_for_metrics(found).cpu())
        return output._replace(metrics=output.metrics | {"nll": -found.mean()})

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._log_preferences = []
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            found = torch.cat(self._log_preferences).double()
        finally:
            self._log_preferences = None
        output.metrics[f"{metric_key_prefix}_nll"] = -found.mean().item()
        output.metrics[f"{metric_key_prefix}_ece"] = expected_calibration_error(found.exp())
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.gaussian:
            _copy_mean(self.model, state_dict)
        super()._save(output_dir, state_dict)


class _KeepPadding(TrainerCallback):
    """Where a reward is read depends on the config's padding token, which transformers' Trainer makes the tokenizer's
    as training begins."""

    def __init__(self, config: Any) -> None:
        self.config, self.pad_token_id = config, config.pad_token_id

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.pad_token_id = self.pad_token_id


def _with_adapter(model: Any, peft_config: Any, args: PreferenceTrainingArguments) -> Any:
    """The model, with a new adapter where there is a config; its score trains."""
    score = causal_lm(model).score
    if not hasattr(model, "disable_adapter"):
        score.float().requires_grad_(True)  # steps of AdamW are below the resolution of 16-bit weights
    if peft_config is not None and peft_config.task_type != "SEQ_CLS":
        raise ValueError(
            f"peft_config must have task_type SEQ_CLS, which trains the score, got {peft_config.task_type}"
        )
    model = with_new_adapter(model, peft_config, args.gradient_checkpointing)
    check_adapter(model, is_reference=False, always=False)
    return model


@torch.no_grad()
def _copy_mean(model: Any, state_dict: dict[str, Tensor] | None) -> None:
    """Make the score the Disco head's mean without its constant, in the model or in the weights gathered from it.

    So a program that knows no Disco head finds the order of the means, and their differences, in the saved model.
    """
    weights = dict(model.named_parameters()) if state_dict is None else state_dict
    mean = next(weight for name, weight in weights.items() if name.endswith("disco_head.linear.weight"))[:1]
    for name, weight in weights.items():
        parts = name.split(".")
        if "score" in parts and "original_module" not in parts and weight.shape == mean.shape:
            weight.copy_(mean)
