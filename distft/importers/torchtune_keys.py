"""torchtune's keys, by section: what becomes of each."""

from __future__ import annotations

from distft.importers.keys import carried, group, left, refused, table

_OPERATIONS = "changes no result, and is decided here by itself"
_REPORTS = "metrics.jsonl, TensorBoard files and [log] wandb are what is written"
_COMPONENT = ("_component_",)
_DISTILLATION = (
    "distils on rows, which is not imported: [objective] distill does so on the student's own answers, or train on the "
    "teacher's answers as rows"
)
_PPO = 'its rewards come from a model beside it: write [objective] name = "ppo" and [rollout] by hand'

TORCHTUNE_KEYS = {
    **table(
        model=carried(
            "[method]", "which weights are trained is read from its component; the weights from checkpointer"
        ),
        tokenizer=carried("[data] max_length", "the tokenizer is the one of the model's folder"),
        checkpointer=carried("[model] path"),
        dataset=carried("[[data.train]]", "the component's own wording is the chat template's here"),
        dataset_val=carried("[[data.eval]]"),
        optimizer=carried(text="components that are not here are refused"),
        lr_scheduler=carried(text="constant where there is none"),
        loss=carried("[objective] name", "cross-entropy is sft; DPOLoss, RSOLoss and SimPOLoss are dpo and simpo"),
        metric_logger=carried("[log] wandb", "WandBLogger's project"),
        batch_size=carried("[train] micro_batch_size", "times accumulation and GPUs it is global_batch_size"),
        batch_size_val=left("held-out rows are evaluated in the micro-batches of training"),
        gradient_accumulation_steps=carried("[train] global_batch_size", "follows from it and the number of GPUs"),
        epochs=carried("[train] epochs"),
        max_steps_per_epoch=carried(
            "[train] max_steps", "times epochs; one pass after the other there, one order here"
        ),
        clip_grad_norm=carried(text="off where it is not set, as there"),
        dtype=carried("[model] dtype", "bf16 keeps an fp32 master copy here, and none there"),
        seed=carried("seed", "42 where it is empty, which is chance there"),
        shuffle=carried("[data] shuffle"),
        output_dir=carried("output_dir/name"),
        enable_activation_checkpointing=carried("[train] activation_checkpointing"),
        ac_mode=carried("[train] activation_checkpointing"),
        compile=carried("[train] compile"),
        fsdp_cpu_offload=carried("[engine] offload"),
        fsdp_reshard_after_forward=carried("[engine] gather"),
        log_every_n_steps=carried("[log] every_steps"),
        run_val_every_n_steps=carried("[eval] every_steps"),
        save_every_n_steps=carried("[checkpoint] every_steps"),
        enable_activation_offloading=left("the inputs of blocks stay on the GPU"),
        optimizer_in_bwd=left(
            "gradients are kept until the update, which is the same; [train] optimizer_in_backward frees each at once"
        ),
        resume_from_checkpoint=left(
            "distft train --resume auto is the default; checkpoints of other tools are not read"
        ),
        save_adapter_weights_only=left("final/ of an adapter method is the adapter", off=(None, True, False)),
        quantizer=refused(
            "trains all weights for torchao's formats: take a lora_ builder, and [method] deploy with that format"
        ),
        fake_quant_after_n_steps=left("belongs to quantisation-aware training"),
        teacher_model=refused(_DISTILLATION),
        teacher_checkpointer=left("belongs to distillation"),
        kd_loss=refused(_DISTILLATION),
        kd_ratio=left("belongs to distillation"),
        reward_and_value_model=refused(_PPO),
        ref_checkpointer=left("the reference is the base model itself"),
        reference_checkpointer=left("the reference is the base model itself"),
        base_model_path=left("the weights of checkpointer are trained"),
        tensor_parallel_dim=left("data-parallel sharding alone is here: no tensor parallelism", off=(None, 1)),
        tensor_parallel_plan=left("data-parallel sharding alone is here: no tensor parallelism"),
        context_parallel_dim=left("data-parallel sharding alone is here: no context parallelism", off=(None, 1)),
        data_parallel_shard_dim=left("[engine] shard_within says how far a model is cut", off=(None, -1)),
        data_parallel_replicate_dim=left("[engine] shard_within says how far a model is cut", off=(None, 1)),
        expert_parallel_dim=left("data-parallel sharding alone is here: no expert parallelism", off=(None, 1)),
        enable_fp8_training=left("products are in bfloat16 here"),
        packed=carried("[data] packing"),
        save_last_epoch_only=left("checkpoints are counted in steps: set [checkpoint] every_steps"),
        checkpoint_dir=carried("[model] path"),
        model_name=left("a name for other values of the file"),
        profiler=left("distft bench --profile measures kernels", off=(None, False)),
        cudnn_deterministic_mode=carried("[train] deterministic"),
    ),
    **group(
        "device memory_efficient_fsdp_wrap fsdp custom_sharded_layers low_cpu_ram use_grouped_mm fp8_recipe_name "
        "gradient_as_bucket_view enable_async_checkpointing async_checkpointing max_seq_len_val num_workers "
        "prefetch_factor use_loss_parallel_ctx_manager context_parallel_rotate_method dataloader",
        left(_OPERATIONS, off=(None, True, False, "cuda")),
    ),
    **group("log_level log_peak_memory_stats log_dir", left(_REPORTS, off=(None, True, False))),
}
"""Keys at the top."""

