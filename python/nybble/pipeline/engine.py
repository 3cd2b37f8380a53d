"""`Pipeline`: an engine whose model is divided into stages."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble import _native
from nybble.engine import Engine
from nybble.engine_options import EngineOptions, merge_engine_options
from nybble.generation.driver import SAVING_SECONDS
from nybble.load_options import LoadOptions
from nybble.model import Model
from nybble.model_info import ModelInfo
from nybble.pipeline import worker
from nybble.pipeline.stages import StageInfo, Stages, Units

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nybble.engine_options import EngineOverrides

Source = str | os.PathLike[str]


class StagedModel(Model):
    """A model whose layers are in the stages of a pipeline. This process has its tokenizer, and no weights.

    It generates, chats and computes logits as other models do. It has no adapters, no embeddings, and its sessions
    cannot be saved.
    """

    stages: Stages
    units: Sequence[Units]
    """The units of each stage: layers from 0 on, then the model's output."""
    stage_infos: Sequence[StageInfo]

    @classmethod
    def open(
        cls,
        source: Source | None,
        new_stages: Callable[[Path, Sequence[Units]], Stages],
        count: int,
        options: LoadOptions,
        cuts: Sequence[int] | None,
    ) -> StagedModel:
        """Divides a model, starts its stages and waits until they are loaded."""
        from nybble.models import hub
        from nybble.tokenizer.tokenizer import Tokenizer

        if options.quantize is not None and ":" in options.quantize:
            raise ValueError(f"quantize: found {options.quantize!r}, expected auto, int4, int8 or None for a pipeline")
        if options.mtp:
            raise ValueError("mtp: found True, expected None or False for a pipeline, which does not use the head")
        file = hub.resolve(source, filename=options.filename, revision=options.revision)
        units = divided(file, options, count, cuts)
        stages = new_stages(file, units)
        # It computes nothing, so it needs no threads.
        native = _native.pipeline(file, options.replace(threads=1), stages)
        info = native.info()
        try:
            chosen = options.replace(cache_type=info["cache_type"], context=info["context"], mtp=False)
            infos = stages.start(chosen)
            model = cls._of(native, Tokenizer.load(file, mmap=options.mmap), file, file)
        except BaseException:
            stages.close()
            raise
        model.stages, model.units, model.stage_infos = stages, units, infos
        sums = {
            name: sum(getattr(each, name) for each in infos) for name in ("threads", "weight_bytes", "bytes_per_token")
        }
        model.info = ModelInfo(file=file, **{**info, **sums, "kernel": infos[0].kernel})
        model._cache_limit = _cache_limit(infos, int(info["cache_bytes"]))
        # Also when the model is garbage collected, and at the end of the process while Python still runs.
        weakref.finalize(model, stages.close)
        return model

    def close(self) -> None:
        """Ends the stages. Later calls raise `ModelError`."""
        super().close()
        self.stages.close()


def divided(path: Path, options: LoadOptions, count: int, cuts: Sequence[int] | None) -> list[Units]:
    """Divides a model at `cuts`, or so that the stage with the most bytes of weights has as few as possible.

    Raises:
        ValueError: The model cannot be divided so.
    """
    if count < 1:
        raise ValueError(f"stages: found {count}, expected 1 or more")
    if cuts is None:
        return _native.divide(path, options, count)
    ((_, end),) = _native.divide(path, options, 1)
    bounds = [0, *cuts, end]
    if len(cuts) != count - 1 or bounds != sorted(set(bounds)):
        raise ValueError(f"cuts: found {list(cuts)}, expected {count - 1} rising numbers from 1 to {end - 1}")
    return [*itertools.pairwise(bounds)]


def _cache_limit(infos: Sequence[StageInfo], cache_bytes: int) -> int:
    """The default size of the KV cache of all stages: half of what the stage with the least free memory has left."""
    limits = [
        info.available_bytes // 2 * cache_bytes // info.cache_bytes
        for info in infos
        if info.available_bytes is not None and info.cache_bytes > 0
    ]
    return max(cache_bytes, min(limits, default=1 << 30))


class Pipeline(Engine):
    """An engine whose model is divided into stages, which other processes or machines compute.

    It is used like any `Engine`, and results are bit-identical to those of one process. While one stage computes some
    requests, the others compute the rest, so all are busy once there is a request for each stage. A stage that ends is
    started again, and what it had computed is computed again from the tokens.

    `close` ends the stages as well.
    """

    model: StagedModel

    def close(self, *, drain: bool = False, saving_seconds: float = SAVING_SECONDS) -> None:
        """Stops the engine and its stages. Later requests raise `ModelError`.

        Args:
            drain: Finish all running and waiting requests first. Otherwise they fail with `ModelError`.
            saving_seconds: Without effect: a pipeline has no `cache_dir`.
        """
        super().close(drain=drain, saving_seconds=saving_seconds)
        self.model.close()


def open_pipeline(
    source: Source | None,
    new_stages: Callable[[Path, Sequence[Units]], Stages],
    stages: int,
    options: EngineOptions | None,
    *,
    load: LoadOptions,
    cuts: Sequence[int] | None,
    draft: Model | None,
    overrides: Mapping[str, Any],
) -> Pipeline:
    """Starts the stages of a model and an engine over them."""
    chosen = merge_engine_options(options, {**overrides})  # type: ignore[typeddict-item]
    if chosen.cache_dir is not None:
        raise ValueError("cache_dir: found a folder, expected None for a pipeline, whose stages keep the prefix cache")
    if chosen.speculation == "mtp":
        raise ValueError('speculation: found "mtp", expected "off", "on" or "auto" for a pipeline')
    model = StagedModel.open(source, new_stages, stages, load, cuts)
    try:
        return Pipeline(model, chosen, draft=draft)
    except BaseException:
        model.close()
        raise


def processes(
    source: Source | None = None,
    *,
    stages: int = 2,
    cuts: Sequence[int] | None = None,
    load: LoadOptions | None = None,
    options: EngineOptions | None = None,
    draft: Model | None = None,
    silent_seconds: float = worker.SILENT_SECONDS,
    **overrides: Unpack[EngineOverrides],
) -> Pipeline:
    """Starts a pipeline whose stages are processes of this machine.

    Args:
        source: The model, as in `Model.load`.
        stages: Number of processes.
        cuts: The first layers of all stages but the first; the number of layers stands for the model's output. None
            divides the weights evenly.
        load: How each stage loads its part; `threads` is the number of each. The defaults of `LoadOptions` if None.
        options: As in `Engine`.
        draft: As in `Engine`; it computes in this process.
        silent_seconds: A stage sends a sign of life every second, also while it computes. A stage that is silent for
            this long is killed and started again.
        **overrides: Single options of the engine by name.

    Raises:
        ValueError: An option is out of range, or the model cannot be divided so, or does not generate text.
        FileNotFoundError, PermissionError, ConnectionError: The file cannot be read or downloaded.
        MemoryError: A part does not fit into memory.

    Example:
        ```python
        from nybble import pipeline

        with pipeline.processes("model.gguf", stages=2) as engine:
            print(engine.submit("Once upon a time", max_tokens=64).result())
        ```
    """
    if not silent_seconds > 0:
        raise ValueError(f"silent_seconds: found {silent_seconds}, expected more than 0")
    new_stages = lambda path, units: worker.processes(str(path), units, silent_seconds=silent_seconds)  # noqa: E731
    return open_pipeline(
        source,
        new_stages,
        stages,
        options,
        load=load or LoadOptions(),
        cuts=cuts,
        draft=draft,
        overrides=overrides,
    )
