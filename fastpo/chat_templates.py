"""Chat templates by name, written in the tokenizer's own language (Jinja).

The names, and what each renders, are those of LLaMA-Factory, so that its recipes and models mean here what they mean
there. To add one: its line in `CHAT_TEMPLATES`, and a rendered string in the tests.
"""

import json
import re
from typing import Any, NamedTuple

THINK_START, THINK_END = "<think>\n", "\n</think>\n\n"


class ChatTemplate(NamedTuple):
    """What a conversation is written as. In each text {content} is the message, {bos} and {eos} are the tokens.

    Attributes:
        user: a user's message, with what begins the assistant's.
        assistant: the assistant's message, with what ends it.
        system: the system message; the conversation may have none.
        prefix: what every conversation begins with.
        default_system: the system message of a conversation without one.
        stop_words: tokens that end a message; the tokenizer must have those that the template writes.
        replaces_eos: the first of them becomes the tokenizer's eos_token.
        eos_at_end: the conversation as a whole ends with eos_token, and its messages do not.
        system_in_user: the system message stands inside the first user message.
        thinks: answers begin with their thoughts, as `render` says.
    """

    user: str
    assistant: str = "{content}{eos}"
    system: str = "{content}"
    prefix: str = ""
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    replaces_eos: bool = False
    eos_at_end: bool = False
    system_in_user: bool = False
    thinks: bool = False


_CHATML = ChatTemplate(
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    stop_words=("<|im_end|>",),
)
_QWEN = _CHATML._replace(replaces_eos=True)
_GEMMA = ChatTemplate(
    user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
    assistant="{content}<end_of_turn>\n",
    system="{content}\n\n",
    prefix="{bos}",
    stop_words=("<end_of_turn>",),
    replaces_eos=True,
    system_in_user=True,
)

CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    "alpaca": ChatTemplate(
        user="### Instruction:\n{content}\n\n### Response:\n",
        assistant="{content}{eos}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "chatml": _CHATML._replace(stop_words=("<|im_end|>", "<|im_start|>"), replaces_eos=True),
    "deepseek": ChatTemplate(user="User: {content}\n\nAssistant:", system="{content}\n\n", prefix="{bos}"),
    "deepseek3": ChatTemplate(user="<\uff5cUser\uff5c>{content}<\uff5cAssistant\uff5c>", prefix="{bos}"),
    "default": ChatTemplate(
        user="Human: {content}{eos}\nAssistant:", assistant="{content}{eos}\n", system="System: {content}{eos}\n"
    ),
    "empty": ChatTemplate(user="{content}", assistant="{content}"),
    "falcon": ChatTemplate(user="User: {content}\nFalcon:", assistant="{content}\n", eos_at_end=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA._replace(stop_words=("<eos>", "<end_of_turn>"), replaces_eos=False, eos_at_end=True),
    "gemma3": _GEMMA,
    "llama2": ChatTemplate(
        user="{bos}[INST] {content} [/INST]", system="<<SYS>>\n{content}\n<</SYS>>\n\n", system_in_user=True
    ),
    "llama3": ChatTemplate(
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        assistant="{content}<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        prefix="{bos}",
        stop_words=("<|eot_id|>", "<|eom_id|>"),
        replaces_eos=True,
    ),
    "mistral": ChatTemplate(
        user="[INST] {content}[/INST]",
        assistant=" {content}{eos}",
        system="{content}\n\n",
        prefix="{bos}",
        system_in_user=True,
    ),
    "phi": ChatTemplate(
        user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
        assistant="{content}<|end|>\n",
        system="<|system|>\n{content}<|end|>\n",
        stop_words=("<|end|>",),
        replaces_eos=True,
    ),
    "phi4": ChatTemplate(
        user="<|im_start|>user<|im_sep|>{content}<|im_end|><|im_start|>assistant<|im_sep|>",
        assistant="{content}<|im_end|>",
        system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
        stop_words=("<|im_end|>",),
        replaces_eos=True,
    ),
    "qwen": _QWEN._replace(default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _QWEN._replace(thinks=True),
    "qwen3_nothink": _QWEN,
    "smollm": _CHATML,
    "smollm2": _CHATML._replace(
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."
    ),
    "vicuna": ChatTemplate(
        user="USER: {content} ASSISTANT:",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "yi": _CHATML,
    "zephyr": ChatTemplate(
        user="<|user|>\n{content}{eos}<|assistant|>\n",
        system="<|system|>\n{content}{eos}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
}  # fmt: skip


def check_chat_template(name: str) -> None:
    """Raises:
    ValueError: no template has this name.
    """
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"chat_template must be one of {', '.join(CHAT_TEMPLATES)}, got {name!r}")


def set_chat_template(
    tokenizer: Any, name: str, default_system: str | None = None, enable_thinking: bool = True
) -> None:
    """Give a tokenizer the template of this name in place of its own, and the eos_token that goes with it.

    Args:
        tokenizer: of transformers; changed.
        name: a key of `CHAT_TEMPLATES`.
        default_system: in place of the template's own.
        enable_thinking: as in `render`.

    Raises:
        ValueError: no such template, or the tokenizer lacks a token of it.
    """
    check_chat_template(name)
    template = CHAT_TEMPLATES[name]
    vocabulary = tokenizer.get_vocab()
    for word in template.stop_words:
        if word in template.user + template.assistant and word not in vocabulary:
            raise ValueError(f"chat_template={name!r} needs the token {word!r}, which the tokenizer does not have")
    if template.replaces_eos:
        tokenizer.eos_token = template.stop_words[0]
    if tokenizer.eos_token is None:
        raise ValueError(f"chat_template={name!r} needs an eos_token, which the tokenizer does not have")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if default_system is not None:
        template = template._replace(default_system=default_system)
    tokenizer.chat_template = render(template, enable_thinking)


def render(template: ChatTemplate, enable_thinking: bool = True) -> str:
    """The template in Jinja.

    Where it thinks: earlier answers lose their thoughts; the last one keeps them, and where it has none an empty
    thought is put before it. With enable_thinking=False the last one loses them too, and the empty thought is a part
    of the prompt.
    """
    system = _expression(template.system, "ns.system")
    user, assistant = _expression(template.user), _expression(template.assistant)
    parts = [
        f"{{% set ns = namespace(system={_literal(template.default_system)}) %}}",
        "{% set turns = messages %}",
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
        "{% if messages[0]['content'] %}{% set ns.system = messages[0]['content'] %}{% endif %}{% endif %}",
        f"{{{{ {_expression(template.prefix)} }}}}",
        "" if template.system_in_user else f"{{% if ns.system %}}{{{{ {system} }}}}{{% endif %}}",
        "{% for message in turns %}{% set content = message['content'] %}",
        "{% if message['role'] == 'user' %}",
        f"{{% if loop.first and ns.system %}}{{% set content = {system} + content %}}{{% endif %}}"
        if template.system_in_user
        else "",
        f"{{{{ {user} }}}}",
        "{% elif message['role'] == 'assistant' %}",
        _thoughts(enable_thinking) if template.thinks else "",
        f"{{{{ {assistant} }}}}",
        "{% if loop.last %}{{ eos_token }}{% endif %}" if template.eos_at_end else "",
        "{% else %}{{ raise_exception('messages must be of user and assistant, got ' + message['role']) }}{% endif %}",
        "{% endfor %}",
        f"{{% if add_generation_prompt %}}{{{{ {_literal(THINK_START + THINK_END)} }}}}{{% endif %}}"
        if template.thinks and not enable_thinking
        else "",
    ]
    return "".join(parts)


def _thoughts(enable_thinking: bool) -> str:
    start, end, empty = _literal(THINK_START), _literal(THINK_END), _literal(THINK_START + THINK_END)
    strip = (
        f"{{% if {start} in content and {end} in content %}}"
        f"{{% set content = (content.split({start})[0] + content.split({end})[-1]).lstrip('\\n') %}}{{% endif %}}"
    )
    has_none = "'<think>' not in content and '</think>' not in content"
    add = f"{{% if loop.last and {has_none} %}}{{% set content = {empty} + content %}}{{% endif %}}"
    return (f"{{% if not loop.last %}}{strip}{{% endif %}}" if enable_thinking else strip) + add


def _expression(text: str, content: str = "content") -> str:
    """A Jinja expression of a text with {content}, {bos} and {eos} in it; `content` is a variable's name."""
    names = {"{content}": content, "{bos}": "(bos_token or '')", "{eos}": "eos_token"}
    pieces = [
        names.get(piece) or _literal(piece) for piece in re.split(r"(\{content\}|\{bos\}|\{eos\})", text) if piece
    ]
    return " + ".join(pieces) or "''"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
