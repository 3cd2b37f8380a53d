"""Let the model call a Python function, over the server's OpenAI-compatible API.

    nybble serve MODEL
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/tool_calling.py

The chat template of the model must support tools: docs/serving.md lists the formats.
"""

import json
from typing import Any

from openai import OpenAI


def population(city: str) -> int:
    """Returns the population of a city; a real program would look it up."""
    return {"Paris": 2_100_000, "Rome": 2_750_000}.get(city, 0)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "population",
        "description": "The number of people who live in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}

client = OpenAI()
model = client.models.list().data[0].id
messages: list[Any] = [{"role": "user", "content": "How many people live in Rome?"}]

# "required" restricts the answer to one valid call. With "auto", the model decides whether to call.
asked = client.chat.completions.create(
    model=model, messages=messages, tools=[TOOL], tool_choice="required", temperature=0, max_tokens=128
)
message: Any = asked.choices[0].message
call = message.tool_calls[0]
arguments = json.loads(call.function.arguments)
result = population(**arguments)
print(f"{call.function.name}({arguments}) = {result}")

messages += [message, {"role": "tool", "tool_call_id": call.id, "content": str(result)}]
answer = client.chat.completions.create(model=model, messages=messages, tools=[TOOL], temperature=0, max_tokens=48)
print(answer.choices[0].message.content)
