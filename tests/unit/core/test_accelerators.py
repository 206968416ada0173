"""The one table of GPUs: found by what the driver calls them, and by what a user types."""

import re

import pytest

from distft.core.accelerators import ACCELERATORS, BY_NAME, SOURCES, named, of_device, peak_flops


def test_no_product_is_hidden_behind_a_shorter_name() -> None:
    for gpu in ACCELERATORS:
        product = gpu.product if gpu.product.startswith("NVIDIA") else f"NVIDIA {gpu.product}"
        assert of_device(product) is gpu, gpu.name


def test_every_row_says_where_it_is_from_and_when_it_was_read() -> None:
    for gpu in ACCELERATORS:
        assert re.search(r"20\d\d-\d\d-\d\d", gpu.source), gpu.name
    assert BY_NAME.keys() >= SOURCES.keys(), "of rows that are there"
    assert "from memory" in BY_NAME["a800-80gb"].source, "what no page was found for says so"
    assert "data sheet" in BY_NAME["h100-80gb"].source


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 3090", "rtx3090-24gb"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090ti-24gb"),
        ("NVIDIA GeForce RTX 4090 D", "rtx4090d-24gb"),
        ("NVIDIA GeForce RTX 4080 SUPER", "rtx4080-super-16gb"),
        ("NVIDIA GeForce RTX 5070 Ti", "rtx5070ti-16gb"),
        ("NVIDIA GeForce RTX 5070", "rtx5070-12gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA H200 NVL", "h200-nvl-141gb"),
        ("NVIDIA H20", "h20-96gb"),
        ("NVIDIA H800", "h800-80gb"),
        ("NVIDIA A800-SXM4-80GB", "a800-80gb"),
        ("NVIDIA A800 80GB PCIe", "a800-pcie-80gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA B200", "b200-180gb"),
        ("NVIDIA GB200", "gb200-186gb"),
        ("NVIDIA GB300", "gb300-288gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
    ],
)
def test_devices_by_the_drivers_name(device: str, name: str) -> None:
    found = of_device(device)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "device",
    [
        *("cpu", "NVIDIA T400 4GB", "NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU"),
        *("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GeForce RTX 3080 Ti", "NVIDIA GeForce RTX 5090 D"),
    ],
)
def test_a_small_card_is_not_taken_for_a_large_one(device: str) -> None:
    assert of_device(device) is None
    assert peak_flops(device) is None


def test_names_are_unique_and_say_no_less_memory_than_is_usable() -> None:
    assert len(BY_NAME) == len(ACCELERATORS)
    for gpu in ACCELERATORS:
        assert 0.85 * int(gpu.name.rsplit("-", 1)[1].removesuffix("gb")) < gpu.memory_gib
        assert gpu.memory_gib < int(gpu.name.rsplit("-", 1)[1].removesuffix("gb"))


def test_what_a_user_types() -> None:
    assert named("H200").name == "h200-141gb"
    assert named("H200 NVL").name == "h200-nvl-141gb"
    assert named("RTX4090-24GB").name == "rtx4090-24gb"
    with pytest.raises(KeyError, match="a100"):
        named("a100")  # 40 or 80 GB
    with pytest.raises(KeyError, match="h100-80gb"):
        named("h100-80g")
    with pytest.raises(KeyError):
        named("abacus")
