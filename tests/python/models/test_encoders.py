"""Embeddings, classification and ranking with the golden encoders of `tests/data/encoders`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from serving import serving

from nybble import Engine, LoadOptions, Model, ModelError

ENCODERS = Path(__file__).resolve().parents[2] / "data" / "encoders"
TEXTS = ["a cat", "the black dog said he sees a fox", "fog"]


def folder(name: str) -> Path:
    return ENCODERS / name


def changed(name: str, target: Path, file: str, change: Callable[[Any], None]) -> Path:
    """A copy of a golden folder in which one JSON file is different."""
    shutil.copytree(folder(name), target)
    content = json.loads((target / file).read_text()) if (target / file).exists() else {}
    change(content)
    (target / file).write_text(json.dumps(content))
    return target


def cosine(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


@pytest.mark.parametrize("name", ["bert", "xlm_roberta", "modernbert", "nomic_bert", "gemma3-embedding"])
def test_vectors_are_the_same_for_ids_and_in_batches(name: str) -> None:
    with Model.load(folder(name), threads=2, quantize="stored") as model:
        vectors = model.embed(TEXTS)
        assert vectors.shape == (3, model.info.embedding_size)
        assert vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        ids = [model.tokenize(text) for text in TEXTS]
        assert np.array_equal(model.embed(ids), vectors)
        for text, vector in zip(TEXTS, vectors, strict=True):
            assert np.array_equal(model.embed(text)[0], vector)
        many = model.embed(TEXTS * 50)
        assert np.array_equal(many, np.tile(vectors, (50, 1)))
        assert not np.allclose(model.embed(TEXTS[0], normalize=False), vectors[0])


def test_a_text_is_framed_by_the_tokens_of_the_model() -> None:
    with Model.load(folder("bert")) as model:
        ids = model.tokenize("the cat")
        assert ids[0] == model.tokenizer.id_of("[CLS]")
        assert ids[-1] == model.tokenizer.id_of("[SEP]")
        pair, second = model.tokenizer.encode_pair("the cat", "a dog")
        assert pair[: len(ids)] == ids
        assert second == len(ids)
        assert pair[-1] == ids[-1]
        assert model.detokenize(ids) == "the cat"
    with Model.load(folder("xlm_roberta")) as model:
        ids = model.tokenize("the cat")
        pair, second = model.tokenizer.encode_pair("the cat", "a dog")
        assert second is None
        assert pair[: len(ids) + 1] == [*ids, ids[-1]], "two end tokens between the documents"


@pytest.mark.parametrize("name", ["bert", "xlm_roberta", "nomic_bert", "jina_embeddings_v3"])
def test_tokenizers_of_converted_files_are_those_of_the_folder(name: str, tmp_path: Path) -> None:
    from nybble import _native
    from nybble.tokenizer.tokenizer import Tokenizer

    _native.convert(folder(name), tmp_path / "model.gguf", "f32")
    ours = Tokenizer.from_folder(folder(name))
    whole = Tokenizer.load(tmp_path / "model.gguf")
    with_keys = _native.GgufFile(tmp_path / "model.gguf").metadata
    del with_keys["tokenizer.huggingface.json"]
    by_keys = Tokenizer.from_gguf_metadata(with_keys)
    for text in [*TEXTS, "  The  DOG, said:\n he! (one)", "", "z" * 300, "\u00c9t\u00e9 \u4e2d\u6587 \U0001f600"]:
        for other in (whole, by_keys):
            assert other.encode(text) == ours.encode(text), text
            assert other.encode_pair(text, "a dog") == ours.encode_pair(text, "a dog"), text


def test_tokenizers_of_other_converters_are_those_of_the_folder() -> None:
    from nybble.tokenizer.tokenizer import Tokenizer

    for name in ("bert", "xlm_roberta"):
        ours, theirs = Tokenizer.from_folder(folder(name)), Tokenizer.load(ENCODERS / "gguf" / f"{name}.gguf")
        for text in TEXTS:
            assert theirs.encode(text) == ours.encode(text)
            assert theirs.encode_pair(text, "a dog") == ours.encode_pair(text, "a dog")


def test_an_encoder_generates_nothing_and_says_so() -> None:
    with Model.load(folder("bert")) as model:
        assert not model.info.generates
        for refused in (lambda: model.generate("a cat"), lambda: next(iter(model.stream("a cat")))):
            with pytest.raises(ModelError, match="bert has no output for tokens and generates no text"):
                refused()
        with pytest.raises(ModelError, match="generates no text"):
            model.session().generate("a cat")
        with pytest.raises(ValueError, match="logits: found logits of bert, a model without an output matrix"):
            model.logits("a cat")
        with pytest.raises(ModelError, match="without a classification head"):
            model.classify("a cat")
        with pytest.raises(ValueError, match="pooling: found 'max', expected mean, cls or last"):
            model.embed("a cat", pooling="max")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="context"):
            model.embed([list(range(5, 60)) * 2])


def test_a_classifier_scores_and_ranks_documents() -> None:
    with Model.load(folder("bert-classify")) as model:
        assert model.info.labels == ("LABEL_0",)
        assert model.classify("a cat").shape == (1,)
        scores = model.classify(TEXTS)
        assert scores.shape == (3, 1)
        assert np.array_equal(scores[1], model.classify(model.tokenize(TEXTS[1])))
        ranked = model.rerank("a cat", TEXTS)
        assert ranked.shape == (3,)
        assert np.array_equal(ranked[1:2], model.rerank("a cat", TEXTS[1:2]))
        ids, _ = model.tokenizer.encode_pair("a cat", TEXTS[1])
        # The second text has a token type of its own.
        assert not np.array_equal(ranked[1:2], model.classify(ids))
        with pytest.raises(TypeError, match="documents: found str"):
            model.rerank("a cat", "a dog")
        with pytest.raises(ModelError, match="generates no text"):
            model.generate("a cat")


def test_labels_have_the_names_of_the_configuration(tmp_path: Path) -> None:
    def rename(config: Any) -> None:
        config["id2label"] = {"0": "relevant"}

    with Model.load(changed("xlm_roberta-classify", tmp_path / "one", "config.json", rename)) as model:
        assert model.info.labels == ("relevant",)

    def two(config: Any) -> None:
        config["id2label"] = {"0": "a", "1": "b"}

    with pytest.raises(ModelError, match=r"classifier\.out_proj\.weight.*shape \[1, 32\].*expected \[2, 32\]"):
        Model.load(changed("xlm_roberta-classify", tmp_path / "two", "config.json", two))


def test_prompts_precede_strings_but_not_ids(tmp_path: Path) -> None:
    def add(config: Any) -> None:
        config.update(prompts={"query": "the ", "document": ""}, default_prompt_name=None)

    path = changed("bert", tmp_path / "model", "config_sentence_transformers.json", add)
    with Model.load(path) as model:
        assert dict(model.prompts) == {"query": "the ", "document": ""}
        assert np.array_equal(model.embed("cat", prompt="query"), model.embed("the cat"))
        ids = model.tokenize("cat")
        assert np.array_equal(model.embed(ids, prompt="query"), model.embed("cat"))
        with pytest.raises(ValueError, match="prompt: found 'other', expected query, document"):
            model.embed("cat", prompt="other")
        (path / "config_sentence_transformers.json").write_text(
            json.dumps({"prompts": {"query": "the "}, "default_prompt_name": "query"})
        )
        assert np.array_equal(model.embed("cat"), model.embed(model.tokenize("the cat")))


def _pooling(config: Any, **modes: Any) -> None:
    for key in [key for key in config if key.startswith("pooling_mode")]:
        config[key] = False
    config.update(modes)


@pytest.mark.parametrize(
    ("modes", "pooling"),
    [
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "several poolings"),
        ({"pooling_mode": "weird"}, "weird"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt"),
    ],
)
def test_poolings_of_sentence_transformers_are_read_or_refused(
    modes: dict[str, Any], pooling: str, tmp_path: Path
) -> None:
    path = changed("bert", tmp_path / "model", "1_Pooling/config.json", lambda config: _pooling(config, **modes))
    if pooling in ("mean", "cls", "last"):
        with Model.load(path) as model:
            assert model.info.pooling == pooling
    else:
        with pytest.raises(ModelError, match=pooling):
            Model.load(path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("modules.json", lambda modules: modules[2].update(type="x.WordWeights"), "WordWeights"),
        ("modules.json", lambda modules: modules[2].update(path="../other"), "inside of this one"),
        ("modules.json", lambda modules: modules.reverse(), "in this order"),
        ("2_Dense/config.json", lambda config: config.update(out_features=63), r"linear\.weight.*expected \[63, 32\]"),
        ("2_Dense/config.json", lambda config: config.update(bias=True), r"linear\.bias.*missing"),
        ("2_Dense/config.json", lambda config: config.update(activation_function="torch.nn.Softsign"), "Softsign"),
    ],
)
def test_damaged_modules_are_refused_by_name(
    file: str, change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        Model.load(changed("gemma3-embedding", tmp_path / "model", file, change))


def test_the_activation_of_a_dense_module_is_applied(tmp_path: Path) -> None:
    def tanh(config: Any) -> None:
        config["activation_function"] = "torch.nn.modules.activation.Tanh"

    path = changed("gemma3-embedding", tmp_path / "model", "3_Dense/config.json", tanh)
    with Model.load(folder("gemma3-embedding")) as plain, Model.load(path) as model:
        expected = np.tanh(plain.embed(TEXTS, normalize=False))
        assert np.allclose(model.embed(TEXTS, normalize=False), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("nomic_bert", {"moe_every_n_layers": 2}, "moe_every_n_layers"),
        ("nomic_bert", {"prenorm": True}, "prenorm"),
        ("modernbert-classify", {"classifier_pooling": "max"}, "classifier_pooling"),
        ("modernbert-classify", {"classifier_activation": "cube"}, "classifier_activation"),
        ("xlm_roberta", {"pad_token_id": 70}, "max_position_embeddings"),
        ("bert", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_keys_that_change_the_result_are_refused(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = changed(name, tmp_path / "model", "config.json", lambda config: config.update(change))
    with pytest.raises(ModelError, match=message):
        Model.load(path)


def test_published_names_of_keys_mean_the_same(tmp_path: Path) -> None:
    def nomic(config: Any) -> None:
        for ours, theirs in [
            ("hidden_size", "n_embd"),
            ("num_attention_heads", "n_head"),
            ("num_hidden_layers", "n_layer"),
            ("intermediate_size", "n_inner"),
            ("max_position_embeddings", "n_positions"),
            ("layer_norm_eps", "layer_norm_epsilon"),
        ]:
            config[theirs] = config.pop(ours)
        config["rotary_emb_base"] = config.pop("rope_parameters")["rope_theta"]
        config["activation_function"] = "swiglu"
        del config["hidden_act"], config["head_dim"]

    def modern(config: Any) -> None:
        bases = config.pop("rope_parameters")
        config["global_rope_theta"] = bases["full_attention"]["rope_theta"]
        config["local_rope_theta"] = bases["sliding_attention"]["rope_theta"]
        config["global_attn_every_n_layers"] = 3
        del config["layer_types"]

    for name, change in (("nomic_bert", nomic), ("modernbert", modern)):
        path = changed(name, tmp_path / name, "config.json", change)
        with Model.load(folder(name)) as plain, Model.load(path) as model:
            ids = [list(range(5, 45))]
            assert np.array_equal(model.embed(ids), plain.embed(ids))


def test_a_decoder_with_attention_in_both_directions_is_an_encoder(tmp_path: Path) -> None:
    goldens = ENCODERS.parent / "goldens"
    shutil.copytree(goldens / "llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    ids = list(range(5, 25))
    with Model.load(goldens / "llama") as causal, Model.load(tmp_path / "model") as model:
        assert causal.info.generates
        assert not model.info.generates
        both = [each.embed([ids], pooling="cls")[0] for each in (causal, model)]
        assert cosine(*both) < 0.999
        # The last token sees all others in both models, but in the first layer only.
        assert not np.array_equal(causal.embed([ids], pooling="last"), model.embed([ids], pooling="last"))


def test_the_server_embeds_and_ranks() -> None:
    with Model.load(folder("bert-classify")) as model, Engine(model) as engine, serving(engine) as server:
        body: dict[str, Any] = {
            "query": "a cat",
            "documents": [*TEXTS, {"text": "a dog"}],
            "top_n": 2,
            "return_documents": True,
        }
        reply = server.request("POST", "/v1/rerank", body)
        assert reply.status == 200, reply.text
        scores = 1 / (1 + np.exp(-model.rerank("a cat", [*TEXTS, "a dog"]).astype(np.float64)))
        order = np.argsort(-scores, kind="stable")[:2]
        assert [each["index"] for each in reply.json["results"]] == order.tolist()
        assert np.allclose([each["relevance_score"] for each in reply.json["results"]], scores[order])
        assert reply.json["results"][0]["document"]["text"] == [*TEXTS, "a dog"][order[0]]
        assert reply.json["usage"]["prompt_tokens"] > 0
        cohere = server.request("POST", "/v2/rerank", {"query": "a cat", "documents": TEXTS, "priority": 1}).json
        assert len(cohere["results"]) == len(TEXTS)
        assert cohere["id"] != reply.json["id"]
        assert cohere["meta"]["api_version"]["version"] == "2"
        assert server.request("POST", "/v1/embeddings", {"input": TEXTS}).status == 200
        reply = server.request("POST", "/v1/completions", {"prompt": "a"})
        assert reply.status == 400
        for field, wrong in [("documents", []), ("query", ""), ("top_n", 0), ("rank_fields", ["a"])]:
            reply = server.request("POST", "/v1/rerank", {**body, field: wrong})
            assert (reply.status, field in reply.error) == (400, True), reply.text


def test_a_model_without_a_head_does_not_rank(tiny_model: Model) -> None:
    with Engine(tiny_model) as engine, serving(engine) as server:
        reply = server.request("POST", "/v1/rerank", {"query": "a", "documents": ["b"]})
        assert reply.status == 400
        assert "does not rank" in reply.error


def _layer_norm(x: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    centered = x - x.mean(-1, keepdims=True)
    normed: npt.NDArray[np.float64] = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * weight
    return normed


def _modern_bert(ids: list[int], bases: tuple[float, float], half_window: int) -> npt.NDArray[np.float64]:
    """The hidden states of the golden ModernBERT, computed by NumPy in double precision."""
    raw = (folder("modernbert") / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            values = np.frombuffer(raw[8 + length :][start:end], np.float32).astype(np.float64)
            tensors[name] = values.reshape(entry["shape"])
    x = _layer_norm(tensors["embeddings.tok_embeddings.weight"][ids], tensors["embeddings.norm.weight"])
    position = np.arange(len(ids))
    for layer in range(4):
        own = {name.split(".", 2)[2]: value for name, value in tensors.items() if name.startswith(f"layers.{layer}.")}
        is_local = layer % 3 != 0
        normed = _layer_norm(x, own["attn_norm.weight"]) if layer else x
        query, key, value = (normed @ own["attn.Wqkv.weight"].T).reshape(len(ids), 3, 4, 8).transpose(1, 2, 0, 3)
        angles = position[:, None] * bases[is_local] ** -(np.arange(4) / 4)
        cos, sin = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)
        query, key = (part * cos + np.concatenate([-part[..., 4:], part[..., :4]], -1) * sin for part in (query, key))
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(8)
        if is_local:
            scores[:, np.abs(position[:, None] - position) > half_window] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ value
        x = x + attended.transpose(1, 0, 2).reshape(len(ids), 32) @ own["attn.Wo.weight"].T
        gate, up = np.split(_layer_norm(x, own["mlp_norm.weight"]) @ own["mlp.Wi.weight"].T, 2, axis=-1)
        erf = np.vectorize(math.erf)
        x = x + (gate / 2 * (1 + erf(gate / math.sqrt(2))) * up) @ own["mlp.Wo.weight"].T
    return _layer_norm(x, tensors["final_norm.weight"])


@pytest.mark.parametrize("window", [12, 300])
def test_long_inputs_are_computed_at_once(window: int, tmp_path: Path) -> None:
    def long(config: Any) -> None:
        config.update(max_position_embeddings=1024, local_attention=window)

    path = changed("modernbert", tmp_path / "model", "config.json", long)
    ids = [int(id) for id in np.random.default_rng(7).integers(5, 280, 700)]
    expected = _modern_bert(ids, (160000.0, 10000.0), window // 2)
    options = LoadOptions(quantize="stored", threads=2)
    with Model.load(path, options) as model, Model.load(path, options, threads=1, kernel="scalar") as scalar:
        states = model._native.hidden_states(ids)
        assert np.abs(states - expected).max() < 1e-3
        assert np.array_equal(model.embed([ids, ids[:300]]), scalar.embed([ids, ids[:300]]))
        assert np.array_equal(model.embed([ids[:300], ids])[::-1], model.embed([ids, ids[:300]]))
