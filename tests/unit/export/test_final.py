"""final/: plain transformers loads it, and it is there whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import CPU, build
from transformers import AutoModelForCausalLM, LlamaConfig

from distft.core.errors import DistftError
from distft.core.types import UpdateRule
from distft.engine.params import EngineParams
from distft.engine.processes import Processes
from distft.engine.solo import SoloEngine, open_engine
from distft.export import final
from distft.model.adapters import METHODS
from distft.model.load import WRAPPER, MetaModel

RULE = UpdateRule(
    build=lambda groups: torch.optim.SGD(groups, lr=1.0),
    lr_at=lambda step: 1.0,
    weight_decay=0.0,
    decayed=frozenset(),
    max_grad_norm=None,
)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that plain transformers wrote."""
    folder = tmp_path_factory.mktemp("source")
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=request.param,
    )  # fmt: skip
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def opened(folder: Path, method: str = "full", **how) -> tuple[SoloEngine, MetaModel, dict]:
    """(engine that holds the model, the model, whole shapes of what is saved)."""
    model = build(folder, method, fill=False, init="pretrained", **how)
    shapes = {
        name.removeprefix(WRAPPER): (tuple(param.shape), param.dtype)
        for name, param in model.module.named_parameters()
        if method == "full" or param.requires_grad
    }
    place = Processes(rank=0, world=1, local_rank=0, device=CPU, launcher="plain", wants="", joined=False)
    engine = open_engine("solo", EngineParams(), place)
    engine.setup(model, RULE, micros_per_step=1)
    return engine, model, shapes


def written(folder: Path, engine: SoloEngine, model: MetaModel, shapes: dict, rest: Callable[[Path], None]) -> None:
    final.write_model(folder, engine, shapes, prefix=WRAPPER, layout=model.layout, save_rest=rest)


def same_as_source(folder: Path, source: Path) -> None:
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    assert "distft" not in json.dumps(config), "how we trained is not how others must run it"


def test_one_file_loads_equal_to_its_source(source: Path, tmp_path: Path) -> None:
    engine, model, shapes = opened(source)
    written(
        tmp_path / "final", engine, model, shapes, lambda folder: final.save_config(model.module.transformer, folder)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == ["config.json", "model.safetensors"]
    same_as_source(tmp_path / "final", source)
    with safe_open(tmp_path / "final/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (tmp_path / "final/model.safetensors").stat().st_mode & 0o044 == 0o044, "other people's servers read it"


def test_several_files_and_their_index(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(final, "MAX_FILE_BYTES", 100_000)
    engine, model, shapes = opened(source)
    written(
        tmp_path / "final", engine, model, shapes, lambda folder: final.save_config(model.module.transformer, folder)
    )
    files = sorted((tmp_path / "final").glob("*.safetensors"))
    assert len(files) > 2
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "final/model.safetensors.index.json").read_text())
    found, size = {}, 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        assert num_bytes <= 100_000, "one file's worth is the most that is ever held"
        found |= dict.fromkeys(held, path.name)
        size += num_bytes
    assert index == {"metadata": {"total_size": size}, "weight_map": found}
    same_as_source(tmp_path / "final", source)


@pytest.mark.row(36)
def test_a_gathered_tensor_of_the_wrong_shape_is_not_saved(source: Path, tmp_path: Path) -> None:
    engine, model, shapes = opened(source)
    shapes["model.norm.weight"] = ((65,), torch.float32)
    said = r"model\.norm\.weight was gathered as \(64,\) instead of \(65,\); nothing is saved"
    with pytest.raises(DistftError, match=said):
        written(tmp_path / "final", engine, model, shapes, lambda folder: None)
    assert not (tmp_path / "final").exists()


def test_what_fails_half_way_leaves_the_older_folder_as_it_was(source: Path, tmp_path: Path) -> None:
    engine, model, shapes = opened(source)

    def disk_full(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file(), "the weights were already written, aside"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "final", engine, model, shapes, disk_full)
    assert not (tmp_path / "final").exists()
    (tmp_path / "final").mkdir()
    (tmp_path / "final/older.txt").write_text("kept")
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "final", engine, model, shapes, disk_full)
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["older.txt"]
    written(tmp_path / "final", engine, model, shapes, lambda folder: None)
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["model.safetensors"], "replaced, not mixed"
    assert [path.name for path in tmp_path.iterdir()] == ["final"], "what a failed attempt left aside is gone"


@pytest.mark.row(36)
@pytest.mark.parametrize("params", [{"r": 4}, {"r": 4, "target_modules": ["q_proj"], "dora": True}], ids=str)
def test_an_adapter_that_learnt_nothing_is_refused(source: Path, tmp_path: Path, params: dict) -> None:
    engine, model, shapes = opened(source, "lora", params=params)

    def save() -> None:
        final.write_adapter(
            tmp_path / "final",
            engine,
            shapes,
            prefix=WRAPPER,
            starts_at_zero=METHODS["lora"].starts_at_zero,
            save_adapter=lambda folder, tensors: model.module.lm.save_pretrained(folder, state_dict=tensors),
            save_rest=lambda folder: None,
        )

    with pytest.raises(DistftError, match="the adapter is still its initial value: nothing was trained, so nothing is"):
        save()
    assert not (tmp_path / "final").exists()
    trained = next(name for name in shapes if ".lora_B." in name)
    with torch.no_grad():
        engine.model.get_parameter(WRAPPER + trained)[0, 0] = 1.0
    save()
    with safe_open(tmp_path / "final/adapter_model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == len(shapes)
        assert file.get_tensor(trained.replace(".default", ""))[0, 0] == 1.0
    assert (tmp_path / "final/adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("method", "params"), [("prompt_tuning", {}), ("p_tuning", {}), ("prefix_tuning", {}), ("ia3", {})]
)
def test_an_adapter_that_starts_with_no_zeros_has_to_differ_from_its_start(
    source: Path, tmp_path: Path, method: str, params: dict
) -> None:
    engine, model, shapes = opened(source, method, params=params)
    assert model.starts.keys() == shapes.keys()

    def save() -> None:
        final.write_adapter(
            tmp_path / "final", engine, shapes, prefix=WRAPPER, starts_at_zero=METHODS[method].starts_at_zero,
            starts=model.starts, save_rest=lambda folder: None,
            save_adapter=lambda folder, tensors: METHODS[method].save_adapter(model.module.lm, folder, tensors),
        )  # fmt: skip

    with pytest.raises(DistftError, match="the adapter is still its initial value: nothing was trained, so nothing is"):
        save()
    assert not (tmp_path / "final").exists()
    with torch.no_grad():
        engine.model.get_parameter(WRAPPER + next(iter(shapes))).view(-1)[0] += 1.0
    save()
    assert (tmp_path / "final/adapter_config.json").is_file()
