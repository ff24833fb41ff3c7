"""Chat templates render what LLaMA-Factory's of the same names render; the strings were made there."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastpo.chat_templates import CHAT_TEMPLATES, set_chat_template

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MORE = [{"role": "system", "content": "Be 'brief'."}, *TURNS, {"role": "user", "content": "Bye"}]
THOUGHT = [
    TURNS[0],
    {"role": "assistant", "content": "<think>\nold\n</think>\n\nHello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "<think>\nnew\n</think>\n\nSee you"},
]
QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
BYE = "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
RENDERED: list[tuple[str, dict[str, Any], list[dict[str, str]], str]] = [
    ("qwen", {}, TURNS, f"{QWEN_SYSTEM}{HI}Hello<|im_end|>\n"),
    ("qwen", {"default_system": "Yo"}, TURNS, f"<|im_start|>system\nYo<|im_end|>\n{HI}Hello<|im_end|>\n"),
    ("qwen3_nothink", {}, TURNS, f"{HI}Hello<|im_end|>\n"),
    ("qwen3_nothink", {}, MORE, f"<|im_start|>system\nBe 'brief'.<|im_end|>\n{HI}Hello<|im_end|>\n{BYE}"),
    ("qwen3", {}, TURNS, f"{HI}{EMPTY}Hello<|im_end|>\n"),
    ("qwen3", {}, TURNS[:1], HI),
    ("qwen3", {"enable_thinking": False}, TURNS[:1], f"{HI}{EMPTY}"),
    (
        "qwen3", {}, THOUGHT,
        f"{HI}Hello<|im_end|>\n{BYE}<think>\nnew\n</think>\n\nSee you<|im_end|>\n",
    ),
    ("qwen3", {"enable_thinking": False}, THOUGHT, f"{HI}Hello<|im_end|>\n{BYE}{EMPTY}See you<|im_end|>\n"),
    ("chatml", {}, MORE, f"<|im_start|>system\nBe 'brief'.<|im_end|>\n{HI}Hello<|im_end|>\n{BYE}"),
    (
        "llama3", {}, MORE,
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe 'brief'.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Hello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (
        "gemma", {}, MORE,
        "<s><start_of_turn>user\nBe 'brief'.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    ),
    ("gemma2", {}, TURNS, "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n</s>"),
    ("mistral", {}, MORE, "<s>[INST] Be 'brief'.\n\nHi[/INST] Hello</s>[INST] Bye[/INST]"),
    ("llama2", {}, MORE, "<s>[INST] <<SYS>>\nBe 'brief'.\n<</SYS>>\n\nHi [/INST]Hello</s><s>[INST] Bye [/INST]"),
    ("default", {}, MORE, "System: Be 'brief'.</s>\nHuman: Hi</s>\nAssistant:Hello</s>\nHuman: Bye</s>\nAssistant:"),
    (
        "alpaca", {}, TURNS,
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\nHello</s>\n\n",
    ),
    ("deepseek3", {}, TURNS, "<s><\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>Hello</s>"),
    (
        "zephyr", {}, TURNS,
        "<|system|>\nYou are Zephyr, a helpful assistant.</s><|user|>\nHi</s><|assistant|>\nHello</s>",
    ),
    ("empty", {}, TURNS, "HiHello"),
]  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    loaded.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    loaded.add_tokens(["<|eot_id|>", "<end_of_turn>", "<|end|>"], special_tokens=True)
    return loaded


@pytest.mark.parametrize(("name", "options", "messages", "wanted"), RENDERED)
def test_templates_render_what_llamafactory_s_do(
    name: str, options: dict, messages: list, wanted: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    set_chat_template(tokenizer, name, **options)
    prompt = messages[-1]["role"] == "user"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == wanted


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_whole(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    set_chat_template(tokenizer, name, enable_thinking=False)
    answer = [{"role": "assistant", "content": "So long"}]
    prompt = tokenizer.apply_chat_template(MORE, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template([*MORE, *answer], tokenize=False).startswith(prompt)
    template = CHAT_TEMPLATES[name]
    assert tokenizer.eos_token == (template.stop_words[0] if template.replaces_eos else "</s>")


def test_a_template_s_tokens_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"'llama3' needs the token '<\|eot_id\|>'"):
        set_chat_template(tiny_tokenizer(), "llama3")
