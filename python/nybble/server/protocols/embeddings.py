"""`/v1/embeddings`: inputs in, vectors of length 1 out."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import Request, Response
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from nybble.generation.request import check_length
from nybble.server.delivery import with_timeout
from nybble.server.errors import ApiError, as_api_errors
from nybble.server.protocols.strict import Strict
from nybble.server.service import Service

MAX_INPUTS = 2048
"""Inputs of a request, as with OpenAI."""
_BATCH_TOKENS = 4096
_BATCH_INPUTS = 64

Text = Annotated[str, StringConstraints(min_length=1)]


def _only_text(given: Any) -> Any:
    """Refuses token ids: those of another tokenizer would give wrong vectors that nobody notices."""
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(first, int | list) and not isinstance(first, bool):
        raise PydanticCustomError(
            "unsupported",
            "found token ids, expected strings; clients that count tokens for OpenAI's models must send text "
            "(in LangChain: check_embedding_ctx_length=False)",
        )
    return given


Inputs = Annotated[
    Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)], BeforeValidator(_only_text)
]


class EmbeddingRequest(Strict):
    """`POST /v1/embeddings`."""

    model: str | None = None
    input: Inputs = Field(description="A string, or a list of strings.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        default=None, description="The width of the vectors. Only some models allow less than their own width."
    )
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
    lora = service.admit(body.model, 1)
    check_dimensions(service, body.dimensions)
    with service.in_flight():
        return await with_timeout(service, http, _embeddings(service, body, lora))


async def _embeddings(service: Service, body: EmbeddingRequest, lora: str | None) -> Response:
    inputs = [body.input] if isinstance(body.input, str) else body.input
    rows, tokens = await vectors(service, inputs, body.dimensions, lora=lora)
    data = [
        Embedding(object="embedding", index=index, embedding=_encoded(row, body.encoding_format))
        for index, row in enumerate(rows)
    ]
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    answer = Embeddings(object="list", model=service.name_of(body.model), data=data, usage=usage)
    return Response(answer.model_dump_json(), media_type="application/json")


def check_dimensions(service: Service, dimensions: int | None) -> None:
    """Refuses vectors of a width that the model does not have.

    Raises:
        ApiError: The width is refused.
    """
    width = service.engine.model.info.embedding_size
    if dimensions is None or dimensions == width or (dimensions < width and service.settings.matryoshka):
        return
    why = (
        "this model's vectors have no more"
        if dimensions > width
        else "shorter vectors need a model that was trained for them (Matryoshka) and the option --matryoshka"
    )
    raise ApiError(400, f"dimensions: found {dimensions}, expected {width}: {why}", param="dimensions")


async def vectors(
    service: Service,
    inputs: Sequence[str | list[int]],
    dimensions: int | None,
    param: str = "input",
    lora: str | None = None,
) -> tuple[list[npt.NDArray[np.float32]], int]:
    """The vectors of inputs, and the number of their tokens.

    Args:
        service: The service.
        inputs: Documents or token ids.
        dimensions: The width to cut the vectors to; None for that of the model.
        param: The parameter of the request that holds the inputs, for errors.
        lora: The LoRA adapter to compute with; None for the model alone.

    Raises:
        ApiError: An input is invalid or too long.
    """
    model = service.engine.model
    rows: list[npt.NDArray[np.float32]] = []

    def compute(batch: list[Sequence[int]]) -> npt.NDArray[np.float32]:
        documents: Any = batch  # Token ids are documents, too.
        found = model.embed(documents, pooling=service.settings.pooling, adapter=lora)
        if dimensions is not None and dimensions < found.shape[1]:
            found = found[:, :dimensions]
            found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return found

    def encode() -> list[Sequence[int]]:
        for each in inputs:
            if isinstance(each, str):
                check_length(model, each)
        return [model.tokenize(each) if isinstance(each, str) else each for each in inputs]

    async with service.embedding:
        with as_api_errors(param):
            encoded = await service.in_thread(encode)
            # One batch per call, so that a disconnected client is noticed in between.
            for batch in _batches(encoded):
                rows += [*await service.in_thread(functools.partial(compute, batch))]
    return rows, sum(map(len, encoded))


def _batches(encoded: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    tokens = 0
    for ids in encoded:
        if batch and (tokens + len(ids) > _BATCH_TOKENS or len(batch) >= _BATCH_INPUTS):
            yield batch
            batch, tokens = [], 0
        batch.append(ids)
        tokens += len(ids)
    if batch:
        yield batch


def _encoded(row: npt.NDArray[np.float32], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return [float(value) for value in row]
