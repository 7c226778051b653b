"""A line of jsonl into the text it holds."""

from __future__ import annotations

import json

from pydantic_core import from_json


class BadLineError(Exception):
    """A line of jsonl that holds no text."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class LineParser:
    """Takes one field out of the object on each line."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._expected = f'jsonl has one object a line: {{"{field}": "..."}}'

    def __call__(self, line: bytes) -> str:
        """The text in the line; a blank line has an empty one. Raises BadLineError and UnicodeDecodeError."""
        try:
            # Twice as fast as json, which says what is wrong where this refuses. It takes nothing but UTF-8,
            # and gives no half of a surrogate pair.
            text = from_json(line, cache_strings=False)[self._field]
            if type(text) is str:
                return text
        except (ValueError, TypeError, LookupError, RecursionError):
            pass
        return self._carefully(line.decode("utf-8"))

    def _carefully(self, line: str) -> str:
        """The same with white space around it, or what is wrong with it."""
        if not line or line.isspace():
            return ""
        if line.startswith("\ufeff"):
            raise BadLineError("not JSON: it begins with a byte-order mark", "save the file without one")
        try:
            # Python refuses to read an integer of thousands of digits; no number is asked for here.
            value = json.loads(line, parse_int=float)
        except (ValueError, RecursionError) as error:
            raise BadLineError(f"not JSON: {error}", self._expected) from None
        field = self._field
        if not isinstance(value, dict):
            raise BadLineError(f"a JSON {_type_name(value)}, not an object", self._expected)
        if field not in value:
            fields = ", ".join(map(repr, value)) or "none"
            raise BadLineError(f"no field {field!r} among {fields}", "set data.text_field to one of them")
        text = value[field]
        if not isinstance(text, str):
            reason = f"field {field!r} is of type {_type_name(text)}, not string"
            raise BadLineError(reason, "set data.text_field to the text's field")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadLineError(f"field {field!r} holds half a surrogate pair", "repair the escape") from None
        return text


def _type_name(value: object) -> str:
    names = {type(None): "null", bool: "boolean", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "number")
