from __future__ import annotations

import pytest

from garrison_agent.registry.selection import Rejected, choose_variant
from garrison_protocol.manifest import Manifest, Requirements, RuntimeSpec, Variant
from garrison_protocol.messages.report import Inventory
from garrison_protocol.states import DeviceType, Engine
from tests.fakes.packages import make_package

BOARD = Inventory(architecture="aarch64", memory_mb=4000, cpu_features=("asimd",), engines=("llama.cpp",))


def _variant(
    name: str, device: DeviceType = DeviceType.CPU, *, memory_mb: int = 100, requirements: Requirements | None = None
) -> Variant:
    base = make_package().variant
    return base.model_copy(
        update={
            "name": name,
            "runtime": RuntimeSpec(engine=Engine.LLAMA_CPP, device_type=device),
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
