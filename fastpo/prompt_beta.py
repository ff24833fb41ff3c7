"""beta_eff(x) of prompts outside of training: a saved Beta head's s(x), of their features under the reference."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.adapters import as_reference
from fastpo.backbone import Wanted, causal_lm, install_stats_forward, model_stats
from fastpo.collation import padded
from fastpo.data import Text
from fastpo.heads import BetaHead
from fastpo.lm_head import head_shape
from fastpo.tokenization import encode_prompt


def prompt_scales(
    reference: Any, head: BetaHead, prompt_ids: Sequence[Sequence[int]], *, batch_size: int, pad_token_id: int
) -> Tensor:
    """s(x) (N,) of N prompts, fp32 (float64 of such a head) on the CPU: what training makes of the same prompts.

    Args:
        reference: a causal LM; of one with an adapter, what it is without it. It is left as it came, but for the
            forward of `install_stats_forward`.
        head: on the reference's device.
        prompt_ids: token ids, none empty.
        batch_size: prompts at once.
        pad_token_id: fills the padding, which is masked.

    Raises:
        ValueError: a prompt is empty, or the head takes hidden states of another size.
    """
    lm = causal_lm(reference)
    _, size = head_shape(lm)
    if head.input_size != size:
        raise ValueError(f"head must take hidden states of size {size}, the reference's, got one for {head.input_size}")
    for position, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompt_ids must have at least one token each, got none in {position}")
    install_stats_forward(reference)
    found = []
    with as_reference(lm):
        for first in range(0, len(prompt_ids), batch_size):
            part = prompt_ids[first : first + batch_size]
            wanted = Wanted(prompt=head.config.features, prompt_rows=len(part))
            features = model_stats(reference, _batch(part, pad_token_id, lm.device), wanted).prompt_features()
            found.append(head.log_s(**features).exp().cpu())
    return torch.cat(found) if found else torch.empty(0)


def _batch(prompt_ids: Sequence[Sequence[int]], pad_token_id: int, device: Any) -> dict[str, Tensor]:
    """Prompts without a response."""
    batch = padded(prompt_ids, [[[]] * len(prompt_ids)], pad_token_id)
    return {name: x.to(device) for name, x in batch.items()}


class PromptScaler:
    """s(x) of prompts as text or messages.

    Args:
        reference: a causal LM on the device where it works.
        head: a Beta head for its hidden states.
        tokenizer: with a chat template where prompts are messages.
        max_length: of a prompt, in tokens; it keeps its last ones. None: no limit.
        batch_size: prompts at once.
    """

    def __init__(
        self, reference: Any, head: BetaHead, tokenizer: Any, *, max_length: int | None, batch_size: int
    ) -> None:
        self.reference, self.head, self.tokenizer = reference, head, tokenizer
        self.max_length, self.batch_size = max_length, batch_size

    @classmethod
    def load(cls, beta_head: str, ref_model_name_or_path: str, *, max_length: int | None, batch_size: int) -> Self:
        """From where a head and a model are saved; on the first GPU, or the CPU.

        Raises:
            ValueError: no head is saved there, or no model and tokenizer.
        """
        head = BetaHead.from_pretrained(beta_head)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            reference = AutoModelForCausalLM.from_pretrained(ref_model_name_or_path, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(ref_model_name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"ref_model_name_or_path must name a causal LM, got {ref_model_name_or_path!r}: {error}"
            ) from error
        return cls(reference.to(device), head.to(device), tokenizer, max_length=max_length, batch_size=batch_size)

    def encode(self, prompt: Text) -> list[int]:
        """Its token ids.

        Raises:
            BadRowError: as `encode_prompt`.
        """
        return encode_prompt(prompt, self.tokenizer)[-(self.max_length or 0) :]

    def __call__(self, prompt_ids: Sequence[Sequence[int]]) -> list[float]:
        """s(x) of prompts that `encode` made."""
        pad = self.tokenizer.pad_token_id
        scales = prompt_scales(
            self.reference, self.head, prompt_ids, batch_size=self.batch_size, pad_token_id=0 if pad is None else pad
        )
        return scales.tolist()
