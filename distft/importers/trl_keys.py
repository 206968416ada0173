"""TRL's keys beside transformers' training arguments: what becomes of each."""

from __future__ import annotations

from distft.importers.keys import carried, group, left, refused, table
from distft.importers.trainer_keys import TRAINER_KEYS
from distft.importers.trl_rollouts import ROLLOUT_KEYS

_REFERENCE = "the reference is the base model itself here: remove it"
_ONLINE = "belongs to PPO, RLOO or distillation, which have no importer: write [objective] and [rollout] by hand"

TRL_KEYS = {
    **TRAINER_KEYS,
    **ROLLOUT_KEYS,
    **table(
        model_name_or_path=carried(),
        model_revision=carried(),
        torch_dtype=carried("[model] dtype", "float16 becomes bfloat16; auto is bf16's"),
        dtype=carried("[model] dtype", "float16 becomes bfloat16; auto is bf16's"),
        attn_implementation=carried(text="eager alone; else what is installed"),
        use_peft=carried("[method] name", "lora, or qlora with load_in_4bit; without it full"),
        lora_r=carried(),
        lora_alpha=carried(),
        lora_dropout=carried(),
        lora_target_modules=carried(text='PEFT\'s own choice for the model where it is not set: "all-linear" here'),
        lora_modules_to_save=carried(),
        use_rslora=carried(),
        use_dora=carried(),
        load_in_4bit=carried(),
        load_in_8bit=carried("[method]", "there are no 8-bit bases here: LoRA beside a base in 16 bits"),
        bnb_4bit_quant_type=carried("[method] quant"),
        use_bnb_nested_quant=carried("[method] quant"),
        bnb_4bit_quant_storage=left("[method] quant storage_dtype follows the model's dtype"),
        dataset_name=carried("[[data.train]] path"),
        dataset_config=carried("[[data.train]] subset"),
        dataset_train_split=carried("[[data.train]] split"),
        dataset_test_split=carried("[[data.eval]] split", "where eval_strategy asks for evaluations"),
        datasets=carried("[[data.train]]"),
        dataset_text_field=carried("[[data.train]] columns", "when it is set, rows are plain text"),
        max_length=carried("[data] max_length", "twice as many for pairs, whose two answers are counted together"),
        max_seq_length=carried(),
        packing=carried("[data] packing", "best-fit; documents never attend to each other"),
        packing_strategy=carried("[data] packing", "wrapped cuts documents where a sequence ends; none is cut so here"),
        completion_only_loss=carried("[data] loss_on"),
        assistant_only_loss=carried("[data] loss_on", "false trains whole chats"),
        chat_template_path=carried("[data] chat_template", "a .jinja file; a tokenizer's folder is [model] tokenizer"),
        shuffle_dataset=left("a new order is drawn every epoch, from the seed alone", off=(None, False, True)),
        truncation_mode=carried("[data] long_rows", "keep_start alone; pairs are not cut"),
        loss_type=carried("[objective] loss"),
        beta=carried("[objective] beta"),
        label_smoothing=carried("[objective] label_smoothing"),
        rpo_alpha=carried("[objective] sft_weight"),
        loss_weights=carried("[objective] sft_weight", "of sigmoid and sft together"),
        cpo_alpha=carried("[objective] sft_weight"),
        simpo_gamma=carried("[objective] gamma", "the paper's gamma"),
        desirable_weight=carried("[objective] desirable_weight"),
        undesirable_weight=carried("[objective] undesirable_weight"),
        center_rewards_coefficient=carried("[objective] center"),
        max_prompt_length=left(
            "prompts are not cut on their own: a row longer than max_length is left out; of grpo part of max_length"
        ),
        max_completion_length=left(
            "answers are not cut on their own: a row longer than max_length is left out; grpo: [rollout] max_new_tokens"
        ),
        disable_dropout=left("models here have no dropout but the adapter's", off=(None, True)),
        precompute_ref_log_probs=left(
            "decided by the method: adapters are left out, full fine-tuning computes it once before"
        ),
        precompute_ref_batch_size=left("decided by the micro-batch"),
        dataset_num_proc=left("[data] num_workers processes prepare rows"),
        dataset_streaming=left("rows are read once and kept prepared: they must fit the disk"),
        streaming=left("rows are read once and kept prepared: they must fit the disk"),
        dataset_mixture=carried("[[data.train]]", "the alignment handbook's; see its own keys below"),
        dataset_mixer=carried("[[data.train]]", "the alignment handbook's: names with weights"),
        dataset_splits=carried("[[data.train]] split", "those with test in their name are [[data.eval]]"),
        test_split_size=left("no rows are held out by chance: split them off into a file and name it as [[data.eval]]"),
        eval_packing=left("held-out rows are packed as the trained ones are", off=(None, True, False)),
        padding_free=left("sequences are never padded where the attention kernel allows it", off=(None, True, False)),
        trust_remote_code=left("code of a model's folder is never run: models of transformers alone"),
        use_liger_loss=left("Liger's kernels are used where they are installed"),
        activation_offloading=left(
            "the inputs of blocks stay on the GPU; [train] activation_checkpointing saves memory"
        ),
        gradient_checkpointing_use_reentrant=left("recomputation is torch's non-reentrant one; the same numbers"),
        eos_token=left("the end of a turn is found in the template, and trained"),
        pad_token=left("padding is never trained"),
        model_init_kwargs=left("look at what it sets: [model] has dtype, attention and revision"),
        env=left("set environment variables before the launch"),
        lora_task_type=left("follows from the objective"),
        use_ref_model=refused(_REFERENCE),
        lora_target_parameters=carried("[method] target_parameters"),
        reference_free=refused("DPO without a reference is cpo with sft_weight = 0 here: trl cpo"),
        force_use_ref_model=refused(_REFERENCE),
        ref_model_init_kwargs=left("the reference is the base model itself"),
        sync_ref_model=refused("a reference that moves (TR-DPO) is not here: remove it"),
        f_divergence_type=refused(
            "other divergences than reverse KL are not here: remove it",
            off=(None, "reverse_kl", "FDivergenceType.REVERSE_KL"),
        ),
        f_alpha_divergence_coef=left("belongs to f_divergence_type"),
        use_weighting=refused("WPO's weights are another loss, which is not here: remove it"),
        ld_alpha=carried("[objective] ld_alpha"),
        discopop_tau=refused("discopop's tau is the paper's 0.05 here: remove it", off=(None, 0.05)),
        model_code_revision=left("code of a model's folder is never run"),
        alpha=refused("AlphaPO is another loss, which is not here: remove it"),
        mtp_loss_weight=refused("multi-token prediction is not here: remove it"),
        dft=refused("DFT weighs tokens by their probability, which is another loss: remove it"),
    ),
    **group(
        "ref_model_mixup_alpha ref_model_sync_steps model_adapter_name ref_adapter_name tools label_pad_token_id "
        "padding_value is_encoder_decoder generate_during_eval base_model_attribute_name max_target_length "
        "padding_free_collator pad_to_multiple_of dataset_kwargs dataset_batch_size ignore_bias_buffers "
        "use_flash_attention_2 remove_duplicates use_logits_to_keep reward_model_path add_special_tokens "
        "max_steps_per_epoch config",
        left("has no counterpart, and changes no loss of the rows that are trained", off=(None, False, True, -100)),
    ),
    **group(
        "max_new_tokens judge missing_eos_penalty response_length num_ppo_epochs lmbda teacher_model",
        refused(_ONLINE),
    ),
}

TRL_DATASET_KEYS = table(
    path=carried("[[data.train]] path"),
    name=carried("[[data.train]] subset"),
    split=carried("[[data.train]] split", "train[:N] becomes max_rows"),
    data_files=carried("[[data.train]] path"),
    data_dir=left("name the folder as path"),
    columns=left("columns that a format does not read are ignored"),
)
