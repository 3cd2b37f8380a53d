"""What model files say: every key is applied, listed as without influence, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, logits
from gguf_files import File, Kind, Value, array, boolean, f32, text, u32
from goldens import GOLDENS

from nybble import Model, ModelError, _native
from nybble.generation.scoring import logprob_rows

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], File]:
    """Converts a golden folder to GGUF in F32, for tests to change."""
    kept: dict[str, File] = {}

    def convert(family: str) -> File:
        if family not in kept:
            out = tmp_path_factory.mktemp("gguf") / f"{family}.gguf"
            _native.convert(copy(family, out.with_suffix("")), out, "f32")
            kept[family] = File.read(out)
        return kept[family].copy()

    return convert


def load(file: File, folder: Path) -> Model:
    return Model.load(file.write(folder / "model.gguf"), quantize=None, threads=1)


# GGUF


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "attention.causal", text("no")),
        ("bloom", "attention.causal", u32(0)),
        ("llama", "attention.output_scale", u32(3)),
        ("qwen3", "rope.scaling.yarn_ext_factor", f32(0.5)),
        ("qwen3", "pooling_type", u32(9)),
        ("llama", "ssm.state_size", u32(16)),
        ("gemma3", "rope.dimension_count_swa", u32(7)),
        ("llama", "a_key_of_tomorrow", text("on")),
    ],
)
def test_a_key_that_is_not_computed_is_refused_by_name(
    family: str, key: str, value: Value, converted: Callable[[str], File], tmp_path: Path
) -> None:
    file = converted(family)
    file.metadata[f"{family}.{key}"] = value
    with pytest.raises(ModelError, match=f'"{family}.{key}"'):
        load(file, tmp_path)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"llama.attention.causal": boolean(True), "llama.tensor_data_layout": text("Meta AI original pth")}),
        ("llama", {"llama.attention.head_count": array(Kind.U32, [4, 4]), "llama.rope.scaling.type": text("none")}),
        ("gemma3", {"gemma3.vision.block_count": u32(27), "gemma3.mm.tokens_per_image": u32(256)}),
        ("llama", {"general.name": (Kind.STRING, b"caf\xe9"), "some.tags": array(Kind.STRING, [b"a", b""])}),
        ("qwen3", {"qwen3.pooling_type": (Kind.I32, -1), "qwen3.attention.key_length_swa": u32(32)}),
    ],
    ids=str,
)
def test_keys_without_influence_change_no_logits(
    family: str, keys: dict[str, Value], converted: Callable[[str], File], tmp_path: Path
) -> None:
    file = converted(family)
    expected = logits(file.write(tmp_path / "plain.gguf"))
    file.metadata.update(keys)
    np.testing.assert_array_equal(logits(file.write(tmp_path / "more.gguf")), expected)


@pytest.mark.parametrize(
    ("family", "renamed"),
    [
        ("gemma3", {"rope.freq_base": "rope.global.freq_base", "rope.freq_base_swa": "rope.local.freq_base"}),
        ("qwen3_moe", {"expert_weights_norm": "norm_top_k_prob"}),
    ],
)
def test_keys_with_the_names_of_ollama_mean_the_same(
    family: str, renamed: dict[str, str], converted: Callable[[str], File], tmp_path: Path
) -> None:
    file = converted(family)
    expected = logits(file.write(tmp_path / "plain.gguf"))
    architecture = file.metadata["general.architecture"][1].decode()
    for name, theirs in renamed.items():
        kind, value = file.metadata.pop(f"{architecture}.{name}")
        file.metadata[f"{architecture}.{theirs}"] = kind, value
    np.testing.assert_array_equal(logits(file.write(tmp_path / "renamed.gguf")), expected)


@pytest.mark.parametrize(("number", "pooling"), [(None, "mean"), (0, "mean"), (1, "mean"), (2, "cls"), (3, "last")])
def test_the_file_chooses_the_pooling_of_embeddings(
    number: int | None, pooling: str, converted: Callable[[str], File], tmp_path: Path
) -> None:
    file = converted("qwen3")
    if number is not None:
        file.metadata["qwen3.pooling_type"] = u32(number)
    with load(file, tmp_path) as model:
        assert model.info.pooling == pooling
        given: Any = pooling
        np.testing.assert_array_equal(model.embed("hello he the"), model.embed("hello he the", pooling=given))
        assert (model.embed("hello he", pooling="mean") != model.embed("hello he", pooling="last")).any()


@pytest.mark.parametrize("kind", [Kind.U64, Kind.I32, Kind.U16])
def test_hyperparameters_may_have_any_integer_type(
    kind: Kind, converted: Callable[[str], File], tmp_path: Path
) -> None:
    file = converted("llama")
    expected = logits(file.write(tmp_path / "plain.gguf"))
    for key, (found, value) in file.metadata.items():
        if found is Kind.U32 and key.startswith("llama."):
            file.metadata[key] = kind, value
    for key in ("llama.vocab_size", "llama.rope.dimension_count"):
        file.metadata.pop(key)
    np.testing.assert_array_equal(logits(file.write(tmp_path / "other.gguf")), expected)


# config.json


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "qwen2_moe", "gemma2", "phi3", "gpt2", "opt"])
def test_a_model_that_is_not_causal_sees_later_tokens(family: str, tmp_path: Path) -> None:
    path = copy(family, tmp_path / "model", config={"is_causal": False})
    ids = list(range(5, 25))
    with Model.load(path, quantize="stored", threads=1) as model:
        assert not model.info.generates
        first = model.embed([ids, [*ids[:-1], 30]], pooling="cls")
        assert np.abs(first[0] - first[1]).max() > 1e-5
        assert np.abs(model.logits(ids)[0] - model.logits([*ids[:-1], 30])[0]).max() > 1e-5
        with pytest.raises(ModelError, match="generates no text"):
            next(logprob_rows(model, ids))
    with Model.load(copy(family, tmp_path / "causal"), quantize="stored", threads=1) as model:
        first = model.embed([ids, [*ids[:-1], 30]], pooling="cls")
        assert np.array_equal(first[0], first[1])


def test_distances_in_both_directions_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"attention\.causal.*max_alibi_bias.*is_causal"):
        Model.load(copy("bloom", tmp_path / "model", config={"is_causal": False}))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "qwen2_moe", "gemma2", "phi3", "gpt2", "opt", "bloom"])
def test_another_name_of_both_directions_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="use_bidirectional_attention"):
        logits(copy(family, tmp_path / "model", config={"use_bidirectional_attention": True}))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt_bigcode", {"scale_attn_weights": False}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("opt", {"layer_norm_elementwise_affine": False}),
    ],
)
def test_a_switch_that_is_not_computed_is_refused_by_name(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=next(iter(config))):
        logits(copy(family, tmp_path / "model", config=config))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma", {"hidden_act": "relu"}),
        ("gemma2", {"hidden_activation": "silu"}),
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_a_switch_changes_the_logits(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    changed = logits(copy(family, tmp_path / "model", config=config))
    assert (changed != logits(copy(family, tmp_path / "plain"))).any()


def test_gelu_in_gemma_means_its_approximation_by_tanh(tmp_path: Path) -> None:
    found = logits(copy("gemma", tmp_path / "model", config={"hidden_act": "gelu"}))
    np.testing.assert_array_equal(found, logits(copy("gemma", tmp_path / "plain")))


@pytest.mark.parametrize(
    ("family", "key", "default"),
    [
        ("granite", "attention_multiplier", 1.0),
        ("granite", "residual_multiplier", 1.0),
        ("bloom", "n_layer", 2),
        ("bloom", "hidden_size", 64),
        ("qwen2_moe", "intermediate_size", 5632),
        ("mistral", "num_key_value_heads", 8),
        ("gemma2", "query_pre_attn_scalar", 256),
        ("gemma3", "sliding_window", 4096),
        ("phi", "hidden_act", "gelu_new"),
    ],
)
def test_a_missing_key_has_the_default_of_transformers(family: str, key: str, default: Any, tmp_path: Path) -> None:
    def result(folder: Path) -> Any:
        try:
            return logits(folder).tolist()
        except ModelError as error:
            return str(error).replace(str(folder), "")

    explicit = copy(family, tmp_path / "explicit", config={key: default})
    assert result(copy(family, tmp_path / "left-out", without=[key])) == result(explicit)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}


def test_rope_scaling_takes_the_place_of_rope_parameters(tmp_path: Path) -> None:
    plain = logits(copy("llama", tmp_path / "plain"))
    inside = logits(copy("llama", tmp_path / "inside", config={"rope_parameters": YARN}))
    assert (inside != plain).any()
    added = logits(copy("llama", tmp_path / "added", config={"rope_scaling": YARN}))
    np.testing.assert_array_equal(added, inside)
    for nothing in (None, dict[str, Any]()):
        config = {"rope_parameters": YARN, "rope_scaling": nothing}
        np.testing.assert_array_equal(logits(copy("llama", tmp_path / "nothing", config=config)), inside)


def test_rope_scaling_of_gemma3_changes_layers_without_a_window(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    rope = json.loads((GOLDENS / "gemma3" / "config.json").read_text())["rope_parameters"]
    inside = {**rope, "full_attention": {**rope["full_attention"], **scaling}}
    expected = logits(copy("gemma3", tmp_path / "inside", config={"rope_parameters": inside}))
    added = logits(copy("gemma3", tmp_path / "added", config={"rope_scaling": scaling}))
    np.testing.assert_array_equal(added, expected)


@pytest.mark.parametrize("truncate", [None, False, True], ids=str)
@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "converted"])
def test_yarn_extends_the_context(as_file: bool, truncate: bool | None, tmp_path: Path) -> None:
    def like_a_model_card(config: dict[str, Any]) -> None:
        scaling = {**YARN, **({} if truncate is None else {"truncate": truncate})}
        config.pop("rope_parameters")
        config.update(rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling, max_position_embeddings=80)

    source = copy("qwen3", tmp_path / "model", config=like_a_model_card)
    if as_file:
        _native.convert(source, tmp_path / "model.gguf", "f32")
        source = tmp_path / "model.gguf"
    with Model.load(source, context=256) as model:
        assert model.info.context == 256
        assert model.logits([i % 300 for i in range(200)]).shape == (200, 320)
    with pytest.raises(ValueError, match="1 to 256"):
        Model.load(source, context=257)


def test_infinity_and_nan_in_config_json_are_read(tmp_path: Path) -> None:
    odd = {"swiglu_limit": float("inf"), "another": float("nan"), "a_third": -float("inf")}
    expected = logits(copy("llama", tmp_path / "plain"))
    np.testing.assert_array_equal(logits(copy("llama", tmp_path / "odd", config=odd)), expected)
    with pytest.raises(ModelError, match=r"rms_norm_eps.*NaN"):
        logits(copy("llama", tmp_path / "needed", config={"rms_norm_eps": float("nan")}))


# The lists against the installed packages


def test_the_lists_of_keys_are_those_of_the_installed_packages() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    import runpy

    script = runpy.run_path(str(ROOT / "scripts" / "transformers_keys.py"))
    classes = json.loads((ROOT / "src" / "model" / "hf" / "transformers.json").read_text(encoding="utf-8"))
    found = script["transformers_keys"](list(classes["families"]))
    assert (found["base"], found["families"]) == (classes["base"], classes["families"])
    keys = json.loads((ROOT / "tests" / "data" / "gguf_keys.json").read_text(encoding="utf-8"))
    assert script["gguf_keys"]()["keys"] == keys["keys"]
