"""Answers in the form of a pydantic model, as clients of other projects ask for them, sampled under the grammar."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import clients
import pytest
from clients import Leg, Trip, llama_index_model, needed
from serving import Running, serving

from nybble import Model
from nybble.engine import Engine

pytestmark = clients.IGNORED

GO: list[dict[str, str]] = [{"role": "user", "content": "Plan a trip."}]


@pytest.fixture(scope="module")
def server(chat_model: Model) -> Iterator[Running]:
    with Engine(chat_model) as engine, serving(engine) as running:
        yield running


def openai_client(url: str) -> Any:
    return needed("openai").OpenAI(base_url=url, api_key="none")


def openai_parse(url: str) -> Any:
    with openai_client(url) as client:
        done = client.chat.completions.parse(model="tiny", messages=GO, response_format=Trip)
        return done.choices[0].message.parsed


def openai_beta_parse(url: str) -> Any:
    with openai_client(url) as client:
        done = client.beta.chat.completions.parse(model="tiny", messages=GO, response_format=Trip)
        return done.choices[0].message.parsed


def openai_stream(url: str) -> Any:
    with openai_client(url) as client:
        asked = client.chat.completions.stream(model="tiny", messages=GO, response_format=Trip)
        with asked as stream:
            assert {"chunk", "content.delta", "content.done"} <= {event.type for event in stream}
            return stream.get_final_completion().choices[0].message.parsed


def openai_required_tool(url: str) -> Any:
    tool = needed("openai").pydantic_function_tool(Trip)
    with openai_client(url) as client:
        done = client.chat.completions.parse(model="tiny", messages=GO, tools=[tool], tool_choice="required")
        return done.choices[0].message.tool_calls[0].function.parsed_arguments


def openai_streamed_tool(url: str) -> Any:
    tool = needed("openai").pydantic_function_tool(Trip)
    with openai_client(url) as client:
        asked = client.chat.completions.stream(model="tiny", messages=GO, tools=[tool], tool_choice="required")
        with asked as stream:
            assert "tool_calls.function.arguments.done" in {event.type for event in stream}
            return stream.get_final_completion().choices[0].message.tool_calls[0].function.parsed_arguments


def instructor_default(url: str) -> Any:
    client = needed("instructor").from_openai(openai_client(url))
    return client.chat.completions.create(model="tiny", response_model=Trip, messages=GO, max_retries=0)


def instructor_provider(url: str) -> Any:
    client = needed("instructor").from_provider("openai/tiny", base_url=url, api_key="none")
    return client.chat.completions.create(response_model=Trip, messages=GO, max_retries=0)


def instructor_json_schema(url: str) -> Any:
    instructor = needed("instructor")
    client = instructor.from_openai(openai_client(url), mode=instructor.Mode.JSON_SCHEMA)
    return client.chat.completions.create(model="tiny", response_model=Trip, messages=GO, max_retries=0)


def instructor_partial(url: str) -> Any:
    client = needed("instructor").from_openai(openai_client(url))
    partial = client.chat.completions.create_partial
    *_, last = partial(model="tiny", response_model=Trip, messages=GO, max_retries=0)
    return Trip.model_validate(last.model_dump())


def langchain(url: str, method: str) -> Any:
    model = needed("langchain_openai").ChatOpenAI(base_url=url, api_key="none", model="tiny", max_retries=0)
    return model.with_structured_output(Trip, method=method).invoke("Plan a trip.")


def langchain_json_schema(url: str) -> Any:
    return langchain(url, "json_schema")


def langchain_function_calling(url: str) -> Any:
    return langchain(url, "function_calling")


def llama_index(url: str) -> Any:
    return llama_index_model(url).as_structured_llm(Trip).complete("Plan a trip.").raw


def openai_agents(url: str) -> Any:
    agents, openai = needed("agents"), needed("openai")
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    model = agents.OpenAIChatCompletionsModel(model="tiny", openai_client=client)
    agent = agents.Agent(name="a", model=model, output_type=Trip)
    return asyncio.run(agents.Runner.run(agent, "Plan a trip.")).final_output


def pydantic_ai(url: str, form: Any = Trip) -> Any:
    models, providers = needed("pydantic_ai.models.openai"), needed("pydantic_ai.providers.openai")
    model = models.OpenAIChatModel("tiny", provider=providers.OpenAIProvider(base_url=url, api_key="none"))
    agent = needed("pydantic_ai").Agent(model, output_type=form, retries=0)
    return asyncio.run(agent.run("Plan a trip.")).output


def pydantic_ai_native(url: str) -> Any:
    return pydantic_ai(url, needed("pydantic_ai").NativeOutput(Trip))


def litellm(url: str) -> Any:
    done = needed("litellm").completion(
        model="openai/tiny", api_base=url, api_key="none", messages=GO, response_format=Trip
    )
    return Trip.model_validate_json(done.choices[0].message.content)


def ollama_format(url: str) -> Any:
    client = needed("ollama").Client(host=url.removesuffix("/v1"))
    return Trip.model_validate_json(client.chat("tiny", messages=GO, format=Trip.model_json_schema()).message.content)


CLIENTS: list[Callable[[str], Any]] = [
    openai_parse, openai_beta_parse, openai_stream, openai_required_tool, openai_streamed_tool, instructor_default,
    instructor_provider, instructor_json_schema, instructor_partial, langchain_json_schema, langchain_function_calling,
    llama_index, openai_agents, pydantic_ai, pydantic_ai_native, litellm, ollama_format,
]  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_an_answer_has_the_form_that_the_client_asks_for(client: Callable[[str], Any], server: Running) -> None:
    found = client(f"{server.url}/v1")
    assert isinstance(found, Trip)
    assert all(isinstance(leg, Leg) for leg in found.legs)


def test_litellm_reads_completions_embeddings_and_logprobs(server: Running) -> None:
    litellm = needed("litellm")
    of: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": "none"}
    done = litellm.text_completion(model="text-completion-openai/tiny", prompt="hi", max_tokens=3, **of)
    assert done.usage.completion_tokens == 3
    vectors = litellm.embedding(model="openai/tiny", input=["a", "b"], **of)
    assert [len(each["embedding"]) for each in vectors.data] == [64, 64]
    done = litellm.completion(model="openai/tiny", messages=GO, max_tokens=2, logprobs=True, top_logprobs=3, **of)
    assert [len(token["top_logprobs"]) for token in done.choices[0].logprobs["content"]] == [3, 3]


def test_langchain_embeds_a_thousand_documents(server: Running) -> None:
    embeddings = needed("langchain_openai").OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_documents([f"document {number}" for number in range(1000)])) == 1000
