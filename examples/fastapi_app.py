"""Build your own application around an engine: FastAPI endpoints that stream, with nybble's API mounted next to them.

    NYBBLE_MODEL=model.gguf uvicorn --app-dir examples fastapi_app:app

    curl -N 'http://127.0.0.1:8000/story?topic=rain'

Without NYBBLE_MODEL, the default model is used.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from nybble import Engine, Model, QueueFullError
from nybble.server import Service, create_app

model = Model.load(os.environ.get("NYBBLE_MODEL"))
engine = Engine(model, max_batch=8, max_queue=32)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    engine.close()
    model.close()


app = FastAPI(lifespan=lifespan)


@app.get("/story")
async def story(topic: str, max_tokens: int = 64) -> StreamingResponse:
    """Streams a story. A client that disconnects cancels its request."""
    try:
        pieces = engine.stream(f"A story about {topic}:", max_tokens=max_tokens)
    except QueueFullError as error:
        raise HTTPException(503, str(error)) from error
    return StreamingResponse(pieces, media_type="text/plain; charset=utf-8")


app.mount("/openai", create_app(Service(engine, "model")))  # base_url http://127.0.0.1:8000/openai/v1
