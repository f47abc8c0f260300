"""The recipes for many users at once: `batch.py` in asyncio, `serve.py` in a real server."""

import asyncio
import contextlib
import functools
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import openvino_genai
import pytest
from conftest import EXACT, PROPERTIES, make_config, posix, wait_for
from families import FAMILIES, GGUF, MESSAGES, MODELS, PROMPTS, SUN, path_of
from recipes import import_recipe, run, run_program, save
from servers import SERVE_ENDLESS, Server, client, question, read

from multinomial_causal_lm import stream


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """`batch.py`, imported. It computes exactly."""
    module = import_recipe("batch.py", tmp_path_factory.mktemp("batch"))
    module.ContinuousBatchingPipeline = functools.partial(
        openvino_genai.ContinuousBatchingPipeline, properties=EXACT
    )
    return module


@pytest.fixture(scope="module")
def load_batch(module):
    batches = {}

    def load(name: str):
        if name not in batches:
            batches[name] = module.Batch(str(path_of(name)))
        return batches[name]

    return load


@pytest.fixture
def batch(load_batch):
    return load_batch("tiny-llama")


def run_beside_batch(folder, source: str) -> subprocess.CompletedProcess:
    """Run a program that may import `batch`, in a process of its own."""
    environment = save(folder, "batch.py")
    (folder / "program.py").write_text(source, encoding="utf-8")
    return run_program(folder / "program.py", environment=environment)


async def answer(batch, prompt, tokens: int = 40) -> str:
    config = make_config(batch.pipe, tokens)
    return "".join([chunk async for chunk in batch.stream(prompt, config)])


async def answers(batch, prompts, tokens: int = 40) -> list[str]:
    return await asyncio.gather(*(answer(batch, prompt, tokens) for prompt in prompts))


def test_the_program_answers_three_prompts(tmp_path):
    output = run(tmp_path, "batch.py")
    assert "yellow" in output and len(output.splitlines()) >= 3


@pytest.mark.parametrize("name", FAMILIES + GGUF)
def test_100_answers_at_once_are_those_of_stream(load_batch, load_pipe, choose, name):
    batch = load_batch(name)
    pipe = load_pipe(name, **PROPERTIES["paged attention"])
    prompts = [f"{PROMPTS[number % 3]} {number}" for number in range(choose(12, 100))]
    expected = ["".join(stream(pipe, prompt, make_config(pipe, 40))) for prompt in prompts]
    received = asyncio.run(answers(batch, prompts))
    same = sum(map(str.__eq__, received, expected))
    # Batches round differently, and random weights have close calls.
    assert len(prompts) - same <= (0 if name == "tiny-llama" else choose(4, 15))


def test_messages_of_a_chat_are_a_prompt(batch, load_pipe):
    pipe = load_pipe("tiny-llama", **PROPERTIES["paged attention"])
    history = openvino_genai.ChatHistory(MESSAGES)
    expected = "".join(stream(pipe, history, make_config(pipe, 40)))
    assert asyncio.run(answer(batch, MESSAGES)) == expected


def test_a_chat_with_a_model_without_a_template_raises(load_batch):
    with pytest.raises(RuntimeError, match="[Tt]emplate"):
        asyncio.run(answer(load_batch("tiny-qwen"), MESSAGES))


def test_what_is_refused_raises(batch):
    async def refused():
        config = make_config(batch.pipe, 40)
        config.do_sample, config.top_p = True, 7.0
        return [chunk async for chunk in batch.stream(SUN, config)]

    with pytest.raises(RuntimeError, match="top_p"):
        asyncio.run(refused())


def test_200_cancelled_at_random_leave_nothing_behind(batch):
    threads = threading.active_count()

    async def cancel_all() -> float:
        tasks = [
            asyncio.create_task(answer(batch, prompt, tokens=1_000_000))
            for prompt in [SUN, "Why? " * 400] * 100  # Some are still being read.
        ]
        for task in tasks:
            asyncio.get_running_loop().call_later(random.random() * 2, task.cancel)
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        start = time.monotonic()
        assert "yellow" in await answer(batch, SUN, tokens=60)
        return time.monotonic() - start

    assert asyncio.run(cancel_all()) < 10  # All of them would take hours.
    wait_for(lambda: batch.pipe.get_metrics().requests == 0)
    wait_for(lambda: batch.pipe.get_metrics().cache_usage == 0)
    assert threading.active_count() <= threads  # Those of another `Batch` may have ended.


