"""What tests of other projects' clients share. Import it before the client: some read the environment then."""

from __future__ import annotations

import os
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

# No client may leave this machine, or wait for a network that is not there.
os.environ.update(
    OPENAI_API_KEY="none",
    OPENAI_AGENTS_DISABLE_TRACING="1",
    LANGSMITH_TRACING="false",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
)

IGNORED = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
"""Warnings of clients, and of what they leave open at the end, are theirs."""

CALLS = {
    "marked": '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>',
    "bare": '{"name": "weather", "arguments": {"city": "Rome"}}',
    "fenced": '```json\n{"name": "weather", "parameters": {"city": "Rome"}}\n```',
}
"""The same call of `weather` as different models write it."""
ANSWER = "It is warm."


def needed(module: str) -> Any:
    """Imports a module, or skips the test without it."""
    return pytest.importorskip(module, reason=f"needs {module}: make test-clients")


def llama_index_model(url: str) -> Any:
    """A model of LlamaIndex that a server runs."""
    return needed("llama_index.llms.openai_like").OpenAILike(
        model="tiny",
        api_base=url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
    )


def weather(city: str) -> str:
    """Say what the weather is like.

    Args:
        city: The city.
    """
    return f"Sunny in {city}"


class Leg(BaseModel):
    """A part of a trip."""

    to: Literal["Rome", "Oslo"]
    days: int = Field(ge=0, le=9)


class Trip(BaseModel):
    """A trip. Its schema has definitions, references, unions and bounds."""

    legs: list[Leg] = Field(min_length=1, max_length=2)
    paid: bool
    note: Literal["a", "b"] | None = None


class Forecast(BaseModel):
    """An answer after calls."""

    city: str
    sunny: bool
