import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import version_key
from garrison_protocol.manifest import MAX_MANIFEST_BYTES, ModelFile, pack_chunks, parse_manifest, unpack_chunks


def document(**changes: Any) -> dict[str, Any]:
    file = {"path": "model.gguf", "size": 10, "sha256": "a" * 64, "chunks_sha256": "b" * 64}
    variant = {"name": "cpu", "runtime": {"engine": "llama.cpp"}, "files": [file], "memory_mb": 100}
    cases = [{"kind": "choice", "id": "one", "prompt": "The sky is", "choices": [" blue", " loud"], "expected": 0}]
    return {
        "name": "tiny",
        "version": "1.0.0",
        "alias": "tiny",
        "display_name": "Tiny",
        "publisher": "us",
        "license": "Apache-2.0",
        "task": "chat-completion",
        "created_at": "2026-01-01T00:00:00Z",
        "variants": [variant],
        "evaluation": {"cases": cases, "min_accuracy": 0.5},
        **changes,
    }


def parse(**changes: Any) -> Any:
    return parse_manifest(json.dumps(document(**changes)).encode())


def test_a_plain_manifest_parses() -> None:
    manifest = parse()
    assert manifest.id == "tiny:1.0.0"
    assert manifest.variant("cpu").size_bytes == 10
    assert manifest.variant("gpu") is None


def test_unknown_fields_and_newer_minor_versions_are_tolerated() -> None:
    assert parse(schema_version="1.7", colour="blue").name == "tiny"


def test_a_newer_major_version_is_refused() -> None:
    with pytest.raises(InvalidError, match="newer Garrison"):
        parse(schema_version="2.0")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", ".", "", "a\\b", "a\nb", "a/", "x" * 256]
)
def test_a_file_path_stays_inside_its_package(path: str) -> None:
    broken = document()
    broken["variants"][0]["files"][0]["path"] = path
    with pytest.raises(InvalidError) as caught:
        parse_manifest(json.dumps(broken).encode())
    assert caught.value.code == "manifest.malformed"


def test_two_files_may_not_share_a_path() -> None:
    broken = document()
    broken["variants"][0]["files"] *= 2
    with pytest.raises(InvalidError, match="share one path"):
        parse_manifest(json.dumps(broken).encode())


@pytest.mark.parametrize("name", ["Tiny", "tiny/..", "", "-tiny", "tiny model", "a" * 129])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(InvalidError):
        parse(name=name)


def test_an_expected_choice_must_exist() -> None:
    case = {"kind": "choice", "id": "one", "prompt": "x", "choices": ["a", "b"], "expected": 2}
    with pytest.raises(InvalidError, match="names no choice"):
        parse(evaluation={"cases": [case], "min_accuracy": 1})


def test_an_embedding_model_is_known_by_its_task_or_its_setting() -> None:
    for changes, makes in (({}, False), ({"task": "text-embedding"}, True)):
        manifest = parse(**changes)
        assert manifest.makes_embeddings(manifest.variants[0]) is makes
    variants = document()["variants"]
    variants[0]["model_settings"] = {"embedding": True}
    manifest = parse(variants=variants)
    assert manifest.makes_embeddings(manifest.variants[0])


def test_a_similarity_case_compares_texts() -> None:
    case = {"kind": "similarity", "id": "one", "anchor": "a cat", "closer": "a kitten", "farther": "a tax"}
    (read,) = parse(evaluation={"cases": [case], "min_accuracy": 1}).evaluation.cases
    assert read.model_dump() == {**case, "margin": 0.0}
    for wrong in ({"anchor": ""}, {"margin": -1}, {"margin": "NaN"}):
        with pytest.raises(InvalidError):
            parse(evaluation={"cases": [{**case, **wrong}], "min_accuracy": 1})


def test_a_gate_without_cases_is_refused() -> None:
    with pytest.raises(InvalidError):
        parse(evaluation={"cases": [], "min_accuracy": 0})


def test_the_case_set_is_named_by_content() -> None:
    one, other = parse(), parse(evaluation={**document()["evaluation"], "min_accuracy": 0.9})
    assert one.evaluation.cases_sha256 == other.evaluation.cases_sha256
    changed = document()["evaluation"]
    changed["cases"][0]["prompt"] = "The sea is"
    assert parse(evaluation=changed).evaluation.cases_sha256 != one.evaluation.cases_sha256


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff", b" " * (MAX_MANIFEST_BYTES + 1)])
def test_anything_else_is_refused_with_a_code(data: bytes) -> None:
    with pytest.raises(InvalidError) as caught:
        parse_manifest(data)
    assert caught.value.code in {"manifest.malformed", "manifest.too_large"}


@pytest.mark.parametrize(("count", "label"), [(135_000_000, "micro"), (7_000_000_000, "small"), (0, ""), (1, "")])
def test_parameter_classes(count: int, label: str) -> None:
    assert parse(parameter_count=count).parameter_class == label


@given(st.binary(max_size=5 * 4096))
def test_chunk_lists_cover_their_file(data: bytes) -> None:
    size = 4096
    digests = [hashlib.sha256(data[at : at + size]).digest() for at in range(0, len(data), size)]
    packed = pack_chunks(digests)
    file = ModelFile(path="f", size=len(data), sha256="a" * 64, chunk_size=size, chunks_sha256="b" * 64)
    assert unpack_chunks(packed, file) == digests
    with pytest.raises(InvalidError) as caught:
        unpack_chunks(packed + b"x", file)
    assert caught.value.code == "manifest.chunks_malformed"


def test_versions_compare_as_integers() -> None:
    assert version_key("1.10") > version_key("1.9.9.9")
    assert version_key("1") == version_key("1.0.0.0")
    with pytest.raises(ValueError, match="not a version"):
        version_key("1.0-beta")
