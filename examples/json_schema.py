"""Restrict the output to a pydantic model.

    python examples/json_schema.py [MODEL]

MODEL is a GGUF file, a folder or a Hugging Face repository; without it, the default model is used.
"""

import sys
from typing import Literal

from pydantic import BaseModel, Field

from nybble import Model


class Review(BaseModel):
    """The fields that the model fills in."""

    sentiment: Literal["positive", "neutral", "negative"]
    stars: int = Field(ge=1, le=5)


REVIEWS = ["The soup was cold and the waiter was rude.", "Best pizza in town!"]

with Model.load(sys.argv[1] if len(sys.argv) > 1 else None) as model:
    for text in REVIEWS:
        prompt = [{"role": "user", "content": f"Rate this review as JSON: {text}"}]
        answer = model.chat(prompt, schema=Review, temperature=0, max_tokens=64)
        review = Review.model_validate_json(answer.text)
        print(f"{review.sentiment}, {review.stars} stars: {text}")
