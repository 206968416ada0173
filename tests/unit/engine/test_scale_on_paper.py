"""Llama-3.1 8B and 70B over ranks that are not there: fake process group, meta device, the real wrapping code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                        "num_attention_heads": 64}  # fmt: skip
TOTAL_8B = 8_030_261_248
TOTAL_70B = 70_553_706_496

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from distft.core.types import UpdateRule
from distft.engine.fsdp2 import open_engine
from distft.engine.master_weights import MasterWeights
from distft.engine.processes import Processes
from distft.engine.params import Fsdp2Params
from distft.model import load, stats
from distft.model.adapters import METHODS
from distft.model.quantize import is_4bit
from distft.recipe import ModelTable

CPU = torch.device("cpu")
RULE = UpdateRule(build=lambda groups: torch.optim.SGD(groups, lr=1.0), lr_at=lambda step: 1.0, weight_decay=0.0,
                  decayed=frozenset(), max_grad_norm=1.0)

def built(folder, method):
    table, spec = ModelTable(path=folder, init="random"), METHODS[method]
    return load.build(table, Path(folder), spec, spec.params(), seed=1, device=CPU, weights=False)

def local(rank, world, weights):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    weights.fill = lambda unit, device: None  # stays on meta: sizes only
    place = Processes(rank=rank, world=world, local_rank=0, device=CPU, launcher="torchrun", wants="fsdp", joined=True)
    engine = open_engine("fsdp2", Fsdp2Params(), place)
    engine.setup(weights, RULE, micros_per_step=1)
    held = sum(param.to_local().numel() for param in engine.model.parameters())
    engine.close()
    return held

small, large = sys.argv[1:]
said = {"even": [local(rank, 64, built(small, "full")) for rank in (0, 31, 63)],
        "uneven": [local(rank, 6, built(small, "full")) for rank in range(6)]}
model = built(large, "qlora")
said["qlora"] = vars(stats.count(model.module)) | {"meta": all(p.is_meta for p in model.module.parameters())}
said["four_bit"] = sum(map(is_4bit, model.module.modules()))

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
shard = torch.nn.Parameter(DTensor.from_local(torch.zeros(4, 2), init_device_mesh("cpu", (2,)), [Shard(0)]))
[(_, owned)] = MasterWeights([("weight", shard)])
owned.data.add_(1.0)
said["owned"] = [type(owned).__name__, shard.to_local().sum().item()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folders = []
    for name, config in (("8b", LLAMA_8B), ("70b", LLAMA_70B)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(str(folder))
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_8b_over_64_ranks_is_one_64th_on_each(said: dict) -> None:
    assert said["even"] == [TOTAL_8B // 64] * 3
    assert said["even"][0] * 64 == TOTAL_8B


def test_8b_over_6_ranks_is_whole_although_rows_do_not_divide(said: dict) -> None:
    """4096 and 14336 rows over 6 ranks: the last one holds less, none is lost or counted twice."""
    assert sum(said["uneven"]) == TOTAL_8B
    assert max(said["uneven"]) / min(said["uneven"]) < 1.003


def test_70b_in_four_bits_counts_whole_weights_and_trains_adapters_only(said: dict) -> None:
    hidden, kv, wide, rank = 8192, 1024, 28672, 16
    pairs = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + wide)
    adapters = 80 * rank * pairs
    assert said["qlora"] == {"total": TOTAL_70B + adapters, "trainable": adapters, "meta": True}
    assert said["four_bit"] == 80 * 7


def test_an_fp32_shard_is_updated_in_place(said: dict) -> None:
    assert said["owned"] == ["Parameter", 8.0]
