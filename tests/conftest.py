import gc
import os
from collections.abc import Iterator

import pytest
import torch

# Before triton is imported: without a GPU the Triton kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The suite runs one process a core.
torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    """Where fused kernels run: a GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def quick_collection() -> Iterator[None]:
    """Every train() collects garbage; what the imports left is not worth 0.3 s of looking through each time."""
    gc.freeze()
    yield
    gc.unfreeze()
