"""What connects to `serve.py`, each client as the page says it."""

import asyncio
import gc
import re
import shlex
import subprocess

import pytest
from conftest import skip_unless_installed, wait_for
from families import FUNCTION, MODELS, PROMPTS, SUN
from programs import PAGES, run_program
from servers import SERVE_ENDLESS, SLOWLY, Server

skip_unless_installed("langchain_openai", "llama_index", "openai", "agents", "pydantic_ai", "llm")

import agents
import openai
import pydantic_ai
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openvino_genai import LLMPipeline

MODEL = MODELS / "tiny-llama"


# What connects to `serve.py`, each by its line in the table of CLIENTS.md.


@pytest.fixture(scope="module")
def greedy():
    """Return what the library answers."""
    pipe = LLMPipeline(MODEL, "CPU")

    def answer(prompt: str) -> str:
        config = pipe.get_generation_config()
        config.max_new_tokens = 500
        return pipe.generate(prompt, config)

    return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server"), changes_of_batch=SLOWLY) as server:
        yield server


@pytest.fixture
def by_environment(server, monkeypatch):
    (row,) = re.findall(r"^\| what is built on .*", CLIENTS, re.MULTILINE)
    for name, value in re.findall(r"`(\w+)=(\S+)`", row):
        monkeypatch.setenv(name, value.replace(ADDRESS, server.url))


def connect(kind, server):
    """Make a client as the table says."""
    (line,) = re.findall(rf"^\| .* \| `({kind.__name__}\(.*\))` \|$", CLIENTS, re.MULTILINE)
    assert ADDRESS in line
    return eval(line.replace(ADDRESS, server.url), {kind.__name__: kind})


CLIENTS = PAGES["examples/README.md"]
ADDRESS = "http://127.0.0.1:8000"
QUESTION = {"model": "any", "messages": [{"role": "user", "content": SUN}]}
LINES = [None, openai.OpenAI], [None, openai.AsyncOpenAI]  # By the environment, by the line.


@pytest.mark.parametrize("kind", LINES[0])
def test_openai_answers_whole_and_streams(server, by_environment, greedy, kind):
    client = connect(kind, server) if kind else openai.OpenAI()
    assert [model.id for model in client.models.list()] == ["tiny-llama"]
    whole = client.chat.completions.create(**QUESTION)
    assert whole.choices[0].message.content == greedy(SUN)
    assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens > 10
    chunks = list(client.chat.completions.create(**QUESTION, stream=True))
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == greedy(SUN)
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(**QUESTION, top_p=7)


