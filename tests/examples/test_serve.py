"""`serve.py` in a real server, with real clients."""

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator

import httpx
import pytest
from conftest import EXACT, PROPERTIES, make_config, posix, wait_for
from families import PROMPTS, SUN
from multinomial_causal_lm import stream
from servers import SERVE_ENDLESS, Server, client, question, read


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
