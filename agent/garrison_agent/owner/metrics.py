"""What the agent measured, as families of ``core.exposition``. Owner thread only; loaded when somebody asks."""

from __future__ import annotations

from garrison_agent.core.exposition import MODEL_LABEL, Family, Sample, gauge, histograms
from garrison_agent.core.slot import Phase
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.deployments import Deployments
from garrison_agent.owner.telemetry import Telemetry
from garrison_agent.owner.uplink import AGENT_VERSION
from garrison_agent.owner.workers import Workers

_MIB = 1024 * 1024
_BOARD = {
    "cpu_permille": ("garrison_board_cpu_ratio", "Share of all cores in use since the last look", 0.001),
    "mem_used_mb": ("garrison_board_memory_used_bytes", "Memory in use on the board", _MIB),
    "mem_total_mb": ("garrison_board_memory_bytes", "Memory of the board", _MIB),
    "disk_free_mb": ("garrison_board_disk_free_bytes", "Room on the disk that holds the models", _MIB),
    "temp_mc": ("garrison_board_temperature_celsius", "The hottest sensor", 0.001),
    "rss_mb": ("garrison_agent_memory_bytes", "Resident memory of the agent", _MIB),
}


def measured(telemetry: Telemetry, deployments: Deployments, workers: Workers, journal: Journal) -> list[Family]:
    """Return histograms since the agent started, and gauges of this moment."""
    loaded, memory = [], []
    for slot in deployments.slots.values():
        if slot.serving is None:
            continue
        labels = {MODEL_LABEL: slot.alias}
        loaded.append(Sample({**labels, "model_id": slot.serving.package.id}, slot.phase is Phase.READY))
        rss_mb = workers.rss_mb(slot.alias, slot.serving.package)
        if rss_mb is not None:
            memory.append(Sample(labels, round(rss_mb * _MIB)))
    pending = tuple(Sample({"stream": name}, count) for name, count in sorted(journal.pending().items()))
    health = telemetry.measure()
    return [
        Family("garrison_build_info", "gauge", "Version of the agent", (Sample({"version": AGENT_VERSION}, 1),)),
        *histograms(telemetry.all_meters()),
        Family("garrison_model_loaded", "gauge", "Whether a model is in memory and serves", tuple(loaded)),
        Family("garrison_worker_memory_bytes", "gauge", "Resident memory of a model's worker", tuple(memory)),
        Family("garrison_outbox_pending_rows", "gauge", "Rows that no receipt of the controller covers", pending),
        *(gauge(name, help, health[fact] * scale) for fact, (name, help, scale) in _BOARD.items() if fact in health),
    ]
