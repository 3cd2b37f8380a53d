"""lm-evaluation-harness, by the class `nybble` and through the server. Needs the extra `lm-eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from serving import Running

from nybble import Model, Report, _native, quantize
from nybble.cli import main
from nybble.integrations.tasks import compare_tasks

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: make test-clients")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUESTIONS: list[dict[str, Any]] = [
    {"question": "The sky is", "choices": [" blue", " made of stone", " a"], "answer": 0},
    {"question": "Two and two are", "choices": [" 4", " 5", " 6"], "answer": 0},
    {"question": "Für alle:", "choices": [" ja", "nein", " vielleicht\n"], "answer": 2},
    {"question": "A long one." * 40, "choices": [" x", " yy"], "answer": 1},
]
TEXTS = ["One river.", "Zwei Flüsse fließen weiter.", "x", "A text that is longer than the context. " * 12]
COMMON = "dataset_path: json\ntest_split: test\n"
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "until": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "x"
generation_kwargs: {until: ["e", "<|im_end|>"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
CONTEXT = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    file = tiny.write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", llama__context_length=CONTEXT)
    with Model.load(file, threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks."""
    found = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        rows = QUESTIONS if name == "choices" else [{"text": text} for text in TEXTS]
        data = found / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (found / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{files}{task}")
    return found


def evaluate(model: Any, folder: Path, *tasks: str, **arguments: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model, tasks=[*tasks], task_manager=manager, log_samples=True, bootstrap_iters=0, **arguments
    )
    return found


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """What the model said to each document, in the order of the documents."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


def direct(model: Model, context: str, continuation: str, longest: int) -> tuple[float, bool]:
    """The log-likelihood of a continuation by the logits of the model."""
    ids = model.tokenize(context + continuation)
    count = len(ids) - len(model.tokenize(context))
    logits = model.logits(ids[-longest - 1 : -1]).astype(np.float64)[-count:]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = sum(float(row[token]) for row, token in zip(logprobs, ids[-count:], strict=True))
    return total, [int(row.argmax()) for row in logits] == ids[-count:]


def by_class(model: Model) -> Any:
    from nybble.integrations.lm_eval import NybbleLM

    return NybbleLM(model)


def through_server(server: Running) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model="tiny", base_url=f"{server.url}/v1/completions", max_length=CONTEXT, tokenizer_backend="auto"
    )


@pytest.mark.parametrize("way", ["class", "server"])
def test_a_task_gets_the_figures_of_direct_logits(way: str, model: Model, server: Running, folder: Path) -> None:
    lm = by_class(model) if way == "class" else through_server(server)
    results = evaluate(lm, folder, "choices", "rolling", "until")
    # The server generates one token behind an echo, which needs a position of the context.
    longest = CONTEXT if way == "class" else CONTEXT - 2
    right = 0
    for question, found in zip(QUESTIONS, responses(results, "choices"), strict=True):
        expected = [direct(model, question["question"], choice, longest) for choice in question["choices"]]
        # The harness stores a log-likelihood as text.
        said = [(float(logprob), str(greedy) == "True") for ((logprob, greedy),) in found]
        assert [greedy for _, greedy in said] == [greedy for _, greedy in expected]
        assert [logprob for logprob, _ in said] == pytest.approx([logprob for logprob, _ in expected], abs=2e-3)
        right += int(np.argmax([logprob for logprob, _ in expected])) == question["answer"]
    assert results["results"]["choices"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    total = 0.0
    start = tiny.IM_START
    for text, ((found,),) in zip(TEXTS[:3], responses(results, "rolling"), strict=False):
        ids = model.tokenize(text)
        logits = model.logits([start, *ids[:-1]]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected_total = float(logprobs[np.arange(len(ids)), ids].sum())
        assert float(found) == pytest.approx(expected_total, abs=2e-3)
        total += float(found)
    assert total < 0
    for text, ((found,),) in zip(TEXTS[:3], responses(results, "until"), strict=False):
        completion = model.generate(text, temperature=0, stop=["e"], max_tokens=8)
        assert found == completion.text


def test_both_ways_give_the_same_perplexity(model: Model, server: Running, folder: Path) -> None:
    def perplexity(lm: Any) -> float:
        return float(evaluate(lm, folder, "rolling")["results"]["rolling"]["byte_perplexity,none"])

    from nybble.integrations.lm_eval import NybbleLM

    # The server needs a place for a token that it generates, and the harness one more.
    assert perplexity(NybbleLM(model, max_length=CONTEXT - 2)) == pytest.approx(perplexity(through_server(server)))


def test_the_name_and_arguments_of_the_command_load_a_model(model: Model, folder: Path) -> None:
    from lm_eval.api.registry import get_model

    from nybble.integrations.lm_eval import NybbleLM

    assert get_model("nybble") is NybbleLM
    arguments = f"pretrained={model.info.file},threads=1,max_gen_toks=5"
    results = evaluate("nybble", folder, "until", model_args=arguments, batch_size=4, device="cpu")
    assert responses(results, "until") == responses(evaluate(by_class(model), folder, "until"), "until")


def test_the_module_is_the_command_of_the_harness(model: Model, folder: Path) -> None:
    command = [
        *(sys.executable, "-m", "nybble.integrations.lm_eval", "run", "--model", "nybble"),
        *("--model_args", f"pretrained={model.info.file},threads=1", "--tasks", "until"),
        *("--include_path", str(folder), "--output_path", str(folder / "out")),
    ]
    package = Path(__file__).parents[3] / "python"
    environment = {**os.environ, "PYTHONPATH": str(package), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exact_match" in done.stdout


def test_a_chat_template_and_the_start_of_an_answer_are_applied(model: Model, folder: Path) -> None:
    lm = by_class(model)
    turns = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(turns) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    begun = [*turns, {"role": "assistant", "content": "The answer is"}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\nThe answer is")
    results = evaluate(lm, folder, "choices", apply_chat_template=True)
    arguments = json.dumps(results["samples"]["choices"][0]["arguments"])
    assert '"<|im_start|>user\\nThe sky is<|im_end|>\\n<|im_start|>assistant\\n"' in arguments
    assert "im_start" in lm.chat_template(True)
    assert lm.tok_encode("<|im_start|>x") == [tiny.IM_START, ord("x")], "a start token is not doubled"


def test_contexts_that_are_too_long_are_cut_from_the_left(model: Model) -> None:
    from lm_eval.api.instance import Instance

    lm = by_class(model)

    def asked(kind: str, *arguments: Any) -> Instance:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    long = " abc" * 200
    ((found, _),) = lm.loglikelihood([asked("loglikelihood", long, " x")])
    assert found == pytest.approx(direct(model, long, " x", CONTEXT)[0])
    (text,) = lm.generate_until([asked("generate_until", long, {"until": ["\n\n"], "max_gen_toks": 6})])
    ids = model.tokenize(long)[-(CONTEXT - 6) :]
    assert text == model.generate(ids, temperature=0, max_tokens=6, stop=["\n\n"]).text
    assert lm.loglikelihood([asked("loglikelihood", "", "ab")])[0][0] < 0
    with pytest.raises(ValueError, match="a continuation has 500 tokens, expected at most 256"):
        lm.loglikelihood([asked("loglikelihood", "a", "b" * 500)])


@pytest.fixture(scope="module")
def source(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in F32."""
    path = tmp_path_factory.mktemp("source") / "tiny-f32.gguf"
    _native.convert(model.info.file, path, "f32")
    return path


def test_a_quantization_is_measured_in_tasks(source: Path, folder: Path, tmp_path: Path) -> None:
    stages = []
    done = quantize(source, tmp_path / "out.gguf", recipe="rtn", progress=False)
    report = compare_tasks(
        done,
        ["choices", " until"],
        folder=folder,
        limit=3,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    found = {(score.task, score.metric): score for score in report.tasks}
    assert [*found] == [("choices", "acc"), ("choices", "acc_norm"), ("until", "exact_match")]
    for path, name in ((source, "source"), (report.out, "value")):
        with Model.load(path, quantize=None if path == source else "auto", threads=2) as own:
            expected = evaluate(by_class(own), folder, "choices", limit=3)["results"]["choices"]
        assert getattr(found["choices", "acc"], name) == expected["acc,none"]
        assert getattr(found["choices", "acc_norm"], name) == expected["acc_norm,none"]
    accuracy = found["choices", "acc"]
    assert (accuracy.samples, accuracy.higher_is_better) == (3, True)
    assert accuracy.error is not None
    for what in ("the source", "the file"):
        counts = [(done, total) for stage, done, total in stages if stage == f"tasks with {what}"]
        assert counts[0][0] == 0
        assert counts[-1] == (3, 3), "one generation for each document"
    assert Report.from_json(report.to_json()) == report
    assert "choices, acc" in report._repr_html_()
    assert "<h2>Tasks</h2>" in report.to_html()


def test_tasks_that_cannot_be_used_are_refused_before_the_quantization(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "tasks"
    broken.mkdir()
    files = f"dataset_kwargs: {{data_files: {{test: {broken / 'none.jsonl'}}}}}\n"
    (broken / "broken.yaml").write_text(f"task: broken\n{COMMON}{files}{TASKS['choices']}")

    def said(*arguments: str) -> str:
        assert main(["quantize", str(source), str(tmp_path / "out.gguf"), "--recipe", "rtn", *arguments]) == 1
        return capsys.readouterr().err

    found = said("--tasks", "choices,no_such_task", "--task-folder", str(folder))
    assert "tasks: found no_such_task, expected tasks of" in found
    assert "missing: there is no such folder" in said("--tasks", "choices", "--task-folder", str(tmp_path / "missing"))
    assert "tasks: broken cannot be loaded: FileNotFoundError" in said(
        "--tasks", "broken", "--task-folder", str(broken)
    )
    assert "expected names of tasks" in said("--tasks", " ,")
    assert [*tmp_path.iterdir()] == [broken]


def test_a_command_interrupted_in_a_task_continues_there(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nybble.integrations.lm_eval import NybbleLM

    out, page = tmp_path / "out.gguf", tmp_path / "out.html"
    command = ["quantize", str(source), str(out), "--recipe", "rtn", "--tasks", "choices", "--task-folder", str(folder)]
    command += ["--report", str(page), "--evaluation", str(tmp_path / "prose.txt")]
    (tmp_path / "prose.txt").write_text("The dog and the fox are friends. " * 60)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(NybbleLM, "_loglikelihood_tokens", interrupt)
        assert main(command) == 130
    assert "the same command continues from here" in capsys.readouterr().err
    written = out.stat().st_mtime_ns
    assert main(command) == 0
    assert out.stat().st_mtime_ns == written
    assert "choices, acc" in capsys.readouterr().out
    assert "<h2>Tasks</h2>" in page.read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"out.gguf", "out.html", "out.json", "prose.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 10**6}, "max_length: found 1000000, expected 2 to 256"),
        ({"dtype": "float16"}, "dtype"),
    ],
    ids=str,
)
def test_arguments_are_refused_by_name(arguments: dict[str, Any], message: str, model: Model) -> None:
    from nybble.integrations.lm_eval import NybbleLM

    with pytest.raises((TypeError, ValueError), match=message):
        NybbleLM(str(model.info.file), **arguments)


def test_options_of_a_task_are_refused_by_name(model: Model) -> None:
    from lm_eval.api.instance import Instance

    lm = by_class(model)

    def said(**options: Any) -> Any:
        asked = Instance(request_type="generate_until", doc={}, arguments=("Hi", options), idx=0)
        return lm.generate_until([asked])[0]

    with pytest.raises(TypeError, match="penalty_alpha"):
        said(until=[], max_gen_toks=4, penalty_alpha=0.6)
    with pytest.raises(ValueError, match="max_gen_toks: found 256"):
        said(until=[])
    sampled = {"do_sample": True, "temperature": 0.9, "max_gen_toks": 12}
    assert said(**sampled) == said(**sampled), "the seed makes it repeatable"
    assert said(until="e", max_new_tokens=4) == said(until=["e", ""], max_tokens=4)
