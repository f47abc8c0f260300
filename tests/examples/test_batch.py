"""`batch.py` in asyncio, with its engine as a process of its own."""

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import openvino_genai
import pytest
from conftest import EXACT, PROPERTIES, make_config, posix, wait_for
from families import FAMILIES, GGUF, MESSAGES, MODELS, PROMPTS, SUN, path_of
from multinomial_causal_lm import stream
from programs import EXAMPLES, import_changed, run, run_program, save

MODEL = str(MODELS / "tiny-llama")
EXACTLY = {r"scheduler, device\)": f"scheduler, device, {EXACT})"}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """`batch.py`, imported. Its engine computes exactly."""
    return import_changed("batch.py", tmp_path_factory.mktemp("batch"), EXACTLY)


@pytest.fixture(scope="module")
def load_batch(module):
    batches = {}

    def load(name: str):
        if name not in batches:
            batches[name] = module.Batch(path_of(name))
        return batches[name]

    yield load
    batches.clear()


@pytest.fixture
def batch(load_batch):
    return load_batch("tiny-llama")


@pytest.fixture
def make_changed(tmp_path):
    """Make a `Batch` whose engine is changed."""
    return lambda changes: import_changed("batch.py", tmp_path, changes).Batch(MODEL)


def run_beside_batch(folder, source: str) -> subprocess.CompletedProcess:
    """Run a program that may import `batch`, in a process of its own."""
    environment = save(folder, "batch.py")
    (folder / "program.py").write_text(source, encoding="utf-8")
    return run_program(folder / "program.py", environment=environment, seconds=300)


def settings_of(tokens: int) -> dict:
    return {"max_new_tokens": tokens, "ignore_eos": tokens >= 1000}


async def answer(batch, prompt=SUN, tokens: int = 40, **settings) -> str:
    chunks = batch.stream(prompt, **settings_of(tokens) | settings)
    return "".join([chunk async for chunk in chunks])


async def answers(batch, prompts, tokens: int = 40) -> list[str]:
    return await asyncio.gather(*(answer(batch, prompt, tokens) for prompt in prompts))


def finish(coroutine, seconds: float = 60):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=seconds))


def nothing_runs(batch) -> bool:
    return not batch.engine.answers


def test_the_program_answers_three_prompts():
    output = run(EXAMPLES / "batch.py")
    assert "yellow" in output and len(output.splitlines()) >= 3


@pytest.mark.parametrize("name", FAMILIES + GGUF)
def test_100_answers_at_once_are_those_of_stream(load_batch, load_pipe, choose, name):
    batch = load_batch(name)
    pipe = load_pipe(name, **PROPERTIES["paged attention"])
    prompts = [f"{PROMPTS[number % 3]} {number}" for number in range(choose(12, 100))]
    expected = ["".join(stream(pipe, prompt, make_config(pipe, 40))) for prompt in prompts]
    received = finish(answers(batch, prompts))
    same = sum(map(str.__eq__, received, expected))
    # Batches round differently, and random weights have close calls.
    assert len(prompts) - same <= (0 if name == "tiny-llama" else choose(4, 15))


def test_messages_of_a_chat_are_a_prompt(batch, load_pipe):
    pipe = load_pipe("tiny-llama", **PROPERTIES["paged attention"])
    history = openvino_genai.ChatHistory(MESSAGES)
    expected = "".join(stream(pipe, history, make_config(pipe, 40)))
    assert finish(answer(batch, MESSAGES)) == expected


def test_usage_is_counted_and_says_how_an_answer_ended(batch):
    async def ask(**settings) -> dict:
        usage = {}
        async for _ in batch.stream(SUN, usage, **settings):
            pass
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        return usage

    whole = finish(ask(max_new_tokens=200))
    assert whole["finish_reason"] == "stop" and 20 < whole["completion_tokens"] < 200
    assert finish(ask(max_new_tokens=7))["finish_reason"] == "length"
    stopped = finish(ask(max_new_tokens=200, stop_strings=["ello"]))
    assert stopped["finish_reason"] == "stop"
    assert stopped["completion_tokens"] <= whole["completion_tokens"]
    assert finish(ask(max_length=40))["total_tokens"] == 40


