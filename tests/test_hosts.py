"""The recipes of README.md for other hosts: notebook, Streamlit, LangChain, LlamaIndex, Gradio.

They need an environment of their own: the README's section on development makes it.
"""

import ast
import asyncio
import importlib.util
import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time

import httpx
import pytest
from conftest import posix, wait_for
from families import FUNCTION, HELLO, MODELS, PROMPTS, ROOT, SCRIPT, SUN
from recipes import ENDLESS, RECIPES, change, import_recipe, run, save

HOSTS = [
    "ipykernel",
    "jupyter_client",
    "streamlit",
    "langchain_core",
    "llama_index",
    "gradio",
    "openai",
]
for name in HOSTS:
    if not importlib.util.find_spec(name):
        pytest.skip(
            f"{name} is not installed: pip install -r requirements.txt -r tests/requirements.txt "
            "-r tests/hosts-requirements.txt",
            allow_module_level=True,
        )

import jupyter_client
import openai
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core.llms import ChatMessage
from openvino_genai import LLMPipeline
from streamlit.runtime.scriptrunner import StopException
from streamlit.testing.v1 import AppTest
from test_batch import Server

import multinomial_causal_lm
from multinomial_causal_lm import stream

MODEL = MODELS / "tiny-llama"
BROKEN = {r"config\.max_new_tokens = 500": "config.do_sample, config.top_p = True, 7.0"}


def wait_for_end(writes: list[int]) -> None:
    """Wait until no more tokens come. The answers would take many minutes."""
    for _ in range(100):
        before = len(writes)
        time.sleep(0.2)
        if len(writes) == before:
            return
    raise AssertionError("it still generates")


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


# Streamlit, in its own test host.


@pytest.fixture
def app(tmp_path, monkeypatch):
    save(tmp_path, "app.py")
    monkeypatch.chdir(ROOT)
    return AppTest.from_file(str(tmp_path / "app.py"), default_timeout=60).run()


def ask(app, prompt: str) -> list[str]:
    """Return the texts of all messages."""
    app.chat_input[0].set_value(prompt).run()
    assert not app.exception
    return [message.children[0].value for message in app.chat_message]


def test_streamlit_answers_and_remembers(app, monkeypatch):
    histories = []

    def spy(pipe, prompt, config):
        histories.append(prompt.get_messages())
        return stream(pipe, prompt, config)

    monkeypatch.setattr(multinomial_causal_lm, "stream", spy)
    prompt, code = ask(app, FUNCTION)
    assert prompt == FUNCTION
    ast.parse(code)  # Its indentation is there.
    assert len(ask(app, HELLO)) == 4
    history = app.session_state.messages
    assert [message["role"] for message in history] == ["user", "assistant"] * 2
    assert histories == [history[:1], history[:3]]


def test_streamlit_keeps_the_answer_that_a_user_stops(app, monkeypatch, writes):
    def stopped(pipe, prompt, config):
        config.max_new_tokens, config.ignore_eos = 1_000_000, True
        chunks = stream(pipe, prompt, config)
        try:
            for _ in range(2):
                yield next(chunks)
            raise StopException  # What Streamlit raises in the app when a user presses Stop.
        finally:
            chunks.close()

    monkeypatch.setattr(multinomial_causal_lm, "stream", stopped)
    ask(app, SUN)
    wait_for_end(writes)
    monkeypatch.undo()
    partial = app.session_state.messages[1]["content"]
    assert partial
    texts = ask(app, HELLO)
    assert texts[1] == partial and texts[3]


# LangChain.


@pytest.fixture(scope="module")
def pipeline():
    return LLMPipeline(MODEL, "CPU")


@pytest.fixture
def make_chat(tmp_path, pipeline):
    def make(changes=None):
        return import_recipe("langchain_chat.py", tmp_path, changes).ChatOpenVINO(pipeline=pipeline)

    return make


@pytest.fixture
def greedy(pipeline):
    """Return what the library answers."""

    def answer(prompt: str) -> str:
        config = pipeline.get_generation_config()
        config.max_new_tokens = 500
        return pipeline.generate(prompt, config)

    return answer


def test_langchain_invoke_stream_batch_and_chains_answer(make_chat, greedy):
    chat = make_chat()
    assert chat._llm_type == "openvino"
    assert chat.invoke(SUN).content == greedy(SUN)
    assert "".join(chunk.content for chunk in chat.stream(FUNCTION)) == greedy(FUNCTION)
    assert [message.content for message in chat.batch([SUN, FUNCTION] * 5)] == [
        greedy(SUN),
        greedy(FUNCTION),
    ] * 5
    chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | chat | StrOutputParser()
    assert chain.invoke({"question": SUN}) == greedy(SUN)
    assert "".join(chain.stream({"question": SUN})) == greedy(SUN)


def test_langchain_calls_back_with_each_chunk_and_stops_at_a_word(make_chat):
    received = []

    class Handler(BaseCallbackHandler):
        def on_llm_new_token(self, token, **kwargs):
            received.append(token)

    chat = make_chat()
    chunks = [chunk.content for chunk in chat.stream(SUN, config={"callbacks": [Handler()]})]
    assert len(received) > 1 and "".join(received) == "".join(chunks)
    assert chat.invoke(SUN, stop=["Sun"]).content == "The "