def test_a_reader_that_is_late_gets_all_that_waits_as_one_chunk(batch):
    """Or a loop with more chunks than it can send would fall behind, further with each."""

    async def main() -> str:
        usage = {}
        chunks = batch.stream(SUN, make_config(batch.pipe, 1_000_000), usage)
        await anext(chunks)
        while usage["completion_tokens"] < 300:
            await asyncio.sleep(0.01)
        late = await anext(chunks)
        await chunks.aclose()
        return late

    assert len(asyncio.run(asyncio.wait_for(main(), timeout=60))) > 300


def test_leaving_the_loop_stops_the_generation(batch):
    async def leave():
        async for chunk in batch.stream(SUN, make_config(batch.pipe, 1_000_000)):
            assert chunk
            break
        while batch.pipe.get_metrics().requests:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), timeout=30))


INTERRUPTED = """
import asyncio, gc, os, random, signal, sys, threading, time
sys.path.append("tests")
import batch as module
from conftest import make_config, wait_for

signal.signal(signal.SIGINT, signal.default_int_handler)
batch = module.Batch("tests/models/tiny-llama")
config = make_config(batch.pipe, 1_000_000)


async def main():
    async for chunk in batch.stream("Hi", config):
        pass


def nothing_runs():
    return batch.pipe.get_metrics().requests == 0


async def answer():
    return "".join([chunk async for chunk in batch.stream("Hi", make_config(batch.pipe, 5))])
"""


@posix
def test_signals_at_random_times_leave_nothing_running(tmp_path, choose):
    process = run_beside_batch(
        tmp_path,
        f"""{INTERRUPTED}
for count in range({choose(8, 300)}):
    timer = threading.Timer(random.random() * 0.02, os.kill, [os.getpid(), signal.SIGINT])
    try:
        timer.start()
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
    timer.join()
    wait_for(nothing_runs, seconds=20)
    assert asyncio.run(answer())
print("free")
""",
    )
    assert process.stdout == "free\n", process.stderr


@pytest.mark.parametrize("place", ["added", "queued"])
def test_an_interrupt_while_a_request_starts_leaves_nothing_running(tmp_path, place):
    """Right behind what makes the library know of it, or the thread."""
    process = run_beside_batch(
        tmp_path,
        f"""{INTERRUPTED}
class Interrupting:
    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def add_request(self, *arguments):
        self.real.add_request(*arguments)
        raise KeyboardInterrupt

    def put(self, item):
        self.real.put(item)
        raise KeyboardInterrupt


pipe, started = batch.pipe, batch._started
if {place!r} == "added":
    batch.pipe = Interrupting(pipe)
else:
    batch._started = Interrupting(started)
try:
    asyncio.run(main())
except KeyboardInterrupt as error:
    wait_for(nothing_runs, seconds=20)  # Even while the traceback is held.
batch.pipe, batch._started = pipe, started
assert asyncio.run(answer())
print("free")
""",
    )
    assert process.stdout == "free\n", process.stderr


def test_ten_batches_one_after_the_other_take_the_place_of_one(tmp_path, choose):
    """And nothing of one that nobody holds is left, though a stream of it was not finished."""
    process = run_beside_batch(
        tmp_path,
        f"""
import asyncio, re, sys, threading
sys.path.append("tests")
from batch import Batch
from conftest import make_config, wait_for


def memory():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])


async def begin(batch):
    async for chunk in batch.stream("Hi", make_config(batch.pipe, 1_000_000)):
        return


sizes = []
for count in range({choose(4, 11)}):
    batch = Batch("tests/models/tiny-llama")
    asyncio.run(begin(batch))
    del batch
    wait_for(lambda: not re.search("step|decode", str(threading.enumerate())), seconds=30)
    if sys.platform == "linux":
        sizes.append(memory())
print("growth", sizes[-1] / sizes[0] if sizes else 1, sizes)
""",
    )
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert float(re.match(r"growth (\S+)", process.stdout)[1]) < 2, process.stdout


