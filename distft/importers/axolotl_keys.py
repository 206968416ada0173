"""Axolotl's keys: what becomes of each."""

from __future__ import annotations

from distft.importers.keys import carried, group, left, refused, table

_STEPS = "in steps; by epoch, or as a share of all steps, it is left out"
_TRACKING = "metrics.jsonl, TensorBoard files and [log] wandb are what is written"
_KERNELS = "kernels are chosen here by what is installed; the same numbers but for rounding"
_LOADING = "weights are read once a node, straight into their shards"
_LOADER = "rows are prepared once, by [data] num_workers processes; the same rows"
_PROCESSES = "the launcher and [engine] decide"
_LISA = "trains other blocks every few steps, which nothing here does: remove it, or take unfrozen_parameters"
_LAYOUT = "changes the adapter in a way that is not imported: remove it, and look at the keys of [method]"
_TOKENS = "gives reserved tokens other texts: change the tokenizer in its folder, and name it as tokenizer_config"
_PARALLEL = "data-parallel sharding alone is here: no tensor, context or expert parallelism"

AXOLOTL_KEYS = {
    **table(
        base_model=carried(),
        model_revision=carried(),
        revision_of_model=carried("[model] revision"),
        tokenizer_config=carried("[model] tokenizer"),
        adapter=carried("[method] name", "lora with load_in_4bit is qlora; none is full"),
        load_in_4bit=carried(),
        load_in_8bit=carried("[method]", "there are no 8-bit bases here: LoRA beside a base in 16 bits"),
        bnb_config_kwargs=carried("[method] quant"),
        lora_r=carried(),
        lora_alpha=carried(),
        lora_dropout=carried(),
        lora_target_modules=carried(),
        lora_target_linear=carried("[method] target_modules", 'becomes "all-linear"'),
        lora_modules_to_save=carried(),
        peft_use_rslora=carried("[method] rslora"),
        peft_use_dora=carried("[method] dora"),
        datasets=carried(),
        test_datasets=carried(),
        pretraining_dataset=carried("[[data.train]]", "text, packed, and read whole before the start"),
        sequence_len=carried(text="twice as many for pairs, whose two answers are counted together"),
        sample_packing=carried(text="best-fit; documents never attend to each other"),
        excess_length_strategy=carried("[data] long_rows"),
        train_on_inputs=carried("[data] loss_on", "true is all"),
        chat_template=carried(
            "[data] chat_template", "chatml and llama3 are built in; others become the tokenizer's own"
        ),
        chat_template_jinja=carried("[data] chat_template", "a file; text inside the YAML is refused"),
        curriculum_sampling=carried("[data] shuffle"),
        sample_packing_sequentially=left("documents are packed best-fit; the order of sequences comes from the seed"),
        shuffle_merged_datasets=carried("[data] shuffle"),
        rl=carried("[objective] name"),
        reward_model=carried("[objective] name"),
        rl_beta=carried("[objective] beta"),
        dpo_beta=carried("[objective] beta"),
        dpo_label_smoothing=carried("[objective] label_smoothing"),
        dpo_loss_type=carried("[objective] loss"),
        dpo_loss_weights=carried("[objective] sft_weight", "of sigmoid and sft together"),
        rpo_alpha=carried("[objective] sft_weight"),
        orpo_alpha=carried("[objective] beta", "the paper's lambda"),
        simpo_gamma=carried("[objective] gamma", "the paper's gamma"),
        cpo_alpha=carried("[objective] sft_weight", "1 where it is not set, as TRL has it"),
        kto_desirable_weight=carried("[objective] desirable_weight"),
        kto_undesirable_weight=carried("[objective] undesirable_weight"),
        micro_batch_size=carried("[train] micro_batch_size", "times accumulation and GPUs it is global_batch_size"),
        gradient_accumulation_steps=carried("[train] global_batch_size", "follows from it and the number of GPUs"),
        batch_size=carried("[train] global_batch_size", "of one GPU there"),
        num_epochs=carried(),
        max_steps=carried("[train] max_steps"),
        optimizer=carried(text="optimizers that are not here are refused"),
        learning_rate=carried("[optim] learning_rate"),
        weight_decay=carried("[optim] weight_decay"),
        adam_beta1=carried("[optim] betas"),
        adam_beta2=carried("[optim] betas"),
        adam_epsilon=carried("[optim] eps"),
        lr_scheduler=carried(text="curves that are not here are refused"),
        lr_scheduler_kwargs=carried("[schedule] min_ratio, decay_ratio"),
        cosine_min_lr_ratio=carried("[schedule] min_ratio"),
        warmup_steps=carried("[schedule] warmup_steps"),
        warmup_ratio=carried("[schedule] warmup_ratio", "0.03 where neither is set, at most 100 steps there"),
        max_grad_norm=carried("[train] max_grad_norm"),
        gradient_checkpointing=carried(),
        activation_checkpointing=carried("[train] activation_checkpointing"),
        torch_compile=carried(),
        bf16=carried("[model] dtype", "weights are kept in bfloat16 beside an fp32 master copy"),
        bfloat16=carried("[model] dtype", "the same, without a master copy there"),
        fp16=carried("[model] dtype", "becomes bfloat16"),
        float16=carried("[model] dtype", "becomes bfloat16"),
        float32=carried("[model] dtype"),
        eager_attention=carried("[model] attention"),
        attn_implementation=carried(text="eager alone; else what is installed"),
        flash_attn_cross_entropy=left(_KERNELS),
        deepspeed=carried(text="stage and offload of the JSON file it names; other keys of that file are listed"),
        fsdp=carried(text="FSDP2"),
        fsdp_version=carried("[engine] name"),
        fsdp_config=carried("[engine]", "sharding strategy and offload; wrapping is by block"),
        save_steps=carried(text=_STEPS),
        save_strategy=carried("[checkpoint] every_steps", _STEPS),
        save_total_limit=carried(text="at least 2"),
        eval_steps=carried(text=_STEPS),
        eval_strategy=carried("[eval] every_steps", _STEPS),
        evaluation_strategy=carried("[eval] every_steps", _STEPS),
        early_stopping_patience=carried(),
        load_best_model_at_end=carried(),
        metric_for_best_model=carried("[eval] best_by", "eval_loss alone"),
        logging_steps=carried(),
        wandb_project=carried(),
        use_wandb=carried("[log] wandb"),
        output_dir=carried("output_dir/name"),
        seed=carried("seed"),
        val_set_size=left(
            "no rows are held out by chance: split them off into a file and name it as "
            "[[data.eval]]; all rows are trained"
        ),
        eval_sequence_len=left("held-out rows have the length of the trained ones"),
        eval_sample_packing=left("held-out rows are packed as the trained ones are", off=(None, True, False)),
        pad_to_sequence_len=left("sequences are padded no further than needed; the same numbers"),
        group_by_length=left("rows are packed; their order comes from the seed alone"),
        tf32=left("torch's default precision of fp32 products is used", off=(None, False, True, "auto")),
        fp8=left("products are in bfloat16 here"),
        saves_per_epoch=left("checkpoints are counted in steps: set [checkpoint] every_steps"),
        evals_per_epoch=left("evaluations are counted in steps: add a [[data.eval]] source and set [eval] every_steps"),
        resume_from_checkpoint=left(
            "distft train --resume auto is the default; checkpoints of other tools are not read"
        ),
        dataset_prepared_path=left("prepared rows are kept in a cache by themselves: [data] cache_dir"),
        special_tokens=left(
            "the tokenizer's own tokens are used: change them in its folder, and name it as [model] tokenizer"
        ),
        default_system_message=left(
            "the template's own default is used: put the message into the rows, or into a template"
        ),
        eot_tokens=left("the end of a turn is found in the template, and trained"),
        model_type=left("the model's config says its class"),
        type_of_model=left("the model's config says its class"),
        trust_remote_code=left("code of a model's folder is never run: models of transformers alone"),
        is_llama_derived_model=left("the model's config says its class"),
        lora_model_dir=carried("[method] start", "base, layers and ranks must be the same"),
        lora_fan_in_fan_out=left("known from the layers themselves"),
        peft_autocast_adapter_dtype=left(
            "[method] adapter_dtype; the optimizer keeps an fp32 master copy", off=(None, True)
        ),
        loraplus_lr_embedding=left("a part of LoRA+", off=(None, 1e-6)),
        loraplus_lr_ratio=carried("[method] lora_plus_ratio"),
        lora_target_parameters=carried("[method] target_parameters"),
        peft_layers_to_transform=carried("[method] layers_to_transform"),
        peft_init_lora_weights=carried("[method] init", "pissa_niter_N with exact singular vectors"),
        peft_trainable_token_indices=refused("name the tokens by their texts: [method] trainable_tokens"),
        neftune_noise_alpha=refused(
            "NEFTune adds noise to embeddings, which nothing here does: remove it to train without"
        ),
        noisy_embedding_alpha=refused(
            "NEFTune adds noise to embeddings, which nothing here does: remove it to train without"
        ),
        optim_args=refused("settings of an optimizer that no recipe has: set what is meant in [optim]"),
        optim_target_modules=refused("trains some modules by a projection of their gradients, which is not here"),
        embedding_lr=refused("a learning rate of its own for embeddings is not here: remove it"),
        embedding_lr_scale=refused("a learning rate of its own for embeddings is not here: remove it"),
        lr_groups=refused("learning rates by group of modules are not here: remove it"),
        lr_quadratic_warmup=refused("the warm-up is linear here: remove it"),
        cosine_constant_lr_ratio=refused(
            "the rate stays constant at the end there; take cosine_min_lr_ratio, or lr_scheduler warmup_stable_decay"
        ),
        processor_type=refused(
            "reads images or sound, which are not trained on here: remove it where all rows are text"
        ),
        quantize_moe_experts=left("qlora stores experts in 4 bits too"),
        gptq=refused("bases in GPTQ's form are not trained here: name the base in 16 bits, with load_in_4bit"),
        process_reward_model=refused(
            "reward models of single steps are not trained here; outcome rewards are: reward_model"
        ),
        label_smoothing_factor=refused("smoothed labels are another loss, which is not here: remove it"),
        peft=carried("[method] quant"),
        unfrozen_parameters=carried("[method] parameters", "of the method freeze; rows of a parameter are refused"),
        llama4_linearized_experts=left(_KERNELS),
        dpo_use_weighting=refused("WPO's weights are another loss, which is not here: remove it"),
        dpo_norm_loss=refused('a normalised DPO loss is another one: see [objective] loss = "sigmoid_norm"'),
        qat=refused(
            "trains all weights for torchao's formats: take an adapter, and [method] deploy with the format it is for"
        ),
        tokens=carried("[model] add_tokens", "new rows start as the mean of a token's pieces"),
        added_tokens_overrides=refused(_TOKENS),
        resize_token_embeddings_to_32x=refused(
            "changes the model's shape: do it once, and name the new folder as base_model"
        ),
        overrides_of_model_config=refused(
            "changes the model: write it into the config.json of a local folder, and name that"
        ),
        model_config=refused("changes the model: write it into the config.json of a local folder, and name that"),
        rope_scaling=refused("changes the model: write it into the config.json of a local folder, and name that"),
        train_on_eos=carried("[data.train] format", "turn alone"),
        roles_to_train=carried("[data] loss_on", "assistant alone"),
        use_pose=refused("positional skip-wise training is not here: remove it"),
        s2_attention=refused("shifted sparse attention is another model: remove it"),
        dataset_exact_deduplication=left("distft check names duplicates, and none is dropped: drop them from the file"),
        dataset_shard_num=refused("takes a part of the rows, by place: split the rows first, or use train[:N]"),
        dataset_shard_idx=left("goes with dataset_shard_num"),
        fix_untrained_tokens=left("embeddings of untrained tokens stay as they are: set what the model needs before"),
        min_sample_len=left("short rows are trained too"),
        max_prompt_len=left("prompts are not cut on their own"),
        multipack_real_batches=left("the loss of a step is divided by all its tokens, however they lie in batches"),
        plugins=left("plugins of Axolotl: kernels (liger, cut_cross_entropy) are chosen here by what is installed"),
    ),
    **group(
        "relora relora_steps relora_prune_ratio relora_cpu_offload relora_warmup_steps jagged_restart_steps "
        "jagged_restart_warmup_steps jagged_restart_anneal_steps",
        refused("restarts of the adapter during training are not here: remove it"),
    ),
    **group("lisa_n_layers lisa_step_interval lisa_layers_attribute", refused(_LISA)),
    **group(
        "peft_layers_pattern peft_layer_replication loftq_config",
        refused(_LAYOUT, off=(None, False, True, [])),
    ),
    **group(
        "vllm trl gradio_title use_ray ray_run_name ray_num_workers resources_per_worker gradio_share "
        "gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
        left("belongs to other commands of Axolotl"),
    ),
    **group(
        "attention fused_attn_kernel flash_attention sdp_attention xformers_attention flex_attention "
        "flash_attn_rms_norm flash_attn_fuse_qkv "
        "flash_attn_fuse_mlp flash_optimum unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv "
        "unsloth_lora_o unsloth_rms_norm unsloth_rope lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
        "lora_embedding_kernel liger_rope liger_rms_norm liger_rms_norm_gated liger_glu_activation liger_layer_norm "
        "liger_fused_linear_cross_entropy liger_cross_entropy cut_cross_entropy use_kernels torch_compile_backend "
        "torch_compile_mode flex_attn_compile_kwargs batch_flattening scaling_softmax chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks experts_implementation use_scattermoe use_sonicmoe",
        left(_KERNELS),
    ),
    **group(
        "wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model wandb_mode use_mlflow mlflow_tracking_uri "
        "mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace "
        "comet_project_name comet_experiment_key comet_mode comet_online comet_experiment_config use_tensorboard "
        "include_tokens_per_second profiler_steps profiler_steps_start include_tkps eval_table_size "
        "eval_max_new_tokens generate_samples num_generation_samples generation_max_new_tokens "
        "loss_watchdog_threshold loss_watchdog_patience use_otel_metrics use_trackio "
        "trackio_project_name trackio_run_name",
        left(_TRACKING),
    ),
    **group(
        "hub_model_id hub_strategy hub_revision push_dataset_to_hub hf_use_auth_token save_safetensors "
        "save_only_model save_first_step save_on_each_node auto_resume_from_checkpoints merge_lora merge_method",
        left("final/ is written in safetensors; nothing is sent to a hub", off=(None, False, True)),
    ),
    **group(
        "dataset_processes dataset_num_proc dataset_keep_in_memory dataloader_pin_memory dataloader_num_workers "
        "dataloader_prefetch_factor dataloader_drop_last skip_prepare_dataset remove_unused_columns "
        "sample_packing_group_size sample_packing_bin_size sample_packing_mp_start_method sample_packing_eff_est "
        "total_num_tokens total_supervised_tokens pretrain_multipack_buffer_size pretrain_multipack_attn streaming "
        "streaming_multipack_buffer_size pretraining_sample_concatenation accelerator_config "
        "shuffle_before_merging_datasets",
        left(_LOADER, off=(None, False, True)),
    ),
    **group(
        "local_rank world_size device device_map ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_find_unused_parameters max_memory gpu_memory_limit fsdp_final_state_dict_type",
        left(_PROCESSES),
    ),
    **group(
        "torchdistx_path experimental_skip_move_to_device "
        "low_cpu_mem_usage lora_on_cpu qlora_sharded_model_loading model_kwargs overrides_of_model_kwargs "
        "base_model_config cls_model_config tokenizer_type tokenizer_use_fast tokenizer_legacy "
        "is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model mean_resizing_embeddings "
        "embeddings_skip_upcast shrink_embeddings tokenizer_save_jinja_files tokenizer_use_mistral_common "
        "reinit_weights model_quantization_config model_quantization_config_kwargs",
        left(_LOADING),
    ),
    **group(
        "gradient_checkpointing_kwargs activation_offloading layer_offloading gc_steps strict debug seed_all "
        "auto_find_batch_size eval_batch_size do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset "
        "bench_split greater_is_better num_labels dpo_generate_during_eval dpo_use_logits_to_keep dpo_padding_free "
        "precompute_ref_log_probs save_compressed",
        left("has no counterpart; the same loss on the rows that are trained", off=(None, False, True)),
    ),
    **group(
        "sequence_parallel_degree context_parallel_size tensor_parallel_size dp_shard_size dp_replicate_size "
        "expert_parallel_size heads_k_stride ring_attn_func tiled_mlp tiled_mlp_num_shards",
        left(_PARALLEL, off=(None, False, 1, 0)),
    ),
}

