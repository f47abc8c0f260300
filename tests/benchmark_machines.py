"""What HAProxy costs in front of `uvicorn`, as ratios to `uvicorn` alone, in one run on one machine:

    python tests/benchmark_machines.py

In the environment of the recipes for other hosts. Both ways lead to the same server, in turns.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from families import SUN
from servers import Server, client, question, serve_with, start_haproxy

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


def main() -> None:
    settings = serve_with(f"max_new_tokens={TOKENS}, min_new_tokens={TOKENS}")
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), settings) as server:
        url, stop = start_haproxy(Path(folder), [server.url, server.url])
        for count in 1, 40:
            ratios = []
            for _ in range(ROUNDS):
                alone = asyncio.run(measure(server.url, count))
                behind = asyncio.run(measure(url, count))
                ratios.append([mine / its for mine, its in zip(behind, alone, strict=True)])
            first, whole = map(statistics.median, zip(*ratios, strict=True))
            print(f"{count} clients: first text after {first:.2f}, tokens a second {1 / whole:.2f}")
        stop()


if __name__ == "__main__":
    main()
