"""Parameters of requests: what changes nothing is taken, other servers' names work, and errors name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import openai
import pytest
from serving import Running, served

from nybble import Model
from nybble.constraints.gbnf import lark_of_gbnf
from nybble.sampling import DRY_BREAKERS

Json = dict[str, Any]
DOG: Json = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"enum": [1, 2]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tool_model: Model) -> Iterator[Running]:
    with served(tool_model) as running:
        yield running


# --- What changes nothing

NEUTRAL: list[Json] = [
    {"store": False},
    {"store": None},
    {"metadata": {"a": "b"}},
    {"service_tier": "auto"},
    {"user": "u", "safety_identifier": "u"},
    {"prompt_cache_key": "k", "prompt_cache_retention": "24h"},
    {"prediction": {"type": "content", "content": "x"}},
    {"cache_prompt": False},
    {"mirostat": 0, "mirostat_tau": 5.0, "xtc_probability": 0.0, "xtc_threshold": 0.1, "dry_multiplier": 0, "tfs_z": 1},
    {"dynatemp_range": 0.0, "n_keep": 0, "id_slot": -1, "n_probs": 0, "lora": [], "top_a": 0, "t_max_predict_ms": 0},
    {"return_tokens": False, "timings_per_token": False, "post_sampling_probs": False, "reasoning_format": "auto"},
    {"detokenize": True, "return_token_ids": False, "bad_words": [], "request_id": "r", "cache_salt": "c"},
    {"reasoning": {"effort": "low"}, "documents": []},
    {"best_of": 1, "min_tokens": 0, "ignore_eos": False, "use_beam_search": False, "length_penalty": 1.0},
    {"n": None, "stop": None, "logit_bias": None, "seed": None, "top_p": None},
    {"top_k": -1},
    {"stop_token_ids": []},
    {"return_tokens_as_token_ids": False, "include_reasoning": True},
    {"response_format": {"type": "text"}},
    {"unknown_but_null": None},
]
ONLY_CHAT: list[Json] = [
    {"reasoning_effort": "low", "verbosity": "high", "modalities": ["text"]},
    {"tools": [], "tool_choice": "auto"},
    {"tools": [], "tool_choice": "none"},
    {"functions": None, "function_call": None, "audio": None, "web_search_options": None},
    {"add_generation_prompt": True, "continue_final_message": False, "echo": False},
]


@pytest.mark.parametrize("parameters", [*NEUTRAL, *ONLY_CHAT], ids=str)
def test_parameters_that_change_nothing_are_taken(parameters: Json, server: Running) -> None:
    expected = server.chat().choice["message"]["content"]
    assert server.chat(**parameters).choice["message"]["content"] == expected
    if parameters in NEUTRAL:
        assert server.complete(**parameters).choice["text"] == server.complete().choice["text"]


def test_the_openai_client_may_send_all_its_parameters(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        done = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            max_completion_tokens=4,
            temperature=0,
            store=False,
            metadata={"run": "1"},
            service_tier="auto",
            safety_identifier="u",
            prompt_cache_key="k",
            verbosity="low",
            reasoning_effort="low",
        )
        assert done.choices[0].message.content == server.chat().choice["message"]["content"]
    options = {"include_usage": True, "include_obfuscation": False}
    events = server.chat(stream=True, stream_options=options).events
    assert events[-1]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"nonsense": 1}, "unsupported parameter: nonsense"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"best_of": 2}, "best_of: Input should be 1"),
        ({"min_tokens": 5}, "min_tokens: found 5, expected at most 4, the value of max_tokens"),
        ({"min_tokens": -1}, "min_tokens: Input should be greater than or equal to 0"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"mirostat": 1}, "mirostat: Input should be 0 or 2"),
        ({"num_beams": 2, "frequency_penalty": 0.5}, "frequency_penalty: found 0.5, expected none with num_beams=2"),
        ({"num_beams": 2, "n": 2}, "n: expected 1 with num_beams"),
        ({"dry_sequence_breakers": ["x" * 41]}, "dry_sequence_breakers.0: String should have at most 40 characters"),
        ({"num_beams": 17}, "num_beams: Input should be less than or equal to 16"),
        ({"xtc_probability": 1.5}, "xtc_probability: Input should be less than or equal to 1"),
        ({"dry_base": 0.5}, "dry_base: Input should be greater than or equal to 1"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"penalty_window": 5, "repeat_last_n": 6}, "repeat_last_n is another name of penalty_window"),
        ({"tool_choice": "required"}, "tool_choice requires tools"),
        ({"top_k": -2}, "top_k"),
        ({"stop": 5}, "stop: Input should be a valid string or a valid list"),
        ({"stop": [1]}, "stop.0: Input should be a valid string"),
        ({"stop": ["a"] * 20}, "stop: List should have at most 16 items"),
        ({"stop": ""}, "stop: String should have at least 1 character"),
        ({"repeat_penalty": 1.2, "repetition_penalty": 1.1}, "repeat_penalty is another name of repetition_penalty"),
        ({"max_tokens": 5, "n_predict": 6}, "n_predict is another name of max_tokens"),
        ({"regex": "a", "guided_choice": ["b"]}, "regex and guided_choice exclude each other"),
        (
            {"structured_outputs": {"regex": "a", "json": {}}},
            r"structured_outputs.json and structured_outputs.regex exclude",
        ),
        ({"guided_json": "{"}, "guided_json: expected a JSON Schema"),
        ({"response_format": {"type": "json_schema"}}, "type json_schema requires json_schema"),
        ({"response_format": {"type": "text", "schema": {}}}, "type text excludes json_schema"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "functions": [{"name": "f"}]},
            "functions is the",
        ),
    ],
    ids=str,
)
def test_errors_name_the_parameter(parameters: Json, message: str, server: Running) -> None:
    reply = server.chat(**parameters)
    assert reply.status == 400
    assert message in reply.error


# --- Names of other servers


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_object", "schema": DOG}},
        {"response_format": {"type": "json_schema", "schema": DOG}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": DOG}}},
        {"json_schema": DOG},
        {"structured_outputs": {"json": DOG}},
        {"structured_outputs": {"json": json.dumps(DOG)}},
        {"guided_json": DOG, "guided_decoding_backend": "xgrammar"},
    ],
    ids=str,
)
def test_a_schema_works_under_every_name(form: Json, server: Running) -> None:
    for reply in (server.chat(max_tokens=60, seed=1, **form), server.complete(max_tokens=60, seed=1, **form)):
        text = reply.choice["message"]["content"] if "message" in reply.choice else reply.choice["text"]
        if reply.choice["finish_reason"] == "stop":
            jsonschema_rs.validate(DOG, json.loads(text))
        else:
            assert text.startswith('{"name": "')


GBNF = 'root ::= answer | x-y # a comment\nanswer ::= "Yes" | "No"\nx-y ::= [Y] "es"'


@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"regex": "(Yes|No)"}},
        {"structured_outputs": {"choice": ["Yes", "No"]}},
        {"structured_outputs": {"grammar": 'start: "Yes" | "No"'}},
        {"guided_regex": "(Yes|No)"},
        {"guided_choice": ["Yes", "No"]},
        {"guided_grammar": GBNF},
        {"grammar": GBNF},
        {"grammar": 'start: "Yes" | "No"'},
    ],
    ids=str,
)
def test_other_forms_work_under_every_name(form: Json, server: Running) -> None:
    assert server.chat(max_tokens=60, **form).choice["message"]["content"] in ("Yes", "No")
    assert server.complete(max_tokens=60, **form).choice["text"] in ("Yes", "No")


def test_errors_of_a_form_name_the_parameter_that_holds_it(server: Running) -> None:
    bad = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    for form, parameter in (
        ({"json_schema": bad}, "json_schema"),
        ({"structured_outputs": {"json": bad}}, "structured_outputs.json"),
        ({"response_format": {"type": "json_object", "schema": bad}}, "response_format.schema"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"grammar": "root ::= ~"}, "grammar: rule 'root', line 1: found '~'"),
    ):
        for stream in (False, True):
            reply = server.chat(stream=stream, **form)
            assert (reply.status, reply.error.startswith(parameter)) == (400, True), reply.text


def test_other_names_of_numbers_work(server: Running) -> None:
    assert server.complete(max_tokens=None, n_predict=2).json["usage"]["completion_tokens"] == 2
    body = {"prompt": "aaaa", "max_tokens": 8}
    assert (
        server.complete(**body, repeat_penalty=1.9).text.split('"choices"')[1].split('"usage"')[0]
        == (server.complete(**body, repetition_penalty=1.9).text.split('"choices"')[1].split('"usage"')[0])
    )
    assert server.complete(max_tokens=-1, stop=["x"], logit_bias={str(ord("x")): 100}).choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        ({"num_beams": 3, "early_stopping": "never"}, {"num_beams": 3, "early_stopping": "never"}),
        ({"dry_multiplier": 5.0, "dry_penalty_last_n": -1}, {"dry_multiplier": 5.0}),
        ({"dry_multiplier": 5, "dry_window": 9}, {"dry_multiplier": 5.0, "dry_window": 9}),
        ({"dry_multiplier": 5.0, "dry_penalty_last_n": 0}, {}),
        (
            {"dry_multiplier": 5.0, "dry_sequence_breakers": ["a"]},
            {"dry_multiplier": 5.0, "dry_sequence_breakers": "a"},
        ),
        ({"mirostat": 2, "mirostat_tau": 2.0}, {"mirostat": 2, "mirostat_tau": 2.0}),
        ({"top_n_sigma": -1}, {}),
        ({"top_n_sigma": 0.7}, {"top_n_sigma": 0.7}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.01}, {"xtc_probability": 1.0, "xtc_threshold": 0.01}),
        ({"dynatemp_range": 0.9}, {"dynatemp_range": 0.9}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
    ],
    ids=str,
)
def test_samplers_of_llama_server_work(parameters: Json, options: Json, server: Running, tool_model: Model) -> None:
    options = {**options, "dry_sequence_breakers": tuple(options.get("dry_sequence_breakers", DRY_BREAKERS))}
    body: Json = {"max_tokens": 12, "temperature": 1.2, "seed": 4, "top_k": 0}
    done = server.complete(prompt="abcabcab", **body, **parameters)
    assert done.choice["text"] == tool_model.generate("abcabcab", **body, **options).text


@pytest.mark.parametrize(
    ("gbnf", "text"),
    [
        ('root ::= "a\\n\\"\\u00e9" [^a-c\\]-]{2,3}', 'a\n"éxyz'),
        ('root ::= (ws item)+\nitem ::= "x" | "y"\nws ::= [ \\t]*', " x y"),
        ('root ::= a-b aB\na-b ::= "1"?\naB ::= .', "1z"),
    ],
)
def test_grammars_in_gbnf_accept_the_same_strings(gbnf: str, text: str, uniform_model: Model) -> None:
    rule = lark_of_gbnf(gbnf)
    forced = {ord(char): 100.0 for char in set(text) if ord(char) < 128}
    done = uniform_model.generate("x", grammar=rule, logit_bias=forced, max_tokens=40, seed=0)
    assert done.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "gbnf",
    [
        "root ::= ~",
        'x ::= "a',
        "root ::= []",
        '"a" root ::= "b"',
        'root ::= "a"{' + 50_000 * " ",
        'root ::= "a"{' + 50_000 * "1",
    ],
)
def test_invalid_gbnf_is_refused(gbnf: str) -> None:
    with pytest.raises(ValueError, match="found"):
        lark_of_gbnf(gbnf)