def test_langchain_gets_an_empty_answer_and_an_error(make_chat):
    chat = make_chat()
    assert chat.invoke(SUN, stop=["The Sun", " Sun"]).content == ""
    nothing = make_chat({"for chunk in chunks": "for chunk in ()"})
    assert nothing.invoke(SUN).content == ""
    broken = make_chat(BROKEN)
    with pytest.raises(RuntimeError, match="top_p"):
        broken.invoke(SUN)
    with pytest.raises(RuntimeError, match="top_p"):
        list(broken.stream(SUN))


def test_leaving_the_stream_of_langchain_stops_the_generation(make_chat, writes, greedy):
    chat = make_chat(ENDLESS)
    for chunk in chat.stream(SUN):
        if chunk.content:
            break
    del chunk
    wait_for_end(writes)
    assert len(writes) < 1000
    assert make_chat().invoke(SUN).content == greedy(SUN)


def test_langchain_streams_ten_answers_in_an_event_loop(make_chat, greedy):
    chat = make_chat()

    async def answer() -> str:
        return "".join([chunk.content async for chunk in chat.astream(SUN)])

    async def main() -> list[str]:
        return await asyncio.gather(*(answer() for _ in range(10)))

    assert asyncio.run(asyncio.wait_for(main(), timeout=60)) == [greedy(SUN)] * 10


# LlamaIndex.


@pytest.fixture
def make_llm(tmp_path, pipeline):
    def make(changes=None):
        return import_recipe("llamaindex_llm.py", tmp_path, changes).OpenVINO(pipeline=pipeline)

    return make


CHAT = [ChatMessage(SUN, role="user")]


def test_llamaindex_completes_and_chats(make_llm, greedy):
    llm = make_llm()
    assert llm.complete(SUN).text == llm.chat(CHAT).message.content == greedy(SUN)
    for prompt in PROMPTS:
        *_, last = llm.stream_complete(prompt)
        deltas = [response.delta for response in llm.stream_complete(prompt)]
        assert last.text == "".join(deltas) == greedy(prompt)
        assert len(deltas) > 1
        responses = list(llm.stream_chat([ChatMessage(prompt, role="user")]))
        assert responses[-1].message.content == greedy(prompt)
        assert "".join(response.delta for response in responses) == greedy(prompt)


def test_llamaindex_stops_at_a_word_and_raises_errors(make_llm):
    llm = make_llm()
    assert llm.complete(SUN, stop=["Sun"]).text == "The "
    assert llm.chat(CHAT, stop=["Sun"]).message.content == "The "
    broken = make_llm(BROKEN)
    for call in (
        lambda: broken.complete(SUN),
        lambda: broken.chat(CHAT),
        lambda: list(broken.stream_chat(CHAT)),
    ):
        with pytest.raises(RuntimeError, match="top_p"):
            call()


def test_leaving_the_stream_of_llamaindex_stops_the_generation(make_llm, writes, greedy):
    llm = make_llm(ENDLESS)
    for response in llm.stream_chat(CHAT):
        break
    wait_for_end(writes)
    assert response.delta and len(writes) < 1000
    assert make_llm().complete(SUN).text == greedy(SUN)


def test_llamaindex_streams_ten_chats_in_an_event_loop(make_llm, greedy):
    llm = make_llm()

    async def answer() -> str:
        return "".join([response.delta async for response in await llm.astream_chat(CHAT)])

    async def main() -> list[str]:
        return await asyncio.gather(*(answer() for _ in range(10)))

    assert asyncio.run(asyncio.wait_for(main(), timeout=60)) == [greedy(SUN)] * 10


@pytest.mark.parametrize("name", ["langchain_chat.py", "llamaindex_llm.py"])
def test_the_program_answers(tmp_path, name):
    assert "yellow" in run(tmp_path, name)


# The package `openai`, in front of `serve.py`.


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def by_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "any")


def test_openai_answers_whole_and_streams(by_environment, greedy):
    question = {"model": "any", "messages": [{"role": "user", "content": SUN}], "temperature": 0}
    client = openai.OpenAI()
    assert [model.id for model in client.models.list()] == ["tiny-llama"]
    whole = client.chat.completions.create(**question)
    assert whole.choices[0].message.content == greedy(SUN)
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**question, stream=True))
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == greedy(SUN)
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(**question, top_p=7)


def test_openai_streams_ten_answers_in_an_event_loop(by_environment, greedy):
    question = {"model": "any", "messages": [{"role": "user", "content": SUN}], "temperature": 0}

    async def answer(client) -> str:
        chunks = await client.chat.completions.create(**question, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI() as client:
            return await asyncio.gather(*(answer(client) for _ in range(10)))

    same = asyncio.run(asyncio.wait_for(main(), timeout=60)).count(greedy(SUN))
    assert same >= 9  # Batches round differently.


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
def test_control_c_ends_the_page(page):
    page.process.send_signal(2)
    assert page.process.wait(timeout=30) in (0, 130, -2)