@pytest.mark.parametrize("kind", LINES[1])
def test_openai_streams_ten_answers_in_an_event_loop(server, by_environment, greedy, kind):
    async def answer(client) -> str:
        chunks = await client.chat.completions.create(**QUESTION, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def main() -> list[str]:
        async with connect(kind, server) if kind else openai.AsyncOpenAI() as client:
            return await asyncio.gather(*(answer(client) for _ in range(10)))

    assert_most_are(greedy(SUN), asyncio.run(asyncio.wait_for(main(), timeout=60)))


def assert_most_are(expected: str, texts: list[str]) -> None:
    assert texts.count(expected) >= len(texts) * 0.8  # Batches round differently.


def test_curl_streams(server):
    (command,) = re.findall(r"^curl .*", CLIENTS, re.MULTILINE)
    command = shlex.split(command.replace(ADDRESS, server.url))
    process = subprocess.run(command, capture_output=True, timeout=60, check=True)
    *events, done, _ = process.stdout.decode().split("\n\n")
    assert "yellow" in process.stdout.decode() and len(events) > 2 and done == "data: [DONE]"


def test_langchain_invoke_stream_batch_and_chains_answer(server, greedy):
    chat = connect(ChatOpenAI, server)
    answer = chat.invoke(SUN)
    assert answer.content == greedy(SUN) and answer.usage_metadata["output_tokens"] > 10
    assert "".join(chunk.content for chunk in chat.stream(FUNCTION)) == greedy(FUNCTION)
    assert_most_are(greedy(SUN), [message.content for message in chat.batch([SUN] * 10)])
    chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | chat | StrOutputParser()
    assert chain.invoke({"question": SUN}) == greedy(SUN)
    assert "".join(chain.stream({"question": SUN})) == greedy(SUN)
    assert chat.invoke(SUN, stop=["Sun"]).content == greedy(SUN).partition("Sun")[0]
    with pytest.raises(openai.BadRequestError, match="top_p"):
        chat.invoke(SUN, top_p=7)

    async def stream_ten() -> list[str]:
        async def read() -> str:
            return "".join([chunk.content async for chunk in chat.astream(SUN)])

        return await asyncio.gather(*(read() for _ in range(10)))

    assert_most_are(greedy(SUN), asyncio.run(asyncio.wait_for(stream_ten(), timeout=60)))


def test_llamaindex_completes_and_chats(server, greedy):
    llm = connect(OpenAILike, server)
    messages = [ChatMessage(SUN, role="user")]
    calm = {"temperature": 0}  # LlamaIndex has 0.1 if it is not told.
    assert llm.complete(SUN, **calm).text == llm.chat(messages, **calm).message.content
    for prompt in PROMPTS:
        responses = list(llm.stream_complete(prompt, **calm))
        assert responses[-1].text == greedy(prompt) and len(responses) > 2
        responses = list(llm.stream_chat([ChatMessage(prompt, role="user")], **calm))
        assert "".join(response.delta for response in responses) == greedy(prompt)
    assert llm.complete(SUN, stop=["Sun"], **calm).text == greedy(SUN).partition("Sun")[0]
    with pytest.raises(openai.BadRequestError, match="top_p"):
        llm.complete(SUN, top_p=7)

    async def stream_ten() -> list[str]:
        async def read() -> str:
            responses = await llm.astream_chat(messages, **calm)
            return "".join([response.delta async for response in responses])

        return await asyncio.gather(*(read() for _ in range(10)))

    assert_most_are(greedy(SUN), asyncio.run(asyncio.wait_for(stream_ten(), timeout=60)))


def said_of(client: str) -> str:
    """Return what the table says in code of a client."""
    return re.search(rf"^\| {client} \| `(.*?)`", CLIENTS, re.MULTILINE)[1]


def test_pydantic_ai_answers_and_streams(server, by_environment, greedy):
    agent = eval(said_of("pydantic-ai"), {"Agent": pydantic_ai.Agent})
    assert agent.run_sync(SUN).output == greedy(SUN)

    async def main() -> list[str]:
        async with agent.run_stream(SUN) as result:
            return [text async for text in result.stream_text(delta=True, debounce_by=None)]

    chunks = asyncio.run(main())
    assert "".join(chunks) == greedy(SUN) and len(chunks) > 2


def test_openai_agents_answer(server, by_environment, greedy):
    eval(said_of("openai-agents"), vars(agents))
    agents.set_tracing_disabled(True)  # It would send what was said to OpenAI.
    agent = agents.Agent(name="helper", model="any")
    assert agents.Runner.run_sync(agent, SUN).final_output == greedy(SUN)


def test_llm_answers(server, by_environment, greedy, tmp_path, monkeypatch):
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", CLIENTS, re.MULTILINE | re.DOTALL)
    settings = settings.replace(ADDRESS, server.url)
    (tmp_path / "extra-openai-models.yaml").write_text(settings, encoding="utf-8")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    command = shlex.split(re.search("`llm (-m local .*?)`", CLIENTS)[1])
    process = run_program("-m", "llm", *command)
    assert process.stdout.strip() == greedy(SUN), process.stderr


def test_leaving_the_stream_of_a_client_stops_the_generation(tmp_path):
    with Server(tmp_path, SERVE_ENDLESS) as server:
        for stream_of in (
            lambda: connect(openai.OpenAI, server).chat.completions.create(**QUESTION, stream=True),
            lambda: connect(ChatOpenAI, server).stream(SUN),
            lambda: connect(OpenAILike, server).stream_chat([ChatMessage(SUN, role="user")]),
        ):
            chunks = stream_of()
            next(iter(chunks))
            assert server.running() == 1
            chunks.close()
            del chunks
            gc.collect()
            wait_for(lambda: server.running() == 0)
