"""What README.md connects: a notebook, clients of `serve.py`, Streamlit, Gradio.

They need an environment of their own: the README's section on development makes it.
"""

import ast
import asyncio
import gc
import itertools
import json
import random
import re
import shlex
import subprocess
import sys
import threading
import time

import httpx
import pytest
from conftest import posix, skip_unless_installed, wait_for
from families import FUNCTION, HELLO, MODELS, PROMPTS, ROOT, SCRIPT, SUN
from recipes import ENDLESS, README, RECIPES, change, save
from servers import SERVE_ENDLESS, Server, serve_with

skip_unless_installed(
    "ipykernel",
    "jupyter_client",
    "streamlit",
    "langchain_openai",
    "llama_index",
    "gradio",
    "openai",
)

import jupyter_client
import openai
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openvino_genai import LLMPipeline
from streamlit.testing.v1 import AppTest

MODEL = MODELS / "tiny-llama"


# A notebook, in a real kernel.


class Kernel:
    def __init__(self, folder) -> None:
        environment = save(folder, "notebook.py")
        self.manager, self.client = jupyter_client.manager.start_new_kernel(
            kernel_name="python3", cwd=str(ROOT), env=environment
        )

    def start(self, code: str) -> str:
        """Begin to run it, and return the identity of the request once it runs."""
        request = self.client.execute(code)
        while self.message(request)["msg_type"] != "execute_input":
            pass
        return request

    def message(self, request: str, timeout: float = 60) -> dict:
        while True:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") == request:
                return message

    def finish(self, request: str) -> tuple[list[dict], str]:
        """Return the messages until it ends, and what it raised, or nothing."""
        messages = []
        while True:
            messages.append(message := self.message(request))
            content = message["content"]
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                errors = [m["content"]["ename"] for m in messages if m["msg_type"] == "error"]
                return messages, "".join(errors)

    def run(self, code: str) -> tuple[list[dict], str]:
        return self.finish(self.start(code))


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


IN_NOTEBOOK = f"""
from multinomial_causal_lm import stream
from openvino_genai import LLMPipeline
pipe = LLMPipeline({str(MODEL)!r}, "CPU")
endless = pipe.get_generation_config()
endless.max_new_tokens, endless.ignore_eos = 1_000_000, True
short = pipe.get_generation_config()
short.max_new_tokens = 3
"""


def test_the_notebook_shows_an_answer_that_grows(kernel):
    messages, error = kernel.run(RECIPES["notebook.py"])
    assert not error
    texts = [
        message["content"]["data"]["text/markdown"]
        for message in messages
        if message["msg_type"] in ("display_data", "update_display_data")
    ]
    assert texts[0] == "" and "yellow" in texts[-1] and len(texts) >= 3
    assert all(new.startswith(old) for old, new in itertools.pairwise(texts))


def test_chunks_come_one_after_another_in_a_notebook(kernel):
    assert kernel.run(IN_NOTEBOOK)[1] == ""
    request = kernel.start("for chunk in stream(pipe, 'Hi', endless): print(chunk, flush=True)")
    for _ in range(3):
        while kernel.message(request)["msg_type"] != "stream":
            pass
    kernel.manager.interrupt_kernel()
    assert kernel.finish(request)[1] == "KeyboardInterrupt"


def test_50_interrupts_in_a_notebook_leave_the_pipeline_free(kernel):
    assert kernel.run(IN_NOTEBOOK)[1] == ""
    for _ in range(50):
        request = kernel.start("for chunk in stream(pipe, 'Hi', endless): pass")
        time.sleep(random.random() * 0.1)
        kernel.manager.interrupt_kernel()
        assert kernel.finish(request)[1] == "KeyboardInterrupt"
        assert kernel.run("assert list(stream(pipe, 'Hi', short))")[1] == ""


