"""Sampling: exact frequencies, padding that changes nothing, and a model that is left as it came."""

import copy
import itertools
import math
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fastpo import vllm_backend
from fastpo.backbone import install_stats_forward
from fastpo.chat_templates import CHAT_TEMPLATES, render, set_chat_template
from fastpo.generation import Completion, Sampling, end_tokens, generate, said, seed_of
from fastpo.tokenization import encode_completion

VOCAB, EOS = 7, 5
ENDS = {"pad_token_id": 0, "eos_token_id": EOS}
PROMPTS = [[1, 2, 3], [4, 6, 4, 6, 1, 2, 3], [2]]
GREEDY = Sampling(max_completion_length=8, top_k=1)


def small(model_type: str = "qwen3", seed: int = 0, sharpness: float = 20.0, **fields: Any) -> Any:
    """A model of few tokens whose distributions are far from uniform."""
    model = tiny_model(model_type, seed, vocab_size=VOCAB, **{**ENDS, "tie_word_embeddings": False, **fields})
    with torch.no_grad():
        model.get_output_embeddings().weight *= sharpness
    return model.eval()


def draw(model: Any, prompts: Any = PROMPTS, sampling: Sampling | None = None, seed: int = 0) -> list[Completion]:
    return generate(model, prompts, sampling or Sampling(max_completion_length=8), seed=seed, **ENDS)


# --- frequencies ------------------------------------------------------------------------------------------------------


