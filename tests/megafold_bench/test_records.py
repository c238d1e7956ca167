from __future__ import annotations

import json

import pytest

from megafold_bench.errors import UserError
from megafold_bench.records import (
    SCHEMA_VERSION,
    ResultsWarning,
    jsonable,
    latest,
    read_manifest,
    read_results,
)


def line(trial: str, attempt: int = 1, version: int = SCHEMA_VERSION) -> bytes:
    return json.dumps({"schema_version": version, "trial_id": trial, "attempt": attempt}).encode() + b"\n"


def test_missing_file_is_an_empty_run(tmp_path):
    assert read_results(tmp_path / "results.jsonl") == []


@pytest.mark.parametrize(
    "tail", [b'{"schema_version": 1, "tri', b"\x00\x00\x00\x00", b'{"a": "\xff\xfe', b"[1, 2]\n"]
)
def test_torn_line_is_skipped_with_a_warning(tmp_path, tail):
    path = tmp_path / "results.jsonl"
    path.write_bytes(line("a") + line("b") + tail)
    with pytest.warns(ResultsWarning, match="line 3"):
        assert [record["trial_id"] for record in read_results(path)] == ["a", "b"]


def test_torn_line_in_the_middle_hides_nothing_after_it(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(line("a") + b'{"half\n' + line("b"))
    with pytest.warns(ResultsWarning, match="line 2"):
        assert len(read_results(path)) == 2


def test_newer_schema_is_refused_naming_both_versions(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(line("a") + line("b", version=SCHEMA_VERSION + 1))
    with pytest.raises(UserError, match=rf"line 2.* version {SCHEMA_VERSION + 1}.* up to {SCHEMA_VERSION}"):
        read_results(path)


def test_latest_attempt_counts():
    records = [
        {"trial_id": "a", "attempt": 1},
        {"trial_id": "b", "attempt": 1},
        {"trial_id": "a", "attempt": 2},
    ]
    assert latest(records) == [records[2], records[1]]  # type: ignore[arg-type]


def test_jsonable_leaves_strict_json():
    value = jsonable({"a": (1, float("nan")), "b": {"c": float("inf")}})
    assert json.loads(json.dumps(value, allow_nan=False)) == {"a": [1, None], "b": {"c": None}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not a run folder"),
        ("{", "is not JSON"),
        ("[]", "not a manifest"),
        ('{"schema_version": 99}', "99"),
        ("{}", "None"),
    ],
)
def test_bad_manifest(tmp_path, content, words):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_manifest(tmp_path)


def test_manifest_of_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "none")
