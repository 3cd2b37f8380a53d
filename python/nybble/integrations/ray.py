"""Past one machine, with Ray (`pip install nybble[ray]`): Ray decides what runs where, nybble computes.

`generate` continues or answers the rows of a dataset, on as many workers as are asked for; a worker that dies is
replaced, and its rows are done again. `deployment` is the server of `nybble serve` as an application of Ray Serve, with
replicas.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data
from ray import serve

from nybble.model import Model
from nybble.sampling import SamplingOptions

if TYPE_CHECKING:
    from fastapi import FastAPI

Batch = dict[str, np.ndarray[Any, Any]]


class Worker:
    """A model in a process of Ray's, which maps batches of rows. `generate` makes them."""

    def __init__(
        self, source: str | None, load: Mapping[str, Any], options: SamplingOptions, column: str, output: str
    ) -> None:
        self._model = Model.load(source, progress=False, **load)
        self._options = options
        self._column = column
        self._output = output

    def __call__(self, batch: Batch) -> Batch:
        """Adds to each row its text, why it ended, and how many tokens were read and written."""
        done = self._model.generate([self._prompt(value) for value in batch[self._column]], self._options)
        return {
            **batch,
            self._output: np.array([each.text for each in done], dtype=object),
            "finish_reason": np.array([each.finish_reason for each in done], dtype=object),
            "prompt_tokens": np.array([each.usage.prompt_tokens for each in done]),
            "completion_tokens": np.array([each.usage.completion_tokens for each in done]),
        }

    def _prompt(self, value: str | Sequence[Mapping[str, Any]]) -> str:
        if isinstance(value, str):
            return value
        return self._model.tokenizer.apply_chat_template([dict(turn) for turn in value])


def generate(
    dataset: ray.data.Dataset,
    source: str | None = None,
    *,
    workers: int = 1,
    threads: int = 1,
    column: str = "prompt",
    output: str = "completion",
    options: SamplingOptions | None = None,
    batch_size: int = 64,
    load: Mapping[str, Any] | None = None,
) -> ray.data.Dataset:
    """Continues the texts of a dataset, or answers its conversations.

    The same rows give the same texts with a seed or at temperature 0, on whichever workers they are computed.

    Args:
        dataset: any of Ray Data's.
        source: the model, as in `Model.load`: a path that all machines have, or a repository that each fetches.
        workers: processes with a model each.
        threads: threads of each worker, and the CPUs that Ray sets aside for it.
        column: what holds a text to continue, or a conversation as a list of messages.
        output: the column for what the model writes. `finish_reason`, `prompt_tokens` and `completion_tokens` come
            beside it.
        options: as in `Model.generate`.
        batch_size: rows that a worker takes at a time; what is done again if it dies.
        load: other arguments of `Model.load`, such as `{"context": 2048}`.
    """
    return dataset.map_batches(
        Worker,
        fn_constructor_kwargs={
            "source": source,
            "load": {"threads": threads, **(load or {})},
            "options": options or SamplingOptions(),
            "column": column,
            "output": output,
        },
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
    )


def deployment(
    source: str | None = None,
    *,
    name: str,
    replicas: int = 1,
    threads: int = 1,
    max_batch: int = 16,
    max_queue: int = 128,
    api_key: str | None = None,
    load: Mapping[str, Any] | None = None,
) -> serve.Application:
    """The server as an application: `serve.run(nybble.ray.deployment("model.gguf", name="model"))`.

    Ray Serve listens, and distributes requests over the replicas.

    Args:
        source: the model, as in `Model.load`.
        name: what clients call it.
        replicas: processes with a model each.
        threads: threads of each replica, and the CPUs that Ray sets aside for it.
        max_batch: answers that a replica writes at the same time.
        max_queue: answers that may wait at a replica.
        api_key: what clients must know.
        load: other arguments of `Model.load`.
    """
    build = functools.partial(
        _application, source, {"threads": threads, **(load or {})}, name, max_batch, max_queue, api_key
    )

    def builder() -> FastAPI:
        return build()

    made = serve.deployment(
        serve.ingress(builder)(),
        name="nybble",
        num_replicas=replicas,
        # Requests for the page, for health and for metrics are answered beside those that wait.
        max_ongoing_requests=max_batch + max_queue + 16,
        ray_actor_options={"num_cpus": threads},
    )
    application: serve.Application = made.bind()
    return application


def _application(
    source: str | None, load: Mapping[str, Any], name: str, max_batch: int, max_queue: int, api_key: str | None
) -> FastAPI:
    from nybble.engine import Engine
    from nybble.server import Service, Settings, create_app

    engine = Engine(Model.load(source, progress=False, **load), max_batch=max_batch, max_queue=max_queue)
    return create_app(Service(engine, name, Settings(api_key=api_key, max_answers=max_batch + max_queue)))