def distribution(model: Any, ids: list[int], sampling: Sampling) -> np.ndarray:
    """Of the next token, by the definitions: temperature, then the k likeliest, of these the fewest with mass p."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([ids])).logits[0, -1].numpy() / sampling.temperature
    p = np.exp(logits - logits.max())
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    return p / p.sum()


def two_tokens(model: Any, prompt: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Completions of at most two tokens, and their probabilities."""
    first = distribution(model, prompt, sampling)
    found = {(EOS,): first[EOS]}
    for a in set(range(VOCAB)) - {EOS}:
        second = distribution(model, [*prompt, a], sampling)
        found |= {(a, b): first[a] * second[b] for b in range(VOCAB)}
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.7},
    ],
    ids=str,
)  # fmt: skip
def test_frequencies_are_those_of_the_model(settings: dict[str, Any]) -> None:
    """Pearson's chi-square on completions of two tokens, drawn beside a longer prompt and so padded."""
    model, sampling, draws = small(sharpness=8.0), Sampling(max_completion_length=2, **settings), 4000
    prompt, longer = PROMPTS[:2]
    completions = draw(model, [prompt] * draws + [longer], sampling)[:draws]
    counts = Counter(tuple(completion.ids) for completion in completions)
    expected = {ids: p * draws for ids, p in two_tokens(model, prompt, sampling).items() if p > 0}
    assert set(counts) <= set(expected)  # nothing that is cut off is ever drawn
    assert all(completion.finished == (completion.ids[-1] == EOS) for completion in completions)
    common = [ids for ids, count in expected.items() if count >= 5]
    rest = [ids for ids, count in expected.items() if count < 5]
    cells = [[ids] for ids in common] + ([rest] if sum(expected[ids] for ids in rest) >= 5 else [])
    assert len(cells) > 3
    chi2 = sum(
        (sum(counts[ids] for ids in cell) - (e := sum(expected[ids] for ids in cell))) ** 2 / e for cell in cells
    )
    p_value = torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(chi2 / 2)).item()
    assert p_value > 0.001, (chi2, len(cells))


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "llama"])
def test_padding_changes_nothing(model_type: str) -> None:
    model = small(model_type)
    alone = [draw(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert draw(model, PROMPTS, GREEDY) == alone
    assert len({tuple(completion.ids) for completion in alone}) > 1
    for prompt, completion in zip(PROMPTS, alone, strict=True):  # by hand, without cache and padding
        ids = list(prompt)
        while len(ids) - len(prompt) < GREEDY.max_completion_length and EOS not in ids[len(prompt) :]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert completion.ids == ids[len(prompt) :]


def test_the_seed_decides_and_torchs_generator_stays() -> None:
    model, before = small(), torch.get_rng_state()
    assert draw(model, seed=1) == draw(model, seed=1) != draw(model, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    twice = draw(model, [PROMPTS[0]] * 8)
    assert len({tuple(completion.ids) for completion in twice}) > 4


def test_seeds_differ_in_what_a_cpu_reads_of_them() -> None:
    seeds = [seed_of(seed, batch) for seed in range(30) for batch in range(30)]
    assert len({seed % 2**32 for seed in seeds}) == 900 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3) and seed_of(0, 1) == seed_of(0, 1)


# --- the model --------------------------------------------------------------------------------------------------------


def test_generation_settings_of_the_model_do_not_count() -> None:
    expected = draw(small())
    model = small()
    own = GenerationConfig(
        do_sample=False, top_k=1, top_p=0.1, temperature=9.0, repetition_penalty=7.0, no_repeat_ngram_size=1,
        min_new_tokens=7, max_length=4, num_beams=3, num_return_sequences=2, suppress_tokens=[1, 2, 3],
        forced_eos_token_id=6, begin_suppress_tokens=[4], pad_token_id=3, use_cache=False, min_p=0.9, eos_token_id=EOS,
    )  # fmt: skip
    model.generation_config = own
    assert draw(model) == expected
    assert model.generation_config is own


def test_all_end_of_sequence_tokens_end() -> None:
    assert end_tokens(GenerationConfig(eos_token_id=[3, EOS]), EOS) == [EOS, 3]
    assert end_tokens(GenerationConfig(eos_token_id=4), [3, 2]) == [3, 2, 4]
    with pytest.raises(ValueError, match="eos_token_id must be a token of the tokenizer or the model, got none"):
        end_tokens(GenerationConfig(), None)
    model = small(sharpness=1.0)
    model.generation_config.eos_token_id = [3, EOS]
    completions = draw(model, [PROMPTS[0]] * 64)
    assert {completion.ids[-1] for completion in completions if completion.finished} == {3, EOS}
    for completion in completions:
        assert not {3, EOS} & set(completion.ids[:-1])
        assert completion.finished == (completion.ids[-1] in (3, EOS))
        assert completion.finished or len(completion.ids) == 8


def test_it_generates_in_the_middle_of_training() -> None:
    """Dropout, checkpointing, the statistics' forward: as if none was there, and all is as before."""
    expected = draw(small())
    model = small(attention_dropout=0.5)
    install_stats_forward(model)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[1].eval()  # what somebody froze
    modes = {name: module.training for name, module in model.named_modules()}
    seen: list[int] = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    assert draw(model) == expected
    assert seen == [7, *[1] * 7]  # from the second token on the cache has what was before
    hook.remove()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model(torch.tensor([PROMPTS[0]])).logits.requires_grad


def test_adapters_take_part() -> None:
    from peft import LoraConfig, get_peft_model

    base = small()
    without = draw(base, sampling=GREEDY)
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(base, config).train()
    adapted = draw(model, sampling=GREEDY)
    assert model.training and adapted != without
    assert draw(copy.deepcopy(model).merge_and_unload(), sampling=GREEDY) == adapted


def test_what_it_cannot_do_is_said() -> None:
    model = small(max_position_embeddings=12)
    assert len(draw(model, [[1] * 4])) == 1
    with pytest.raises(
        ValueError, match=r"5 tokens and max_completion_length=8 must fit into the model's 12 positions"
    ):
        draw(model, [[1] * 5])
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="prompts must be lists of at least one token each"):
            draw(model, prompts)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id must be"):
        generate(model, PROMPTS[:1], GREEDY, seed=0, pad_token_id=None, eos_token_id=None)
    assert generate(model, PROMPTS[:1], GREEDY, seed=0, pad_token_id=None, eos_token_id=EOS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_completion_length", 0), ("temperature", 0.0), ("temperature", math.inf), ("temperature", math.nan),
        ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1),
    ],
)  # fmt: skip
def test_bad_sampling_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        Sampling(**{field: value})


