"""A TRL script for DPO on a file of ranked answers. One line makes it fastpo's: DPOTrainer's import.

python examples/trl_dpo.py --dataset_name dpo_en_demo.json --output_dir runs/trl_dpo --max_steps 20 --use_cpu --bf16 no
python examples/trl_dpo.py --config dpo.yaml --model_name_or_path Qwen/Qwen3-0.6B --use_peft

The file holds LLaMA-Factory's ranking form. Without a model a tiny Qwen3 is made, with a vocabulary of 32,768.
"""

from pathlib import Path

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from fastpo.data import Pair
from fastpo.integrations.trl import DPOConfig, DPOTrainer
from fastpo.tokenizer import train_tokenizer

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32768, "tie_word_embeddings": True}


def to_messages(row):
    """prompt, chosen and rejected, each a list of messages, as TRL reads them."""
    sides = {"prompt": row["conversations"], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}
    return {
        name: [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
        for name, turns in sides.items()
    }


def make_model(folder, rows):
    """A random model and a tokenizer of the rows' text, saved."""
    tokenizer = train_tokenizer((Pair(**row) for row in rows), 4000)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    set_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **TINY, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_trainer(argv=None):
    script, args, model = TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config(argv)
    rows = load_dataset("json", data_files=script.dataset_name, split="train")
    rows = rows.map(to_messages, remove_columns=rows.column_names)
    name = model.model_name_or_path or make_model(Path(args.output_dir) / "start", rows)
    return DPOTrainer(model=name, args=args, train_dataset=rows, peft_config=get_peft_config(model))


if __name__ == "__main__":
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
