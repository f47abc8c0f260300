"""Compare answers at once with answers one by one, in one run on one machine:

    python tests/benchmark_batch.py

At once by `batch.py` of README.md, one by one by `stream`. The prompts come at the same time, and
the shipped model writes 100 tokens to each. All numbers are ratios: how many times more tokens a
second come at once, and how many times sooner the first text of an answer comes, on average.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import openvino_genai
from families import MODELS, PROMPTS
from recipes import import_recipe

from multinomial_causal_lm import stream

ROUNDS, TOKENS = 5, 100


def one_by_one(pipe, prompts: list[str], config) -> tuple[float, float]:
    """Return the seconds for all, and until the first text of each on average."""
    start, firsts = time.perf_counter(), []
    for prompt in prompts:
        chunks = stream(pipe, prompt, config)
        next(chunks)
        firsts.append(time.perf_counter() - start)
        for _ in chunks:
            pass
    return time.perf_counter() - start, statistics.mean(firsts)


async def at_once(batch, prompts: list[str], config) -> tuple[float, float]:
    start = time.perf_counter()

    async def read(prompt: str) -> float:
        chunks = batch.stream(prompt, config)
        await anext(chunks)
        first = time.perf_counter() - start
        async for _ in chunks:
            pass
        return first

    firsts = await asyncio.gather(*map(read, prompts))
    return time.perf_counter() - start, statistics.mean(firsts)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        batch = import_recipe("batch.py", Path(folder)).Batch(MODELS / "tiny-llama")
    pipe = openvino_genai.LLMPipeline(MODELS / "tiny-llama", "CPU")
    config = pipe.get_generation_config()
    config.min_new_tokens = config.max_new_tokens = TOKENS
    print("| prompts | tokens a second | first text |")
    print("| --- | --- | --- |")
    for count in 1, 4, 16, 64:
        prompts = [f"{PROMPTS[number % 3]} {number}" for number in range(count)]
        ratios = []
        for _ in range(ROUNDS):
            slow = one_by_one(pipe, prompts, config)
            fast = asyncio.run(at_once(batch, prompts, config))
            ratios.append([mine / other for mine, other in zip(slow, fast, strict=True)])
        speed, first = map(statistics.median, zip(*ratios, strict=True))
        print(f"| {count} | {speed:.1f} times as many | {first:.1f} times as soon |", flush=True)


if __name__ == "__main__":
    main()
