from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.presets import PRESETS
from launcher.errors import RequestError
from launcher.plan.orders import VERSION, Orders, format_orders, parse_orders
from tests.conftest import small_plan

PLAN = small_plan()
PATHS = st.none() | st.text()


@given(
    name=st.text(), weights=PATHS, store=PATHS, vocabulary=st.none() | st.integers(1), activation=st.text()
)
def test_orders_survive_being_written_and_read(
    name: str, weights: str | None, store: str | None, vocabulary: int | None, activation: str
) -> None:
    model = {**PRESETS["gpt2"].config(), "activation_function": activation}
    orders = Orders("0.1.0", "f" * 64, replace(PLAN, name=name), model, weights, store, vocabulary)
    assert parse_orders(format_orders(orders)) == orders


def test_the_file_is_json_that_a_person_can_read() -> None:
    text = format_orders(Orders("0.1.0", "f" * 64, PLAN, {"model_type": "gpt2"}, None, "/stores/é", 300))
    assert text.endswith("}\n")
    fields = json.loads(text)
    assert fields["version"] == VERSION
    assert fields["plan"]["batch"] == {
        "batch_size": 8,
        "micro_batch": 2,
        "accumulation": 2,
        "world_size": 2,
    }
    assert '"micro_batch": 2,\n' in text
    assert "/stores/é" in text


@pytest.mark.parametrize("version", [VERSION + 1, VERSION - 1, "1", None])
def test_another_version_is_refused(version: object) -> None:
    fields = json.loads(format_orders(Orders("0.1.0", "f" * 64, PLAN, {}, None, None, None)))
    if version is None:
        del fields["version"]
    else:
        fields["version"] = version
    with pytest.raises(RequestError, match=f"not of format version {VERSION}") as refused:
        parse_orders(json.dumps(fields))
    assert "another version of launcher wrote it" in (refused.value.hint or "")
