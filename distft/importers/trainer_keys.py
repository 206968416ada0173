"""transformers' training arguments, as LLaMA-Factory and TRL take them: what becomes of each."""

from __future__ import annotations

from distft.importers.keys import carried, group, left, refused, table

_STEPS = "in steps; by epoch, or as a share of all steps, it is left out"
_HUB = "nothing is sent to a hub: upload final/ when it is done"
_LOGGING = "metrics.jsonl, TensorBoard files and [log] wandb are what is written"
_LOADER = "rows are prepared once and read by [data] num_workers processes; results are the same"
_PROCESSES = "the launcher and [engine] decide"
_EVALUATION = "held-out loss is measured in the micro-batches of training"

TRAINER_KEYS = {
    **table(
        output_dir=carried("output_dir/name"),
        per_device_train_batch_size=carried(text="times accumulation and GPUs it is [train] global_batch_size"),
        gradient_accumulation_steps=carried("[train] global_batch_size", "follows from it and the number of GPUs"),
        num_train_epochs=carried(),
        max_steps=carried("[train] max_steps"),
        learning_rate=carried("[optim] learning_rate"),
        lr_scheduler_type=carried(text="cosine_with_restarts of one cycle is cosine; other curves are refused"),
        lr_scheduler_kwargs=carried("[schedule] min_ratio, decay_ratio"),
        warmup_steps=carried("[schedule] warmup_steps", "below 1 it is a share of all steps"),
        warmup_ratio=carried("[schedule] warmup_ratio"),
        optim=carried("[optim] name", "optimizers that are not here are refused"),
        optim_args=refused("settings of an optimizer that no recipe has: remove it, or set what is meant in [optim]"),
        optim_target_modules=refused("trains some modules by a projection of their gradients, which is not here"),
        weight_decay=carried("[optim] weight_decay"),
        adam_beta1=carried("[optim] betas"),
        adam_beta2=carried("[optim] betas"),
        adam_epsilon=carried("[optim] eps"),
        max_grad_norm=carried("[train] max_grad_norm"),
        label_smoothing_factor=refused("smoothed labels are another loss, which is not here: remove it"),
        neftune_noise_alpha=refused(
            "NEFTune adds noise to embeddings, which nothing here does: remove it to train without"
        ),
        bf16=carried("[model] dtype", "weights are kept in bfloat16 beside an fp32 master copy"),
        fp16=carried("[model] dtype", "becomes bfloat16"),
        gradient_checkpointing=carried(),
        activation_checkpointing=carried("[train] activation_checkpointing"),
        torch_compile=carried(),
        save_strategy=carried("[checkpoint] every_steps", _STEPS),
        save_steps=carried(text=_STEPS),
        save_total_limit=carried(text="at least 2"),
        eval_strategy=carried("[eval] every_steps", _STEPS),
        evaluation_strategy=carried("[eval] every_steps", _STEPS),
        eval_steps=carried(text=_STEPS),
        eval_on_start=carried("[eval] at_start", "always, unless at_start = false"),
        load_best_model_at_end=carried(),
        metric_for_best_model=carried("[eval] best_by", "eval_loss alone"),
        logging_steps=carried(),
        report_to=carried("[log] wandb", "wandb alone"),
        seed=carried("seed"),
        deepspeed=carried(text="stage and offload of the JSON file it names; other keys of that file are listed"),
        fsdp=carried(text="FSDP2"),
        fsdp_config=carried("[engine]", "sharding strategy and offload; wrapping is by block"),
        full_determinism=carried("[train] deterministic"),
        dataloader_drop_last=left(
            "a step is always a whole global batch here; rows left at the end begin the next epoch"
        ),
        data_seed=left("seed draws the order of rows too"),
        train_sampling_strategy=carried("[data] shuffle", "sequential; by length is left out"),
        group_by_length=left("rows are packed or padded little by little; their order comes from the seed alone"),
        use_liger_kernel=left("Liger's kernels are used where they are installed", off=(None, False)),
        average_tokens_across_devices=left("losses are always divided by the tokens of all GPUs", off=(None, True)),
        resume_from_checkpoint=left(
            "distft train --resume auto is the default; checkpoints of other tools are not read"
        ),
        remove_unused_columns=left("columns that a format does not read are ignored", off=(None, True, False)),
        tf32=left("torch's default precision of fp32 products is used"),
        use_cpu=left("a run without GPUs is on CPUs by itself"),
        auto_find_batch_size=left('[train] micro_batch_size = "auto" takes what fits, before the start'),
        include_num_input_tokens_seen=left("tokens are in metrics.jsonl always"),
        parallelism_config=left("data-parallel sharding alone is here: no tensor, context or pipeline parallelism"),
        run_name=left("name is the run's name"),
        gradient_checkpointing_kwargs=left("recomputation is torch's non-reentrant one; the same numbers"),
    ),
    **group(
        "do_train overwrite_output_dir",
        left("distft train trains, and asks before it overwrites", off=(None, True, False)),
    ),
    **group("do_eval", left("[eval] decides", off=(None, True, False))),
    **group("do_predict predict_with_generate", left("answers are asked for by [[eval.answers]]")),
    **group(
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
        "hub_revision push_to_hub_token",
        left(_HUB, off=(None, False, "every_save")),
    ),
    **group(
        "logging_dir logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter log_level "
        "log_level_replica disable_tqdm project trackio_space_id trackio_bucket_id trackio_static_space_id",
        left(_LOGGING, off=(None, False, "steps", "passive", "warning")),
    ),
    **group(
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order length_column_name label_names accelerator_config",
        left(_LOADER, off=(None, True, False, 0)),
    ),
    **group(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
        "local_rank no_cuda",
        left(_PROCESSES, off=(None, False, -1, 1800)),
    ),
    **group(
        "per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps eval_delay include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval "
        "greater_is_better",
        left(_EVALUATION, off=(None, True, False, 0)),
    ),
    **group(
        "save_only_model save_on_each_node enable_jit_checkpoint ignore_data_skip save_safetensors "
        "restore_callback_states_from_checkpoint",
        left("checkpoints are complete and resume exactly, always", off=(None, True, False)),
    ),
    **group(
        "torch_compile_backend torch_compile_mode liger_kernel_config use_cache torch_empty_cache_steps debug "
        "skip_memory_metrics activation_checkpointing_kwargs",
        left("changes no result, and is decided here by itself", off=(None, False, True, "")),
    ),
}
