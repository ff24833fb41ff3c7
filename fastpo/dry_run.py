"""Two steps of the training that a recipe describes, on tensors without data, for what they allocate."""

import contextlib
import copy
import dataclasses
import gc
import itertools
import logging
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from datasets import Dataset
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, PrinterCallback

from fastpo.arguments import PreferenceTrainingArguments
from fastpo.backbone import causal_lm
from fastpo.data import VECTOR_COLUMNS
from fastpo.from_recipe import build_peft_config, freeze, model_config, weights_dtype
from fastpo.recipe import RecipeArguments
from fastpo.reference_model import Reference
from fastpo.shape_mode import ShapeMode
from fastpo.trainer import PreferenceTrainer

STEPS, MICRO_BATCHES = 2, 2
PARTS = ("weights", "reference", "gradients", "optimizer", "activations", "head")
EIGHT_BIT_OPTIMIZERS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
# Of the fused head: columns of its narrowest 16-bit tile, and its slices of the (rows, vocabulary) plane.
TILE_COLS, SLICE_COLS, SLICE_STEP, SLICE_ELEMENTS = 64, 1 << 14, 256, 1 << 26
# bitsandbytes: smaller parameters keep fp32 states; each block of a state has an fp32 scale.
EIGHT_BIT_MIN_SIZE, EIGHT_BIT_BLOCK = 4096, 256


class Lengths(NamedTuple):
    """Tokens of a row: of its prompt and of its responses."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def longest(self) -> int:
        return self.prompt + max(self.chosen, self.rejected)


def lengths_at(max_length: int) -> Lengths:
    """A row that fills max_length, half of it prompt."""
    prompt = max_length // 2
    return Lengths(prompt, max_length - prompt, max_length - prompt)


def lengths_of(rows: Dataset) -> list[Lengths]:
    """Of tokenised rows; in stage sft there is no rejected response."""
    columns = [
        map(len, rows[name]) if name in rows.column_names else itertools.repeat(0, len(rows))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    ]
    return [Lengths(*row) for row in zip(*columns, strict=True)]


def longest_batches(rows: list[Lengths], size: int) -> list[list[Lengths]]:
    """Batches of `size` rows of which one needs the most memory: the longest rows, one of them with padding (with a
    mask, attention takes more than without), and the rows of the most tokens, where prompts are shared."""
    by_length = sorted(rows, key=lambda row: (row.longest, sum(row)), reverse=True)
    batch = by_length[:size]
    if size > 1 and len({row.prompt + side for row in batch for side in row[1:] if side}) == 1:
        batch[-1] = next((row for row in by_length[size:] if row.longest < batch[0].longest), batch[-1])
    most_tokens = sorted(rows, key=sum, reverse=True)[:size]
    return [batch] if sorted(most_tokens) == sorted(batch) else [batch, most_tokens]


def dry_run(
    recipe: RecipeArguments, args: PreferenceTrainingArguments, rows: list[Lengths], config: Any, on_gpu: bool
) -> list[dict[str, int]]:
    """Bytes by part at the highest moment of each stretch of a run in which every batch has these rows.

    The stretches are the same ones, in the same order, for every number of layers in `config`.

    Raises:
        ValueError, TypeError: as the trainer, or `optim` is one whose states are not known here.
    """
    mode = ShapeMode(_fused_workspace if on_gpu else None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        args = _dry_args(args, len(rows), stack.enter_context(tempfile.TemporaryDirectory()))
        data = _dataset(rows, STEPS * args.gradient_accumulation_steps, args, config)
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _cast_in_place))
        stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _copy, create=True))
        stack.enter_context(mode)
        trainer = _DryTrainer(
            mode=mode, model=_model(recipe, config), ref_model=_reference(recipe), args=args, train_dataset=data,
            processing_class=_Tokenizer(2), peft_config=build_peft_config(recipe, args.stage),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return mode.timeline.stretches()


def planned_config(recipe: RecipeArguments) -> Any:
    """The config of the recipe's model, of which neither weights nor tokenizer are read.

    Raises:
        ValueError: the recipe says load_in_4bit, or leaves the size of the vocabulary to a tokenizer of its own.
    """
    if recipe.load_in_4bit:
        raise ValueError("load_in_4bit must be false for a memory plan, which knows no 4-bit weights, got True")
    config = model_config(recipe, _Tokenizer(recipe.tokenizer_vocab_size or None))
    config._name_or_path = ""  # nothing is looked for beside it
    return config


class _DryTrainer(PreferenceTrainer):
    """Tells the mode what is what."""

    def __init__(self, mode: ShapeMode, **arguments: Any) -> None:
        self.mode = mode
        super().__init__(**arguments)
        timeline = mode.timeline
        models = {"weights": self.model, "reference": self.ref_model}
        for part, model in models.items():
            if model is not None:
                timeline.put_down_to(part, [*model.parameters(), *model.buffers()])
                # What goes forward and what goes backward stand in stretches of their own.
                backbone = causal_lm(model).base_model
                backbone.register_forward_pre_hook(lambda *_: timeline.mark())
                backbone.register_forward_hook(lambda *_: timeline.mark())
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: timeline.put_down_to("gradients", [p.grad]))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        step = contextlib.ExitStack()
        optimizer.register_step_pre_hook(lambda *_: step.enter_context(self.mode.part("optimizer")))
        optimizer.register_step_post_hook(lambda *_: step.close())
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        if args.optim in EIGHT_BIT_OPTIMIZERS:
            return _EightBitStates, {"lr": args.learning_rate}
        if not args.optim.startswith(("adamw_torch", "sgd", "adafactor")):
            raise ValueError(
                f"optim must be an adamw_torch one, sgd, adafactor or {', '.join(EIGHT_BIT_OPTIMIZERS)} to be "
                f"planned, got {args.optim!r}"
            )
        return PreferenceTrainer.get_optimizer_cls_and_kwargs(args, model)


class _EightBitStates(torch.optim.Optimizer):
    """Has the states of bitsandbytes' 8-bit AdamW, and does nothing with them."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or self.state[p]:
                    continue
                blocks = -(-p.numel() // EIGHT_BIT_BLOCK)
                for name in ("state1", "state2"):
                    small = p.numel() < EIGHT_BIT_MIN_SIZE
                    self.state[p][name] = torch.zeros_like(p, dtype=torch.float32 if small else torch.uint8)
                    if not small:
                        self.state[p]["absmax_" + name] = p.new_zeros(blocks, dtype=torch.float32)


class _Tokenizer:
    """What the trainer asks of a tokenizer when the data is tokenised."""

    pad_token_id, eos_token_id, bos_token_id = 0, 1, None

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def __len__(self) -> int:
        if self.size is None:
            raise ValueError("model_config must state its vocab_size for a memory plan, which reads no tokenizer")
        return self.size


def _model(recipe: RecipeArguments, config: Any) -> Any:
    eager = {"attn_implementation": "eager"} if recipe.attn_implementation == "eager" else {}
    dtype: Any = weights_dtype(recipe)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **eager)
    freeze(recipe, model)
    return model


