"""What only matters on GPUs and can be tested without: which GPU is whose, which cores, which kernels, which bits."""

import os
import sys
from pathlib import Path

import pytest
import torch

from distft.core.errors import MachineError
from distft.core.optional import why_not
from distft.engine import affinity, determinism, processes

# -- which GPU is whose ----------------------------------------------------------------------------------------------


def test_a_process_that_sees_one_gpu_was_given_it() -> None:
    assert [processes.gpu_of(local_rank, 1) for local_rank in range(4)] == [0, 0, 0, 0]
    assert [processes.gpu_of(local_rank, 8) for local_rank in range(8)] == list(range(8))
    with pytest.raises(MachineError, match="process 2 of this host has no GPU: 2 visible; start 2 processes per host"):
        processes.gpu_of(2, 2)


def test_two_processes_on_one_gpu_are_refused_and_named() -> None:
    processes.refuse_shared_gpus([(1, 10), (1, 11), (2, 10)])  # the same number on another host
    with pytest.raises(MachineError, match="ranks 1 and 2 use the same GPU"):
        processes.refuse_shared_gpus([(1, 10), (1, 11), (1, 11)])


def test_nccls_heartbeat_outlasts_the_watch() -> None:
    [(name, value)] = processes.nccl_variables(3660, {}).items()
    assert name == "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
    assert int(value) > 3660
    assert processes.nccl_variables(3660, {name: "7"}) == {}, "what the user says counts"


# -- which cores -----------------------------------------------------------------------------------------------------


def test_cores_of_the_gpus_socket(tmp_path: Path) -> None:
    device = tmp_path / "0000:1b:00.0"
    device.mkdir()
    (device / "local_cpulist").write_text("0-3,8,10-11\n")
    assert affinity.cores_near("0000:1b:00.0", set(range(16)), tmp_path) == {0, 1, 2, 3, 8, 10, 11}
    assert affinity.cores_near("0000:1b:00.0", {2, 3, 4}, tmp_path) == {2, 3}
    assert affinity.cores_near("0000:1b:00.0", {4, 5}, tmp_path) == {4, 5}, "bound elsewhere by the launcher"
    assert affinity.cores_near("0000:1c:00.0", {4, 5}, tmp_path) == {4, 5}, "a virtual machine shows no such device"


def test_binding_takes_the_devices_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        pci_domain_id, pci_bus_id, pci_device_id = 0, 0x1B, 0

    device = tmp_path / "0000:1b:00.0"
    device.mkdir()
    first = min(os.sched_getaffinity(0))
    (device / "local_cpulist").write_text(f"{first}\n")
    monkeypatch.setattr(affinity, "SYSFS", tmp_path)
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append(cores))
    affinity.bind(Properties())
    affinity.bind(object())  # an older torch says nothing of where a device is
    assert bound == [{first}]


# -- which kernels ---------------------------------------------------------------------------------------------------


def test_a_package_built_for_another_torch_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels_of_another_torch.py").write_text('raise ImportError("x.so: undefined symbol: _ZN3c104cuda")')
    (tmp_path / "kernels_on_another_driver.py").write_text(
        'raise OSError("libcudart.so.12: cannot open shared object")'
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert "cannot be imported: x.so: undefined symbol" in why_not("kernels_of_another_torch")
    assert "libcudart.so.12" in why_not("kernels_on_another_driver")
    assert why_not("kernels_that_nobody_installed") == "kernels_that_nobody_installed is not installed"
    assert why_not("json") == ""


# -- which bits ------------------------------------------------------------------------------------------------------


def test_deterministic_is_set_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    with determinism.deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with determinism.deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "a kernel without a deterministic form raises"
        assert os.environ[determinism.WORKSPACE] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert determinism.WORKSPACE not in os.environ
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(determinism.WORKSPACE, ":0:0")
    said = "needs CUBLAS_WORKSPACE_CONFIG=:4096:8, the environment says :0:0"
    with pytest.raises(MachineError, match=said), determinism.deterministic(True):
        pass


def test_segments_expand_where_nobody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in determinism.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    determinism.expandable_segments()
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    determinism.expandable_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
