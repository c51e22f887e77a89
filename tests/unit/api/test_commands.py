from __future__ import annotations

import json

from garrison_agent.api.commands import ModelView, model_view, unknown_model
from tests.fakes.local_owner import DIGEST, make_manifest


def test_a_model_view_is_complete_and_json() -> None:
    manifest = make_manifest()
    view = model_view(
        manifest,
        manifest.variants[0],
        alias="chat",
        manifest_sha256=DIGEST,
        state="ACTIVE",
        serving=True,
        loaded=False,
    )
    assert set(view) == set(ModelView.__annotations__)
    assert json.loads(json.dumps(view)) == view
    assert (view["id"], view["file_size_mb"], view["engine"]) == ("smollm2:1.0.0", 3.0, "llama.cpp")


def test_an_unknown_model_error_lists_what_is_known() -> None:
    assert unknown_model("x", ["b", "a", "b"]).hint == "known here: a, b"
    assert "garrison-agent status" in unknown_model("x", []).hint