def test_run_in_a_notebook_answers_and_survives_an_interrupt(kernel, tmp_path):
    messages, error = kernel.run(f"%run '{SCRIPT}' '{MODEL}' '{SUN}'")
    assert not error
    text = "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")
    assert "yellow" in text
    source = change(SCRIPT.read_text(encoding="utf-8"), ENDLESS)
    (tmp_path / "endless.py").write_text(source, encoding="utf-8")
    request = kernel.start(f"%run '{tmp_path / 'endless.py'}' '{MODEL}' '{SUN}'")
    while "Loading" not in kernel.message(request)["content"].get("text", ""):
        pass
    while kernel.message(request)["msg_type"] != "stream":
        pass
    kernel.manager.interrupt_kernel()
    assert kernel.finish(request)[1] == "KeyboardInterrupt"
    assert kernel.run("print('alive')")[1] == ""


def test_a_kernel_with_an_unfinished_stream_shuts_down(kernel):
    assert kernel.run(IN_NOTEBOOK + "chunks = stream(pipe, 'Hi', endless); next(chunks)")[1] == ""
    kernel.client.shutdown()
    wait_for(lambda: not kernel.manager.is_alive())


# What connects to `serve.py`, each by its line in the table of README.md.


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
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def by_environment(server, monkeypatch):
    (row,) = re.findall(r"^\| what is built on .*", README, re.MULTILINE)
    for name, value in re.findall(r"`(\w+)=(\S+)`", row):
        monkeypatch.setenv(name, value.replace(ADDRESS, server.url))


def connect(kind, server):
    """Make a client as the table says."""
    (line,) = re.findall(rf"^\| .* \| `({kind.__name__}\(.*\))` \|$", README, re.MULTILINE)
    assert ADDRESS in line
    return eval(line.replace(ADDRESS, server.url), {kind.__name__: kind})


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
    (command,) = re.findall(r"^curl .*", README, re.MULTILINE)
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


# Streamlit, in its own test host.


@pytest.fixture
def make_app(tmp_path, monkeypatch):
    def make(server, changes=None):
        save(tmp_path, "app.py", changes={ADDRESS: server.url} | (changes or {}))
        return AppTest.from_file(str(tmp_path / "app.py"), default_timeout=60).run()

    monkeypatch.chdir(ROOT)
    return make


def ask(app, prompt: str) -> list[str]:
    """Return the texts of all messages."""
    app.chat_input[0].set_value(prompt).run()
    assert not app.exception
    return [message.children[0].value for message in app.chat_message]


def test_streamlit_answers_and_remembers(make_app, server):
    seen = {r"with client": "streamlit.session_state.seen = [*messages]\n    with client"}
    app = make_app(server, seen)
    prompt, code = ask(app, FUNCTION)
    assert prompt == FUNCTION
    ast.parse(code)  # Its indentation is there.
    assert len(ask(app, HELLO)) == 4
    history = app.session_state.messages
    assert [message["role"] for message in history] == ["user", "assistant"] * 2
    assert app.session_state.seen == history[:3]


def test_streamlit_keeps_the_answer_that_a_user_stops(make_app, tmp_path):
    """By the exception that Streamlit raises in the app when a user presses Stop."""
    stop = {
        r"for chunk in chunks:": "from streamlit.runtime.scriptrunner import StopException\n"
        "        for number, chunk in enumerate(chunks):\n"
        "            if number == 3 and len(messages) == 2:\n"
        "                raise StopException"
    }
    with Server(
        tmp_path, serve_with("max_new_tokens=200, ignore_eos=len(self.messages) == 1")
    ) as server:
        app = make_app(server, stop)
        _, partial = ask(app, SUN)
        assert partial
        wait_for(lambda: server.running() == 0)
        texts = ask(app, HELLO)
        assert texts[1] == partial and texts[3]


# Gradio, over HTTP.