@pytest.fixture
def small_batch(module, monkeypatch):
    """Its cache has room for 20 blocks."""

    def small_cache():
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = 20
        return scheduler

    monkeypatch.setattr(module, "SchedulerConfig", small_cache)
    return module.Batch(str(MODELS / "tiny-llama"), cache_gb=0)


def test_a_context_that_does_not_fit_in_the_cache_raises(small_batch):
    for prompt in "Why? " * 1000, SUN:
        with pytest.raises(MemoryError, match="cache"):
            asyncio.run(answer(small_batch, prompt, tokens=1_000_000))
    assert "yellow" in asyncio.run(answer(small_batch, SUN))


def test_more_prompts_than_fit_in_the_cache_take_turns(small_batch):
    texts = asyncio.run(answers(small_batch, [SUN] * 30))
    assert all("yellow" in text for text in texts)


def test_what_a_step_raises_reaches_every_reader_and_the_next_are_answered(module, monkeypatch):
    class BrokenOnce:
        broken = False

        def __init__(self, *arguments):
            self.pipe = openvino_genai.ContinuousBatchingPipeline(*arguments)

        def __getattr__(self, name):
            return getattr(self.pipe, name)

        def step(self):
            if self.broken and self.pipe.has_non_finished_requests():
                self.broken = False
                raise ArithmeticError("broken")
            self.pipe.step()

    monkeypatch.setattr(module, "ContinuousBatchingPipeline", BrokenOnce)
    batch = module.Batch(str(MODELS / "tiny-llama3"))

    async def main():
        streams = [batch.stream(SUN, make_config(batch.pipe.pipe, 1_000_000)) for _ in range(5)]
        await asyncio.gather(*map(anext, streams))  # All run.
        batch.pipe.broken = True
        for chunks in streams:
            with pytest.raises(ArithmeticError, match="broken"):
                async for _ in chunks:
                    pass
        while batch.pipe.get_metrics().requests:  # They have been cancelled, too.
            await asyncio.sleep(0.01)
        config = make_config(batch.pipe.pipe, 40)
        return [chunk async for chunk in batch.stream(SUN, config)]

    assert asyncio.run(asyncio.wait_for(main(), timeout=60))


def test_a_step_that_always_raises_does_not_keep_a_program_from_ending(tmp_path):
    process = run_beside_batch(
        tmp_path,
        """
import asyncio, sys
import batch as module
sys.path.append("tests")
from conftest import make_config


class Broken(module.ContinuousBatchingPipeline):
    def step(self):
        raise ArithmeticError("broken")


module.ContinuousBatchingPipeline = Broken
batch = module.Batch("tests/models/tiny-llama")


async def main():
    async for chunk in batch.stream("Hi", make_config(batch.pipe, 1_000_000)):
        pass


try:
    asyncio.run(main())
except ArithmeticError:
    sys.exit(3)
""",
    )
    assert process.returncode == 3


