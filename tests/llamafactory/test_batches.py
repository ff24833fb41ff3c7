"""LLaMA-Factory's batches as fastpo's."""

import pytest
import torch

from fastpo.integrations.llamafactory.batches import check_text, preference_batch

IDS = torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0], [5, 8, 9, 4], [5, 3, 0, 0]])
BATCH = {
    "input_ids": IDS,
    "attention_mask": (IDS != 0).long(),
    "labels": torch.tensor([[-100, 6, 7, -100], [-100, 6, -100, -100], [-100, -100, 9, 4], [-100, 3, -100, -100]]),
}


def test_layout() -> None:
    found = preference_batch(dict(BATCH))
    assert torch.equal(found["input_ids"], IDS)
    assert found["completion_mask"].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert found["index"].tolist() == [0, 1]


def test_what_fastpo_would_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="input_ids, attention_mask, labels alone, got pixel_values too"):
        preference_batch({**BATCH, "pixel_values": torch.zeros(1)})
    check_text(None)
    with pytest.raises(ValueError, match="a model of text alone, got one with a dict"):
        check_text({})
