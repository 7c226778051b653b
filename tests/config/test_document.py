"""YAML as people mean it: types, duplicate keys, places, and what is refused."""

from __future__ import annotations

import datetime

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.document import Value, parse, write
from launcher.errors import ConfigError


def value_of(text: str) -> Value:
    document = parse(text, label="x.yaml")
    assert document.faults == ()
    return document.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("10e9", 10e9),
        ("1e9", 1e9),
        ("+.5", 0.5),
        ("-3.", -3.0),
        ("0123", 123),
        ("0x1F", 31),
        ("0o17", 15),
        ("-7", -7),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
    ],
)
def test_numbers_booleans_and_null_follow_yaml_1_2(text: str, value: Value) -> None:
    assert value_of(f"key: {text}") == {"key": value}
    assert type(value_of(f"key: {text}")["key"]) is type(value)  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    "text",
    [
        "on",
        "off",
        "yes",
        "No",
        "y",
        "1_000",
        "24:00:00",
        "2026-01-31",
        "2026-01-31 10:00:00",
        ".inf",
        ".nan",
        "=",
    ],
)
def test_what_yaml_1_1_took_for_something_else_is_text(text: str) -> None:
    assert value_of(f"key: {text}") == {"key": text}


def test_json_is_yaml() -> None:
    assert value_of('{"a": [1, 2.5, true, null, "x"],\n "b": {"c": 1e-3}}') == {
        "a": [1, 2.5, True, None, "x"],
        "b": {"c": 1e-3},
    }


def test_a_key_set_twice_is_a_fault_at_the_second_line() -> None:
    document = parse("train:\n  steps: 1\n  batch_size: 8\n  steps: 2\n", label="x.yaml")
    (fault,) = document.faults
    assert (fault.path, fault.place) == ("train.steps", "x.yaml:4")
    assert "first on line 2" in fault.message
    assert fault.hint == "keep one of them"


def test_text_that_is_not_yaml_is_refused_with_line_and_column() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("a: 1\nb: [1, 2\nc: 3\n", label="x.yaml")
    (fault,) = caught.value.faults
    assert fault.place == "x.yaml:3:2"
    assert fault.message.startswith("not YAML: ")
    assert fault.hint


def test_a_tab_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("a:\n\tb: 1\n", label="x.yaml")
    assert caught.value.faults[0].place == "x.yaml:2:1"
    assert caught.value.faults[0].hint == "indent with spaces, not tabs"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("a: \x00", "character that text may not have"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 30_000, "nested more than 100 levels deep"),
    ],
)
def test_other_texts_that_cannot_be_read_are_one_fault(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, label="x.yaml")
    (fault,) = caught.value.faults
    assert reason in fault.message
    assert fault.place is not None
    assert fault.place.startswith("x.yaml")


def test_aliases_of_aliases_do_not_grow_without_bound() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        parse("\n".join(lines), label="x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  b: !!python/object:os.system x", "does not fit the tag !!python/object:os.system"),
        ("a:\n  b: !!set {x: null}", "the tag !!set is not understood"),
        ("a:\n  b: !!int x", "x does not fit the tag !!int"),
        ("a:\n  b: 1e999", "1e999 is not a finite number"),
    ],
)
def test_tags_and_numbers_out_of_reach_are_faults(text: str, message: str) -> None:
    (fault,) = parse(text, label="x.yaml").faults
    assert (fault.path, fault.place) == ("a.b", "x.yaml:2")
    assert message in fault.message
    assert fault.hint


def test_places_are_lines_of_keys_and_of_list_items() -> None:
    document = parse("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n'e.f': 3\n", label="x.yaml")
    assert document.place("a.b") == "x.yaml:2"
    assert document.place("a.c.1.d") == "x.yaml:5"
    assert document.place("e.f") == "x.yaml:6"
    assert document.has("a.c.0")
    assert not document.has("a.z")
    assert document.place("a.z") == "x.yaml:1"
    assert document.place("z") == "x.yaml"


def test_a_place_without_lines_is_its_label() -> None:
    document = parse("{a: 1, a: 2}", label="override x={a: 1, a: 2}", lines=False, root=("x",))
    assert document.faults[0].path == "x.a"
    assert document.faults[0].place == "override x={a: 1, a: 2}"


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(
        ["3e-4", "on", "0123", "24:00:00", "2026-01-31", "null", "", " x ", "a: b", "#", "*a", "\n"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(plain)
def test_what_is_written_reads_back_equal_here_and_in_yaml_1_1(value: Value) -> None:
    text = write(value)
    assert repr(value_of(text)) == repr(value)
    assert repr(yaml.safe_load(text)) == repr(value)


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "a\u2029", "two\nlines", "plain"])
def test_every_kind_of_line_end_in_a_text_comes_back(text: str) -> None:
    assert value_of(write({"key": [text]})) == {"key": [text]}


def test_the_yaml_1_1_reader_is_another_reader() -> None:
    assert yaml.safe_load("a: 2026-01-31") == {"a": datetime.date(2026, 1, 31)}
