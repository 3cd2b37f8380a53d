"""`/v1/embeddings`: inputs in, vectors of length 1 out."""

from __future__ import annotations

import base64
import functools
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from fastapi import Request, Response
from pydantic import BaseModel, Field, StringConstraints

from nybble.server.delivery import with_timeout
from nybble.server.errors import as_api_errors
from nybble.server.protocols.strict import Strict
from nybble.server.service import Service

Text = Annotated[str, StringConstraints(min_length=1)]


class EmbeddingRequest(Strict):
    """`POST /v1/embeddings`."""

    model: str | None = None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=256)] = Field(
        description="A string, or a list of strings."
    )
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class Embedding(BaseModel):
    """The vector of an input: numbers, or base64 of little-endian 32-bit floats."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """The tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The vectors of all inputs."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


async def embed(service: Service, http: Request, body: EmbeddingRequest) -> Response:
    """Answers one request for embeddings.

    Raises:
        ApiError: The request is invalid or the server is overloaded.
    """
    service.admit(body.model, 1)
    with service.in_flight():
        return await with_timeout(service, http, _embeddings(service, body))


async def _embeddings(service: Service, body: EmbeddingRequest) -> Response:
    model = service.engine.model
    data, tokens = [], 0

    def compute(text: str) -> tuple[npt.NDArray[np.float32], int]:
        return model.embed(text, pooling=service.settings.pooling)[0], len(model.tokenize(text))

    async with service.embedding:
        # One input per call, so that a disconnected client is noticed in between.
        for index, text in enumerate([body.input] if isinstance(body.input, str) else body.input):
            with as_api_errors("input"):
                row, count = await service.in_thread(functools.partial(compute, text))
            values = _encoded(row, body.encoding_format)
            data.append(Embedding(object="embedding", index=index, embedding=values))
            tokens += count
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    answer = Embeddings(object="list", model=service.name, data=data, usage=usage)
    return Response(answer.model_dump_json(), media_type="application/json")


def _encoded(row: npt.NDArray[np.float32], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return [float(value) for value in row]
