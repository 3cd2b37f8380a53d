"""Ray on this machine with two workers. Needs the group `ray`, and is skipped without it."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nybble import Model

pytest.importorskip("ray", reason="needs Ray: pip install --group ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OPTIONS: Any = {"max_tokens": 8, "seed": 3}
PROMPTS = [f"prompt {number}" for number in range(1000)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    paths = [str(Path(__file__).parents[3] / "python"), str(Path(__file__).parents[1] / "support")]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env=environment, object_store_memory=200 << 20)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"number": n, "prompt": p}) + "\n" for n, p in enumerate(PROMPTS)))
    return file


@pytest.fixture(scope="module")
def expected(tiny_model: Model) -> list[str]:
    return [done.text for done in tiny_model.generate(PROMPTS, **OPTIONS)]


def pids(name: str) -> list[int]:
    """The processes of this machine that are named after a worker of Ray."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if line.startswith("ray::") and name in line:
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("killed", [False, True])
def test_a_thousand_prompts_are_completed_once_each(
    cluster: Any, tiny_file: Path, prompts: Path, expected: list[str], killed: bool
) -> None:
    import nybble.integrations.ray
    from nybble import SamplingOptions

    dataset = cluster.data.read_json(str(prompts)).repartition(40)
    done = nybble.integrations.ray.generate(
        dataset, str(tiny_file), workers=2, batch_size=10, options=SamplingOptions(**OPTIONS)
    )
    rows = []
    workers: list[int] = []
    for row in done.iter_rows():
        rows.append(row)
        if killed and not workers:
            workers = pids("MapWorker") or pids("Worker")
            assert workers
            os.kill(workers[0], signal.SIGKILL)
    assert sorted(row["number"] for row in rows) == list(range(1000))
    assert [row["completion"] for row in sorted(rows, key=lambda row: row["number"])] == expected
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}


def test_conversations_are_answered_through_the_chat_template(cluster: Any, tiny_file: Path, tiny_model: Model) -> None:
    import nybble.integrations.ray
    from nybble import SamplingOptions

    turns = [{"role": "user", "content": "Hello"}]
    dataset = cluster.data.from_items([{"messages": turns}])
    options = SamplingOptions(**OPTIONS)
    (row,) = nybble.integrations.ray.generate(dataset, str(tiny_file), column="messages", options=options).take_all()
    assert row["completion"] == tiny_model.chat(turns, **OPTIONS).text


def test_replicas_answer_like_the_server(cluster: Any, tiny_file: Path, tiny_model: Model) -> None:
    from ray import serve

    import nybble.integrations.ray

    serve.start(http_options={"host": "127.0.0.1", "port": 18437})
    serve.run(
        nybble.integrations.ray.deployment(str(tiny_file), name="tiny", replicas=2, api_key="s3cret"), route_prefix="/"
    )
    turns = [{"role": "user", "content": "Hello"}]
    alone = tiny_model.chat(turns, **OPTIONS).text

    def ask(stream: bool) -> str:
        body = json.dumps({"model": "tiny", "messages": turns, "stream": stream, **OPTIONS}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer s3cret"}
        request = urllib.request.Request("http://127.0.0.1:18437/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
        if not stream:
            return str(json.loads(text)["choices"][0]["message"]["content"])
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

    answers: list[str] = []
    threads = [threading.Thread(target=lambda n=n: answers.append(ask(n % 2 == 0))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    serve.shutdown()
    assert answers == [alone] * 8


@pytest.mark.parametrize("killed", [False, True])
def test_a_model_in_stages_on_actors_answers_the_same(
    cluster: Any, tmp_path_factory: pytest.TempPathFactory, killed: bool
) -> None:
    import tiny

    import nybble.integrations.ray

    file = tiny.write_model(tmp_path_factory.mktemp("deep") / "deep.gguf", layers=4)
    options: Any = {"max_tokens": 24, "ignore_eos": True}
    with Model.load(file, threads=1) as model:
        expected = [model.generate(prompt, seed=n, **options).text for n, prompt in enumerate(PROMPTS[:16])]
    with nybble.integrations.ray.pipeline(file, stages=3, speculation="on") as engine:
        assert len(engine.model.stage_infos) == 3
        requests = [engine.submit(prompt, seed=n, **options) for n, prompt in enumerate(PROMPTS[:16])]
        if killed:
            next(iter(requests[0]))
            actors = pids("StageActor")
            assert len(actors) == 3
            os.kill(actors[1], signal.SIGKILL)
        assert [request.result(timeout=300).text for request in requests] == expected
        assert engine.failure is None
