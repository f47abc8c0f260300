"""`serve.py` in a real server, with real clients."""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from conftest import EXACT, PROPERTIES, make_config, posix, wait_for
from families import MODELS, PROMPTS, SUN
from multinomial_causal_lm import stream
from servers import PROBE, SERVE_ENDLESS, Server, client, question, read


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
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    url = f"{server.url}/v1/chat/completions"
    return CLIENT.post(url, content=content, headers=headers, **options)


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
    {"messages": [{"role": "nobody", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    question("Hi", n=2),
    question("Hi", n=0),
    *(question("Hi", stream_options=options) for options in ([], {"include_usage": [1]})),
    question("Hi", tools=[{"type": "function"}]),
    question("Hi", tool_choice="required"),
    question("Hi", functions=[{"name": "f"}]),
    question("Hi", function_call={"name": "f"}),
    question("Hi", logprobs=True),
    question("Hi", top_logprobs=2),
    question("Hi", logit_bias={"5": 100}),
    question("Hi", modalities=["text", "audio"]),
    question("Hi", prediction={"type": "content", "content": "Hi"}),
    {"messages": "Hi"},
    {"messages": [None]},
    {"messages": [{"role": "user", "content": 7}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"content": "Hi"}]},
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    *(question("Hi", stop=stop) for stop in (7, "x" * 101, ["x"] * 101, [None])),
    question("Hi", seed="many"),
    *(question("Hi", max_tokens=number) for number in (0, -1, 32769, "many")),
    *(question("Hi", max_completion_tokens=number) for number in (0, -1, 32769)),
    *(question("Hi", temperature=number) for number in (-1, 3, "hot")),
    *(question("Hi", top_p=number) for number in (0, -1, 7)),
    *(question("Hi", frequency_penalty=number) for number in (-3, 3)),
    *(question("Hi", presence_penalty=number) for number in (-3, 3)),
    question("Hi", response_format={"type": "xml"}),
    question("Hi", response_format={"type": "json_schema", "json_schema": {"schema": 7}}),
    *(
        question("Hi", response_format={"type": "json_schema", "json_schema": {"schema": schema}})
        for schema in ({"type": "nothing"}, {"enum": []}, {"type": "string", "pattern": "("})
    ),
    question("Why? " * 2000),  # More than its context.
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
    assert httpx.get(f"{server.url}/nothing").json()["error"]["message"] == "Not Found"
    assert server.running() == 0


def chunks_of(body: dict):
    """Return a body that does not say its length, as some clients send it."""
    content = json.dumps(body).encode()
    yield from (content[start : start + 10] for start in range(0, len(content), 10))


def test_a_body_without_a_length_is_read_and_a_large_one_is_refused(server):
    response = ask(server, chunks_of(question(SUN, max_tokens=60)))
    assert response.status_code == 200 and "yellow" in response.text
    large = question("x" * 1_000_001)
    for body in large, chunks_of(large):
        response = ask(server, body, headers={"Connection": "close"})
        assert response.status_code == 413
        assert "1,000,000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_page_of_other_people_may_send_unasked_is_refused(server, kind):
    response = ask(server, question(SUN), headers={"Content-Type": kind, "Origin": "http://x"})
    assert response.status_code == 415
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_what_clients_send_that_changes_nothing_is_accepted(server):
    extras = {
        "stream": None,
        "stream_options": {"include_usage": None},
        "seed": -1,
        "user": "me",
        "tools": [],
        "tool_choice": "auto",
        "logprobs": False,
        "n": None,
        "response_format": {"type": "text"},
        "reasoning_effort": "low",
    }
    response = ask(server, question(SUN, max_tokens=5, **extras))
    assert response.status_code == 200, response.text
    messages = [{"role": "developer", "content": "Hi"}, {"role": "user", "content": None}]
    same = [{"role": "system", "content": "Hi"}, {"role": "user", "content": ""}]
    first, second = (ask(server, {"messages": each, "max_tokens": 9}) for each in (messages, same))
    assert first.json()["choices"] == second.json()["choices"]


def test_an_answer_without_a_limit_goes_on_until_the_model_or_its_context_ends(tmp_path):
    """Here, of a model that never ends one: its context has 2,048 tokens."""
    with Server(
        tmp_path, {r"return settings \|": "return settings | {'ignore_eos': True} |"}
    ) as server:
        whole = ask(server, question("Hi")).json()
        assert whole["choices"][0]["finish_reason"] == "length"
        assert whole["usage"]["total_tokens"] == 2048


def test_structured_answers_are_valid_or_cut(server):
    """`tiny-llama` has `{` as a byte only, which the library does not see as one."""

    def ask_for(schema: dict, **more) -> dict:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return ask(server, question(SUN, response_format=form, **more)).json()["choices"][0]

    assert json.loads(ask_for({"enum": ["red", "green"]})["message"]["content"]) in ["red", "green"]
    assert json.loads(ask_for({"type": "boolean"})["message"]["content"]) in [True, False]
    assert ask_for({"enum": ["red", "green"]}, max_tokens=1)["finish_reason"] == "length"


def test_what_a_chat_template_takes_reaches_it(tmp_path, monkeypatch):
    """As `enable_thinking`, which thinking models have."""
    folder = shutil.copytree(MODELS / "tiny-qwen", tmp_path / "model")
    template = "{{ messages[0].content }}{% if enable_thinking %}{{ ' think' * 20 }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    monkeypatch.setenv("MODEL", str(folder))
    with Server(tmp_path) as server:
        counts = []
        for kwargs in None, {"enable_thinking": False}, {"enable_thinking": True}:
            body = question("Hi", max_tokens=3, chat_template_kwargs=kwargs)
            counts.append(ask(server, body).json()["usage"]["prompt_tokens"])
        assert counts[0] == counts[1] < counts[2]


def test_a_prompt_that_fits_no_cache_is_refused(tmp_path):
    small = {r"scheduler\.cache_size = .*": "scheduler.num_kv_blocks, scheduler.cache_size = 4, 0"}
    with Server(tmp_path, {}, small) as server:
        for streamed in False, True:
            response = ask(server, question("Why? " * 400, stream=streamed))
            assert response.status_code == 400
            assert "cache" in response.json()["error"]["message"]


def kill_engine(server) -> None:
    CLIENT.get(f"{server.url}/kill")


KILLING = (
    PROBE
    + """
app.get("/kill")(lambda: batch.engine.process.kill())
"""
)


def test_a_dead_engine_is_said_and_ends_the_server_with_a_status(tmp_path):
    """As an error, as an event behind the first text, at `/health`, and with a traceback."""

    async def main() -> list:
        async with client() as session:
            body = question(SUN, stream=True)
            url = f"{server.url}/v1/chat/completions"
            async with session.stream("POST", url, json=body) as response:
                lines = response.aiter_lines()
                await anext(lines)
                await asyncio.to_thread(kill_engine, server)
                rest = [line async for line in lines if line]
                health = await session.get(f"{server.url}/health")
                late = await session.post(url, json=question(SUN))
                return [health, late, rest]

    with Server(tmp_path, SERVE_ENDLESS, probe=KILLING) as server:
        health, late, lines = asyncio.run(asyncio.wait_for(main(), timeout=60))
        assert health.status_code == 503 and "engine has ended" in health.json()["status"]
        assert late.status_code == 500 and late.json()["error"]["type"] == "server_error"
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and lines[-1] == "data: [DONE]"
        assert server.process.wait(timeout=30) == 1
        log = server.log.read_text(encoding="utf-8")
        assert "Traceback" in log and "and so does the server" in log


def test_health_and_models(server):
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 200 and health.json() == {"status": "ok", "answers": 0}
    assert httpx.get(f"{server.url}/v1/models/tiny-llama").json()["id"] == "tiny-llama"
    assert httpx.get(f"{server.url}/v1/models/other").status_code == 404


def test_health_counts_the_answers_under_way(endless_server):
    async def main() -> None:
        async with client() as session, contextlib.AsyncExitStack() as stack:
            url, body = f"{endless_server.url}/v1/chat/completions", question(SUN, stream=True)
            parts = [session.stream("POST", url, json=body) for _ in range(3)]
            await asyncio.gather(*map(stack.enter_async_context, parts))
            health = await session.get(f"{endless_server.url}/health")
            assert health.json()["answers"] == 3

    asyncio.run(asyncio.wait_for(main(), timeout=60))
    wait_for(lambda: endless_server.running() == 0)


def test_each_answer_is_a_line_in_the_log(tmp_path):
    """Also one that is refused, or whose client leaves, before or behind its body."""

    async def leave(server) -> None:
        async with client() as session:
            url = f"{server.url}/v1/chat/completions"
            asking = asyncio.create_task(session.post(url, json=question("Hi")))
            while await asyncio.to_thread(server.running) != 1:
                await asyncio.sleep(0.02)
            asking.cancel()

    with Server(tmp_path, SERVE_ENDLESS) as server:
        asyncio.run(asyncio.wait_for(leave(server), timeout=60))
        wait_for(lambda: server.running() == 0)
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as caller:
            caller.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
                b"Content-Type: application/json\r\n\r\n{"
            )
        assert (
            ask(
                server,
                question(
                    "Hi",
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"schema": {"enum": []}},
                    },
                ),
            ).status_code
            == 400
        )
        wait_for(lambda: "refused" in server.log.read_text(encoding="utf-8"))
        log = server.log.read_text(encoding="utf-8")
    assert re.search(r"14 \+ \d+ tokens in [0-9.]+ s: the client left", log)
    assert re.search(r"0 \+ 0 tokens in [0-9.]+ s: refused: ", log)
    assert "Traceback" not in log


def test_an_api_key_is_asked_for_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    with Server(tmp_path) as server:
        for given, status in [
            ("Bearer secret", 200),
            ("bearer secret", 200),
            ("Bearer Secret", 401),
            ("Bearer secret2", 401),
            ("Basic secret", 401),
            ("secret", 401),
            ("", 401),
        ]:
            response = ask(server, question("Hi", max_tokens=3), headers={"Authorization": given})
            assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.headers["WWW-Authenticate"] == "Bearer"
        for path, status in {
            "health": 200,
            "v1/models": 401,
            "docs": 404,
            "openapi.json": 404,
        }.items():
            assert httpx.get(f"{server.url}/{path}").status_code == status


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
