"""Run PyTorch code for what it allocates: floating-point tensors have shapes and no values, integers have both.

What a training step does depends on its integers (which tokens count, where a prompt ends, whether there is padding)
and hardly ever on its floats. So the code runs as it is, in seconds and with next to no memory, for a model of any
size, and every storage is noted when it comes and when it goes.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from fastpo.ops import HEAD_OPS

# Integers beyond so many elements (attention masks of long sequences) are not worth their own memory.
MAX_VALUES = 1 << 22
# Rows of the LM head that its code is run over: two and more of its tiles.
HEAD_ROWS = 1 << 14
# Of the head's op: its operands that have a row for each of the vocabulary, and what its backward answers.
HEAD_ROWS_OF = ("weight", "bias", "lora_b")
RESULTS = ("hidden", "weight", "bias", "projected", "lora_b")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
# Factories whose dtype, where none is given, is that of the numbers they are given.
_DTYPE_OF_ARGUMENTS = {_aten.arange, _aten.full, _aten.scalar_tensor}


class Timeline:
    """Storages in the order in which they come and go, each put down to a part, with marks in between."""

    def __init__(self) -> None:
        self._events: list[tuple[int, int]] = []  # (storage's number, bytes; negative when it goes)
        self._parts: list[str] = []  # of each storage
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # by the storage's address
        self._marks = [0]

    def mark(self) -> None:
        """A stretch ends here and another begins."""
        self._marks.append(len(self._events))

    def note(self, x: Tensor, part: str) -> None:
        """Take in a tensor's storage, unless it is known."""
        storage = x.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive or size == 0:
            return
        number = len(self._parts)
        self._parts.append(part)
        self._events.append((number, size))

        def gone(_: Any) -> None:
            del self._alive[address]
            self._events.append((number, -size))

        self._alive[address] = (number, weakref.ref(storage, gone))

    def put_down_to(self, part: str, tensors: Iterable[Tensor]) -> None:
        """The storages of these tensors belong to `part`, whoever made them."""
        for x in tensors:
            self.note(x, part)
            known = self._alive.get(x.untyped_storage()._cdata)
            if known is not None:
                self._parts[known[0]] = part

    def stretches(self) -> list[dict[str, int]]:
        """Bytes by part at the highest moment of each half of what lies between two marks.

        Memory rises through a forward pass and rises or falls through a backward one: a half has its highest moment
        near one and the same end whatever the number of layers, and so in proportion to it."""
        bounds = [*self._marks, len(self._events)]
        ends = [end for a, b in itertools.pairwise(bounds) for end in ((a + b) // 2, b)]
        found, parts = [], dict.fromkeys(self._parts, 0)
        total, start = 0, 0
        for end in ends:
            highest, best = total, dict(parts)
            for number, size in self._events[start:end]:
                total += size
                parts[self._parts[number]] += size
                if total > highest:
                    highest, best = total, dict(parts)
            found.append(best)
            start = end
        return found


class ShapeMode(TorchDispatchMode):
    """While it is active, tensors are made without data and `timeline` fills.

    Everything is on the CPU, whatever device is asked for. A number read off a tensor without values is 1, or True.

    Args:
        head_workspace: given a call of the LM head's op, its arguments by name, bytes that it holds while it runs
            beside what its PyTorch code does.
    """

    def __init__(self, head_workspace: Callable[[dict[str, Any]], int] | None = None) -> None:
        super().__init__()
        self.timeline = Timeline()
        self._part = "activations"
        self._head_workspace = head_workspace
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Storages made here are put down to `name`, and the timeline is marked at both ends."""
        before, self._part = self._part, name
        self.timeline.mark()
        try:
            yield
        finally:
            self.timeline.mark()
            self._part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return _CPU
        if func in HEAD_OPS:
            return self._head(func, args)
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = _CPU
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        has_shapes_only = any(isinstance(x, FakeTensor) for x in tensors)
        if has_shapes_only and func is _aten._local_scalar_dense.default:
            return torch.ones((), dtype=tensors[0].dtype).item()
        if has_shapes_only or _makes_floats(func, tensors, kwargs) or any(map(_is_large, tensors)):
            out = self._fake.dispatch(func, types, args, kwargs)
        else:
            out = tree_map_only(Tensor, self._forget, func(*args, **kwargs))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self.timeline.note(x, self._part)
        return out

    def _forget(self, x: Tensor) -> Tensor:
        return self._fake.from_tensor(x) if x.dtype.is_floating_point or _is_large(x) else x

    def _head(self, func: Any, args: Any) -> Any:
        """The head's own code, so that its tiles and sums are seen: as one op it would show its results alone.

        It runs over the first rows of the LM head; the others add no more tiles at a time, only rows of results.
        """
        names = [argument.name for argument in func._schema.arguments]
        call = dict(zip(names, args, strict=True))
        workspace = 0 if self._head_workspace is None else self._head_workspace(call)
        size = call["weight"].shape[0]
        # What skips or stashes keeps something of every row.
        if call["mode"] != "stash" and not call["skip_mass"]:
            call |= {name: call[name][:HEAD_ROWS] for name in HEAD_ROWS_OF if call[name] is not None}
        rest = size - call["weight"].shape[0]
        results = list(HEAD_ROWS_OF) if "grad_logps" in call else []
        results = [name for name in results if call[name] is not None and call[f"needs_{name}"]]
        with self.part("head"), self:
            room = [torch.empty(rest, *call[name].shape[1:], dtype=call[name].dtype) for name in results]
            buffer = torch.empty(-(-workspace // 4), dtype=torch.float32)
            out = list(HEAD_OPS[func](*call.values()))
            if "grad_logps" in call:
                self.timeline.put_down_to("gradients", [*room, *out[1:]])
            del room, buffer
            for name in results if rest else ():
                short, out[RESULTS.index(name)] = out[RESULTS.index(name)], None
                shape, dtype = (size, *short.shape[1:]), short.dtype
                del short
                out[RESULTS.index(name)] = torch.empty(shape, dtype=dtype)
                self.timeline.put_down_to("gradients", [out[RESULTS.index(name)]])
        return tuple(out)


def _makes_floats(func: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return dtype.is_floating_point
    return not tensors and func.overloadpacket not in _DTYPE_OF_ARGUMENTS


def _is_large(x: Tensor) -> bool:
    return x.numel() > MAX_VALUES
