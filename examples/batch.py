"""Run many prompts at once: a fixed list as one batch, and requests that arrive over time through an engine.

    python examples/batch.py [MODEL]

MODEL is a GGUF file, a folder or a Hugging Face repository; without it, the default model is used.
"""

import asyncio
import sys

from nybble import Engine, Model, SamplingOptions

TOPICS = ["rain", "a fox", "the sea", "an old clock"]
OPTIONS = SamplingOptions(max_tokens=24, seed=1)


async def answer(engine: Engine, topic: str) -> str:
    """Generates one story. Many of these tasks share the steps of the engine."""
    pieces = [piece async for piece in engine.stream(f"A story about {topic}:", OPTIONS)]
    return "".join(pieces)


async def main(model: Model) -> list[str]:
    with Engine(model, max_batch=16, speculation="auto") as engine:
        stories = await asyncio.gather(*(answer(engine, topic) for topic in TOPICS))
        print(engine.stats())
    return stories


with Model.load(sys.argv[1] if len(sys.argv) > 1 else None) as model:
    batch = model.generate([f"A story about {topic}:" for topic in TOPICS], OPTIONS)
    stories = asyncio.run(main(model))
    for topic, completion, story in zip(TOPICS, batch, stories, strict=True):
        print(f"{topic}: {story!r}")
        print("  bit-identical in both:", completion.text == story)
