"""Agents of other projects: they call a tool of the model's choice, and answer with its result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import clients
import pytest
from clients import ANSWER, CALLS, Forecast, llama_index_model, needed, weather
from serving import scripted, serving

from nybble import Model

pytestmark = clients.IGNORED


def openai_agent(url: str, **options: Any) -> tuple[Any, Any]:
    agents, openai = needed("agents"), needed("openai")
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    model = agents.OpenAIChatCompletionsModel(model="tiny", openai_client=client)
    return agents, agents.Agent(name="a", model=model, tools=[agents.function_tool(weather)], **options)


def openai_agents(url: str) -> Any:
    agents, agent = openai_agent(url)
    return asyncio.run(agents.Runner.run(agent, "How is Rome?")).final_output


def openai_agents_streamed(url: str) -> Any:
    agents, agent = openai_agent(url)

    async def run() -> Any:
        run = agents.Runner.run_streamed(agent, "How is Rome?")
        async for _ in run.stream_events():
            pass
        return run.final_output

    return asyncio.run(run())


def openai_agents_responses(url: str) -> Any:
    agents, openai = needed("agents"), needed("openai")
    agents.set_tracing_disabled(True)

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            model = agents.OpenAIResponsesModel(model="tiny", openai_client=client)
            agent = agents.Agent(name="a", model=model, tools=[agents.function_tool(weather)])
            return (await agents.Runner.run(agent, "How is Rome?")).final_output

    return asyncio.run(run())


def pydantic_agent(url: str, **options: Any) -> Any:
    pydantic_ai = needed("pydantic_ai")
    models, providers = needed("pydantic_ai.models.openai"), needed("pydantic_ai.providers.openai")
    model = models.OpenAIChatModel("tiny", provider=providers.OpenAIProvider(base_url=url, api_key="none"))
    return pydantic_ai.Agent(model, tools=[weather], **options)


def pydantic_ai(url: str) -> Any:
    return asyncio.run(pydantic_agent(url).run("How is Rome?")).output


def pydantic_ai_responses(url: str) -> Any:
    models, providers = needed("pydantic_ai.models.openai"), needed("pydantic_ai.providers.openai")
    model = models.OpenAIResponsesModel("tiny", provider=providers.OpenAIProvider(base_url=url, api_key="none"))
    agent = needed("pydantic_ai").Agent(model, tools=[weather])
    return asyncio.run(agent.run("How is Rome?")).output


def pydantic_ai_streamed(url: str) -> Any:
    async def run() -> str:
        async with pydantic_agent(url).run_stream("How is Rome?") as answer:
            return "".join([text async for text in answer.stream_text(delta=True)])

    return asyncio.run(run())


def langchain_model(url: str) -> Any:
    return needed("langchain_openai").ChatOpenAI(base_url=url, api_key="none", model="tiny", max_retries=0)


def langchain(url: str) -> Any:
    agent = needed("langchain.agents").create_agent(langchain_model(url), [weather])
    return agent.invoke({"messages": [("user", "How is Rome?")]})["messages"][-1].content


def langchain_responses(url: str) -> Any:
    model = needed("langchain_openai").ChatOpenAI(
        base_url=url, api_key="none", model="tiny", max_retries=0, use_responses_api=True
    )
    agent = needed("langchain.agents").create_agent(model, [weather])
    return agent.invoke({"messages": [("user", "How is Rome?")]})["messages"][-1].text


def langchain_streamed(url: str) -> Any:
    agent = needed("langchain.agents").create_agent(langchain_model(url), [weather])
    pieces = agent.stream({"messages": [("user", "How is Rome?")]}, stream_mode="messages")
    return "".join(message.content for message, _ in pieces if message.type == "AIMessageChunk")


def langgraph(url: str) -> Any:
    graphs, prebuilt = needed("langgraph.graph"), needed("langgraph.prebuilt")
    model = langchain_model(url).bind_tools([weather])
    graph = graphs.StateGraph(graphs.MessagesState)
    graph.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_node("tools", prebuilt.ToolNode([weather]))
    graph.add_edge(graphs.START, "model")
    graph.add_conditional_edges("model", prebuilt.tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile().invoke({"messages": [("user", "How is Rome?")]})["messages"][-1].content


def llama_index(url: str) -> Any:
    workflow = needed("llama_index.core.agent.workflow")
    model = llama_index_model(url)

    async def run() -> str:
        return str(await workflow.FunctionAgent(tools=[weather], llm=model).run("How is Rome?"))

    return asyncio.run(run())


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def with_litellm(name: str, base: str, *, stream: bool) -> str:
    litellm = needed("litellm")
    messages: list[Any] = [{"role": "user", "content": "How is Rome?"}]

    def ask() -> Any:
        answer = litellm.completion(
            model=name, api_base=base, api_key="none", messages=messages, tools=[TOOL], stream=stream
        )
        return (litellm.stream_chunk_builder([*answer]) if stream else answer).choices[0]

    first = ask()
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert call.function.name == "weather"
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny in Rome"}]
    return str(ask().message.content)


def litellm(url: str) -> Any:
    return with_litellm("openai/tiny", url, stream=False)


def litellm_streamed(url: str) -> Any:
    return with_litellm("openai/tiny", url, stream=True)


def litellm_as_ollama(url: str) -> Any:
    return with_litellm("ollama_chat/tiny", url.removesuffix("/v1"), stream=False)


def litellm_as_ollama_streamed(url: str) -> Any:
    return with_litellm("ollama_chat/tiny", url.removesuffix("/v1"), stream=True)


def litellm_as_anthropic(url: str) -> Any:
    return with_litellm("anthropic/tiny", url.removesuffix("/v1"), stream=False)


def litellm_as_anthropic_streamed(url: str) -> Any:
    return with_litellm("anthropic/tiny", url.removesuffix("/v1"), stream=True)


def ollama(url: str) -> Any:
    client = needed("ollama").Client(host=url.removesuffix("/v1"))
    messages: list[Any] = [{"role": "user", "content": "How is Rome?"}]
    answer = client.chat("tiny", messages=messages, tools=[weather]).message
    (call,) = answer.tool_calls
    messages += [answer, {"role": "tool", "content": weather(**call.function.arguments), "tool_name": "weather"}]
    return "".join(piece.message.content for piece in client.chat("tiny", messages=messages, stream=True))


def openai_functions(url: str) -> Any:
    openai = needed("openai")
    with openai.OpenAI(base_url=url, api_key="none") as client:
        messages: list[Any] = [{"role": "user", "content": "How is Rome?"}]
        with client.chat.completions.stream(model="tiny", messages=messages, tools=[TOOL]) as stream:
            message = stream.get_final_completion().choices[0].message
        (call,) = message.tool_calls
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny in Rome"}]
        done = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    return done.choices[0].message.content


AGENTS: list[Callable[[str], Any]] = [
    openai_agents, openai_agents_streamed, pydantic_ai, pydantic_ai_streamed, langchain, langchain_streamed, langgraph,
    openai_agents_responses, pydantic_ai_responses, langchain_responses, litellm_as_anthropic,
    litellm_as_anthropic_streamed, llama_index,
    litellm, litellm_streamed, litellm_as_ollama, litellm_as_ollama_streamed, ollama, openai_functions,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
def test_an_agent_calls_a_tool_and_answers(agent: Callable[[str], Any], call: str, chat_model: Model) -> None:
    engine, script = scripted(chat_model, call, ANSWER)
    with serving(engine) as running:
        assert agent(f"{running.url}/v1") == ANSWER
    assert "Sunny in Rome" in script.prompts[1]


def openai_agents_with_form(url: str) -> Any:
    agents, agent = openai_agent(url, output_type=Forecast)
    return asyncio.run(agents.Runner.run(agent, "How is Rome?")).final_output


def pydantic_ai_with_form(url: str) -> Any:
    form = needed("pydantic_ai").NativeOutput(Forecast)
    return asyncio.run(pydantic_agent(url, output_type=form).run("How is Rome?")).output


def langchain_with_form(url: str) -> Any:
    form = needed("langchain.agents.structured_output").ProviderStrategy(Forecast)
    agent = needed("langchain.agents").create_agent(langchain_model(url), [weather], response_format=form)
    return agent.invoke({"messages": [("user", "How is Rome?")]})["structured_response"]


FORMED = [openai_agents_with_form, pydantic_ai_with_form, langchain_with_form]


@pytest.mark.parametrize("agent", FORMED, ids=lambda agent: agent.__name__)
def test_an_agent_with_a_form_calls_first_and_answers_in_it(agent: Callable[[str], Any], chat_model: Model) -> None:
    engine, script = scripted(chat_model, CALLS["marked"], '{"city": "Rome", "sunny": true}')
    with serving(engine) as running:
        assert agent(f"{running.url}/v1") == Forecast(city="Rome", sunny=True)
    # One grammar allows calls and answers.
    assert [options.grammar is not None for options in script.options] == [True, True]
