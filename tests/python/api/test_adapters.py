"""LoRA adapters: chosen by name in each call, for everything, merged, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
import tiny

from nybble import Engine, Model, ModelError, SamplingOptions, _native
from nybble.cli import main
from nybble.load_options import LoadOptions

OPTIONS = SamplingOptions(max_tokens=24, temperature=0, logit_bias={tiny.IM_END: -100, tiny.END_OF_TEXT: -100})
NAMES = (None, "one", "two", "in.gguf")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters by name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": adapters.write_peft(folder / "one", 1),
        "two": adapters.write_peft(folder / "two", 2, rank=3, targets=("q_proj", "down_proj"), use_rslora=True),
        "in.gguf": adapters.write_gguf(folder / "three.gguf", 3),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a context of several pages."""
    return tiny.write_model(tmp_path_factory.mktemp("base") / "tiny.gguf", llama__context_length=512)


@pytest.fixture(scope="module")
def model(base: Path, paths: dict[str, Path]) -> Iterator[Model]:
    """The tiny model with all adapters."""
    with Model.load(base, threads=2, adapters=paths) as model:
        yield model


def test_a_call_chooses_an_adapter_by_its_name(model: Model, base: Path) -> None:
    assert model.adapters == ("in.gguf", "one", "two")
    completions = {name: model.generate("Once upon", OPTIONS, adapter=name).text for name in NAMES}
    assert len(set(completions.values())) == len(NAMES)
    with Model.load(base, threads=1) as plain:
        assert completions[None] == plain.generate("Once upon", OPTIONS).text
    assert "".join(model.stream("Once upon", OPTIONS, adapter="two")) == completions["two"]
    messages: Any = [{"role": "user", "content": "Hi"}]
    texts = {name: model.chat(messages, OPTIONS, adapter=name).text for name in NAMES}
    assert len(set(texts.values())) == len(NAMES)


def test_an_adapter_for_everything_computes_what_the_named_one_computes(
    model: Model, base: Path, paths: dict[str, Path]
) -> None:
    for name, path in paths.items():
        with Model.load(base, threads=1, adapter=path) as other:
            assert other.adapters == ()
            assert np.array_equal(other.logits("Once upon"), model.logits("Once upon", adapter=name))
            assert other.generate("Once", OPTIONS).text == model.generate("Once", OPTIONS, adapter=name).text
            found = other.embed("some text")
            assert np.array_equal(found, model.embed("some text", adapter=name))
            assert not np.array_equal(found, model.embed("some text"))