def test_what_a_decode_raises_reaches_those_whose_tokens_caused_it(batch, module, monkeypatch):
    """Here, those of one reader. The others get their whole texts."""

    class Fragile(module.Answer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            answers_begun.append(self)
            if self is answers_begun[0]:
                self.detokenizer.tokens = [None]

    answers_begun = []
    monkeypatch.setattr(module, "Answer", Fragile)

    async def main():
        broken = asyncio.create_task(answer(batch, SUN, 1_000_000))
        others = asyncio.create_task(answers(batch, [SUN] * 5))
        with pytest.raises(TypeError):
            await broken
        return await others

    assert all("yellow" in text for text in asyncio.run(asyncio.wait_for(main(), timeout=60)))
    wait_for(lambda: batch.pipe.get_metrics().requests == 0)


def test_stop_strings_end_an_answer_also_in_parts(batch, choose):
    full = asyncio.run(answer(batch, SUN))
    starts = range(0, len(full) - 8, choose(8, 1))
    stops = [full[start : start + length] for start in starts for length in (1, 5, 8)]

    async def stopped(stop: str) -> str:
        config = make_config(batch.pipe, 40)
        config.stop_strings = {stop, "never"}
        text = "".join([chunk async for chunk in batch.stream(SUN, config)])
        assert config.stop_strings == {stop, "never"}
        return text

    async def all_stopped() -> list[str]:
        return await asyncio.gather(*map(stopped, stops))

    texts = asyncio.run(asyncio.wait_for(all_stopped(), timeout=100))
    right = [text == full[: full.index(stop)] for text, stop in zip(texts, stops, strict=True)]
    assert sum(right) >= len(stops) * 0.9  # Batches round differently.
    assert not [stop for text, stop in zip(texts, stops, strict=True) if stop in text]


def test_hundreds_of_prompts_at_once_are_all_answered(batch, choose):
    prompts = [SUN] * choose(100, 500)
    texts = asyncio.run(asyncio.wait_for(answers(batch, prompts), timeout=100))
    assert len(texts) == len(prompts) and all("yellow" in text for text in texts)


@pytest.mark.runs(2, 20)
def test_a_program_that_ends_while_streams_run_ends_with_its_status(tmp_path, run):
    process = run_beside_batch(
        tmp_path,
        """
import asyncio, sys, time
sys.path.append("tests")
from batch import Batch
from conftest import make_config

batch = Batch("tests/models/tiny-llama")


async def main():
    config = make_config(batch.pipe, 1_000_000)
    streams = [batch.stream("Hi", config) for _ in range(10)]
    await asyncio.gather(*map(anext, streams))
    print(time.time())
    sys.exit(3)


asyncio.run(main())
""",
    )
    assert process.returncode == 3, process.stderr
    assert process.stderr == ""
    assert time.time() - float(process.stdout) < 10  # It would go on for hours.


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    exact = {r"scheduler, device\)": f"scheduler, device, {EXACT})"}
    with Server(tmp_path_factory.mktemp("server"), changes_of_batch=exact) as server:
        yield server


@pytest.fixture(scope="module")
def endless_server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server"), SERVE_ENDLESS) as server:
        yield server


CLIENT = httpx.Client(timeout=60)  # One for all: each new one takes a while.


def ask(server, body: dict | bytes | Iterator[bytes], **options) -> httpx.Response:
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    return CLIENT.post(f"{server.url}/v1/chat/completions", content=content, **options)


def events_of(response: httpx.Response) -> list[dict]:
    *lines, done = [line for line in response.text.splitlines() if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def read_whole(session, server) -> str:
    status, text = await read(session, server.url)
    assert status == 200
    return text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_is_that_of_stream_whole_and_in_events(server, load_pipe, prompt):
    pipe = load_pipe("tiny-llama", **PROPERTIES["paged attention"])
    for tokens, reason in (5, "length"), (400, "stop"):
        expected = "".join(stream(pipe, prompt, make_config(pipe, tokens)))
        body = question(prompt, max_tokens=tokens, temperature=0)
        whole = ask(server, body).json()
        (choice,) = whole["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected}
        assert choice["finish_reason"] == reason
        usage = whole["usage"]
        assert usage["completion_tokens"] == tokens or reason == "stop"
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *events, last = events_of(ask(server, body | options))
        assert last["usage"] == usage and not last["choices"]
        choices = [event["choices"][0] for event in events]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == expected
        assert [choice["finish_reason"] for choice in choices[-2:]] == [None, reason]
        assert len({event["id"] for event in [*events, last]}) == 1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stop_string_ends_an_answer_wherever_it_stands_and_is_its_reason(server, choose, prompt):
    """Alone or with others that begin later, overlap or never come; whole and in events."""

    def answer(**settings) -> tuple[str, str]:
        body = question(prompt, temperature=0, max_tokens=60, **settings)
        response = ask(server, body)
        if not body.get("stream"):
            (choice,) = response.json()["choices"]
            return choice["message"]["content"], choice["finish_reason"]
        choices = [event["choices"][0] for event in events_of(response)]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        return text, choices[-1]["finish_reason"]

    full, _ = answer()
    for start in range(0, len(full) - 8, choose(15, 1)):
        for length in 1, 6:
            stop = full[start : start + length]
            others = [full[start + 1 : start + 5], full[-4:], "never", f"{stop}never"]
            for stops in [stop], [*others, stop]:
                expected = full[: min(full.find(each) for each in stops if each in full)]
                given = stop if stops == [stop] else stops
                assert answer(stop=given, stream=start % 2 == 1) == (expected, "stop")


def test_settings_reach_the_model(server):
    def text(**settings) -> str:
        body = question(SUN, max_tokens=40, **settings)
        return ask(server, body).json()["choices"][0]["message"]["content"]

    assert text(temperature=0) == text() == text(temperature=None)  # As the model says.
    assert len({text(temperature=1.5) for _ in range(5)}) > 1
    sampled = text(temperature=1.5, seed=7)
    assert sampled == text(temperature=1.5, seed=7, frequency_penalty=0)
    assert sampled != text(temperature=1.5, seed=7, frequency_penalty=2, presence_penalty=2)
    assert sampled != text(temperature=1.5, seed=7, top_p=0.01)
    parts = [{"type": "text", "text": SUN[:9]}, {"type": "text", "text": SUN[9:]}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 40, "unknown": 1}
    assert ask(server, body).json()["choices"][0]["message"]["content"] == text()


def test_the_model_is_listed(server):
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["id"] == "tiny-llama" and model["object"] == "model"


BAD = [
    b"",
    b"{",
    b"[]",
    b"\xff",
    {},
    {"messages": None},
    {"messages": []},
    {"messages": [{}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "nobody", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    question("Hi", n=2),
    question("Hi", n=0),
    *(question("Hi", stream_options=options) for options in ([], {"include_usage": [1]})),
    question("Hi", tools=[{"type": "function"}]),
    {"messages": "Hi"},
    {"messages": [None]},
    {"messages": [{"role": "user", "content": 7}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"content": "Hi"}]},
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    *(question("Hi", stop=stop) for stop in (7, "x" * 101, ["x"] * 101, [None])),
    *(question("Hi", seed=seed) for seed in (-1, 2**63, "many")),
    question("x" * 100_000),
    *(question("Hi", max_tokens=number) for number in (0, -1, 4097, "many")),
    *(question("Hi", max_completion_tokens=number) for number in (0, -1, 4097)),
    *(question("Hi", temperature=number) for number in (-1, 3, "hot")),
    *(question("Hi", top_p=number) for number in (0, -1, 7)),
    *(question("Hi", frequency_penalty=number) for number in (-3, 3)),
    *(question("Hi", presence_penalty=number) for number in (-3, 3)),
]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_bad_body_is_refused_and_leaves_nothing_running(server, streamed):
    for body in BAD:
        if isinstance(body, dict):
            body = body | {"stream": streamed}
        response = ask(server, body)
        assert response.status_code == 400, body
        error = response.json()["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}
    assert ask(server, iter([b"{}"])).status_code == 400  # A body that does not say its length.
    assert httpx.get(f"{server.url}/nothing").json()["error"]["message"] == "Not Found"
    assert server.running() == 0


def test_a_prompt_that_fits_no_cache_is_refused_and_a_broken_step_is_a_500(tmp_path):
    tiny = "scheduler.num_kv_blocks = 4; scheduler.cache_size = 0  #"
    changes = {r"Batch\(MODEL\)": "Batch(MODEL, cache_gb=0)"}
    with Server(tmp_path, changes, {"scheduler.cache_size = ": tiny}) as server:
        for streamed in False, True:
            response = ask(server, question("Why? " * 2000, stream=streamed))
            assert response.status_code == 400
            assert "cache" in response.json()["error"]["message"]
    broken = {r"            pipe\.step\(\)": "            if running:\n                1 / 0"}
    with Server(tmp_path, {}, broken) as server:
        for streamed in False, True:
            headers = {"Connection": "close"}  # The server closes it itself, a moment later.
            response = ask(server, question("Hi", stream=streamed), headers=headers)
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"


def test_a_step_that_breaks_behind_the_first_text_is_an_event(tmp_path):
    late = "any(answer.usage['completion_tokens'] > 200 for answer in running)"
    broken = {
        r"            pipe\.step\(\)": f"            pipe.step()\n            1 / (not {late})"
    }
    with Server(tmp_path, SERVE_ENDLESS, broken) as server:
        response = ask(server, question(SUN, stream=True))
        *chunks, error = events_of(response)
        assert response.status_code == 200 and len(chunks) > 1
        assert error["error"]["type"] == "server_error" and error["error"]["message"]
        wait_for(lambda: server.running() == 0)


def test_an_api_key_is_asked_for_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    with Server(tmp_path) as server:
        for key, status in ("secret", 200), ("Secret", 401), ("secret2", 401):
            headers = {"Authorization": f"Bearer {key}"}
            response = ask(server, question("Hi", max_tokens=3), headers=headers)
            assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_100_clients_at_once_get_their_whole_texts(server, choose):
    async def main():
        async with client() as session:
            reading = (read_whole(session, server) for _ in range(choose(20, 100)))
            return await asyncio.gather(*reading)

    texts = asyncio.run(asyncio.wait_for(main(), timeout=100))
    assert all("yellow" in text for text in texts)
    assert len(set(texts)) <= 5  # Batches round differently.


def test_100_clients_at_once_do_not_wait_in_line(endless_server, choose):
    """Each has its first text before any of them has ended: in a line, the second had none."""

    async def main():
        async with client() as session, contextlib.AsyncExitStack() as stack:
            url, body = f"{endless_server.url}/v1/chat/completions", question(SUN, stream=True)
            parts = [session.stream("POST", url, json=body) for _ in range(choose(20, 100))]
            responses = await asyncio.gather(*map(stack.enter_async_context, parts))
            for response in responses:
                assert "content" in await anext(response.aiter_text())

    asyncio.run(asyncio.wait_for(main(), timeout=100))
    wait_for(lambda: endless_server.running() == 0)


@pytest.mark.parametrize("prompt", ["Hi", "Why? " * 9000])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_stops_its_generation(endless_server, prompt, streamed):
    """While it is generated, and while the prompt is read."""

    async def main():
        async with client() as session:
            body = question(prompt, stream=streamed)
            url = f"{endless_server.url}/v1/chat/completions"
            asking = asyncio.create_task(session.post(url, json=body))
            while (await session.get(f"{endless_server.url}/requests")).json() != 1:
                await asyncio.sleep(0.05)
            asking.cancel()

    asyncio.run(asyncio.wait_for(main(), timeout=100))
    wait_for(lambda: endless_server.running() == 0)


def test_200_clients_that_give_up_and_slow_readers_block_nobody(endless_server, choose):
    async def give_up(session) -> None:
        with contextlib.suppress(asyncio.TimeoutError):  # Another one on Python 3.10.
            await asyncio.wait_for(read_whole(session, endless_server), random.random() * 2)

    async def main():
        url = f"{endless_server.url}/v1/chat/completions"
        async with client() as session, client() as slow:
            request = slow.build_request("POST", url, json=question(SUN, stream=True))
            unread = [await slow.send(request, stream=True) for _ in range(5)]
            await asyncio.gather(*(give_up(session) for _ in range(choose(50, 200))))
            parts = session.stream("POST", url, json=question("Hi", stream=True))
            async with parts as response:
                assert await anext(response.aiter_text())
            for response in unread:
                await response.aclose()

    asyncio.run(asyncio.wait_for(main(), timeout=100))
    wait_for(lambda: endless_server.running() == 0)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_while_it_streams(tmp_path, number):
    async def main(server) -> float:
        async with client() as session:
            streams = [asyncio.create_task(read_whole(session, server)) for _ in range(5)]
            while (await session.get(f"{server.url}/requests")).json() < 5:
                await asyncio.sleep(0.05)
            os.kill(server.process.pid, number)
            start = time.monotonic()
            await asyncio.to_thread(server.process.wait, 60)
            await asyncio.gather(*streams, return_exceptions=True)
            return time.monotonic() - start

    with Server(tmp_path, SERVE_ENDLESS) as server:
        assert (
            asyncio.run(asyncio.wait_for(main(server), timeout=100)) < 20
        )  # They would take hours. About 2.5 s here.
        assert server.process.returncode in (0, -number)
