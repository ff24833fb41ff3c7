"""A Trainer of your own: transformers' with another compute_loss, here DPO. Logits are never formed.

python examples/plain_trainer.py [--model Qwen/Qwen3-0.6B] [--dataset pairs.jsonl]
"""

import argparse
import copy

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fastpo
from fastpo.planted import planted_preferences
from fastpo.tiny import tiny_model


class DPOTrainer(Trainer):
    def __init__(self, *args, reference, **kwargs):
        super().__init__(*args, **kwargs)
        self.reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.objective = fastpo.PreferenceConfig(beta=0.1)
        self.can_return_loss = True  # so that evaluation asks for a loss though no batch has labels

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = fastpo.model_stats(model, inputs).sequence_stats().split()
        with torch.no_grad():
            ref_chosen, ref_rejected = fastpo.model_stats(self.reference, inputs).sequence_stats().split()
        output = fastpo.preference_loss(
            chosen, rejected, self.objective, ref_chosen=ref_chosen, ref_rejected=ref_rejected
        )
        return (output.loss, {"margins": output.margins}) if return_outputs else output.loss


parser = argparse.ArgumentParser()
parser.add_argument("--model", help="default: a tiny Qwen3 with random weights")
parser.add_argument("--dataset", help="default: generated pairs")
options = parser.parse_args()
rows = fastpo.read_dataset(options.dataset) if options.dataset else Dataset.from_list(planted_preferences(256, seed=1))
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
else:
    model, tokenizer = tiny_model(rows)
fastpo.install_stats_forward(model)  # it answers a batch that has a completion_mask with statistics, not logits
pairs = fastpo.tokenize_dataset(rows, tokenizer, max_length=512).train_test_split(0.1, seed=0)
args = TrainingArguments(
    "runs/plain_trainer", learning_rate=1e-6 if options.model else 1e-3, num_train_epochs=1, logging_steps=1,
    eval_strategy="epoch", label_names=[], remove_unused_columns=False,
)  # fmt: skip
trainer = DPOTrainer(
    model, args, fastpo.PreferenceCollator(tokenizer.eos_token_id), pairs["train"], pairs["test"], tokenizer,
    reference=copy.deepcopy(model),
)  # fmt: skip
trainer.train()
