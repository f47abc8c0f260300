"""Compare answers at once with answers one by one, in one run on one machine:

    python tests/benchmark_batch.py [model_dir [prompts ...]]

At once by `examples/batch.py`, one by one by `stream`. The prompts come at the same time, and
the model writes 100 tokens to each. All numbers are ratios: how many times more tokens a second
come at once, and how many times sooner the first text of an answer comes, on average.

What text costs is the time as a ratio to the same steps of the library without any text, as if a
device did each step in 20 ms. Like a real step, the simulated one keeps Python's lock.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import device
import openvino_genai
from families import MODELS, PROMPTS
from multinomial_causal_lm import stream
from programs import import_changed

ROUNDS, TOKENS = 3, 100


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


async def at_once(batch, prompts: list[str], settings: dict) -> tuple[float, float]:
    await asyncio.sleep(1)  # Until the threads of what was measured before sleep, too.
    start = time.perf_counter()

    async def read(prompt: str) -> float:
        chunks = batch.stream(prompt, **settings)
        await anext(chunks)
        first = time.perf_counter() - start
        async for _ in chunks:
            pass
        return first

    firsts = await asyncio.gather(*map(read, prompts))
    return time.perf_counter() - start, statistics.mean(firsts)


def without_text(pipe, prompts: list[str], config) -> float:
    """Return the seconds of the same steps, with nothing between them."""
    tokenizer, start, handles = pipe.get_tokenizer(), time.perf_counter(), []
    for number, prompt in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        tokens = tokenizer.encode(text, add_special_tokens=False).input_ids
        handles.append(pipe.add_request(number, tokens, config))
    while pipe.has_non_finished_requests():
        device.step(pipe)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare answers at once with one by one.")
    parser.add_argument("model_dir", nargs="?", default=str(MODELS / "tiny-llama"))
    parser.add_argument("prompts", nargs="*", type=int, default=[1, 4, 16, 64, 200])
    arguments = parser.parse_args()
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    bare = openvino_genai.ContinuousBatchingPipeline(arguments.model_dir, scheduler, "CPU")
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        here = import_changed("batch.py", Path(one)).Batch(arguments.model_dir)
        slow = {r"pipe\.step\(\)": "__import__('device').step(pipe)"}
        there = import_changed("batch.py", Path(other), slow).Batch(arguments.model_dir)
    pipe = openvino_genai.LLMPipeline(arguments.model_dir, "CPU")
    config = pipe.get_generation_config()
    settings = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    config.update_generation_config(**settings)
    print("| prompts at once | tokens a second | first text | text costs, at 20 ms a step |")
    print("| --- | --- | --- | --- |")
    for count in arguments.prompts:
        prompts = [f"{PROMPTS[number % 3]} {number}" for number in range(count)]
        ratios = []
        for _ in range(ROUNDS):
            slow = one_by_one(pipe, prompts, config)
            fast = asyncio.run(at_once(here, prompts, settings))
            ratios.append([mine / other for mine, other in zip(slow, fast, strict=True)])
            floor = without_text(bare, prompts, config)
            ratios[-1].append(asyncio.run(at_once(there, prompts, settings))[0] / floor)
        speed, first, on_device = map(statistics.median, zip(*ratios, strict=True))
        print(
            f"| {count} | {speed:.1f} times as many | {first:.1f} times sooner | {on_device:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
