"""The worker's orders, `plan.json`: written once by the control half, read by every rank.

Both directions stand here, beside the plan itself, so that the worker need not know the renderers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import RequestError
from launcher.plan.choose import Plan
from launcher.plan.shape import Shape, shape_of, with_vocabulary

VERSION = 3


@dataclass(frozen=True, slots=True)
class Orders:
    """The plan and where its inputs are.

    `model` is the transformers config of the model to build, `weights` the folder or Hub id its
    weights come from (None: from scratch), `store` the token store's folder and `vocabulary` the size of its
    tokenizer (None: not prepared yet), `configuration` the hash of the configuration this was planned from.
    """

    launcher: str
    configuration: str
    plan: Plan
    model: Mapping[str, Any]
    weights: str | None
    store: str | None
    vocabulary: int | None

    @property
    def shape(self) -> Shape | None:
        """The shape of the model that is trained; None for an architecture that is not known."""
        return shape_of(with_vocabulary(self.model, self.vocabulary, scratch=self.weights is None))


def format_orders(orders: Orders) -> str:
    """The text of `plan.json`."""
    fields = {
        "version": VERSION,
        "launcher": orders.launcher,
        "configuration": orders.configuration,
        "plan": orders.plan.as_dict(),
        "model": dict(orders.model),
        "weights": orders.weights,
        "store": orders.store,
        "vocabulary": orders.vocabulary,
    }
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def parse_orders(text: str) -> Orders:
    """The orders that `format_orders` wrote. Raises RequestError for another format version."""
    fields = json.loads(text)
    if fields.pop("version", None) != VERSION:
        raise RequestError(
            f"plan.json is not of format version {VERSION}",
            hint="another version of launcher wrote it: go on with that one, or give the run another name",
        )
    return Orders(**{**fields, "plan": Plan.from_dict(fields["plan"])})
