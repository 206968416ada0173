"""A profile's kernels are sorted by what they do, and its shares with idle time make one."""

import pytest
import torch

from distft.bench import profile

NAMES = {
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "products",
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN": "products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "products",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL": "collectives",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>": "quantisation",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "elementwise",
    "triton_poi_fused_add_mul_silu_3": "elementwise",
    "aten::mul": "elementwise",
    "aten::addmm": "products",
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert profile.kind(name) == kind


def test_shares_and_idle_time_make_one_also_where_streams_overlap() -> None:
    spans = [("gemm", 0.0, 40.0), ("ncclAllGather", 10.0, 30.0), ("add", 50.0, 60.0), ("gemm", 60.0, 80.0)]
    found = profile.summary(spans, 100.0)
    assert found["shares"]["idle"] == pytest.approx(0.3), "10 between, 20 at the end"
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert found["shares"]["products"] == pytest.approx(0.7 * 60 / 90, abs=1e-4)
    assert found["longest"][0] == {"name": "gemm", "kind": "products", "count": 2, "ms": 0.06}
    assert found["kernels"] == 4
    assert profile.summary([], 10.0)["shares"]["idle"] == 1


def test_a_real_step_on_a_cpu_is_mostly_products() -> None:
    x = torch.randn(256, 256, requires_grad=True)
    found = profile.of(lambda: (x @ x @ x).sum().backward(), torch.device("cpu"))
    assert found["shares"]["products"] > found["shares"]["elementwise"]
    assert any(one["name"] == "aten::mm" for one in found["longest"])
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-3)
