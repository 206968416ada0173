"""LLaMA-Factory's keys beside transformers' training arguments, and those of dataset_info.json."""

from __future__ import annotations

from distft.importers.keys import carried, group, left, refused, table
from distft.importers.trainer_keys import TRAINER_KEYS

_EXPANDED = "trains blocks that are added to the model, which nothing here does: train the last ones by freeze"
_BLOCKWISE = "trains one block after another, which nothing here does: take freeze, or use_galore or use_apollo"
_SHAPE = "changes the model's shape without a token: remove it, or name the tokens in add_tokens"
_MEDIA = "images, video and audio are not trained on here"
_SERVING = "belongs to serving and chatting"
_KERNELS = "kernels are chosen here by what is installed; the same numbers but for rounding"
_PPO = "belongs to PPO"

LLAMA_FACTORY_KEYS = {
    **TRAINER_KEYS,
    **table(
        model_name_or_path=carried(),
        model_revision=carried(),
        stage=carried("[objective] name", "pt and sft are sft, dpo by pref_loss, rm is reward, kto; ppo is refused"),
        finetuning_type=carried("[method] name", "lora (also with quantization_bit: qlora), full, freeze or oft"),
        quantization_bit=carried("[method] name", "4 is qlora; 8 becomes LoRA beside a base in 16 bits"),
        quantization_type=carried("[method] quant"),
        double_quantization=carried("[method] quant"),
        quantization_method=carried("[method] quant", "bnb alone"),
        lora_rank=carried(),
        lora_alpha=carried(text="2 x lora_rank where it is not set"),
        lora_dropout=carried(),
        lora_target=carried(text='all is "all-linear"'),
        additional_target=carried("[method] modules_to_save"),
        use_rslora=carried(),
        use_dora=carried(),
        pure_bf16=carried("[model] dtype", "with an fp32 master copy here"),
        dataset=carried("[[data.train]]", "names of dataset_info.json"),
        eval_dataset=carried("[[data.eval]]", "names of dataset_info.json"),
        dataset_dir=carried("[[data.train]] path"),
        template=carried("[data] chat_template", "llama3 is built in; others become the tokenizer's own"),
        cutoff_len=carried(text="twice as many for pairs, whose two answers are counted together"),
        max_samples=carried("[[data.train]] max_rows"),
        packing=carried("[data] packing", "best-fit; documents never attend to each other (neat_packing there)"),
        neat_packing=carried("[data] packing"),
        train_on_prompt=carried("[data] loss_on", "true is all"),
        mask_history=carried("[data] loss_on", "true is last_turn"),
        mix_strategy=carried("[[data.train]]", "concat alone"),
        interleave_probs=refused("draws sources by chance: write [[data.train]] share or weight instead"),
        disable_shuffling=carried("[data] shuffle"),
        pref_loss=carried("[objective] loss", "orpo and simpo are objectives of their own"),
        pref_beta=carried("[objective] beta"),
        pref_ftx=carried("[objective] sft_weight"),
        dpo_label_smoothing=carried("[objective] label_smoothing"),
        simpo_gamma=carried("[objective] gamma", "the paper's gamma"),
        kto_chosen_weight=carried("[objective] desirable_weight"),
        kto_rejected_weight=carried("[objective] undesirable_weight"),
        flash_attn=carried("[model] attention", "disabled is eager; else what is installed"),
        enable_liger_kernel=left("Liger's kernels are used where they are installed"),
        disable_gradient_checkpointing=carried("[train] activation_checkpointing"),
        early_stopping_steps=carried("[eval] early_stop"),
        train_from_scratch=carried("[model] init"),
        val_size=left(
            "no rows are held out by chance: split them off into a file and name it as "
            "[[data.eval]]; all rows are trained"
        ),
        streaming=left("rows are read once and kept prepared: they must fit the disk"),
        buffer_size=left("rows are drawn from all rows, not from a buffer"),
        eval_on_each_dataset=left("one held-out loss over all [[data.eval]] rows"),
        tokenized_path=left("prepared rows are kept in a cache by themselves: [data] cache_dir"),
        tool_format=left("the chat template writes tools"),
        default_system=left("put the message into the rows, or into a template"),
        enable_thinking=left(
            "the template decides how reasoning is written: compare `distft check`'s samples", off=(None, True)
        ),
        preserve_thinking=left("the template decides how reasoning is written: compare `distft check`'s samples"),
        trust_remote_code=left("code of a model's folder is never run: models of transformers alone"),
        plot_loss=left("distft report RUN draws the curves"),
        compute_accuracy=left("held-out loss and [[eval.answers]] are what is measured"),
        upcast_layernorm=left("norms compute in fp32 where transformers' models do"),
        upcast_lmhead_output=left("losses are computed in fp32"),
        moe_aux_loss_coef=left("the model's config.json decides about router losses"),
        ignore_pad_token_for_loss=left("padding is never trained", off=(None, True)),
        ref_model=refused("the reference is the base model itself here: remove it"),
        reward_model_type=left(_PPO),
        ld_alpha=carried("[objective] ld_alpha"),
        pref_bco_weight=refused("mixes BCO into DPO, which is not here: remove it"),
        adapter_name_or_path=carried(
            "[method] start", "one adapter that is gone on from; with create_new_adapter refused"
        ),
        create_new_adapter=left("an adapter is new where none is named", off=(None, False, True)),
        loraplus_lr_ratio=carried("[method] lora_plus_ratio"),
        loraplus_lr_embedding=left("a part of LoRA+"),
        shift_attn=refused("shifted sparse attention is another model: remove it"),
        mixture_of_depths=refused("mixture of depths is another model: remove it"),
        rope_scaling=refused("changes the model: write it into the config.json of a local folder, and name that"),
        resize_vocab=refused(_SHAPE),
        use_dft_loss=refused("DFT weighs tokens by their probability, which is another loss: remove it"),
        use_asft_loss=refused("another loss, which is not here: remove it"),
        use_eaft_loss=refused("another loss, which is not here: remove it"),
        use_adam_mini=refused("Adam-mini is not here: remove it, or take optim: adamw_8bit for less memory"),
        use_muon=refused('set [optim] name = "muon" by hand: theirs was not compared with it'),
        use_llama_pro=refused(_EXPANDED),
        use_mca=left("Megatron's engine: [engine] decides"),
        fp8=left("products are in bfloat16 here"),
        freeze_language_model=refused(_MEDIA),
        split_special_tokens=left("special tokens typed in rows stay text here: [data] special_tokens_in_content"),
        ray_run_name=left("belongs to Ray"),
    ),
    **table(
        freeze_trainable_layers=carried("[method] last_blocks", "of freeze; blocks at the beginning are refused"),
        freeze_trainable_modules=carried("[method] last_blocks", "of freeze: all alone"),
        freeze_extra_modules=left("a setting of what is off"),
        use_galore=carried("[optim] name"),
        galore_rank=carried("[optim] rank"),
        galore_update_interval=carried("[optim] update_gap"),
        galore_scale=carried("[optim] scale"),
        use_apollo=carried("[optim] name"),
        apollo_rank=carried("[optim] rank"),
        apollo_update_interval=carried("[optim] update_gap"),
        apollo_scale=carried("[optim] scale"),
        apollo_scale_type=carried("[optim] scale_by"),
        use_badam=refused(_BLOCKWISE),
        pissa_init=carried("[method] init", "exact singular vectors"),
        pissa_convert=left("final/ always fits the unchanged base"),
        pissa_iter=left("singular vectors are exact here"),
        oft_block_size=carried("[method] oft_block_size"),
        oft_target=carried("[method] target_modules", 'all is "all-linear"'),
        module_dropout=carried("[method] module_dropout"),
        add_tokens=carried("[model] add_tokens", "rows start as the mean of a token's pieces, not of all with noise"),
        add_special_tokens=carried("[model] add_special_tokens", "as add_tokens"),
        new_special_tokens_config=refused("descriptions that new rows start from are not here: name the tokens"),
    ),
    **group(
        "galore_target galore_proj_type galore_layerwise apollo_target apollo_proj apollo_proj_type apollo_layerwise "
        "apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio "
        "badam_mask_mode badam_verbose oft_rank",
        left("a setting of what is refused or off"),
    ),
    **group(
        "ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters "
        "reward_model_quantization_bit "
        "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards",
        left(_PPO),
    ),
    **group(
        "image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen media_dir "
        "freeze_vision_tower freeze_multi_modal_projector image_do_pan_and_scan crop_to_patches use_audio_in_video "
        "audio_sampling_rate",
        left(_MEDIA),
    ),
    **group(
        "infer_backend offload_folder use_kv_cache infer_dtype print_param_status max_new_tokens top_p top_k "
        "temperature do_sample num_beams eval_num_beams export_dir export_size export_device export_legacy_format "
        "export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_config sglang_maxlen repetition_penalty "
        "length_penalty skip_special_tokens",
        left(_SERVING, off=(None, True, False)),
    ),
    **group(
        "use_unsloth use_unsloth_gc use_reentrant_gc use_v1_kernels use_kernels low_cpu_mem_usage use_fast_tokenizer "
        "quantization_device_map use_kt fp8_backend fp8_enable_fsdp_float8_all_gather init_special_tokens",
        left(_KERNELS, off=(None, True, False)),
    ),
    **group(
        "cache_dir overwrite_cache preprocessing_batch_size preprocessing_num_workers data_shared_file_system",
        left("rows are prepared once, by [data] num_workers processes; the same rows"),
    ),
    **group("hf_hub_token ms_hub_token om_hub_token", left("log in to the hub outside the recipe")),
    **group(
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret",
        left("metrics.jsonl, TensorBoard files and [log] wandb are what is written"),
    ),
    **group(
        "ray_storage_path ray_storage_filesystem ray_num_workers resources_per_worker "
        "placement_strategy ray_init_kwargs "
        "master_addr master_port",
        left("the launcher and [engine] decide"),
    ),
    **group(
        "include_effective_tokens_per_second include_num_input_tokens_seen generation_config generation_max_length "
        "generation_num_beams sortish_sampler",
        left("tokens and speed are in metrics.jsonl always", off=(None, False, True)),
    ),
}

INFO_KEYS = {
    **table(
        file_name=carried("[[data.train]] path"),
        hf_hub_url=carried("[[data.train]] path"),
        formatting=carried("[[data.train]] format"),
        ranking=carried("[[data.train]] format", "true is preference"),
        subset=carried("[[data.train]] subset"),
        split=carried("[[data.train]] split"),
        num_samples=carried("[[data.train]] max_rows"),
        columns=carried("[[data.train]] columns"),
        tags=carried("[[data.train]] format", "from/value is sharegpt, role/content is messages"),
        ms_hub_url=left("ModelScope is not read: Hugging Face's hub is"),
        om_hub_url=left("Modelers is not read: Hugging Face's hub is"),
        cloud_file_name=refused("files in a cloud are not read: download it"),
        script_url=refused("loading scripts are never run: write the rows to a file"),
        folder=refused("chooses a folder of a hub dataset: download it, and name its file"),
    ),
}