class Page:
    """`chat.py` as a process, and a browser's calls."""

    def __init__(self, folder, changes=None) -> None:
        environment = save(folder, "batch.py", "chat.py", changes=changes)
        environment |= {"GRADIO_ANALYTICS_ENABLED": "False"}
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(folder / "chat.py")],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            self.connect()
        except BaseException:
            self.process.kill()
            raise

    def connect(self) -> None:
        wait_for(lambda: self.process.poll() is not None or self.address(), seconds=60)
        address = self.address()[0]
        self.url = f"{address}/gradio_api/queue"
        dependencies = httpx.get(f"{address}/config").json()["dependencies"]
        self.functions = {call["api_name"]: call["id"] for call in dependencies}

    def address(self):
        return re.search(r"http://127.0.0.1:\d+", self.log.read_text(encoding="utf-8"))

    def events(self, session: str, message: str, history: list):
        """Yield what the page gets. It sends the message first, and then asks for the answer."""
        list(self.call(session, "lambda", [history]))
        list(self.call(session, "_clear_and_save_textbox", [message]))
        yield from self.call(session, "_submit_fn", [None, None])

    def call(self, session: str, name: str, data: list):
        call = {"fn_index": self.functions[name], "session_hash": session, "data": data}
        httpx.post(f"{self.url}/join", json=call, timeout=60).raise_for_status()
        parameters = {"session_hash": session}
        with httpx.stream("GET", f"{self.url}/data", params=parameters, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if event["msg"] in ("process_generating", "process_completed"):
                        yield event
                    if event["msg"] == "process_completed":
                        return


def user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("page"))
    yield page
    page.process.kill()
    page.process.wait()


def last_text(events) -> str:
    *_, event = events
    assert event["success"], event
    return json.dumps(event["output"]["data"], ensure_ascii=False)


def test_gradio_streams_an_answer_with_its_indentation(page):
    events = list(page.events("one", FUNCTION, []))
    assert len(events) > 2
    assert r"\n    for " in last_text(events)


def test_gradio_answers_many_tabs_at_once(page):
    results = {}

    def ask(number: int) -> None:
        results[number] = last_text(page.events(f"tab {number}", SUN, []))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 5 and all("yellow" in text for text in results.values())


@pytest.fixture
def changed_page(tmp_path):
    pages = []

    def make(changes):
        pages.append(Page(tmp_path, changes))
        return pages[0]

    yield make
    for page in pages:
        page.process.kill()
        page.process.wait()


def test_gradio_gives_the_history_to_the_model_and_shows_errors(changed_page):
    page = changed_page(
        {
            r"config\.max_new_tokens = 500": "print('messages', messages)\n"
            "    config.do_sample, config.top_p = message == 'fail', 7.0"
        }
    )
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]}
    assert last_text(page.events("a", SUN, [user("Hi"), answer]))
    expected = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": SUN},
    ]
    assert f"messages {expected}" in page.log.read_text(encoding="utf-8")
    assert "Error: " in last_text(page.events("b", "fail", []))
    assert "yellow" in last_text(page.events("c", SUN, []))


def test_stop_in_gradio_stops_the_generation(changed_page):
    page = changed_page(
        ENDLESS
        | {
            r"chat\.launch": "import threading, time\n"
            "def watch():\n    while True:\n        time.sleep(0.1)\n"
            "        print('requests', batch.pipe.get_metrics().requests)\n"
            "threading.Thread(target=watch, daemon=True).start()\nchat.launch"
        }
    )

    def wait_for_requests(count: int) -> None:
        text = str(count)
        wait_for(lambda: re.findall(r"requests (\d+)\n", page.log.read_text())[-1:] == [text])

    events = page.events("stop", "Hi", [])
    event = next(events)
    wait_for_requests(1)
    cancel = {
        "session_hash": "stop",
        "fn_index": page.functions["_submit_fn"],
        "event_id": event["event_id"],
    }
    httpx.post(page.url.replace("queue", "cancel"), json=cancel).raise_for_status()
    wait_for_requests(0)


@posix
def test_control_c_ends_the_page(changed_page):
    page = changed_page({})
    page.process.send_signal(2)
    assert page.process.wait(timeout=30) in (0, 130, -2)