REFUSED = [
    {"top_p": 7.0, "do_sample": True},
    {"max_new_tokens": 0},
    {"max_new_tokens": None},
    {"max_new_tokens": "many"},
    {"max_new_tokens": {1}},
    {"min_new_tokens": 10, "max_new_tokens": 5},
    {"max_length": 5, "max_new_tokens": 2**64 - 1},
    {"repetition_penalty": -1.0},
    {"presence_penalty": float("nan")},
    {"rng_seed": 2**64},
    {"rng_seed": -1},
    {"temperature": float("inf"), "do_sample": True},
    {"stop_strings": [1]},
    {"stop_strings": "a"},
    {"stop_token_ids": "ab"},
    {"num_beams": 4},
    {"num_return_sequences": 2},
    {"assistant_confidence_threshold": 0.5},
    {"unknown": 1},
    {"validate": 1},
    {"structured_output_config": {"json_schema": '{"type": "nothing"}'}},
    {"structured_output_config": {"json_schema": "{"}},
    {"structured_output_config": {"grammar": "x"}},
    {"structured_output_config": {"nothing": 1}},
    {"structured_output_config": "x"},
    {"apply_chat_template": object()},
]


def test_what_is_refused_raises_for_one_reader_only(batch):
    """At the first chunk, in one sentence, while another stream goes on."""

    async def main() -> None:
        others = batch.stream("Hi", **settings_of(1_000_000))
        for settings in REFUSED:
            await anext(others)
            with pytest.raises(ValueError) as caught:
                await answer(batch, **settings)
            assert str(caught.value) and ".cpp" not in str(caught.value), settings
        for prompt in None, 7, "\ud800", [7], {}, b"x":
            with pytest.raises(ValueError):
                await answer(batch, prompt)
        await anext(others)
        await others.aclose()

    finish(main())
    wait_for(lambda: nothing_runs(batch))


def test_a_chat_with_a_model_without_a_template_is_refused(load_batch):
    with pytest.raises(ValueError, match="[Tt]emplate"):
        finish(answer(load_batch("tiny-qwen"), MESSAGES))


VALUES = [None, 0, 1, -1, 2, 2**31, 2**62, 2**63, 2**64, -(2**63), 0.0, 0.5, -0.5, 1e-300, 1e308]
VALUES += [float("nan"), float("inf"), True, False, "", "x", [], [1], [-1], [2**62], ["a"], [None]]
VALUES += [{"a"}, {1}, {}, {"json_schema": "{"}, {"regex": "("}, {"regex": "a"}, (1,), b"x"]


def test_no_settings_stop_the_answers_of_others(batch, module, choose):
    """Any values for any fields, beside a stream that must go on."""
    generator = random.Random(0)
    names = [*module.SETTINGS, "logprobs", "echo", "adapters"]

    async def ask() -> None:
        pairs = [(generator.choice(names), generator.choice(VALUES)) for _ in range(3)]
        settings = {"max_new_tokens": 5} | dict(pairs[: generator.choice([1, 1, 2, 3])])
        with contextlib.suppress(ValueError, MemoryError):
            chunks = batch.stream(SUN, **settings)
            async with contextlib.aclosing(chunks):
                for _ in range(20):
                    await anext(chunks, None)

    async def main() -> None:
        others = batch.stream("Hi", **settings_of(10_000_000))
        for _ in range(choose(10, 300)):
            await asyncio.wait_for(asyncio.gather(*(ask() for _ in range(10))), timeout=60)
            assert await asyncio.wait_for(anext(others), timeout=30)
        await others.aclose()

    finish(main(), seconds=500)
    wait_for(lambda: nothing_runs(batch))


def test_structured_answers_come_beside_free_ones(load_batch):
    """From a model with random weights, so that only the structure makes it valid."""
    batch = load_batch("tiny-qwen")

    async def ask(schema: dict) -> str:
        structure = {"json_schema": json.dumps(schema)}
        return await answer(batch, "Hi", 60, structured_output_config=structure)

    async def main() -> list[str]:
        schemas = [{"enum": ["red", "green"]}, {"type": "boolean"}, {"const": [1, {"a": None}]}]
        free = (answer(batch, "Hi", 60) for _ in range(3))
        return await asyncio.gather(*map(ask, schemas), *free)

    color, switch, constant, *free = finish(main())
    assert json.loads(color) in ["red", "green"]
    assert json.loads(switch) in [True, False]
    assert json.loads(constant) == [1, {"a": None}]
    assert len(set(free)) == 1 and free[0] not in (color, switch, constant)


