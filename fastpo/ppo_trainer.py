"""`PPOTrainer`: on-policy training with a KL coefficient of each prompt's own.

A loop of its own over `transformers.Trainer`, and not a subclass of TRL's GRPOTrainer or RLOOTrainer. TRL 1.16 has no
PPO trainer; those two read one number ``beta`` inside private methods: GRPO adds it times a per-token KL to its loss
(`_compute_loss`), RLOO subtracts it times the KL of the whole completion from the reward
(`_generate_and_score_completions`). A coefficient per prompt, the Beta head on the reference's features, Gaussian
rewards, values per token and exact resumption would mean to replace both methods, which is most of either class; and
TRL is an optional extra here. (Its log-probs are fused too: that is no reason.)
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from fastpo.adapters import check_adapter
from fastpo.architecture import add_heads, add_value_head, check_optimizer, heads_of, with_new_adapter, without_heads
from fastpo.backbone import StatsOutput, Wanted, causal_lm, install_stats_forward, model_stats
from fastpo.generation import check_positions
from fastpo.lm_head import head_shape
from fastpo.loading import copied_reference, disable_dropout, load_models, prepare_reference
from fastpo.losses import spread
from fastpo.policy_gradient import gae, group_advantages, token_kl, token_rewards, whitened
from fastpo.ppo_arguments import PPOTrainingArguments
from fastpo.reference_model import Reference
from fastpo.reward_functions import load_reward_function
from fastpo.rewards import RewardSource, RewardSum
from fastpo.rollouts import BETA_SCALE, PromptSampler, batch_of, draw, rollout_seed, tokenized_prompts
from fastpo.stage_trainer import StageTrainer, check_vocabulary, use_one_gpu
from fastpo.stages import ppo_stage
from fastpo.types import LossOutput, StepTotals


class PPOTrainer(StageTrainer):
    """Train a causal LM on rewards of the completions that it draws itself.

    Args:
        model: a causal LM, possibly with PEFT adapters, or the name or path of one.
        ref_model: the reference model. None: the model with its adapter disabled where it has one, else a copy of
            the model as it is now.
        args: `PPOTrainingArguments`.
        reward_funcs: as the sources of `fastpo.rewards.RewardSum`, one or several; None: what args names.
        train_dataset: prompts, a `datasets.Dataset` in any form of `fastpo.data` or with a column prompt; a column
            beta_scale multiplies beta, and all columns are handed to reward functions.
        eval_dataset: the same, or a dictionary of several.
        processing_class: the tokenizer; default: the one saved beside the model.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: wraps the model in a new adapter.

    Raises:
        ValueError: model, data, rewards and arguments do not fit together; before any training.
    """

    args: PPOTrainingArguments

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: PPOTrainingArguments | None = None,
        reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = PPOTrainingArguments() if args is None else args
        if not isinstance(args, PPOTrainingArguments):
            raise TypeError(f"args must be PPOTrainingArguments, got {type(args).__name__}")
        if is_deepspeed_zero3_enabled():
            raise ValueError("deepspeed must not be ZeRO-3 in stage ppo: generate does not work on a model in parts")
        use_one_gpu(args)
        self.rewards = _reward_sum(reward_funcs, args)
        source = model if isinstance(model, str) else getattr(causal_lm(model).config, "_name_or_path", None)
        model, ref_model, processing_class = load_models(model, ref_model, processing_class, full=peft_config is None)
        model = with_new_adapter(model, peft_config, args.gradient_checkpointing)
        has_adapter = hasattr(model, "disable_adapter")
        if args.disable_dropout:
            # The adapter's too: completions are drawn without, and ratios to that policy would be noise.
            disable_dropout(model)
        self.objective = add_heads(model, ref_model, args.preference_config, source)
        if args.kl_target is None and "beta_head" in heads_of(model):
            heads_of(model)["beta_head"].requires_grad_(False)
        if args.advantage == "gae":
            add_value_head(model, source)
        check_optimizer(optimizers[0], model)
        self.vocab_size, _ = head_shape(causal_lm(model))
        check_vocabulary(processing_class, causal_lm(model).config.get_text_config().vocab_size)
        with args.main_process_first(desc="tokenizing"):
            train_dataset = tokenized_prompts(train_dataset, "train_dataset", args, processing_class)
            eval_dataset = (
                {name: tokenized_prompts(part, name, args, processing_class) for name, part in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else tokenized_prompts(eval_dataset, "eval_dataset", args, processing_class)
            )
        parts = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        longest = max((len(ids) for rows in parts if rows is not None for ids in rows["prompt_ids"]), default=1)
        check_positions(causal_lm(model).config, longest, args.sampling)
        if ref_model is None and not has_adapter:
            with without_heads(model):
                ref_model = copied_reference(model)
        check_adapter(model, is_reference=ref_model is None, always=True)
        self.reference = Reference(self.objective, args.stage)
        self._rollouts: list[dict[str, Any]] | None = None
        self._evaluated = 0
        super().__init__(
            model=model, args=args, data_collator=list, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class, callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        if self.is_fsdp_enabled:
            raise ValueError("FSDP must be off in stage ppo: generate does not work on a model in parts")
        # The loss is divided by the whole step's tokens here, so the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        # After the Trainer, which may replace the forward itself (use_liger_kernel), and before it wraps the model.
        install_stats_forward(self.model)
        if ref_model is not None:
            install_stats_forward(ref_model)
            self.reference.model = prepare_reference(ref_model.requires_grad_(False), self.accelerator)

    @property
    def ref_model(self) -> Any:
        """The second model, where the reference is one."""
        return self.reference.model

    # --- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given to train, got None")
        prompts = self.args.per_device_train_batch_size // self.args.num_generations
        return self._get_dataloader(
            self.train_dataset, "Training", prompts, lambda rows: self._prompt_sampler(len(rows), prompts), True
        )

    def _prompt_sampler(self, rows: int, per_batch: int) -> PromptSampler:
        args = self.args
        return PromptSampler(
            rows, per_batch * args.gradient_accumulation_steps * args.world_size, args.num_iterations,
            args.seed if args.data_seed is None else args.data_seed, args.train_sampling_strategy == "random",
            lambda: self.state.global_step,
        )  # fmt: skip

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if isinstance(eval_dataset, Dataset):
            eval_dataset = tokenized_prompts(eval_dataset, "eval_dataset", self.args, self.processing_class)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> Any:
        return super().get_test_dataloader(
            tokenized_prompts(test_dataset, "test_dataset", self.args, self.processing_class)
        )

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], StepTotals | None]:
        """The step's rollouts, drawn now or in an earlier step, and what the step averages over."""
        batches, step = list(itertools.islice(epoch_iterator, num_batches)), self.state.global_step
        if not batches:
            return [], None
        if self._rollouts is None or step % self.args.num_iterations == 0:
            self._rollouts = [
                self._with_advantages(self.roll_out(rows, self.args.num_generations, self._seed(step, number)))
                for number, rows in enumerate(batches)
            ]
            if self.args.advantage == "gae":
                _whiten(self._rollouts)
        return list(self._rollouts), self._totals(self._rollouts)

    def _seed(self, step: int | str, number: int) -> int:
        """Of a micro-batch: the same one whichever process has it."""
        return rollout_seed(self.args.seed, step, number * self.args.world_size + self.args.process_index)

    @torch.no_grad()
    def roll_out(self, rows: Sequence[dict[str, Any]], generations: int, seed: int) -> dict[str, Any]:
        """R completions of prompts with what is known of them before a step; tensors on the device.

        Returns:
            input_ids, attention_mask, completion_mask (R, T), index (R,); loss_mask (R, T), 1 on the tokens that train;
            old_logps, ref_logps, kl (R, T), in nats, and with a value head token_values (R, T); rewards, beta (R,),
            base_beta (R,) before s(x), and with a Beta head log_s (R,); prompt: features for a Beta head that trains;
            metrics: name -> ().
        """
        args, training = self.args, self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                drawn = draw(self.model, rows, self.processing_class, args.sampling, generations=generations, seed=seed)
                batch: dict[str, Any] = batch_of(drawn, args.device)
                policy, ref_logps, prompt = self._known(batch)
        finally:
            self.model.train(training)
        scored = self.rewards(
            [row["prompt"] for row in drawn.rows], drawn.texts, [tokens.ids for tokens in drawn.completions],
            drawn.columns(), [row["index"] for row in drawn.rows],
        )  # fmt: skip
        mask = batch["completion_mask"]
        finished = torch.tensor([tokens.finished for tokens in drawn.completions], device=args.device)
        rewards = scored.rewards.to(args.device)
        base_beta = torch.full_like(rewards, self.base_beta())
        if BETA_SCALE in drawn.rows[0]:
            base_beta *= torch.tensor([row[BETA_SCALE] for row in drawn.rows]).to(base_beta)
        kl = token_kl(policy["token_logps"], ref_logps, mask, args.kl_estimator)
        batch |= {
            "loss_mask": mask * finished[:, None] if args.mask_truncated_completions else mask,
            "old_logps": policy["token_logps"], "ref_logps": ref_logps, "kl": kl, "rewards": rewards,
            "base_beta": base_beta, "beta": base_beta if policy.log_s is None else base_beta * policy.log_s.exp(),
            "prompt": prompt if args.kl_target is not None else {},
            **{name: policy[name] for name in ("log_s", "token_values") if name in policy},
        }  # fmt: skip
        batch["metrics"] = _metrics(batch, policy, finished, generations)
        of_rewards = {f"rewards/{name}/mean": part.nanmean() for name, part in scored.parts.items()}
        if scored.sigma is not None:
            of_rewards["sigma/mean"] = scored.sigma.mean()
        batch["metrics"] |= {name: mean.to(args.device) for name, mean in of_rewards.items()}
        return batch

    def _known(self, batch: dict[str, Tensor]) -> tuple[StatsOutput, Tensor, dict[str, Tensor]]:
        """The policy's statistics of a batch, log-probs of its tokens under the reference, features of the prompts."""
        args, dynamic = self.args, self.objective.beta_mode == "dynamic_scaling"
        asked = Wanted(
            tokens=True, temperature=args.temperature, prompt_rows=len(batch["index"]),
            prompt=self.objective.beta_head.features if dynamic else (),
        )  # fmt: skip
        own = dataclasses.replace(asked, values=args.advantage == "gae", log_s=dynamic)
        if self.ref_model is None:
            policy = model_stats(self.model, batch, dataclasses.replace(own, reference=True))
            return policy, policy["ref_token_logps"], policy.prompt_features()
        self.ref_model.eval()
        reference = model_stats(self.ref_model, batch, asked)
        prompt = reference.prompt_features()
        policy = model_stats(self.model, batch, dataclasses.replace(own, prompt=()), prompt or None)
        return policy, reference["token_logps"], prompt

    def _with_advantages(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A rollout with advantages (R, T), and with a value head returns (R, T)."""
        args, mask = self.args, batch["completion_mask"]
        rewards = token_rewards(batch["rewards"], batch["kl"], batch["beta"], mask)
        if args.advantage == "gae":
            advantages, returns = gae(rewards, batch["token_values"], mask, args.gamma, args.lam)
            return batch | {"advantages": advantages, "returns": returns}
        return batch | {"advantages": group_advantages(rewards, mask, args.num_generations, args.advantage)}

    def _totals(self, rollouts: list[dict[str, Any]]) -> StepTotals:
        """What the whole optimiser step averages over; see `StepTotals`."""
        rows = sum(len(batch["index"]) for batch in rollouts)
        tokens = sum(batch["loss_mask"].sum() for batch in rollouts)
        return self.step_totals(rows, tokens, self.args.device)

    # --- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Any:
        """The loss of a rollout."""
        return self.watched_loss(model, self.loss_output(model, inputs, num_items_in_batch), inputs["index"])

    def loss_output(self, model: nn.Module, inputs: dict[str, Any], totals: StepTotals | None = None) -> LossOutput:
        """The stage's `LossOutput` for a rollout on the model's device."""
        args, head = self.args, self.objective.beta_head
        wanted = Wanted(
            tokens=True, values="token_values" in inputs, temperature=args.temperature, log_s=args.kl_target is not None
        )
        policy = model_stats(model, inputs, wanted, inputs["prompt"] or None)
        found = ppo_stage(
            policy["token_logps"], inputs["old_logps"], inputs["advantages"], inputs["loss_mask"], epsilon=args.epsilon,
            epsilon_high=args.epsilon_high, kl=inputs["kl"], values=policy.token_values,
            old_values=inputs.get("token_values"), returns=inputs.get("returns"), vf_coef=args.vf_coef,
            vf_epsilon=args.cliprange_value,
            beta=inputs["base_beta"], log_s=inputs.get("log_s") if policy.log_s is None else policy.log_s,
            s_max=head.s_max, kl_target=args.kl_target, totals=totals,
        )  # fmt: skip
        return found._replace(metrics=found.metrics | inputs["metrics"])

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = 0
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Of one completion of each prompt, the same ones at every evaluation of the same policy: minus the mean of
        reward - beta KL, which training raises."""
        batch = self.roll_out(inputs, 1, self._seed("evaluation", self._evaluated))
        self._evaluated += 1
        self._meters["eval"].add(batch["metrics"], len(inputs))
        return (batch["beta"] * batch["kl"].sum(dim=1) - batch["rewards"]).mean(), None, None

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.state.global_step % self.args.num_iterations:  # the next step reads the same rollouts
            torch.save(self._rollouts, self._rollouts_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = self._rollouts_file(resume_from_checkpoint)
        if file.exists():
            self._rollouts = torch.load(file, map_location=self.args.device)

    def _rollouts_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"rollouts_{self.args.process_index}.pt"


def _reward_sum(given: RewardSource | Sequence[RewardSource] | None, args: PPOTrainingArguments) -> RewardSum:
    """The sum of the rewards that are given, or of those that the arguments name."""
    if given is None:
        models: list[RewardSource] = [] if args.reward_model is None else [args.reward_model]
        given = [*models, *map(load_reward_function, args.reward_funcs or [])]
    elif args.reward_model is not None or args.reward_funcs:
        raise ValueError(
            "reward_funcs must be None where args names the rewards, or reward_model and reward_funcs of args unset: "
            f"got both, args with {args.reward_model!r} and {args.reward_funcs!r}"
        )
    sources: Any = given if isinstance(given, list | tuple) else [given]
    return RewardSum(
        sources, args.reward_weights, risk_aversion=args.risk_aversion, max_length=args.max_length, device=args.device
    )


def _whiten(rollouts: list[dict[str, Any]]) -> None:
    """Shift and scale the advantages of a step to mean 0 and deviation 1 over its tokens."""
    masks = [batch["completion_mask"].bool() for batch in rollouts]
    tokens = torch.cat([batch["advantages"][mask] for batch, mask in zip(rollouts, masks, strict=True)])[None]
    parts = whitened(tokens, torch.ones_like(tokens))[0].split([int(mask.sum()) for mask in masks])
    for batch, mask, part in zip(rollouts, masks, parts, strict=True):
        batch["advantages"] = batch["advantages"].masked_scatter(mask, part)


def _metrics(batch: dict[str, Any], policy: StatsOutput, finished: Tensor, generations: int) -> dict[str, Tensor]:
    """What is logged of a rollout, by TRL's names."""
    mask, rewards = batch["completion_mask"], batch["rewards"]
    lengths = mask.sum(dim=1).float()
    grouped = rewards.view(-1, generations)
    return {
        "reward": rewards.mean(),
        "reward_std": rewards.std(correction=0),
        "frac_reward_zero_std": (grouped.amax(dim=1) == grouped.amin(dim=1)).float().mean(),
        "kl": batch["kl"].sum() / lengths.sum(),
        "kl/completion": batch["kl"].sum(dim=1).mean(),
        "entropy": policy["token_entropy"].sum() / lengths.sum(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - finished.float().mean(),
        **spread("beta", batch["beta"]),
    }
