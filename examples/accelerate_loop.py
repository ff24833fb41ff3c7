"""Accelerate's own loop, DPO, on any number of processes. Logits are never formed.

python examples/accelerate_loop.py [--model Qwen/Qwen3-0.6B] [--dataset pairs.jsonl]
accelerate launch --num_processes 2 examples/accelerate_loop.py  # on two GPUs
"""

import argparse
import copy

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpo
from fastpo.planted import planted_preferences
from fastpo.tiny import tiny_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="default: a tiny Qwen3 with random weights")
parser.add_argument("--dataset", help="default: generated pairs")
args = parser.parse_args()
set_seed(0)
# The same batches in the same order on any number of processes, which share each of them out.
accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True))
rows = fastpo.read_dataset(args.dataset) if args.dataset else Dataset.from_list(planted_preferences(256, seed=1))
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
else:
    model, tokenizer = tiny_model(rows)
pairs = fastpo.tokenize_dataset(rows, tokenizer, max_length=512)
collate = fastpo.PreferenceCollator(tokenizer.eos_token_id)  # padding is masked: any token will do
loader = DataLoader(pairs, 8, shuffle=True, drop_last=True, collate_fn=collate)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6 if args.model else 1e-3)
config = fastpo.PreferenceConfig(beta=0.1)

fastpo.install_stats_forward(model)  # before the model is copied and wrapped
reference = accelerator.prepare_model(copy.deepcopy(model), evaluation_mode=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for step, batch in enumerate(loader, start=1):
    # Through the wrapped model: what DDP hangs on its forward sums the gradients.
    chosen, rejected = fastpo.model_stats(model, batch).sequence_stats().split()
    with torch.no_grad():
        ref_chosen, ref_rejected = fastpo.model_stats(reference, batch).sequence_stats().split()
    output = fastpo.preference_loss(chosen, rejected, config, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    accelerator.backward(output.loss)
    optimizer.step()
    optimizer.zero_grad()
    loss = accelerator.reduce(output.loss.detach(), "mean")
    accelerator.print(f"step {step}: loss {loss:.4f}")
