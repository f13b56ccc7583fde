"""YAML as its version 1.2 reads it, and nothing dropped."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scaled_ql import documents


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("10_000", 10_000), ("-3", -3), ("+5", 5),
        ("1e-4", 1e-4), ("1.0e-4", 1e-4), (".5", 0.5), ("1.", 1.0), ("-.inf", float("-inf")),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("true", True), ("FALSE", False),
        ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("~", None), ("", None), ("'010'", "010"), ("<<", "<<"),
        ("[1, no]", [1, "no"]), ('{"a": 1.5}', {"a": 1.5}),
    ],
)  # fmt: skip
def test_values(text: str, value: object) -> None:
    read = documents.parse(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "b:\n  a: 1\n  a: 1", "[{a: 1, 'a': 2}]", "{1: 2, '1': 3}"])
def test_a_key_that_is_given_twice_is_an_error_with_both_lines(text: str, tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    with pytest.raises(documents.DocumentError, match=r"twice\.yaml: .*'[a1]' is given twice, first in line \d.*line"):
        documents.load(file)


@pytest.mark.parametrize(
    "content", [b"a: [", b"a: \xff", b"!!timestamp 5", b"!!bool 5", b"!!int x", b"!!python/none 1", b"? [1]\n: 2"]
)
def test_what_is_not_yaml_names_the_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(documents.DocumentError, match=r"broken\.yaml: cannot be read as YAML"):
        documents.load(file)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
words = st.sampled_from(["no", "010", "0o7", "1e5", "1_0", "12:30", "2024-01-01", "null", "<<", "=", "é", " "])


@settings(deadline=None)
@given(st.dictionaries(words | st.text(), plain | words | st.lists(plain | words)))
def test_what_is_dumped_is_read_as_the_same_by_both_versions(value: dict) -> None:
    text = documents.dump(value)
    assert documents.parse(text) == value
    assert yaml.safe_load(text) == value
