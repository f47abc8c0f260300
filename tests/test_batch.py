"""The recipes for many users at once: `batch.py` in asyncio, `serve.py` in a real server."""

import asyncio
import contextlib
import importlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

import httpx
import openvino_genai
import pytest
from conftest import PROPERTIES, posix, wait_for
from families import FAMILIES, GGUF, MODELS, PROMPTS, ROOT, SUN
from recipes import ENDLESS, RECIPES, run, run_program, save

from multinomial_causal_lm import stream


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """`batch.py`, imported."""
    folder = tmp_path_factory.mktemp("batch")
    save(folder, "batch.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module("batch")


@pytest.fixture(scope="module")
def load_batch(module):
    batches = {}

    def load(name: str):
        if name not in batches:
            batches[name] = module.Batch(str(MODELS / name))
        return batches[name]

    return load


@pytest.fixture
def batch(load_batch):
    return load_batch("tiny-llama")


def make_config(batch, tokens: int = 40):
    config = batch.pipe.get_config()
    config.max_new_tokens = tokens
    config.ignore_eos = tokens > 1000
    return config


async def answer(batch, prompt, tokens: int = 40) -> str:
    return "".join([chunk async for chunk in batch.stream(prompt, make_config(batch, tokens))])


async def answers(batch, prompts, tokens: int = 40) -> list[str]:
    return await asyncio.gather(*(answer(batch, prompt, tokens) for prompt in prompts))


def test_the_program_answers_three_prompts(tmp_path):
    output = run(tmp_path, "batch.py")
    assert "yellow" in output and len(output.splitlines()) >= 3


def test_the_program_has_at_most_70_lines():
    assert len([line for line in RECIPES["batch.py"].splitlines() if line]) <= 70


@pytest.mark.parametrize("name", FAMILIES + GGUF)
def test_100_answers_at_once_are_those_of_stream(load_batch, load_pipe, name):
    batch = load_batch(name)
    pipe = load_pipe(name, **PROPERTIES["paged attention"])
    prompts = [f"{PROMPTS[number % 3]} {number}" for number in range(100)]
    expected = ["".join(stream(pipe, prompt, make_config(batch))) for prompt in prompts]
    received = asyncio.run(answers(batch, prompts))
    same = sum(map(str.__eq__, received, expected))
    # Batches round differently, and random weights have more close calls.
    assert same >= (95 if name == "tiny-llama" else 85)


def test_messages_of_a_chat_are_a_prompt(batch, load_pipe):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": SUN},
    ]
    pipe = load_pipe("tiny-llama", **PROPERTIES["paged attention"])
    history = openvino_genai.ChatHistory(messages)
    expected = "".join(stream(pipe, history, make_config(batch)))
    assert asyncio.run(answer(batch, messages)) == expected


def test_a_chat_with_a_model_without_a_template_raises(load_batch):
    with pytest.raises(RuntimeError, match="[Tt]emplate"):
        asyncio.run(answer(load_batch("tiny-qwen"), [{"role": "user", "content": "Hi"}]))


def test_what_is_refused_raises(batch):
    async def refused():
        config = make_config(batch)
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
    assert threading.active_count() == threads


def test_leaving_the_loop_stops_the_generation(batch):
    async def leave():
        async for chunk in batch.stream(SUN, make_config(batch, 1_000_000)):
            assert chunk
            break
        while batch.pipe.get_metrics().requests:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), timeout=30))


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


def test_what_a_step_raises_reaches_every_reader_and_the_next_are_answered(load_batch):
    batch = load_batch("tiny-llama3")
    pipe = batch.pipe

    class BrokenOnce:
        def __getattr__(self, name):
            return getattr(pipe, name)

        def step(self):
            if self.broken and pipe.has_non_finished_requests():
                self.broken = False
                raise ArithmeticError("broken")
            pipe.step()

    batch.pipe = BrokenOnce()

    async def main():
        batch.pipe.broken = False
        streams = [batch.stream(SUN, make_config(batch, 1_000_000)) for _ in range(5)]
        await asyncio.gather(*map(anext, streams))  # All run.
        batch.pipe.broken = True
        for chunks in streams:
            with pytest.raises(ArithmeticError, match="broken"):
                async for _ in chunks:
                    pass
        return await answer(batch, SUN)

    assert asyncio.run(asyncio.wait_for(main(), timeout=60))


@pytest.mark.parametrize("count", range(20))
def test_a_program_that_ends_while_streams_run_ends_with_its_status(tmp_path, count):
    environment = save(tmp_path, "batch.py")
    (tmp_path / "program.py").write_text(
        """
import asyncio, sys, time
from batch import Batch

batch = Batch("tests/models/tiny-llama")
config = batch.pipe.get_config()
config.max_new_tokens, config.ignore_eos = 1_000_000, True


async def main():
    streams = [batch.stream("Hi", config) for _ in range(10)]
    await asyncio.gather(*map(anext, streams))
    print(time.time())
    sys.exit(3)


asyncio.run(main())
""",
        encoding="utf-8",
    )
    process = run_program(tmp_path / "program.py", environment)
    assert process.returncode == 3, process.stderr
    assert process.stderr == ""
    assert time.time() - float(process.stdout) < 10  # It would go on for hours.