def test_200_cancelled_at_random_leave_nothing_behind(batch):
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

    assert asyncio.run(cancel_all()) < 20  # All of them would take hours.
    wait_for(lambda: nothing_runs(batch))


def test_a_reader_that_is_late_gets_all_that_waits_as_one_chunk(batch):
    """Or a loop with more chunks than it can send would fall behind, further with each."""

    async def main() -> None:
        chunks = batch.stream(SUN, **settings_of(1_000_000))
        await anext(chunks)
        (begun,) = batch.engine.answers.values()
        while begun.queue.qsize() < 5:
            await asyncio.sleep(0.01)
        assert await anext(chunks)
        assert begun.queue.empty()
        await chunks.aclose()

    wait_for(lambda: nothing_runs(batch))
    finish(main())


def test_leaving_the_loop_stops_the_generation(batch):
    async def leave():
        async for chunk in batch.stream(SUN, **settings_of(1_000_000)):
            assert chunk
            break

    finish(leave())
    wait_for(lambda: nothing_runs(batch))


def test_several_event_loops_read_at_the_same_time(batch, choose):
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.extend(finish(answers(batch, [SUN] * 5))))
        for _ in range(choose(4, 20))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 5 * len(threads) and all("yellow" in text for text in texts)


def test_prompts_become_tokens_on_a_thread_of_their_own(batch, monkeypatch):
    """A long one would hold up the event loop."""
    names = []
    encode = batch.engine.encode

    def noting(*arguments):
        names.append(threading.current_thread().name)
        return encode(*arguments)

    monkeypatch.setattr(batch.engine, "encode", noting)
    assert finish(answer(batch))
    assert names == ["send"]


INTERRUPTED = """
import asyncio, os, random, signal, sys, threading
sys.path.append("tests")
import batch as module
from conftest import wait_for

signal.signal(signal.SIGINT, signal.default_int_handler)
batch = module.Batch("tests/models/tiny-llama")


async def main():
    async for chunk in batch.stream("Hi", max_new_tokens=1_000_000, ignore_eos=True):
        pass


def nothing_runs():
    return not batch.engine.answers


async def answer():
    return "".join([chunk async for chunk in batch.stream("Hi", max_new_tokens=5)])
"""


@posix
def test_signals_at_random_times_leave_nothing_running(tmp_path, choose):
    process = run_beside_batch(
        tmp_path,
        f"""{INTERRUPTED}
for count in range({choose(8, 150)}):
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


def test_an_interrupt_while_a_request_starts_leaves_nothing_running(tmp_path):
    """Right behind what makes the engine know of it."""
    process = run_beside_batch(
        tmp_path,
        f"""{INTERRUPTED}
class Interrupting:
    def __init__(self, real):
        self.real, self.count = real, 0

    def put(self, item):
        self.real.put(item)
        self.count += 1
        if self.count == 1:
            raise KeyboardInterrupt


requests = batch.engine.requests
batch.engine.requests = Interrupting(requests)
batch.engine.requests.get = requests.get
try:
    asyncio.run(main())
except KeyboardInterrupt as error:
    wait_for(nothing_runs, seconds=20)  # Even while the traceback is held.
assert asyncio.run(answer())
print("free")
""",
    )
    assert process.stdout == "free\n", process.stderr


def test_a_batch_that_nobody_holds_leaves_nothing_behind(tmp_path, choose):
    """No process, thread or memory, though a stream of it was not finished."""
    process = run_beside_batch(
        tmp_path,
        f"""
import asyncio, re, sys, threading
sys.path.append("tests")
from batch import Batch
from conftest import wait_for


def memory():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])


async def begin(batch):
    async for chunk in batch.stream("Hi", max_new_tokens=1_000_000, ignore_eos=True):
        return


sizes = []
for count in range({choose(4, 11)}):
    batch = Batch("tests/models/tiny-llama")
    asyncio.run(begin(batch))
    engine = batch.engine.process
    del batch
    wait_for(lambda: engine.poll() is not None, seconds=30)
    wait_for(lambda: not re.search("send|receive", str(threading.enumerate())), seconds=30)
    if sys.platform == "linux":
        sizes.append(memory())
