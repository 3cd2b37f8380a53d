"""`/v1/completions` and `/v1/embeddings`: texts or tokens in, texts or numbers out."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from nybble.engine import Piece
from nybble.errors import ContextFullError
from nybble.sampling import SamplingOptions
from nybble.server import responses
from nybble.server.chat import finite
from nybble.server.errors import ApiError, told_to_the_client
from nybble.server.generation import EventStream, Prompt, Run, whole
from nybble.server.requests import CompletionRequest, EmbeddingRequest, texts_of
from nybble.server.responses import TextChoice, TextCompletion, TextLogprobs
from nybble.server.service import Service
from nybble.server.tools import new_id


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

    run = await Run.start(service, "prompt", submissions)
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


async def embed(service: Service, body: EmbeddingRequest) -> Response:
    """Answers one request for embeddings."""
    inputs = texts_of(body.input)
    if not 0 < len(inputs) <= service.settings.max_inputs:
        message = f"input: found {len(inputs)} texts, expected 1 to {service.settings.max_inputs}"
        raise ApiError(400, message, param="input")
    service.admit(body.model, 1)
    model = service.engine.model

    def compute() -> tuple[np.ndarray[Any, Any], int]:
        ids = [model.tokenizer.encode(text) if isinstance(text, str) else text for text in inputs]
        context = model.info.context
        for tokens in ids:
            if not tokens:
                raise ValueError("input: found a text without tokens")
            if len(tokens) > context:
                raise ContextFullError(0, len(tokens), context)
        return np.concatenate([model.embed(tokens) for tokens in ids]), sum(map(len, ids))

    service.working += 1
    try:
        async with service.embedding:
            with told_to_the_client("input"):
                rows, read = await run_in_threadpool(compute)
    finally:
        service.working -= 1
    answer = responses.Embeddings(
        object="list",
        model=service.name,
        data=[
            responses.Embedding(object="embedding", index=index, embedding=_numbers(row, body.encoding_format))
            for index, row in enumerate(rows)
        ],
        usage=responses.EmbeddingUsage(prompt_tokens=read, total_tokens=read),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def _numbers(row: np.ndarray[Any, Any], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return [float(value) for value in row]
