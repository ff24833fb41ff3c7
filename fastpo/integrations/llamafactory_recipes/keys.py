"""Every key of a LLaMA-Factory 0.9.5 recipe, its default there, and what becomes of it here.

`KEYS` is the one table. A key is

- `same`: it means here what it means there;
- `renamed`: the same under another name;
- `by`: a function says which settings of ours it stands for, or why it stands for none;
- `harmless`: it changes nothing of what is trained;
- `refused`: it asks for what is not done here, unless it has the value that means "off".

To support a further key, change its line. What transformers' TrainingArguments define is passed on and has a line here
only where it means more than that.
"""

from typing import Any, NamedTuple

from fastpo.integrations.llamafactory_recipes import meanings
from fastpo.integrations.llamafactory_recipes.meanings import Meaning, Settings


class Key(NamedTuple):
    """A line of `KEYS`.

    Attributes:
        kind: same, renamed, by, harmless or refused.
        default: LLaMA-Factory's.
        ours: the name here of a renamed key; for the others, in words, what becomes of it.
        why: what is different here, or the reason.
        translate: (value, all values) -> settings of ours, or why there are none.
    """

    kind: str
    default: Any = None
    ours: str = ""
    why: str = ""
    translate: Meaning | None = None


def same(default: Any = None, why: str = "") -> Key:
    return Key("same", default, why=why)


def renamed(ours: str, default: Any = None, why: str = "") -> Key:
    return Key("renamed", default, ours, why)


def by(translate: Meaning, default: Any = None, ours: str = "", why: str = "") -> Key:
    return Key("by", default, ours, why, translate)


def harmless(why: str) -> Key:
    return Key("harmless", why=why)


def refused(off: Any, why: str) -> Key:
    return Key("refused", off, why=why)


_INFERENCE = "of inference, not of training"
_EXPORT = "of exporting models, not of training"
_PICTURES = "of pictures, video and sound; fastpo trains on text"
_SPEED = "of speed alone"
_OTHER_STAGE = "read in another stage alone"
_NOT_ON = "of a method that is refused where it is switched on"
_ADAPTER = "PEFT's own"

MODEL: dict[str, Key] = {
    "model_name_or_path": same(),
    "adapter_name_or_path": by(meanings.adapters, ours="merge_adapters", why="merged, with create_new_adapter: true"),
    "create_new_adapter": harmless("says what is done with adapter_name_or_path"),
    "adapter_folder": refused(None, "put the folder into adapter_name_or_path"),
    "cache_dir": refused(None, "set HF_HOME instead"),
    "use_fast_tokenizer": harmless("tokenizers are the fast ones"),
    "resize_vocab": refused(False, "the model must have its tokens already"),
    "split_special_tokens": refused(False, "special tokens in data are read as such"),
    "add_tokens": refused(None, "the tokenizer must have its tokens already"),
    "add_special_tokens": refused(None, "the tokenizer must have its tokens already"),
    "new_special_tokens_config": refused(None, "the tokenizer must have its tokens already"),
    "init_special_tokens": harmless("of added tokens, which are refused"),
    "model_revision": refused("main", "download the revision and name its folder"),
    "low_cpu_mem_usage": harmless("transformers always loads so"),
    "rope_scaling": refused(None, "set it in the model's config.json"),
    "flash_attn": by(meanings.flash_attn, "auto", ours="attn_implementation"),
    "shift_attn": refused(False, "fastpo has no shifted attention"),
    "mixture_of_depths": refused(None, "fastpo has no mixture of depths"),
    "use_unsloth": refused(False, "fastpo's own kernels do that work"),
    "use_unsloth_gc": harmless("ordinary checkpointing has the same gradients"),
    "enable_liger_kernel": renamed("use_liger_kernel", False),
    "moe_aux_loss_coef": refused(None, "the loss has no router term"),
    "disable_gradient_checkpointing": by(
        meanings.no_checkpointing, False, ours="gradient_checkpointing, on where this is off"
    ),
    "use_reentrant_gc": harmless("checkpointing is not reentrant here; the gradients are the same"),
    "upcast_layernorm": harmless("norms compute in fp32 anyway"),
    "upcast_lmhead_output": harmless("log-probs are computed in fp32 anyway, without logits"),
    "train_from_scratch": refused(False, "model_config builds a new model"),
    "infer_backend": harmless(_INFERENCE),
    "offload_folder": harmless(_INFERENCE),
    "use_kv_cache": harmless(_INFERENCE),
    "use_v1_kernels": harmless(_SPEED),
    "infer_dtype": harmless(_INFERENCE),
    "hf_hub_token": refused(None, "set HF_TOKEN instead"),
    "ms_hub_token": refused(None, "models come from the Hugging Face hub or a folder"),
    "om_hub_token": refused(None, "models come from the Hugging Face hub or a folder"),
    "print_param_status": harmless("prints"),
    "trust_remote_code": same(False),
    "quantization_method": refused("bnb", "weights are quantised by bitsandbytes"),
    "quantization_bit": by(meanings.quantization_bit, ours="load_in_4bit", why="4 alone"),
    "quantization_type": refused("nf4", "4-bit weights are NF4"),
    "double_quantization": refused(True, "4-bit weights are quantised twice"),
    "quantization_device_map": harmless(_INFERENCE),
    **dict.fromkeys(
        ("image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches", "video_max_pixels",
         "video_min_pixels", "video_fps", "video_maxlen", "use_audio_in_video", "audio_sampling_rate"),
        harmless(_PICTURES),
    ),
    **dict.fromkeys(
        ("export_dir", "export_size", "export_device", "export_quantization_bit", "export_quantization_dataset",
         "export_quantization_nsamples", "export_quantization_maxlen", "export_legacy_format", "export_hub_model_id"),
        harmless(_EXPORT),
    ),
    **dict.fromkeys(
        ("vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager", "vllm_max_lora_rank", "vllm_config", "sglang_maxlen",
         "sglang_mem_fraction", "sglang_tp_size", "sglang_config", "sglang_lora_backend"),
        harmless(_INFERENCE),
    ),
    "use_kt": refused(False, "fastpo does not run on KTransformers"),
    **dict.fromkeys(
        ("kt_weight_path", "kt_expert_checkpoint_path", "kt_use_lora_experts", "kt_lora_expert_num",
         "kt_lora_expert_intermediate_size"),
        harmless(_NOT_ON),
    ),
}  # fmt: skip

