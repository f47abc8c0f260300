"""What HAProxy and Ray Serve cost in front of one server, as ratios to `uvicorn` alone:

    python tests/benchmark_machines.py

In the environment of the hosts; in one run on one machine, in turns. HAProxy
leads to the same server as without it, Ray to one of its own.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from families import SUN
from servers import PROBE, Ray, Server, client, end, question, serve_with, start_haproxy

ROUNDS, TOKENS = 7, 300


async def ask(session, url: str) -> float:
    """Return the seconds until the first text."""
    start, first = time.perf_counter(), 0.0
    body = question(SUN, stream=True)
    async with session.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        async for _ in response.aiter_lines():
            first = first or time.perf_counter() - start
    return first


async def measure(url: str, count: int) -> tuple[float, float]:
    """Return the seconds until the first text of each on average, and for all."""
    async with client() as session:
        start = time.perf_counter()
        firsts = await asyncio.gather(*(ask(session, url) for _ in range(count)))
        return statistics.mean(firsts), time.perf_counter() - start


def compare(alone: str, behind: str, name: str) -> None:
    for count in 1, 40:
        ratios = []
        for _ in range(ROUNDS):
            its = asyncio.run(measure(alone, count))
            own = asyncio.run(measure(behind, count))
            ratios.append([mine / yours for mine, yours in zip(own, its, strict=True)])
        first, whole = map(statistics.median, zip(*ratios, strict=True))
        print(f"{name}, {count}: first text after {first:.2f}, tokens a second {1 / whole:.2f}")


def main() -> None:
    changes = serve_with(f"max_new_tokens={TOKENS}, min_new_tokens={TOKENS}")
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), changes) as server:
        config = Path(folder) / "haproxy.cfg"
        url, process = start_haproxy(config, [server.url, server.url])
        compare(server.url, url, "HAProxy")
        end(process)
        ray = Ray(Path(folder), changes, PROBE, machines=1)
        compare(server.url, ray.url, "Ray Serve")
        ray.stop()


if __name__ == "__main__":
    main()