MODEL_KEYS = {
    **table(
        _component_=carried("[method] name", "lora_... is lora, qlora_... is qlora, others are full"),
        lora_attn_modules=carried("[method] target_modules", "output_proj is o_proj"),
        apply_lora_to_mlp=carried("[method] target_modules", "gate_proj, up_proj, down_proj"),
        apply_lora_to_output=carried("[method] target_modules", "lm_head"),
        lora_rank=carried(),
        lora_alpha=carried(),
        lora_dropout=carried(),
        use_dora=carried(),
        quantize_base=carried("[method] name", "qlora"),
    ),
}
TOKENIZER_KEYS = table(
    _component_=carried("[model] tokenizer", "the model folder's own"),
    path=left("the tokenizer of the model's folder is used"),
    max_seq_len=carried(text="2048 and an error for longer rows where it is empty"),
    prompt_template=left("the chat template writes roles: compare `distft check`'s samples"),
    merges_file=left("the tokenizer of the model's folder is used"),
    special_tokens_path=left("the tokenizer of the model's folder is used"),
    truncation_type=left("the end of a long row is cut", off=(None, "right")),
)
CHECKPOINTER_KEYS = table(
    _component_=left("weights are read in the hub's layout", off=(None,)),
    checkpoint_dir=carried("[model] path"),
    checkpoint_files=left("known from the folder", off=(None,)),
    adapter_checkpoint=refused("goes on from an adapter: save it in PEFT's form, and name it as [method] start"),
    recipe_checkpoint=left("distft train --resume auto; checkpoints of other tools are not read"),
    output_dir=left("output_dir/name of the recipe", off=(None,)),
    model_type=left("the model's config says its class", off=(None,)),
    safe_serialization=left("final/ is written in safetensors", off=(None, True, False)),
    keep_last_n_checkpoints=carried("[checkpoint] keep"),
)
DATASET_KEYS = table(
    _component_=carried("[[data.train]] format", "its wording around the rows is the chat template's here"),
    source=carried("[[data.train]] path"),
    data_files=carried("[[data.train]] path"),
    split=carried("[[data.train]] split", "train[:N] becomes max_rows"),
    name=carried("[[data.train]] subset"),
    subset=carried("[[data.train]] subset"),
    column=carried("[[data.train]] columns"),
    column_map=carried("[[data.train]] columns"),
    conversation_column=carried("[[data.train]] columns"),
    conversation_style=carried("[[data.train]] format", "openai is messages"),
    train_on_input=carried("[data] loss_on", "true is all; alpaca_dataset has it by default"),
    masking_strategy=carried("[data] loss_on"),
    packed=carried("[data] packing", "best-fit; documents never attend to each other"),
    split_across_pack=left("a document is never cut where a sequence ends"),
    max_seq_len=carried(),
    new_system_prompt=refused("writes a system message into every row: put it into the rows"),
    filter_fn=refused("chooses rows by code: write the chosen rows to a file"),
    add_eos=left("the end of a text is always trained", off=(None, True)),
    template=left("the chat template writes roles: compare `distft check`'s samples"),
    chat_format=left("the chat template writes roles: compare `distft check`'s samples"),
    trust_remote_code=left("loading scripts are never run"),
)
OPTIMIZER_KEYS = table(
    _component_=carried("[optim] name"),
    lr=carried(),
    weight_decay=carried(
        "[optim] weight_decay", "0.01 where it is not set, as torch has it; norms and biases are left out here"
    ),
    betas=carried("[optim] betas"),
    eps=carried("[optim] eps"),
    fused=left(_OPERATIONS, off=(None, True, False)),
    foreach=left(_OPERATIONS, off=(None, True, False)),
)
SCHEDULER_KEYS = table(
    _component_=carried("[schedule] name"),
    num_warmup_steps=carried("[schedule] warmup_steps"),
    num_cycles=carried("[schedule] name", "0.5, half a cosine, alone"),
    warmup_steps=carried("[schedule] warmup_steps"),
)
LOSS_KEYS = table(
    _component_=carried("[objective] name"),
    beta=carried("[objective] beta"),
    label_smoothing=carried("[objective] label_smoothing"),
    gamma=carried("[objective] gamma or beta"),
    num_output_chunks=left("losses are computed in chunks that fit", off=(None, 0)),
    ignore_index=left("tokens that are not trained are known", off=(None, -100)),
)
LOGGER_KEYS = table(
    _component_=left(_REPORTS),
    project=carried("[log] wandb"),
    log_dir=left(_REPORTS, off=(None,)),
    filename=left(_REPORTS),
    entity=left(_REPORTS),
    group=left(_REPORTS),
    name=left(_REPORTS),
)

SECTIONS = {
    "": TORCHTUNE_KEYS,
    "model": MODEL_KEYS,
    "tokenizer": TOKENIZER_KEYS,
    "checkpointer": CHECKPOINTER_KEYS,
    "dataset": DATASET_KEYS,
    "optimizer": OPTIMIZER_KEYS,
    "lr_scheduler": SCHEDULER_KEYS,
    "loss": LOSS_KEYS,
    "metric_logger": LOGGER_KEYS,
}
