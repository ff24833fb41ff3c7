"""What the trainers on pairs share: tokenised data, totals of a step, evaluation that keeps the rewards."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from fastpo.arguments import own_columns
from fastpo.layout import completion_tokens
from fastpo.stage_trainer import StageTrainer
from fastpo.tokenization import tokenize_dataset
from fastpo.types import LossOutput, StepTotals


class PairTrainer(StageTrainer):
    """A `StageTrainer` whose batches are `PreferenceBatch`es; a subclass has the `loss_output` of one."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        # The loss is divided by the whole step's rows and tokens here, so the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True

    def loss_output(self, model: nn.Module, inputs: dict[str, Any], totals: StepTotals | None = None) -> LossOutput:
        """The stage's `LossOutput` for a `PreferenceBatch` on the model's device; totals None: of this batch alone."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Any:
        """The stage's loss of a batch; with `return_outputs` also {"rewards": (B, 2)}."""
        output = self.loss_output(model, inputs, num_items_in_batch)
        loss = self.watched_loss(model, output, inputs["index"])
        if not return_outputs:
            return loss
        return loss, {"rewards": torch.stack((output.chosen_rewards, output.rejected_rewards), dim=1)}

    # --- data -------------------------------------------------------------------------------------------------------

    @staticmethod
    def tokenized(dataset: Any, source: str, args: Any, tokenizer: Any) -> Any:
        """The dataset as the collator takes it; `source` is what errors call it."""
        if not isinstance(dataset, Dataset):
            raise TypeError(f"{source} must be a datasets.Dataset, got {type(dataset).__name__}")
        return tokenize_dataset(
            dataset, tokenizer, stage=args.stage, max_length=args.max_length, source=source,
            skip_bad_rows=args.skip_bad_rows, num_proc=args.dataset_num_proc, own_columns=own_columns(args),
        )  # fmt: skip

    def _tokenize(self, dataset: Any, source: str, args: Any, tokenizer: Any) -> Any:
        """`tokenized`, checked against the objective; None of None."""
        return None if dataset is None else self.tokenized(dataset, source, args, tokenizer)

    def _tokenize_all(self, train: Any, held_out: Any, args: Any, tokenizer: Any) -> tuple[Any, Any]:
        """Training and held-out data, the latter possibly a dictionary of several."""
        with args.main_process_first(desc="tokenizing"):
            train = self._tokenize(train, "train_dataset", args, tokenizer)
            if isinstance(held_out, dict):
                return train, {name: self._tokenize(part, name, args, tokenizer) for name, part in held_out.items()}
            return train, self._tokenize(held_out, "eval_dataset", args, tokenizer)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = self._tokenize(eval_dataset, "eval_dataset", self.args, self.processing_class)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> Any:
        return super().get_test_dataloader(
            self._tokenize(test_dataset, "test_dataset", self.args, self.processing_class)
        )

    # --- steps ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> StepTotals | None:
        """What the whole optimiser step averages over; see `StepTotals`."""
        if not batch_samples:
            return None
        rows = sum(len(batch["index"]) for batch in batch_samples)
        # Chosen rows come first; their completion tokens are what a token mean divides by.
        tokens = sum(completion_tokens(batch, len(batch["index"])) for batch in batch_samples)
        return self.step_totals(rows, tokens, device)

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
