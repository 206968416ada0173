"""Small models with tokenizers of their own, for tests of exports: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "the little dog saw a big red ball in the park and the cat sat on the mat near the tree while a girl named Lily "
    "said hello to her mom and dad. One day it rained. The server reports an error: disk full! What is 2 + 2? It is 4. "
)
_WORDS = TEXT.split(" ")
SENTENCES = [" ".join(_WORDS[start : start + 12]) for start in range(0, len(_WORDS), 3)]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"|\p{N}| ?", r"|\p{N}{1,3}| ?")
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{%- else %}"
    "{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def byte_fallback(*, prefix: bool = True, bos: bool = True, size: int = 420) -> Tokenizer:
    """Return a BPE over the whole text, with bytes for what has no token: as Llama 2's and Gemma's."""
    trained = Tokenizer(models.BPE())
    steps = [normalizers.Prepend("▁")] if prefix else []
    trained.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=size - 256 - len(SPECIAL), show_progress=False)
    trained.train_from_iterator(SENTENCES, trainer)
    content = json.loads(trained.to_str())
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    content["model"] |= {"vocab": {token: place for place, token in enumerate(tokens)}, "byte_fallback": True}
    content["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
    content["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def gemma_like() -> Tokenizer:
    """Return a tokenizer of the kind of Gemma's: no space before the text, and tokens of its own for runs and tags.

    As its tokenizer.json has them: spaces become U+2581 and a split finds none; runs of line ends, runs of U+2581 and
    HTML tags are added tokens that are not special and match before anything is replaced; merges make runs of U+2581.
    """
    content = json.loads(byte_fallback(prefix=False).to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    runs = ["\n" * count for count in range(1, 9)] + ["▁" * count for count in range(2, 9)]
    tags = ["<table>", "</table>", "<h1>", "</h1>", "<code>", "<strong>"]
    for text in [*runs, *tags]:
        vocabulary.setdefault(text, len(vocabulary))
    pairs = [["▁" * left, "▁" * (count - left)] for count in range(2, 9) for left in range(1, count)]
    content["model"]["merges"] = (
        pairs + merges
    )  # every pair that makes a token, as conversion from SentencePiece has them
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
    }  # fmt: skip
    made = Tokenizer.from_str(json.dumps(content))
    made.add_tokens([AddedToken(text, normalized=False) for text in [*runs[1:], *tags]])
    return made


def byte_level(split: str | None = QWEN_SPLIT, *, digits: bool = False, ignore_merges: bool = False) -> Tokenizer:
    """Return a BPE on bytes within pieces: as GPT-2's (None), Qwen's and Llama 3's."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps: list[Any] = []
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, own]) if steps else own
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    return made


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, template: str | None = CHATML) -> None:
    """Write the files of a tokenizer that ends at `</s>`, and turns at `<|im_end|>`."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def save_model(
    folder: Path,
    kind: str = "llama",
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    scale: float = 1.0,
    **config: Any,
) -> Path:
    """Write a random model whose logits are far enough apart that rounding of the last digit changes no choice.

    `scale`: of its matrices; wider models need less, or every rounding turns their logits over.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    given = SHAPE | {"vocab_size": 448, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2} | config
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given), dtype=torch.float32)
    with torch.no_grad():
        for name, param in made.named_parameters():
            if param.dim() > 1:
                param.normal_(0, scale * (0.5 if "embed" in name else 0.15))
            elif "norm" in name:
                param.add_(torch.randn_like(param) * 0.1)
            else:
                param.normal_(0, 0.1)
    made.generation_config = GenerationConfig(eos_token_id=[2, 4], bos_token_id=1, pad_token_id=0)
    made.save_pretrained(folder)
    save_tokenizer(tokenizer or byte_fallback(), folder)
    return folder


def save_adapter(folder: Path, base: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write a LoRA with random A and B for `base`, with the base's tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = get_peft_model(lm, LoraConfig(**(given | config)))
    with torch.no_grad():
        for name, param in made.named_parameters():
            if "lora_" in name:
                param.normal_(0, 0.1)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "generation_config.json").write_text((base / "generation_config.json").read_text())
    return folder


def save_reward_adapter(folder: Path, base: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write a LoRA of a reward model with a head of its own, with the base's tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "SEQ_CLS"}
    lm = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    made = get_peft_model(lm, LoraConfig(**(given | config)))
    with torch.no_grad():
        for name, param in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                param.normal_(0, 0.1)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def export(source: Path, out: Path, *words: str) -> dict[str, Any]:
    """Run `distft export` in this process and return its certificate; raises what the command would report."""
    from distft.export_formats.command import export as run
    from distft.export_options import parser

    return run(parser().parse_args([str(source), "--out", str(out), *words]))


def checks(certificate: dict[str, Any], level: int = 0) -> dict[str, dict[str, Any]]:
    """Return the comparisons of a level by name."""
    return {check["name"]: check for check in certificate["levels"][level]["checks"]}
