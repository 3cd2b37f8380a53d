"""The base of all parts of requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def _boolean(expected: str) -> Callable[[object], object]:
    """Refuses numbers, which Python counts as equal to True and False."""

    def check(value: object) -> object:
        if not isinstance(value, bool):
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return value

    return check


Off = Annotated[Literal[False], BeforeValidator(_boolean("False"))]
On = Annotated[Literal[True], BeforeValidator(_boolean("True"))]


class Strict(BaseModel):
    """A part of a request. Values are not converted, and unknown parameters are errors unless they are null."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"additionalProperties": {"type": "null"}}
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown_nulls(cls, values: Any) -> Any:
        """Clients send null for what they do not use, and null changes nothing."""
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {key: value for key, value in values.items() if value is not None or key in known}