DATASET_KEYS = {
    **table(
        path=carried("[[data.train]] path"),
        type=carried("[[data.train]] format", "rendered by the chat template, where Axolotl has wording of its own"),
        data_files=carried("[[data.train]] path"),
        name=carried("[[data.train]] subset"),
        split=carried("[[data.train]] split", "train[:N] becomes max_rows"),
        field=carried("[[data.train]] columns"),
        text_column=carried("[[data.train]] columns"),
        field_messages=carried("[[data.train]] columns"),
        field_chosen=carried("[[data.train]] columns"),
        field_rejected=carried("[[data.train]] columns"),
        field_tools=carried("[[data.train]] columns"),
        field_human=refused("names of columns of an old form: write message_property_mappings"),
        field_model=refused("names of columns of an old form: write message_property_mappings"),
        conversation=left("a template of FastChat: the chat template of the model is used"),
        message_property_mappings=carried("[[data.train]] format", "from/value is sharegpt, role/content is messages"),
        message_field_role=carried("[[data.train]] format"),
        message_field_content=carried("[[data.train]] format"),
        message_field_training=carried("messages' weight or train", 'a key called "train" or "weight" alone'),
        message_field_training_detail=refused("training parts of a turn is not here: split the turn, or remove it"),
        chat_template=carried("[data] chat_template"),
        chat_template_jinja=carried("[data] chat_template"),
        roles_to_train=carried("[data] loss_on", "assistant alone"),
        train_on_eos=carried("[data] loss_on", "turn alone: every trained turn is trained with its end"),
        roles=left("roles of ShareGPT and OpenAI are known: human, gpt, user, assistant, system, tool"),
        ds_type=left("known from the file's name"),
        train_on_split=carried("[[data.train]] split"),
        preprocess_shards=left("rows are prepared in pieces by themselves"),
        shards=refused("takes a part of the rows, by place: split the rows first, or use train[:N]"),
        shards_idx=refused("takes a part of the rows, by place: split the rows first, or use train[:N]"),
        skip=refused("leaves the first rows out: cut the file, or remove it"),
        drop_system_message=refused("system messages stay in the rows here: remove them from the file"),
        revision=left("the newest rows of the hub are read; the hashes of a run's rows are in its manifest.json"),
        trust_remote_code=left("loading scripts are never run"),
        field_thinking=left("reasoning_content is read, and <think> blocks", off=(None, "reasoning_content")),
        template_thinking_key=left("reasoning_content is read, and <think> blocks", off=(None, "reasoning_content")),
        split_thinking=left("reasoning in <think> blocks is found by itself"),
        train_on_inputs=carried("[data] loss_on"),
        input_transform=refused("changes the rows by code: write the changed rows to a file"),
        system_prompt=left("put it into the rows, as a column system"),
    ),
}