def _reference(recipe: RecipeArguments) -> Any:
    if recipe.ref_model_name_or_path is None:
        return None
    other = dataclasses.replace(recipe, model_name_or_path=recipe.ref_model_name_or_path, model_config=None)
    return _model(recipe, planned_config(other))


def _dataset(rows: list[Lengths], batches: int, args: PreferenceTrainingArguments, config: Any) -> Dataset:
    """Tokenised rows, with what the reference would say of them if it is asked before training."""
    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for row in rows * batches:
        for name, length in zip(columns, row, strict=True):
            columns[name].append([2] * length)
    columns["index"] = list(range(len(rows) * batches))
    if args.stage == "sft":
        del columns["rejected_ids"]
    if args.precompute_ref_log_probs:
        vector = [0.0] * config.get_text_config().hidden_size
        lacking = Reference(args.preference_config, args.stage).lacking(columns)
        for name in lacking.columns():
            columns[name] = [vector if name in VECTOR_COLUMNS else 0.0] * len(columns["index"])
    return Dataset.from_dict(columns)


def _dry_args(args: PreferenceTrainingArguments, batch: int, folder: str) -> PreferenceTrainingArguments:
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    for name in ("fsdp", "deepspeed"):
        if values.get(name):
            raise ValueError(f"{name} must be unset for a memory plan, which is of one process, got {values[name]!r}")
    return type(args)(
        **values
        | {
            "output_dir": folder, "use_cpu": True, "max_steps": STEPS, "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": min(args.gradient_accumulation_steps, MICRO_BATCHES),
            # Of one size in memory, and only one of them is autocast on a CPU.
            "bf16": args.bf16 or args.fp16, "fp16": False, "tf32": None,
            "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
            "load_best_model_at_end": False, "push_to_hub": False, "resume_from_checkpoint": None,
            "disable_tqdm": True, "dataloader_num_workers": 0, "torch_compile": False, "use_liger_kernel": False,
        }
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines and warnings of a training that is none, and without collecting what is there already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    gc.freeze()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
        logging.disable(before)


def _cast_in_place(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` swaps tensors where they have no data, which fails for those that something remembers."""
    with torch.no_grad():
        for tensor in (*self.parameters(recurse), *self.buffers(recurse)):
            cast = fn(tensor)
            if cast.dtype != tensor.dtype:
                tensor.data = cast
    return self


def _copy(self: FakeTensor, memo: dict[int, Any]) -> Any:
    """`Tensor.__deepcopy__` copies what a tensor without data belongs to, and so cuts its views off from it."""
    if id(self) not in memo:
        copied = self.detach().clone()
        memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
    return memo[id(self)]


def _fused_workspace(call: dict[str, Any]) -> int:
    """Bytes of the Triton implementation's buffers in a call of the head's op, from above: the fp32 maximum, sum and
    moment of each row and tile of columns, and a slice of the plane where one is multiplied on."""
    rows, weight = int((call["labels"] >= 0).sum()), call["weight"]
    backward = "grad_logps" in call
    partials = 0 if backward else 12 * rows * (1 + (call["ref_hidden"] is not None)) * -(-weight.shape[0] // TILE_COLS)
    slices = call["mode"] != "frozen" if backward else call["mode"] == "frozen"
    width = min(weight.shape[0], SLICE_COLS, max(SLICE_STEP, SLICE_ELEMENTS // max(rows, 1)))
    return partials + slices * rows * width * weight.element_size()
