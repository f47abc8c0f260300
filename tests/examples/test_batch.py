"""`batch.py` in asyncio."""

import asyncio
import functools
import random
import re
import subprocess
import threading
import time

import openvino_genai
import pytest
from conftest import EXACT, PROPERTIES, make_config, posix, wait_for
from families import FAMILIES, GGUF, MESSAGES, MODELS, PROMPTS, SUN, path_of
from multinomial_causal_lm import stream
from programs import EXAMPLES, import_example, run, run_program, save


@pytest.fixture(scope="module")
def module():
    """`batch.py`, imported. It computes exactly."""
    module = import_example("batch.py")
    exact = functools.partial(openvino_genai.ContinuousBatchingPipeline, properties=EXACT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ContinuousBatchingPipeline", exact)
        yield module


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


def test_the_program_answers_three_prompts():
    output = run(EXAMPLES / "batch.py")
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
