"""A model that is larger than the memory of each machine runs in stages. Groups with a limit stand for machines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import cgroups
import pytest
import tiny

from nybble import LoadOptions, Model, SamplingOptions
from nybble.pipeline import relay
from nybble.pipeline.engine import open_pipeline
from nybble.pipeline.stages import Units
from nybble.pipeline.worker import ProcessLink

STAGES = 4
JOIN = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"']
"""Joins the group whose folder comes first, and runs the rest as a command."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs control groups")
def test_four_processes_run_a_model_three_times_as_large_as_each_may_be(tmp_path: Path) -> None:
    file = tiny.write_large(tmp_path / "large.gguf", layers=20, hidden=2048, feed_forward=8192)
    limit = file.stat().st_size // 3
    prompts = [[n, 1, 2] for n in range(4)]
    options = SamplingOptions(max_tokens=3, seed=1, ignore_eos=True)
    load = LoadOptions(threads=1, context=128)
    with contextlib.ExitStack() as stack:
        limits = {"memory.max": limit, "memory.swap.max": 0}
        groups = [
            stack.enter_context(
                cgroups.group("memory", first={"memory.limit_in_bytes": limit}, second=limits, number=number)
            )
            for number in range(STAGES)
        ]

        def new_stages(path: Path, units: Sequence[Units]) -> relay.Relay:
            folders = dict(zip(units, groups, strict=False))

            def connect(options: LoadOptions, own: Units) -> ProcessLink:
                return ProcessLink(str(path), options, own, [*JOIN, str(folders[own])])

            return relay.Relay(connect, units)

        def answers(stages: int) -> list[list[int]]:
            cache = {"cache_bytes": 16 << 20}
            with open_pipeline(
                file, new_stages, stages, None, load=load, cuts=None, draft=None, overrides=cache
            ) as engine:
                assert engine.model.info.weight_bytes > 2.9 * limit
                requests = [engine.submit(prompt, options) for prompt in prompts]
                return [[*request.result(timeout=300).tokens] for request in requests]

        found = answers(STAGES)
        # One of them has no memory for the model as a whole.
        with pytest.raises((MemoryError, ConnectionError)):
            answers(1)
    with Model.load(file, load) as whole:
        assert [[*done.tokens] for done in whole.generate(prompts, options)] == found
