from __future__ import annotations

import pytest

from garrison_agent.registry.selection import Rejected, VariantFit, choose_variant, explain_variants
from garrison_protocol.manifest import Manifest, Requirements, RuntimeSpec, Variant
from garrison_protocol.messages.report import Inventory
from garrison_protocol.states import DeviceType, Engine
from tests.fakes.packages import make_package

BOARD = Inventory(architecture="aarch64", memory_mb=4000, cpu_features=("asimd",), engines=("llama.cpp",))


def _variant(
    name: str,
    device: DeviceType = DeviceType.CPU,
    provider: str = "CPUExecutionProvider",
    *,
    memory_mb: int = 100,
    requirements: Requirements | None = None,
) -> Variant:
    base = make_package().variant
    return base.model_copy(
        update={
            "name": name,
            "runtime": RuntimeSpec(engine=Engine.LLAMA_CPP, device_type=device, execution_provider=provider),
            "memory_mb": memory_mb,
            "requirements": requirements or Requirements(),
        }
    )


def _manifest(*variants: Variant) -> Manifest:
    return make_package().manifest.model_copy(update={"variants": variants})


def test_npu_before_gpu_before_cpu_then_the_manifests_order() -> None:
    cpu, cpu2, gpu, npu = (
        _variant("cpu"),
        _variant("cpu2"),
        _variant("gpu", DeviceType.GPU),
        _variant("npu", DeviceType.NPU),
    )
    manifest = _manifest(cpu, cpu2, gpu, npu)
    assert choose_variant(manifest, BOARD, 1000, device_types=list(DeviceType)) == npu
    assert choose_variant(manifest, BOARD, 1000, device_types=[DeviceType.CPU, DeviceType.GPU]) == gpu
    assert choose_variant(manifest, BOARD, 1000) == cpu


@pytest.mark.parametrize(
    ("variant", "board", "reason"),
    [
        (_variant("v"), BOARD.model_copy(update={"engines": ("onnxruntime",)}), "llama.cpp is not installed"),
        (_variant("v", DeviceType.GPU), BOARD, "needs a GPU"),
        (_variant("v", requirements=Requirements(architectures=("x86_64",))), BOARD, "is built for x86_64"),
        (_variant("v", requirements=Requirements(cpu_features=("sve", "asimd"))), BOARD, "needs CPU features sve"),
        (_variant("v", requirements=Requirements(memory_mb=4001)), BOARD, "4001 MiB"),
        (_variant("v", memory_mb=1001), BOARD, "takes 1001 MiB of memory, the budget is 1000"),
    ],
)
def test_each_obstacle_is_named(variant: Variant, board: Inventory, reason: str) -> None:
    choice = choose_variant(_manifest(variant), board, 1000)
    assert isinstance(choice, Rejected)
    assert reason in choice.reasons["v"]
    assert choice.message.startswith("v: ")


def test_architectures_have_two_names_each() -> None:
    variant = _variant("v", requirements=Requirements(architectures=("arm64",)))
    assert choose_variant(_manifest(variant), BOARD, 1000) == variant


def test_a_smaller_build_is_taken_when_the_first_does_not_fit() -> None:
    big, small = _variant("big", memory_mb=2000), _variant("small", memory_mb=500)
    assert choose_variant(_manifest(big, small), BOARD, 1000) == small


def test_foundrys_order_of_devices_and_providers() -> None:
    best_first = (
        _variant("npu", DeviceType.NPU, "QNNExecutionProvider"),
        _variant("vendor-gpu", DeviceType.GPU, "NvTensorRTRTXExecutionProvider"),
        _variant("cuda-gpu", DeviceType.GPU, "CUDAExecutionProvider, CPUExecutionProvider"),
        _variant("generic-gpu", DeviceType.GPU, "WebGpuExecutionProvider"),
        _variant("vendor-cpu", DeviceType.CPU, "OpenVINOExecutionProvider"),
        _variant("generic-cpu"),
    )
    for start in range(len(best_first)):
        worst_first = _manifest(*reversed(best_first[start:]))
        assert choose_variant(worst_first, BOARD, 1000, device_types=list(DeviceType)) == best_first[start]
    explained = explain_variants(_manifest(*reversed(best_first)), BOARD, 1000, device_types=list(DeviceType))
    assert [fit.name for fit in explained] == [variant.name for variant in best_first]


def test_memory_decides_before_the_order_of_devices() -> None:
    npu, cpu = _variant("npu", DeviceType.NPU, memory_mb=1001), _variant("cpu", memory_mb=1000)
    assert choose_variant(_manifest(npu, cpu), BOARD, 1000, device_types=list(DeviceType)) == cpu


def test_every_variant_is_explained_with_all_that_is_in_its_way() -> None:
    gpu = _variant("gpu", DeviceType.GPU, memory_mb=2000, requirements=Requirements(cpu_features=("sve",)))
    big, small = _variant("big", memory_mb=1500), _variant("small", memory_mb=500)
    spare = _variant("spare", memory_mb=400)
    explained = {fit.name: fit for fit in explain_variants(_manifest(big, small, spare, gpu), BOARD, 1000)}
    assert explained["gpu"].reasons == (
        "needs a GPU",
        "needs CPU features sve",
        "takes 2000 MiB of memory, the budget is 1000",
    )
    assert explained["big"].reasons == ("takes 1500 MiB of memory, the budget is 1000",)
    assert explained["small"] == VariantFit("small", True, (), True, 500, small.size_bytes)
    assert explained["spare"].fits
    assert not explained["spare"].chosen
    rejected = choose_variant(_manifest(big, gpu), BOARD, 1000)
    assert isinstance(rejected, Rejected)
    assert rejected.reasons["gpu"] == ", ".join(explained["gpu"].reasons)
    assert not any(fit.chosen for fit in explain_variants(_manifest(big, gpu), BOARD, 1000))