print("growth", sizes[-1] / sizes[0] if sizes else 1, sizes)
""",
    )
    assert process.returncode == 0, process.stderr
    assert re.fullmatch("(Loading .*\n)+", process.stderr)
    assert float(re.match(r"growth (\S+)", process.stdout)[1]) < 2, process.stdout


SMALL_CACHE = {
    r"scheduler\.cache_size = .*": "scheduler.num_kv_blocks, scheduler.cache_size = 20, 0"
}


def test_a_context_that_does_not_fit_in_the_cache_raises(make_changed):
    batch = make_changed(SMALL_CACHE)
    for prompt in "Why? " * 1000, SUN:
        with pytest.raises(MemoryError, match="cache"):
            finish(answer(batch, prompt, tokens=1_000_000))
    assert "yellow" in finish(answer(batch, SUN))


def test_more_prompts_than_fit_in_the_cache_take_turns(make_changed):
    texts = finish(answers(make_changed(SMALL_CACHE), [SUN] * 30))
    assert all("yellow" in text for text in texts)


def assert_dead(batch, threads: set[threading.Thread]) -> None:
    """Later calls are told so, too, and nothing is left but the threads of before."""
    for _ in range(3):
        with pytest.raises(RuntimeError, match="engine has ended"):
            finish(answer(batch))
    assert nothing_runs(batch) and batch.engine.process.poll() is not None
    wait_for(lambda: not re.search("send|receive", str(set(threading.enumerate()) - threads)))


def test_an_engine_that_is_killed_at_any_time_fails_every_reader(module, choose):
    for _ in range(choose(3, 20)):
        threads = set(threading.enumerate())
        batch = module.Batch(MODEL)

        async def main(batch=batch) -> list:
            tasks = [
                asyncio.create_task(answer(batch, prompt, 1_000_000))
                for prompt in [SUN, "Why? " * 3000] * 10
            ]
            await asyncio.sleep(random.random() * 0.5)
            batch.engine.process.kill()
            return await asyncio.gather(*tasks, return_exceptions=True)

        for error in finish(main()):
            assert isinstance(error, RuntimeError) and "engine has ended" in str(error)
        assert_dead(batch, threads)


def test_a_step_that_raises_fails_every_reader_and_shows_its_traceback(make_changed, capfd):
    threads = set(threading.enumerate())
    late = "pipe.step() if len(handles) < 5 else 1 / 0"
    batch = make_changed({r"pipe\.step\(\)": late})

    async def main() -> list:
        asking = (answer(batch, SUN, 1_000_000) for _ in range(5))
        return await asyncio.gather(*asking, return_exceptions=True)

    for error in finish(main()):
        assert isinstance(error, RuntimeError) and "with status 1" in str(error)
    assert_dead(batch, threads)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_mistake_where_text_is_made_fails_every_reader(module, monkeypatch, capfd):
    """Rather than let them wait for ever."""
    threads = set(threading.enumerate())
    batch = module.Batch(MODEL)
    monkeypatch.setattr(batch.engine, "show", None)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(RuntimeError, match="engine has ended"):
        finish(answer(batch))
    assert_dead(batch, threads)


def test_what_a_decode_raises_reaches_those_whose_tokens_caused_it(batch, module, monkeypatch):
    """Here, those of one reader. The others get their whole texts."""

    class Fragile(module.Answer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            begun.append(self)
            if self is begun[0]:
                self.detokenizer.tokens = [None]

    begun = []
    monkeypatch.setattr(module, "Answer", Fragile)

    async def main():
        broken = asyncio.create_task(answer(batch, SUN, 1_000_000))
        others = asyncio.create_task(answers(batch, [SUN] * 5))
        with pytest.raises(TypeError):
            await broken
        return await others

    assert all("yellow" in text for text in finish(main()))
    wait_for(lambda: nothing_runs(batch))


def test_what_the_library_prints_does_not_get_between(make_changed, capfd):
    """The engine speaks on stdout, and the library may print there."""
    noisy = {r"pipe\.step\(\)": r"pipe.step(), os.write(1, b'noise\\n')"}
    assert "yellow" in finish(answer(make_changed(noisy)))
    captured = capfd.readouterr()
    assert "noise" in captured.err and "noise" not in captured.out


@pytest.mark.parametrize("model", ["nothing", MODELS, MODELS / "tiny-llama" / "config.json"])
def test_a_model_that_cannot_be_loaded_is_an_error_of_one_line(module, model):
    with pytest.raises(RuntimeError, match="cannot load") as caught:
        module.Batch(model)
    assert len(str(caught.value).splitlines()) == 1 and str(model) in str(caught.value)


def test_stop_strings_end_an_answer_also_in_parts(batch, choose):
    full = finish(answer(batch, SUN))
    starts = range(0, len(full) - 8, choose(8, 1))
    stops = [full[start : start + length] for start in starts for length in (1, 5, 8)]

    async def all_stopped() -> list[str]:
        asking = (answer(batch, SUN, stop_strings=[stop, "never", ""]) for stop in stops)
        return await asyncio.gather(*asking)

    texts = finish(all_stopped(), seconds=100)
    right = [text == full[: full.index(stop)] for text, stop in zip(texts, stops, strict=True)]
    assert sum(right) >= len(stops) * 0.9  # Batches round differently.
    assert not [stop for text, stop in zip(texts, stops, strict=True) if stop in text]
    wait_for(lambda: nothing_runs(batch))


def test_hundreds_of_prompts_at_once_are_all_answered(batch, choose):
    prompts = [SUN] * choose(100, 500)
    texts = finish(answers(batch, prompts), seconds=100)
    assert len(texts) == len(prompts) and all("yellow" in text for text in texts)


ENDLESS = """
import asyncio, os, signal, sys, time
from batch import Batch

