"""The recipe that is held against another library's trainer: rows in their order, a constant rate, fp32."""

from pathlib import Path

LENGTH = 512


def write_peer_recipe(
    path: Path,
    *,
    model: Path,
    rows: Path,
    steps: int,
    batch: int,
    rate: float,
    data: str = "",
    micro: int | str = '"auto"',
) -> None:
    """Write a recipe `ours` into `path` whose runs lie beside it; `data`: further lines of [data]."""
    path.write_text(f"""
name = "ours"
output_dir = "{path.parent}"
[model]
path = "{model}"
dtype = "float32"
[data]
max_length = {LENGTH}
packing = false
shuffle = false
cache_dir = "{path.parent}/cache"
{data}
[[data.train]]
path = "{rows}"
[optim]
learning_rate = {rate}
[schedule]
name = "constant"
[train]
max_steps = {steps}
global_batch_size = {batch}
micro_batch_size = {micro}
[log]
tensorboard = false
console = "off"
""")