DATA: dict[str, Key] = {
    "template": by(meanings.template, ours="chat_template", why="in place of the tokenizer's own, as there"),
    "dataset": same(why="names of dataset_info.json, separated by commas"),
    "eval_dataset": same(why="names of dataset_info.json, separated by commas"),
    "dataset_dir": by(meanings.dataset_dir, "data", ours="dataset_info"),
    "media_dir": harmless(_PICTURES),
    "cutoff_len": renamed("max_length", 2048, "of a prompt that is too long the end is kept, there the beginning"),
    "train_on_prompt": refused(False, "prompts are not trained on"),
    "mask_history": by(meanings.mask_history, False, ours="last_answer_only"),
    "streaming": refused(False, "datasets are read as a whole"),
    "buffer_size": harmless("of streaming, which is refused"),
    "mix_strategy": refused("concat", "datasets are put one after the other"),
    "interleave_probs": refused(None, "datasets are put one after the other"),
    "overwrite_cache": harmless("nothing tokenised is cached"),
    "preprocessing_batch_size": harmless(_SPEED),
    "preprocessing_num_workers": harmless("of speed alone; dataset_num_proc is the key here"),
    "max_samples": same(why="of each dataset"),
    "eval_num_beams": harmless("nothing is generated"),
    "ignore_pad_token_for_loss": refused(True, "padding is never trained on"),
    "val_size": by(meanings.val_size, 0.0, ours="eval_fraction, or eval_rows for a number above 1"),
    "eval_on_each_dataset": refused(False, "held-out rows are evaluated together"),
    "packing": refused(None, "padding_free: true lays a batch's rows end to end, each seeing itself alone"),
    "neat_packing": refused(False, "padding_free: true lays a batch's rows end to end, each seeing itself alone"),
    "tool_format": refused(None, "tools are not trained on"),
    "default_system": by(meanings.with_template("default_system"), ours="default_system"),
    "enable_thinking": by(meanings.with_template("enable_thinking"), True, ours="enable_thinking"),
    "preserve_thinking": refused(False, "earlier answers lose their thoughts"),
    "tokenized_path": refused(None, "rows are tokenised in every run"),
    "data_shared_file_system": harmless("of several machines that read the data"),
}