batch = Batch("tests/models/tiny-llama")


async def main():
    settings = {"max_new_tokens": 10_000_000, "ignore_eos": True}
    streams = [batch.stream("Hi", **settings) for _ in range(10)]
    await asyncio.gather(*map(anext, streams))
"""


@pytest.mark.runs(2, 20)
def test_a_program_that_ends_while_streams_run_ends_with_its_status(tmp_path, run):
    process = run_beside_batch(
        tmp_path,
        f"""{ENDLESS}
    print(time.time())
    sys.exit(3)


asyncio.run(main())
""",
    )
    assert process.returncode == 3, process.stderr
    assert re.fullmatch("Loading .*\n", process.stderr)
    assert time.time() - float(process.stdout) < 10  # It would go on for hours.


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # It may be there, but only in name.
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@posix
@pytest.mark.runs(1, 10)
def test_the_engine_of_a_program_that_is_killed_ends(tmp_path, run):
    process = run_beside_batch(
        tmp_path,
        f"""{ENDLESS}
    print(batch.engine.process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


asyncio.run(main())
""",
    )
    assert process.returncode == -9, process.stderr
    wait_for(lambda: not is_running(int(process.stdout)), seconds=5)
    assert re.fullmatch("Loading .*\n", process.stderr)


@posix
def test_control_c_is_for_the_program_alone(tmp_path):
    """Here, for one that goes on. A terminal sends it to all processes of a group."""
    process = run_beside_batch(
        tmp_path,
        f"""{ENDLESS}
    signal.signal(signal.SIGINT, lambda *arguments: print("interrupted", flush=True))
    os.killpg(0, signal.SIGINT)
    for chunks in streams:
        for _ in range(10):
            await anext(chunks)
    print("goes on", flush=True)


os.setpgid(0, 0)
asyncio.run(main())
""",
    )
    assert process.stdout.splitlines() == ["interrupted", "goes on"], process.stderr


def test_the_engine_has_a_group_of_its_own_on_windows(module, monkeypatch):
    """Where Ctrl+C goes to all processes of a console, but those."""
    made = {}

    class Noting(subprocess.Popen):
        def __init__(self, *arguments, **options) -> None:
            made.update(options)
            options["creationflags"] = 0
            super().__init__(*arguments, **options)

    monkeypatch.setattr(module.subprocess, "Popen", Noting)
    if sys.platform != "win32":
        monkeypatch.setattr(module.subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    module.Batch(MODEL)
    assert made["creationflags"] == 512 and made["start_new_session"]
