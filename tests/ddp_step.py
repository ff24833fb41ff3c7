"""One optimiser step under `torch.distributed.run`, for test_trainer: saves what the parameters moved by."""

import sys

import torch
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer

from fastpo.trainer import PreferenceTrainer


def main(stage: str, output: str) -> None:
    torch.set_num_threads(1)
    args = tiny_args(
        output + ".run", stage=stage, optim="sgd", max_grad_norm=0.0, max_steps=1, learning_rate=1.0,
        per_device_train_batch_size=4, sft_weight=0.5, sft_reduction="token", length_normalization=True, beta=1.0,
    )  # fmt: skip
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = PreferenceTrainer(
        model, tiny_model(seed=7), args, train_dataset=tiny_pairs(8), processing_class=tiny_tokenizer()
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({name: before[name] - p.detach() for name, p in model.named_parameters()}, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