FINETUNING: dict[str, Key] = {
    "stage": by(meanings.stage, "sft", ours="stage", why="dropout stays on in sft and rm, as there"),
    "finetuning_type": by(meanings.finetuning_type, "lora", ours="use_peft, or freeze_trainable_layers"),
    "pure_bf16": by(meanings.dtype("bfloat16", None), False, ours="dtype: bfloat16"),
    "freeze_trainable_layers": by(meanings.with_freeze("freeze_trainable_layers"), 2, ours="freeze_trainable_layers"),
    "freeze_trainable_modules": by(
        meanings.with_freeze("freeze_trainable_modules"), "all", ours="freeze_trainable_modules"
    ),
    "freeze_extra_modules": by(
        meanings.with_freeze("freeze_extra_modules"), ours="freeze_extra_modules",
        why="by its whole name; there norm would also mean the norms of every layer",
    ),
    "additional_target": by(meanings.with_lora("lora_modules_to_save"), ours="lora_modules_to_save"),
    "lora_alpha": by(meanings.with_lora("lora_alpha"), ours="lora_alpha"),
    "lora_dropout": by(meanings.lora_dropout, 0.0, ours="lora_dropout", why="0 in stage dpo, as there"),
    "lora_rank": by(meanings.lora_rank, 8, ours="lora_r, and lora_alpha of twice that where it is left out"),
    "lora_target": by(meanings.lora_target, "all", ours="lora_target_modules"),
    "loraplus_lr_ratio": refused(None, "both factors of an adapter learn at one rate"),
    "loraplus_lr_embedding": harmless(_NOT_ON),
    "use_rslora": by(meanings.with_lora("use_rslora"), False, ours="use_rslora", why=_ADAPTER),
    "use_dora": by(meanings.with_lora("use_dora"), False, ours="use_dora", why=_ADAPTER),
    "pissa_init": refused(False, "it moves a part of the weights into the adapter, which then needs its own base"),
    "pissa_iter": harmless(_NOT_ON),
    "pissa_convert": harmless(_NOT_ON),
    **dict.fromkeys(("module_dropout", "oft_rank", "oft_block_size", "oft_target"), harmless(_NOT_ON)),
    "pref_beta": by(meanings.in_dpo("beta"), 0.1, ours="beta"),
    "pref_ftx": by(meanings.pref_ftx, 0.0, ours="sft_weight", why="per response, mean over its tokens, as there"),
    "pref_bco_weight": refused(0.0, "BCO's moving baseline is not had; pref_loss_type: bco_pair is BCO without it"),
    "pref_loss": by(
        meanings.pref_loss, "sigmoid", ours="pref_loss_type, length_normalization, reference_free",
        why="as named; with trl 0.24 LLaMA-Factory 0.9.5 computes sigmoid for hinge and ipo too",
    ),
    "dpo_label_smoothing": by(meanings.label_smoothing, 0.0, ours="label_smoothing"),
    "simpo_gamma": by(meanings.simpo_gamma, 0.5, ours="home_advantage"),
    "ld_alpha": by(
        meanings.in_dpo("ld_alpha"), ours="ld_alpha", why="of policy and reference; there of the policy alone"
    ),
    "ref_model": renamed("ref_model_name_or_path"),
    "ref_model_adapters": refused(None, "merge them into the reference model first"),
    "ref_model_quantization_bit": refused(None, "a reference model of its own is held as the model is"),
    **dict.fromkeys(("kto_chosen_weight", "kto_rejected_weight"), harmless(_OTHER_STAGE)),
    **dict.fromkeys(
        ("reward_model", "reward_model_adapters", "reward_model_quantization_bit", "reward_model_type",
         "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target", "ppo_whiten_rewards"),
        harmless(_OTHER_STAGE),
    ),
    "use_galore": refused(False, "optim: galore_adamw is transformers' own"),
    **dict.fromkeys(
        ("galore_target", "galore_rank", "galore_update_interval", "galore_scale", "galore_proj_type",
         "galore_layerwise"),
        harmless(_NOT_ON),
    ),
    "use_apollo": refused(False, "optim: apollo_adamw is transformers' own"),
    **dict.fromkeys(
        ("apollo_target", "apollo_rank", "apollo_update_interval", "apollo_scale", "apollo_proj", "apollo_proj_type",
         "apollo_scale_type", "apollo_layerwise", "apollo_scale_front"),
        harmless(_NOT_ON),
    ),
    "use_badam": refused(False, "fastpo does not have BAdam"),
    **dict.fromkeys(
        ("badam_mode", "badam_start_block", "badam_switch_mode", "badam_switch_interval", "badam_update_ratio",
         "badam_mask_mode", "badam_verbose"),
        harmless(_NOT_ON),
    ),
    "use_swanlab": refused(False, "report_to: swanlab is transformers' own"),
    **dict.fromkeys(
        ("swanlab_project", "swanlab_workspace", "swanlab_run_name", "swanlab_mode", "swanlab_api_key",
         "swanlab_logdir", "swanlab_lark_webhook_url", "swanlab_lark_secret"),
        harmless(_NOT_ON),
    ),
    "use_llama_pro": refused(False, "models are not expanded"),
    "use_adam_mini": refused(False, "fastpo does not have Adam-mini"),
    "use_mca": refused(False, "fastpo does not run on Megatron"),
    "use_hyper_parallel": refused(False, "fastpo does not run on HyperParallel"),
    "hyper_parallel_args": harmless(_NOT_ON),
    "use_muon": refused(False, "fastpo does not have Muon"),
    "use_dft_loss": refused(False, "stage sft has the likelihood alone"),
    "use_asft_loss": refused(False, "stage sft has the likelihood alone"),
    "asft_alpha": harmless(_NOT_ON),
    "use_eaft_loss": refused(False, "stage sft has the likelihood alone"),
    "eaft_alpha": harmless(_NOT_ON),
    **dict.fromkeys(("freeze_vision_tower", "freeze_multi_modal_projector"), harmless(_PICTURES)),
    "freeze_language_model": refused(False, "nothing would be left to train"),
    "compute_accuracy": harmless("the accuracy of tokens is not measured"),
    "disable_shuffling": by(meanings.disable_shuffling, False, ours="train_sampling_strategy: sequential"),
    "early_stopping_steps": refused(None, "training ends where max_steps or num_train_epochs say"),
    "plot_loss": harmless("curves are always drawn"),
    "include_effective_tokens_per_second": harmless("speed is logged in its own terms"),
}  # fmt: skip

