"""What people see of objects: representations, notebooks, and the errors of using a class the wrong way."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nybble
from nybble import (
    Candidate,
    Completion,
    Engine,
    Evaluation,
    Model,
    ModelError,
    Reference,
    Report,
    Request,
    Session,
    TensorReport,
    TextStream,
    Timings,
    Tokenizer,
    Usage,
)

WRITE_X: Any = {"logit_bias": {ord("x"): 1000.0}, "max_tokens": 3}
HOSTILE = '<script>alert("&")</script>'


def test_requests_and_streams_show_their_state(tiny_model: Model) -> None:
    stream = tiny_model.stream("abc", **WRITE_X)
    assert repr(stream) == "<TextStream: 0 tokens, running>"
    next(stream)
    assert repr(stream) == "<TextStream: 1 token, running>"
    list(stream)
    assert repr(stream) == "<TextStream: 3 tokens, length>"
    closed = tiny_model.stream("abc")
    closed.close()
    assert repr(closed) == "<TextStream: 0 tokens, cancelled>"
    with Engine(tiny_model) as engine:
        request = engine.submit("abc", **WRITE_X)
        request.result()
        assert repr(request) == "<Request: 3 tokens, length>"
        cancelled = engine.submit("abc", max_tokens=None)
        cancelled.cancel()
        assert repr(cancelled) == "<Request: cancelled>"
        texts = engine.stream("abc", **WRITE_X)
        assert repr(texts).startswith("<stream of <Request: ")
    failed = Engine(tiny_model)
    lost = failed.submit("abc", logit_bias={ord("x"): 1000.0}, max_tokens=None)
    failed.close()
    assert repr(lost).startswith("<Request: failed: ModelError(") or repr(lost) == "<Request: 126 tokens, length>"


def test_a_reference_shows_the_size_of_its_text(tiny_model: Model) -> None:
    assert repr(Reference(tiny_model, ["a" * 250], window=100)) == "<Reference of 2 windows of 100 tokens>"


def test_a_completion_in_a_notebook_is_escaped() -> None:
    done = Completion(
        text=f"{HOSTILE}\n& more",
        tokens=(1, 2),
        finish_reason="stop",
        usage=Usage(7, 2),
        timings=Timings(0.5, 0.1, 14.0, 10.0),
    )
    page = done._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;\n&amp; more" in page
    assert "7 + 2 tokens, 10.0 tokens/s, stop" in page
    assert "tokens/s" not in dataclasses.replace(done, timings=Timings(0, 0, 0, 0))._repr_html_()


def test_a_report_and_an_evaluation_in_a_notebook_are_escaped() -> None:
    candidate = Candidate("gptq", "q4_0", 32, 1000, 12.5, 0.01, 0.005, 0.1, 0.97, 3.0, chosen=True)
    report = Report(
        source=Path("folder"),
        out=Path(f"{HOSTILE}.gguf"),
        recipe=HOSTILE,
        size_bytes=1_500_000,
        bits_per_weight=4.5,
        seconds=75,
        tensors=(TensorReport("blk.0.attn_q.weight", HOSTILE, 32, "gptq", 0.01, 1.0),),
        candidates=(candidate,),
        reference_perplexity=12.0,
    )
    page = report._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3
    for shown in ("1.5 MB", "4.50 bits per weight", "12.50 (source: 12.00)", "97.0%", "1 min 15 s"):
        assert shown in page, shown
    page = Evaluation(1000, 12.5, 0.25, kl_mean=0.0125)._repr_html_()
    assert "1,000" in page
    assert "12.5 ± 0.25" in page
    assert "0.0125" in page
    assert "reference" not in page


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        (Model, r"Model\.load\('x\.gguf'\)"),
        (Session, r"Model\.session\(\) or Model\.load_session\('x\.gguf'\)"),
        (Tokenizer, r"Tokenizer\.load\('x\.gguf'\)"),
        (TextStream, r"Model\.stream\('x\.gguf'\)"),
        (Request, r"Engine\.submit\('x\.gguf'\)"),
    ],
)
def test_a_class_that_methods_return_names_them_when_it_is_called(kind: Any, instead: str) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__} cannot be created directly, expected {instead}$"):
        kind("x.gguf")
    for arguments in ((), (1, 2, 3)):
        with pytest.raises(TypeError, match=r"cannot be created directly, expected \w+\.\w+\((\.\.\.)?\)"):
            kind(*arguments)


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy])
def test_pickling_what_holds_a_model_says_what_to_do_instead(
    tiny_model: Model, use: Callable[[object], object]
) -> None:
    with Engine(tiny_model) as engine:
        for found, instead in (
            (tiny_model, r"load it in the other process with Model\.load"),
            (tiny_model.session(), r"save it, and call Model\.load_session in the other process"),
            (tiny_model.stream("a"), "iterate over it here and send its text"),
            (engine, "load the model and create an engine in the other process"),
            (engine.submit("a", max_tokens=1), "wait for its result here and send that"),
        ):
            with pytest.raises(
                TypeError, match=f"{type(found).__name__} objects hold state of this process.*{instead}"
            ):
                use(found)


def test_a_tokenizer_can_be_pickled_after_any_use(tiny_file: Path) -> None:
    tokenizer = Tokenizer.load(tiny_file)
    messages = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages)
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other.apply_chat_template(messages) == prompt
        assert other.decode(other.encode(prompt)) == tokenizer.decode(tokenizer.encode(prompt))
        assert repr(other) == repr(tokenizer)


def test_a_chat_template_that_replaces_the_models_own_is_kept(tiny_file: Path) -> None:
    tokenizer = Tokenizer.load(tiny_file)
    messages = [{"role": "user", "content": "Hello"}]
    before = tokenizer.apply_chat_template(messages)
    with pytest.raises(ModelError, match="line 1"):
        tokenizer.replace_chat_template("{% if %}")
    assert tokenizer.apply_chat_template(messages) == before
    tokenizer.replace_chat_template("<{{ messages[0].content }}>")
    for other in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other.apply_chat_template(messages) == "<Hello>"


def test_completions_and_options_can_be_pickled_and_copied(tiny_model: Model) -> None:
    done = tiny_model.generate("he", logprobs=1, max_tokens=4, temperature=0)
    assert pickle.loads(pickle.dumps(done)) == copy.deepcopy(done) == done
    assert json.loads(json.dumps(dataclasses.asdict(done)))["text"] == done.text
    options = nybble.SamplingOptions(seed=1, stop="a", logit_bias={1: 2.0}, min_tokens=3)
    assert pickle.loads(pickle.dumps(options)) == copy.deepcopy(options) == options


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("lm_eval", "lm-eval")])
def test_an_integration_without_its_package_says_what_to_install(name: str, package: str) -> None:
    script = f"import sys; sys.modules['{name}'] = None; import nybble.integrations.{name}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    line = done.stderr.splitlines()[-1]
    assert line == f"ModuleNotFoundError: nybble.integrations.{name} needs {name}: pip install 'nybble[{package}]'"


def test_an_engine_of_something_else_names_the_argument(tiny_model: Model) -> None:
    engine: Any = Engine
    with pytest.raises(TypeError, match="model: found str, expected a Model"):
        engine("model.gguf")
    with pytest.raises(TypeError, match="draft: found str, expected a Model"):
        engine(tiny_model, draft="model.gguf", speculation="on")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": "4"}, r"threads: found '4' \(str\), expected int"),
        ({"context": True}, r"context: found True \(bool\), expected int"),
        ({"quantize": 5}, r"quantize: found 5 \(int\), expected str"),
        ({"mmap": "no"}, r"mmap: found 'no' \(str\), expected bool"),
        ({"expert_memory": True}, r"expert_memory: found True \(bool\), expected int or float or str"),
        ({"expert_skip": "0.1"}, r"expert_skip: found '0.1' \(str\), expected int or float"),
        ({"options": {"threads": 4}}, "options: found dict, expected LoadOptions or single options by name"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_by_name(tiny_file: Path, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Model.load(tiny_file, **options)


def test_options_of_the_wrong_class_are_refused_by_name(tiny_model: Model) -> None:
    options: Any = {"temperature": 0}
    with pytest.raises(TypeError, match="options: found dict, expected SamplingOptions or single options by name"):
        tiny_model.generate("a", options)
    with pytest.raises(TypeError, match="options: found dict, expected EngineOptions or single options by name"):
        Engine(tiny_model, options)
    with pytest.raises(TypeError, match=r"max_batch: found '5' \(str\), expected int"):
        nybble.EngineOptions(max_batch="5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("open_file", "number"),
    [
        (lambda missing, model: Model.load(missing), 2),
        (lambda missing, model: Tokenizer.load(missing), 2),
        (lambda missing, model: model.load_session(missing), 2),
        (lambda missing, model: model.session().save(missing / "file"), 2),
        (lambda missing, model: nybble.quantize(missing, missing.parent / "out.gguf"), 2),
        (lambda missing, model: nybble.evaluate(model, missing, window=64), 2),
        (lambda missing, model: model.load_session(missing.parent), 21),
    ],
)
def test_an_error_of_a_file_has_its_number_and_name(
    tmp_path: Path, tiny_model: Model, open_file: Callable[[Path, Model], object], number: int
) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(OSError, match=r"missing|directory") as caught:
        open_file(missing, tiny_model)
    assert type(caught.value) is {2: FileNotFoundError, 21: IsADirectoryError}[number]
    assert caught.value.errno == number
    assert Path(caught.value.filename) in (missing, missing / "file", missing.parent)
    assert caught.value.strerror


def test_an_existing_output_and_a_missing_folder_have_number_and_name(tmp_path: Path, tiny_file: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"")
    with pytest.raises(FileExistsError, match="use force to overwrite it") as exists:
        nybble.quantize(tiny_file, out)
    with pytest.raises(FileNotFoundError, match="its folder does not exist") as missing:
        nybble.quantize(tiny_file, tmp_path / "none" / "out.gguf")
    assert (exists.value.errno, exists.value.filename) == (17, str(out))
    assert (missing.value.errno, missing.value.filename) == (2, str(tmp_path / "none" / "out.gguf"))
