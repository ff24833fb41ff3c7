"""The training step that `python -m bench --preset step` measures: its model, its data, its adapter."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BETA = 0.1
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
LORA_RANK, LORA_ALPHA = 16, 32
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
POLICY_SEED, REFERENCE_SEED, ADAPTER_SEED, DATA_SEED = range(4)
END = "<end>"


@dataclass(frozen=True)
class StepShape:
    """A Qwen3 with tied embeddings, and the pairs of one step; lengths in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    pairs: int
    prompt: int
    completion: int  # its end-of-sequence token included

    def __str__(self) -> str:
        return (
            f"a Qwen3 with hidden size {self.hidden}, {self.layers} layers, {self.heads} heads ({self.kv_heads} for "
            f"keys and values) of {self.head_dim}, an MLP of {self.intermediate} and {self.vocab} tied embeddings; "
            f"{self.pairs} pairs of {self.prompt} prompt + {self.completion} completion tokens, chosen and rejected"
        )


@dataclass(frozen=True)
class Pairs:
    """Token ids of P pairs that are all of one length: (P, prompt), (P, completion), (P, completion)."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor

    def batch(self) -> tuple[Tensor, Tensor]:
        """input_ids and completion mask (2P, T), the chosen rows first."""
        completions = torch.cat((self.chosen, self.rejected))
        input_ids = torch.cat((self.prompt.repeat(2, 1), completions), dim=1)
        mask = torch.zeros_like(input_ids)
        mask[:, self.prompt.shape[1] :] = 1
        return input_ids, mask


def make_pairs(shape: StepShape) -> Pairs:
    """Random words; a completion ends with the end-of-sequence token, the last of the vocabulary."""
    generator = torch.Generator().manual_seed(DATA_SEED)

    def words(length: int) -> Tensor:
        return torch.randint(0, shape.vocab - 1, (shape.pairs, length), generator=generator)

    prompt, chosen, rejected = (words(length) for length in (shape.prompt, *[shape.completion] * 2))
    chosen[:, -1] = rejected[:, -1] = shape.vocab - 1
    return Pairs(prompt, chosen, rejected)


def make_dataset(pairs: Pairs) -> Any:
    """The pairs as text, which both trainers tokenise and end themselves; see `make_tokenizer`."""
    from datasets import Dataset

    def text(ids: Tensor) -> list[str]:
        return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]

    sides = {"chosen": pairs.chosen, "rejected": pairs.rejected}
    completions = {name: [f" {words}" for words in text(ids[:, :-1])] for name, ids in sides.items()}
    return Dataset.from_dict({"prompt": text(pairs.prompt), **completions})


def make_tokenizer(vocab: int) -> Any:
    """One token a word: w0, w1, ..., and the end-of-sequence token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab - 1)} | {END: vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model(shape: StepShape, seed: int) -> Any:
    """A Qwen3ForCausalLM with random weights, fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=shape.prompt + shape.completion, tie_word_embeddings=True,
        initializer_range=shape.hidden**-0.5, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def lora_config() -> Any:
    """LoRA on every linear layer but the head."""
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=list(LORA_MODULES),
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip


@torch.no_grad()
def fill_adapter(model: nn.Module) -> None:
    """Give every LoRA matrix the same values in every contender.

    B is not 0: where policy and reference agree, the loss is log 2 whatever else is wrong.
    """
    generator = torch.Generator().manual_seed(ADAPTER_SEED)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        elif "lora_B" in name:
            parameter.normal_(std=0.02, generator=generator)