def test_requests_with_different_adapters_share_a_batch_and_no_pages(model: Model) -> None:
    prompts = ["a" * 150, "b" * 70, "a" * 150 + "c"]
    alone = {(prompt, name): model.generate(prompt, OPTIONS, adapter=name).text for prompt in prompts for name in NAMES}
    with Engine(model, max_batch=5) as engine:
        for _ in range(2):
            requests = [(key, engine.submit(key[0], OPTIONS, adapter=key[1])) for key in alone]
            assert {key: request.result().text for key, request in requests} == alone
        # The second time, each finds its own pages.
        assert engine.stats().reused_tokens >= sum(len(prompt) // 64 * 64 for prompt, _ in alone)


def test_a_session_keeps_its_adapter(model: Model, tmp_path: Path) -> None:
    session = model.session(adapter="one")
    first = session.generate("Once upon", OPTIONS)
    assert first.text == model.generate("Once upon", OPTIONS, adapter="one").text
    session.save(tmp_path / "saved")
    more = session.fork().generate(" a time", OPTIONS, adapter="one").text
    read = model.load_session(tmp_path / "saved")
    assert (read.adapter, model.session().adapter) == ("one", None)
    assert read.generate(" a time", OPTIONS).text == more
    with pytest.raises(ValueError, match='adapter: found "two", expected "one"'):
        read.generate("x", OPTIONS, adapter="two")
    with pytest.raises(ValueError, match='adapter: found "two", expected None'):
        model.session().generate("x", OPTIONS, adapter="two")


def test_a_session_file_of_another_adapter_is_refused(
    model: Model, base: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    session = model.session(adapter="one")
    session.generate("Once upon", OPTIONS)
    session.save(saved)
    with Model.load(base) as other, pytest.raises(ModelError, match=r'"adapter": found .* the adapter "one"'):
        other.load_session(saved)
    with Model.load(base, adapters={"one": paths["two"]}) as other, pytest.raises(ModelError, match="of the hash"):
        other.load_session(saved)
    model.session().save(saved)
    with Model.load(base, adapter=paths["one"]) as other, pytest.raises(ModelError, match="applies to everything"):
        other.load_session(saved)


def test_adapters_are_loaded_replaced_and_removed_while_others_compute(base: Path, paths: dict[str, Path]) -> None:
    with Model.load(base, threads=2, adapters={"own": paths["one"]}) as model, Engine(model) as engine:
        before = model.generate("Once", OPTIONS, adapter="own").text
        session = model.session(adapter="own")
        running = [engine.submit("Once", OPTIONS, adapter="own", max_tokens=300) for _ in range(4)]
        model.load_adapter("own", paths["two"])
        model.load_adapter("other", paths["in.gguf"])
        after = model.generate("Once", OPTIONS, adapter="own").text
        assert after != before
        model.unload_adapter("own")
        assert model.adapters == ("other",)
        assert session.generate("Once", OPTIONS).text == before
        texts = [request.result().text for request in running]
        assert len(set(texts)) == 1
        assert texts[0].startswith(before)
        # A prefix that the old adapter has computed is not the new one's.
        model.load_adapter("own", paths["two"])
        assert engine.submit("Once", OPTIONS, adapter="own").result().text == after


def test_an_unknown_adapter_is_an_error_that_lists_the_known_ones(model: Model, tiny_model: Model) -> None:
    calls: list[Any] = [
        lambda: model.generate("x", adapter="three"),
        lambda: model.session(adapter="three"),
        lambda: model.logits("x", adapter="three"),
        lambda: model.embed("x", adapter="three"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r'adapter: found "three", expected one of in.gguf, one, two'):
            call()
    with pytest.raises(ValueError, match=r"adapter: found 'three', expected in.gguf, one, two"):
        model.unload_adapter("three")
    with pytest.raises(ValueError, match='adapter: found "three", expected no name'):
        tiny_model.generate("x", adapter="three")
    for name in ("", 1):
        with pytest.raises(ValueError, match=r"adapter: found .*, expected None or the name"):
            SamplingOptions(adapter=name)  # type: ignore[arg-type]


def test_wrong_arguments_are_refused(base: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter: found adapters as well"):
        Model.load(base, adapter=paths["one"], adapters=paths)
    with pytest.raises(ValueError, match='the name "a b", expected 1 to 128 characters'):
        Model.load(base, adapters={"a b": paths["one"]})
    with pytest.raises(FileNotFoundError, match="missing"):
        Model.load(base, adapter=tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        Model.load(base, adapter=tmp_path)
    with Model.load(base, adapter=paths["one"]) as model, pytest.raises(ValueError, match="applies to everything"):
        model.load_adapter("one", paths["one"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__type": "model"}, 'key "general.type": found "model", expected "adapter"'),
        ({"general__type": None}, 'key "general.type"'),
        ({"adapter__type": "control_vector"}, 'key "adapter.type": .*"control_vector"'),
        ({"general__architecture": "qwen2"}, 'key "general.architecture": found "qwen2", expected "llama"'),
        ({"adapter__lora__alpha": float("nan")}, 'key "adapter.lora.alpha": found NaN'),
        ({"adapter__alora__invocation_tokens": 1}, 'key "adapter.alora.invocation_tokens"'),
    ],
)
def test_a_gguf_adapter_with_other_settings_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = adapters.write_gguf(tmp_path / "adapter.gguf", 1, **changes)
    with pytest.raises(ModelError, match=message):
        Model.load(base, adapter=path)


def test_an_adapter_of_another_model_is_refused_by_its_tensor(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: tensor .*lora_A.weight"):
        Model.load(base, adapter=adapters.ADAPTERS / "phi3")
    with pytest.raises(ModelError, match=r"llama-all\.gguf: tensor .*lora_a\": found shape"):
        Model.load(base, adapter=adapters.ADAPTERS / "gguf" / "llama-all.gguf")


def test_what_an_adapter_repeats_of_the_base_is_noted() -> None:
    base = adapters.ADAPTERS.parent / "goldens" / "llama"
    native = _native.Model.load(base, LoadOptions(quantize="stored"))
    notes = native.load_adapter("own", adapters.ADAPTERS / "llama-embeddings")
    assert len(notes) == 2
    assert all("repeats the base and has no influence" in note for note in notes)


def test_convert_merges_an_adapter(
    model: Model, base: Path, paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged.gguf"
    assert main(["convert", str(base), str(out), "--type", "f32", "--adapter", str(paths["one"])]) == 0
    with Model.load(out) as merged, Model.load(base) as plain:
        found, expected = merged.logits("Once upon"), model.logits("Once upon", adapter="one")
        spread = np.abs(expected).max()
        # The base has 8-bit activations, the merged matrices are F32.
        assert np.abs(found - expected).max() < 0.05 * spread
        assert np.abs(found - plain.logits("Once upon")).max() > 0.2 * spread
    capsys.readouterr()
    code = main(["convert", str(base), str(paths["in.gguf"]), "--force", "--adapter", str(paths["in.gguf"])])
    assert code != 0
    assert "expected" in capsys.readouterr().err
    assert paths["in.gguf"].stat().st_size > 0


def test_commands_apply_an_adapter(
    model: Model, base: Path, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(base), "Once", "--raw", "--temperature", "0", "--max-tokens", "12"]
    assert main([*arguments, "--adapter", str(paths["one"])]) == 0
    expected = model.generate("Once", adapter="one", temperature=0, max_tokens=12).text
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")