TRAINING: dict[str, Key] = {
    "overwrite_output_dir": harmless(
        "an output_dir with checkpoints is not overwritten: say resume_from_checkpoint: true, or another output_dir"
    ),
    "ray_num_workers": harmless("of Ray; several GPUs are used by accelerate launch"),
    "ray_init_kwargs": harmless("of Ray; several GPUs are used by accelerate launch"),
    "master_addr": harmless("of Ray; several GPUs are used by accelerate launch"),
    "master_port": harmless("of Ray; several GPUs are used by accelerate launch"),
    "enable_torch_profiler": refused(False, "there is no profiler in training"),
    **dict.fromkeys(
        ("profiler_output_dir", "profiler_wait_steps", "profiler_warmup_steps", "profiler_active_steps",
         "profiler_repeat", "profiler_record_shapes", "profiler_profile_memory", "profiler_with_stack"),
        harmless(_NOT_ON),
    ),
    "profile_modules": refused(None, "there is no profiler in training"),
    "fp8": refused(False, "precision is fp32, bf16 or fp16"),
    "fp8_backend": harmless(_NOT_ON),
    "fp8_enable_fsdp_float8_all_gather": refused(False, "precision is fp32, bf16 or fp16"),
    # transformers' own: what means more in such a recipe, and what transformers no longer has.
    "bf16": by(meanings.dtype("bfloat16", "bf16"), False, ours="bf16, and dtype: bfloat16 with an adapter"),
    "fp16": by(meanings.dtype("float16", "fp16"), False, ours="fp16, and dtype: float16 with an adapter"),
    "warmup_ratio": renamed("warmup_steps", None, "which takes a fraction"),
    "evaluation_strategy": renamed("eval_strategy"),
    "do_train": same(why="false is for fastpo eval alone"),
    "do_predict": refused(False, "nothing is generated"),
    "predict_with_generate": refused(False, "nothing is generated"),
    "generation_max_length": harmless("nothing is generated"),
    "generation_num_beams": harmless("nothing is generated"),
    "generation_config": harmless("nothing is generated"),
    "sortish_sampler": refused(False, "rows are not grouped by length"),
    "group_by_length": refused(False, "rows are not grouped by length"),
    "logging_dir": harmless("set TENSORBOARD_LOGGING_DIR instead"),
    "save_safetensors": harmless("weights are always saved so"),
    "include_tokens_per_second": harmless("speed is logged in its own terms"),
}  # fmt: skip

GENERATING: dict[str, Key] = {
    **dict.fromkeys(
        ("do_sample", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "repetition_penalty",
         "length_penalty", "skip_special_tokens"),
        harmless("nothing is generated"),
    ),
    "max_length": refused(None, "there the length of generated text, here that of a row: say cutoff_len"),
}  # fmt: skip

KEYS: dict[str, Key] = {**MODEL, **DATA, **FINETUNING, **TRAINING, **GENERATING}
# LLaMA-Factory takes transformers' defaults where fastpo has its own, and drops rows that it cannot use.
OTHER_DEFAULTS: Settings = {"learning_rate": 5e-5, "logging_steps": 500, "skip_bad_rows": True}