# --- text -------------------------------------------------------------------------------------------------------------


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """After sentencepiece: a word's token begins with its space, and decoding drops the first one."""
    words = ["<pad>", "</s>", "▁the", "▁sky", "▁is", "▁blue", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_text_goes_on_from_its_prompt_and_messages_are_answered() -> None:
    tokenizer = metaspace_tokenizer()
    prompt_ids = tokenizer("the sky")["input_ids"]
    done = Completion([4, 5, 1], True)
    assert said(tokenizer, "the sky", prompt_ids, done) == " is blue"
    assert said(tokenizer, "the sky", prompt_ids, Completion([1], True)) == ""
    messages = [{"role": "user", "content": "the sky"}]
    tokenizer.chat_template = render(CHAT_TEMPLATES["empty"])
    assert said(tokenizer, messages, prompt_ids, done) == [{"role": "assistant", "content": "is blue"}]
    bytewise = tiny_tokenizer()
    ids = bytewise("über 東京")["input_ids"]
    for split in range(1, len(ids)):
        text = said(bytewise, "", ids[:split], Completion([*ids[split:], bytewise.eos_token_id], True))
        assert text in (bytewise.decode(ids[split:]), "über 東京"[len(bytewise.decode(ids[:split])) :])


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_message_rendered_again_is_what_was_generated(name: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": [*CHAT_TEMPLATES[name].stop_words]})
    set_chat_template(tokenizer, name)
    prompt = [{"role": "user", "content": "Why?"}]
    for content in ("So.", " So\n"):
        prompt_ids, whole = encode_completion(prompt, [{"role": "assistant", "content": content}], tokenizer)
        ids, end = whole[len(prompt_ids) :], tokenizer.eos_token_id
        finished = end in ids
        done = Completion(ids[: ids.index(end) + 1] if finished else ids, finished)
        assert encode_completion(prompt, said(tokenizer, prompt, prompt_ids, done), tokenizer)[1] == whole


# --- vLLM -------------------------------------------------------------------------------------------------------------


class Recorder:
    """In place of vllm.LLM: answers with the prompt's last token, and an end for every other row."""

    def __init__(self, **made_with: Any) -> None:
        self.made_with = made_with

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> Any:
        self.asked = (prompts, params, use_tqdm)
        ends = itertools.cycle((("stop", [EOS]), ("length", [])))
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=(*prompt["prompt_token_ids"][-1:], *end), finish_reason=reason)]
            )
            for prompt, (reason, end) in zip(prompts, ends, strict=False)
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = Recorder, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_what_vllm_is_asked(vllm: ModuleType) -> None:
    llm = vllm_backend.load("model", "tokenizer", "bfloat16")
    assert llm.made_with == {"model": "model", "tokenizer": "tokenizer", "dtype": "bfloat16"}
    sampling = Sampling(max_completion_length=9, temperature=0.7, top_p=0.9)
    asked = {"seed": 3, "pad_token_id": None, "eos_token_id": EOS}
    assert vllm_backend.generate(llm, [[1, 2], [3], [4]], sampling, **asked) == [  # type: ignore[arg-type]
        Completion([2, EOS], True), Completion([3], False), Completion([4, EOS], True),
    ]  # fmt: skip
    prompts, params, _ = llm.asked
    assert prompts == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}, {"prompt_token_ids": [4]}]
    seeds = [vars(one).pop("seed") for one in params]
    assert len(set(seeds)) == 3
    expected = {"n": 1, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_tokens": 9, "stop_token_ids": [EOS]}
    assert [vars(one) for one in params] == [expected] * 3
    vllm_backend.generate(llm, [[1, 2], [3], [4]], sampling, **asked)  # type: ignore[arg-type]
    assert [one.seed for one in llm.asked[1]] == seeds
    vllm_backend.generate(llm, [[1]], Sampling(top_k=5), **asked)  # type: ignore[arg-type]
    assert llm.asked[1][0].top_k == 5


def test_without_vllm_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"backend vllm needs vllm \(pip install 'fastpo\[vllm\]'\)"):
        vllm_backend.load("model", "model", "auto")