class Server:
    """`serve.py` in uvicorn, with the number of requests that run at `/requests`."""

    def __init__(self, folder, changes=None) -> None:
        environment = save(folder, "batch.py", "serve.py", changes=changes)
        (folder / "probe.py").write_text(
            "from serve import app, batch\n"
            "app.get('/requests')(lambda: batch.pipe.get_metrics().requests)\n",
            encoding="utf-8",
        )
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", "probe:app", "--port", str(port)]
        command += ["--timeout-graceful-shutdown", "2"]
        self.log = (folder / "log").open("wb")  # A pipe that nobody reads would stop it.
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log
        )
        self.url = f"http://127.0.0.1:{port}"
        wait_for(self.is_up, seconds=60)

    def is_up(self) -> bool:
        assert self.process.poll() is None
        try:
            return httpx.get(f"{self.url}/requests").status_code == 200
        except httpx.TransportError:
            return False

    def running(self) -> int:
        return httpx.get(f"{self.url}/requests", timeout=30).json()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def endless_server(tmp_path):
    server = Server(tmp_path, ENDLESS)
    yield server
    server.stop()


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60)


async def read(client, url: str, prompt: str) -> tuple[str, float]:
    """Return the text, and when its first part came."""
    text, first = "", 0.0
    async with client.stream("GET", url, params={"prompt": prompt}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain")
        async for part in response.aiter_text():
            first = first or time.monotonic()
            text += part
    return text, first


def test_100_clients_at_once_get_their_whole_texts_and_do_not_wait_in_line(tmp_path):
    long = "config.max_new_tokens = config.min_new_tokens = 200"
    server = Server(tmp_path, {"config.max_new_tokens = 500": long})

    async def main():
        async with client() as session:
            start = time.monotonic()
            reads = await asyncio.gather(*(read(session, server.url, SUN) for _ in range(100)))
            return reads, start, time.monotonic() - start

    reads, start, duration = asyncio.run(main())
    server.stop()
    texts = {text for text, _ in reads}
    assert all("yellow" in text and len(text) > 400 for text in texts)
    assert len(texts) <= 5  # Batches round differently.
    assert statistics.mean(first - start for _, first in reads) < duration / 2


@pytest.mark.parametrize("prompt", ["", " \n", "x" * 2001])
def test_a_prompt_that_is_empty_or_too_long_gets_422_and_one_line(server, prompt):
    response = httpx.get(server.url, params={"prompt": prompt})
    assert response.status_code == 422
    assert len(response.text.splitlines()) == 1


def test_a_client_that_leaves_stops_its_generation(endless_server):
    with httpx.stream("GET", endless_server.url, params={"prompt": "Hi"}) as response:
        assert next(response.iter_text())
        wait_for(lambda: endless_server.running() == 1)
    wait_for(lambda: endless_server.running() == 0)


def test_100_clients_that_give_up_and_slow_readers_block_nobody(endless_server):
    async def give_up(session) -> None:
        with contextlib.suppress(asyncio.TimeoutError):  # Another one on Python 3.10.
            await asyncio.wait_for(read(session, endless_server.url, SUN), random.random() * 2)

    async def main():
        async with client() as session, client() as slow:
            request = slow.build_request("GET", endless_server.url, params={"prompt": SUN})
            unread = [await slow.send(request, stream=True) for _ in range(5)]
            await asyncio.gather(*(give_up(session) for _ in range(100)))
            parts = session.stream("GET", endless_server.url, params={"prompt": "Hi"})
            async with parts as response:
                assert await anext(response.aiter_text())
            for response in unread:
                await response.aclose()

    asyncio.run(main())
    wait_for(lambda: endless_server.running() == 0)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_while_it_streams(endless_server, number):
    async def main() -> float:
        async with client() as session:
            streams = [
                asyncio.create_task(read(session, endless_server.url, SUN)) for _ in range(5)
            ]
            while (await session.get(f"{endless_server.url}/requests")).json() < 5:
                await asyncio.sleep(0.05)
            os.kill(endless_server.process.pid, number)
            start = time.monotonic()
            await asyncio.to_thread(endless_server.process.wait, 60)
            await asyncio.gather(*streams, return_exceptions=True)
            return time.monotonic() - start

    assert asyncio.run(main()) < 20  # They would take hours. About 2.5 s here.
    assert endless_server.process.returncode in (0, -number)
