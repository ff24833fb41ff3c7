"""A loop of your own: DPO with a learned beta for each prompt (LeDPO). Logits are never formed.

python examples/plain_pytorch.py [--model Qwen/Qwen3-0.6B] [--dataset pairs.jsonl]
"""

import argparse
import copy

import torch
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
torch.manual_seed(0)
rows = fastpo.read_dataset(args.dataset) if args.dataset else Dataset.from_list(planted_preferences(256, seed=1))
if args.model:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
else:
    model, tokenizer = tiny_model(rows)
model.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)  # 16 bits would lose AdamW's small steps
reference = copy.deepcopy(model)
pairs = fastpo.tokenize_dataset(rows, tokenizer, max_length=512)
collate = fastpo.PreferenceCollator(tokenizer.eos_token_id)  # padding is masked: any token will do
loader = DataLoader(pairs, 8, shuffle=True, drop_last=True, collate_fn=collate)
config, means = fastpo.PreferenceConfig.preset("ledpo"), {}  # running means, for the regularisers
head, rate = fastpo.BetaHead(model.config.hidden_size).to(model.device), 1e-6 if args.model else 1e-3
groups = [{"params": model.parameters()}, {"params": head.parameters(), "lr": rate * config.beta_head.lr_multiplier}]
optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)


def completion_stats(lm, batch):
    """Statistics of the 2B responses, chosen ones first, and the hidden states (2B, T, D)."""
    hidden = lm.base_model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)  # prompts are not projected
    # Where the model has them: softcap= and logit_scale=, which `fastpo.model_stats` finds by itself.
    return fastpo.linear_sequence_stats(hidden[:, :-1], lm.get_output_embeddings().weight, labels[:, 1:]), hidden


for step, cpu_batch in enumerate(loader, start=1):
    batch = {name: tensor.to(model.device) for name, tensor in cpu_batch.items()}
    chosen, rejected = completion_stats(model, batch)[0].split()
    with torch.no_grad():
        ref_stats, ref_hidden = completion_stats(reference, batch)
    prompt_hidden = ref_hidden[torch.arange(8), batch["completion_mask"].argmax(dim=1)[:8] - 1]  # at its last token
    log_s = head.log_s(prompt_hidden)
    ref_pair = dict(zip(("ref_chosen", "ref_rejected"), ref_stats.split(), strict=True))
    output = fastpo.preference_loss(chosen, rejected, config, **ref_pair, beta=config.beta * log_s.exp())
    (output.loss + fastpo.regularizer_loss(log_s, config, features=prompt_hidden, state=means)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {output.loss:.4f}, beta {output.metrics['beta/mean']:.4f}")
