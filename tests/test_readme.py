import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def test_the_loss_import_runs_as_printed() -> None:
    scope: dict = {}
    exec(BLOCKS[0], scope)
    assert scope["hidden"].grad is not None and scope["beta"].grad is not None


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_names_only_what_exists(block: str) -> None:
    import fastpo

    for names in re.findall(r"from fastpo import (.*)", block):
        assert all(hasattr(fastpo, name.strip()) for name in names.split(","))
