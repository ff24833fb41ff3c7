import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def test_the_blocks_run_as_printed_one_after_the_other() -> None:
    """All but the trainer's, which wants a model from the hub."""
    scope: dict = {}
    for block in (block for block in BLOCKS if "trainer.train()" not in block):
        exec(block, scope)
    assert scope["beta"].grad is not None and scope["head"].layers[-1].weight.grad is not None
    assert scope["kl"].shape == (4,)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_names_only_what_exists(block: str) -> None:
    import fastpo

    for names in re.findall(r"from fastpo import (.*)", block):
        assert all(hasattr(fastpo, name.strip()) for name in names.split(","))
