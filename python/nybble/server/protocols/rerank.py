"""`/v1/rerank`: a query and documents in, the relevance of each document out."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Request, Response
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints

from nybble.chat.tools.reader import new_id
from nybble.generation.request import check_length
from nybble.server.delivery import with_timeout
from nybble.server.errors import ApiError, as_api_errors
from nybble.server.protocols.strict import Strict
from nybble.server.service import Service

MAX_DOCUMENTS = 2048
"""Documents of a request."""
_BATCH = 16

Text = Annotated[str, StringConstraints(min_length=1)]


def _text(given: Any) -> Any:
    """A document may be an object with a text, as in Jina's API."""
    return given["text"] if isinstance(given, dict) and set(given) == {"text"} else given


class RerankRequest(Strict):
    """`POST /v1/rerank`."""

    model: str | None = None
    query: Text = Field(description="What the documents are compared with.")
    documents: Annotated[
        list[Annotated[Text, BeforeValidator(_text)]], Field(min_length=1, max_length=MAX_DOCUMENTS)
    ] = Field(description="Strings, or objects with a `text`.")
    top_n: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        default=None, description="The number of documents to return, the most relevant ones; all by default."
    )
    return_documents: bool = Field(default=False, description="Return the documents with their scores.")
    priority: int | None = Field(default=None, description="Ignored.")


class RankedText(BaseModel):
    """The text of a document."""

    text: str


class Ranked(BaseModel):
    """A document of the request, by its place there, and its relevance from 0 to 1."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class RerankUsage(BaseModel):
    """The tokens of all pairs of query and document."""

    prompt_tokens: int
    total_tokens: int


class BilledUnits(BaseModel):
    """What Cohere counts: a request is one search."""

    search_units: Literal[1] = 1


class ApiVersion(BaseModel):
    """The version of Cohere's API."""

    version: Literal["2"] = "2"


class Meta(BaseModel):
    """What Cohere says about a request."""

    api_version: ApiVersion = Field(default_factory=ApiVersion)
    billed_units: BilledUnits = Field(default_factory=BilledUnits)


class Ranking(BaseModel):
    """The documents, the most relevant first, in the formats of Jina and Cohere."""

    id: str
    object: Literal["list"]
    model: str
    results: list[Ranked]
    usage: RerankUsage
    meta: Meta = Field(default_factory=Meta)


async def rerank(service: Service, http: Request, body: RerankRequest) -> Response:
    """Answers one request for a ranking.

    Raises:
        ApiError: The request is invalid, the model does not rank, or the server is overloaded.
    """
    lora = service.admit(body.model, 1)
    if not service.engine.model.info.labels:
        raise ApiError(400, f"the model {service.name!r} does not rank: it has no classification head", param="model")
    with service.in_flight():
        return await with_timeout(service, http, _ranking(service, body, lora))


async def _ranking(service: Service, body: RerankRequest, lora: str | None) -> Response:
    model = service.engine.model
    scores: list[float] = []

    def count() -> int:
        check_length(model, body.query)
        tokens = 0
        for document in body.documents:
            check_length(model, document)
            tokens += len(model.tokenizer.encode_pair(body.query, document)[0])
        return tokens

    async with service.embedding:
        with as_api_errors("documents"):
            tokens = await service.in_thread(count)
            # One batch per call, so that a disconnected client is noticed in between.
            for start in range(0, len(body.documents), _BATCH):
                batch = body.documents[start : start + _BATCH]
                found = await service.in_thread(functools.partial(model.rerank, body.query, batch, adapter=lora))
                scores += [float(score) for score in 1 / (1 + np.exp(-found.astype(np.float64)))]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    results = [
        Ranked(
            index=index,
            relevance_score=scores[index],
            document=RankedText(text=body.documents[index]) if body.return_documents else None,
        )
        for index in order
    ]
    usage = RerankUsage(prompt_tokens=tokens, total_tokens=tokens)
    answer = Ranking(
        id=f"rerank-{new_id()}", object="list", model=service.name_of(body.model), results=results, usage=usage
    )
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")
