"""`/v1/completions` and `/v1/embeddings`: texts or tokens in, texts or numbers out."""

from __future__ import annotations

import base64
import functools
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import Request, Response

from nybble.engine import Piece
from nybble.sampling import SamplingOptions
from nybble.server import responses
from nybble.server.calls import new_id
from nybble.server.chat import finite
from nybble.server.errors import ApiError, told_to_the_client
from nybble.server.generation import EventStream, Prompt, Run, limited, whole
from nybble.server.requests import CompletionRequest, EmbeddingRequest, texts_of
from nybble.server.responses import TextChoice, TextCompletion, TextLogprobs
from nybble.server.service import Service


async def complete(service: Service, http: Request, body: CompletionRequest) -> Response:
    """Answers one request for completions."""
    prompts = texts_of(body.prompt)
    if not prompts:
        raise ApiError(400, "prompt: found no text, expected at least one", param="prompt")
    count = body.n or 1
    service.admit(body.model, len(prompts) * count)

    def submissions() -> list[tuple[Prompt, SamplingOptions]]:
        given = body.options()
        tokenizer = service.engine.model.tokenizer
        all_ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        return [(ids, SamplingOptions(**given, seed=seed)) for ids in all_ids for seed in body.seeds(count)]

    run = await Run.start(service, http, "prompt", submissions)
    answer = _Completion(service, run, len(prompts))
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(service, run, answer.chunks(with_usage))
    return await whole(service, http, run, answer.completion())


class _Completion:
    """A run on its way to the client."""

    def __init__(self, service: Service, run: Run, prompts: int) -> None:
        self._run = run
        self._prompts = prompts
        self._head: dict[str, Any] = {
            "id": f"cmpl-{new_id()}",
            "object": "text_completion",
            "created": service.now(),
            "model": service.name,
        }

    async def completion(self) -> Response:
        async for _ in self._run.pieces():
            pass
        choices = []
        for index, request in enumerate(self._run.requests):
            done = request.completion
            pieces = [Piece(text="", tokens=(), logprobs=done.logprobs)]
            choices.append(
                TextChoice(
                    index=index,
                    text=done.text,
                    logprobs=None if done.logprobs is None else _logprobs(pieces, 0),
                    finish_reason=self._run.finish_reason(index),
                )
            )
        whole_answer = TextCompletion(**self._head, choices=choices, usage=self._run.usage(self._prompts))
        return Response(whole_answer.model_dump_json(exclude_unset=True), media_type="application/json")

    async def chunks(self, with_usage: bool) -> AsyncIterator[str]:
        offsets = [0] * len(self._run.requests)
        async for index, piece in self._run.pieces():
            logprobs = None
            if piece is not None and piece.logprobs is not None:
                logprobs = _logprobs([piece], offsets[index])
                offsets[index] += sum(map(len, logprobs.tokens))
            reason = self._run.finish_reason(index) if piece is None else None
            text = "" if piece is None else piece.text
            choice = TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
            yield TextCompletion(**self._head, choices=[choice]).model_dump_json(exclude_unset=True)
        if with_usage:
            last = TextCompletion(**self._head, choices=[], usage=self._run.usage(self._prompts))
            yield last.model_dump_json(exclude_unset=True)


def _logprobs(pieces: list[Piece], offset: int) -> TextLogprobs:
    found = [logprob for piece in pieces for logprob in piece.logprobs or ()]
    offsets = []
    for logprob in found:
        offsets.append(offset)
        offset += len(logprob.text)
    return TextLogprobs(
        tokens=[logprob.text for logprob in found],
        token_logprobs=[finite(logprob.logprob) for logprob in found],
        top_logprobs=[{text: finite(value) for _, text, value in logprob.top} for logprob in found],
        text_offset=offsets,
    )


async def embed(service: Service, http: Request, body: EmbeddingRequest) -> Response:
    """Answers one request for embeddings."""
    service.admit(body.model, 1)
    service.working += 1
    try:
        return await limited(service, http, _embeddings(service, body))
    finally:
        service.working -= 1


async def _embeddings(service: Service, body: EmbeddingRequest) -> Response:
    model = service.engine.model
    data, read = [], 0

    def compute(text: str) -> tuple[npt.NDArray[np.float32], int]:
        return model.embed(text, pooling=service.settings.pooling)[0], len(model.tokenize(text))

    async with service.embedding:
        # One text at a time, so that a client that leaves is noticed between two.
        for index, text in enumerate([body.input] if isinstance(body.input, str) else body.input):
            with told_to_the_client("input"):
                row, tokens = await service.in_thread(functools.partial(compute, text))
            numbers = _numbers(row, body.encoding_format)
            data.append(responses.Embedding(object="embedding", index=index, embedding=numbers))
            read += tokens
    usage = responses.EmbeddingUsage(prompt_tokens=read, total_tokens=read)
    answer = responses.Embeddings(object="list", model=service.name, data=data, usage=usage)
    return Response(answer.model_dump_json(), media_type="application/json")


def _numbers(row: npt.NDArray[np.float32], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return [float(value) for value in row]
