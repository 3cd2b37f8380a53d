"""Runs nybble on several machines with Ray: `pip install nybble[ray]`.

`generate` completes the rows of a dataset on several workers. Ray replaces a worker that dies and repeats its batch.
`deployment` turns the server of `nybble serve` into an application of Ray Serve with replicas. `pipeline` divides one
model into stages on several machines.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nybble.integrations import _needs

try:
    import ray.data
    from ray import serve

    from nybble.integrations.ray_stages import RayStages
except ModuleNotFoundError as _error:
    raise _needs("ray", _error) from None

from nybble.load_options import LoadOptions
from nybble.model import Model
from nybble.pipeline.engine import Pipeline, Source, open_pipeline
from nybble.sampling import SamplingOptions

if TYPE_CHECKING:
    from fastapi import FastAPI
    from typing_extensions import Unpack

    from nybble.engine_options import EngineOptions, EngineOverrides

__all__ = ["Batch", "Worker", "deployment", "generate", "pipeline"]

Batch = dict[str, np.ndarray[Any, Any]]

# Ray's own types are not named, so that programs without Ray can check theirs.
Dataset = TypeVar("Dataset")


class Worker:
    """A model in a worker process of Ray, which maps batches of rows. `generate` creates it."""

    def __init__(
        self, source: str | None, load: Mapping[str, Any], options: SamplingOptions, column: str, output: str
    ) -> None:
        self._model = Model.load(source, progress=False, **load)
        self._options = options
        self._column = column
        self._output = output

    def __call__(self, batch: Batch) -> Batch:
        """Adds the completion, the finish reason and the token counts to each row."""
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
    dataset: Dataset,
    source: str | None = None,
    *,
    workers: int = 1,
    threads: int = 1,
    column: str = "prompt",
    output: str = "completion",
    options: SamplingOptions | None = None,
    batch_size: int = 64,
    load: Mapping[str, Any] | None = None,
) -> Dataset:
    """Completes the prompts of a dataset, or answers its conversations.

    With a seed or at temperature 0, completions do not depend on the workers that compute them.

    Args:
        dataset: A dataset of Ray Data.
        source: The model, as in `Model.load`: a path that exists on all machines, or a repository that each downloads.
        workers: Number of processes, each with its own model.
        threads: Threads of each worker, and CPUs that Ray reserves for it.
        column: The column with prompts, or with conversations as lists of messages.
        output: The column for completions. The columns `finish_reason`, `prompt_tokens` and `completion_tokens` are
            added as well.
        options: As in `Model.generate`.
        batch_size: Rows per batch, the unit of work that is repeated if a worker dies.
        load: Other arguments of `Model.load`, such as `{"context": 2048}`.

    Returns:
        The dataset with the added columns, computed when it is read.
    """
    rows: Any = dataset
    mapped: Dataset = rows.map_batches(
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
    return mapped


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
) -> Any:
    """Turns the server into an application of Ray Serve, which distributes requests over replicas.

    Args:
        source: The model, as in `Model.load`.
        name: The name of the model for clients.
        replicas: Number of processes, each with its own model.
        threads: Threads of each replica, and CPUs that Ray reserves for it.
        max_batch: Answers that a replica generates at the same time.
        max_queue: Answers that may wait at a replica.
        api_key: The key that clients must send; None for no key.
        load: Other arguments of `Model.load`.

    Returns:
        The application, for `ray.serve.run`.

    Example:
        ```python
        from nybble.integrations.ray import deployment
        serve.run(deployment("model.gguf", name="model", replicas=2))
        ```
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
        # The page, health and metrics are served in addition to answers.
        max_ongoing_requests=max_batch + max_queue + 16,
        ray_actor_options={"num_cpus": threads},
    )
    return made.bind()


def pipeline(
    source: Source | None = None,
    *,
    stages: int = 2,
    threads: int = 1,
    cuts: Sequence[int] | None = None,
    address: str | None = None,
    load: LoadOptions | None = None,
    options: EngineOptions | None = None,
    draft: Model | None = None,
    **overrides: Unpack[EngineOverrides],
) -> Pipeline:
    """Divides a model into stages, each an actor of Ray, and returns an engine over them.

    Each stage reads only its layers. Ray places the stages on as many machines as it has. Results are bit-identical to
    those of one process. A stage that dies is started again, and its requests are computed again from their tokens.

    Args:
        source: The model, as in `Model.load`: a path that exists on all machines and on this one, or a repository that
            each downloads.
        stages: Number of stages.
        threads: Threads of each stage, and CPUs that Ray reserves for it.
        cuts: The first layers of all stages but the first; the number of layers stands for the model's output. None
            divides the weights evenly.
        address: The address of the cluster, as in `ray.init`, if Ray is not connected yet.
        load: How each stage loads its part, but for `threads`. The defaults of `LoadOptions` if None.
        options: As in `Engine`.
        draft: As in `Engine`; it computes in this process.
        **overrides: Single options of the engine by name.

    Raises:
        ValueError: An option is out of range, or the model cannot be divided so, or does not generate text.
        FileNotFoundError, PermissionError, ConnectionError: The file cannot be read or downloaded.

    Example:
        ```python
        from nybble.integrations.ray import pipeline

        with pipeline("model.gguf", stages=4, threads=16, address="auto") as engine:
            print(engine.submit("Once upon a time", max_tokens=64).result())
        ```
    """
    if not ray.is_initialized():
        ray.init(address=address)
    name = None if source is None else os.fspath(source)
    return open_pipeline(
        source,
        lambda _, units: RayStages(name, units, threads),
        stages,
        options,
        load=(load or LoadOptions()).replace(threads=threads),
        cuts=cuts,
        draft=draft,
        overrides=overrides,
    )


def _application(
    source: str | None, load: Mapping[str, Any], name: str, max_batch: int, max_queue: int, api_key: str | None
) -> FastAPI:
    from nybble.engine import Engine
    from nybble.server import Service, Settings, create_app

    engine = Engine(Model.load(source, progress=False, **load), max_batch=max_batch, max_queue=max_queue)
    return create_app(Service(engine, name, Settings(api_key=api_key, max_answers=max_batch + max_queue)))
