"""`stream` with several callers, interrupts at any time, and prompts of every kind."""

import contextlib
import subprocess
import sys
import threading

import pytest
from conftest import PROPERTIES, posix
from families import MODELS, PROMPTS, ROOT, SUN, Tokenizer
from openvino_genai import ChatHistory, LLMPipeline, StreamingStatus

from multinomial_causal_lm import IterableStreamer, stream

MODEL = MODELS / "tiny-llama"
PROGRAM = f"""
import os, random, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import openvino_genai
from multinomial_causal_lm import IterableStreamer, stream
MODEL = {str(MODEL)!r}
"""


def run_program(code: str, seconds: int) -> str:
    """Run it in a process of its own, that may freeze."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM + code],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(params=["paged attention", "SDPA"])
def pipe(request, load_pipe):
    return load_pipe("tiny-llama", **PROPERTIES[request.param])


@pytest.fixture
def make_config(pipe):
    def make(tokens: int):
        config = pipe.get_generation_config()
        config.max_new_tokens = tokens
        config.ignore_eos = tokens > 1000
        return config

    return make


@pytest.mark.parametrize("run", range(30))
def test_threads_make_their_first_streamers_at_the_same_time(run):
    run_program(
        """
tokenizer = openvino_genai.Tokenizer(MODEL)
barrier = threading.Barrier(4)

def make():
    barrier.wait()
    IterableStreamer(tokenizer)

threads = [threading.Thread(target=make) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
        seconds=20,
    )


def test_an_interrupt_while_the_thread_starts_stops_the_generation(pipe, make_config, monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream(pipe, "hi", make_config(1_000_000)))
    monkeypatch.undo()
    assert list(stream(pipe, "hi", make_config(10)))


@posix
def test_300_interrupts_leave_the_pipeline_free():
    """Of a timer, after 0 to 15 ms: before, while and after the thread starts."""
    output = run_program(
        """
pipe = openvino_genai.LLMPipeline(MODEL, "CPU")
config = pipe.get_generation_config()
config.max_new_tokens, config.ignore_eos = 1_000_000, True
short = pipe.get_generation_config()
short.max_new_tokens = 3
interrupt = [os.getpid(), signal.SIGINT]
for count in range(300):
    try:
        timer = threading.Timer(random.random() * 0.015, os.kill, interrupt)
        timer.start()
        for chunk in stream(pipe, "hi", config):
            pass
    except KeyboardInterrupt:
        pass
    assert list(stream(pipe, "hi", short))
print("free")
""",
        seconds=120,
    )
    assert output == "free\n"


def in_threads(count: int, function) -> list:
    """Return what the function returns for each number, called on as many threads."""
    results = [None] * count

    def call(number: int) -> None:
        results[number] = function(number)

    threads = [threading.Thread(target=call, args=[n], daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
        assert not thread.is_alive()
    return results


def test_50_threads_get_their_whole_texts(pipe, make_config):
    prompts = [f"{PROMPTS[number % 3]} {number}" for number in range(50)]
    expected = ["".join(stream(pipe, prompt, make_config(20))) for prompt in prompts]
    config = [make_config(20) for _ in prompts]
    texts = in_threads(50, lambda number: "".join(stream(pipe, prompts[number], config[number])))
    same = sum(map(str.__eq__, texts, expected))
    assert same >= 48  # A prefix that is cached computes a little differently.
    assert all(texts)


def test_callers_that_leave_while_they_wait_never_generate(pipe, make_config, monkeypatch):
    first = stream(pipe, SUN, make_config(1_000_000))
    next(first)  # Now the others wait.
    waiting = [stream(pipe, SUN, make_config(20)) for _ in range(50)]
    threads = threading.active_count()
    start = threading.Thread.start

    def interrupted(thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    for chunks in waiting[:40]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(threading.Thread, "start", interrupted)
            next(chunks)
    assert threading.active_count() == threads + 40  # They wait for their turn.
    results = []
    readers = [
        threading.Thread(target=lambda n=n: results.append("".join(waiting[n])))
        for n in range(40, 50)
    ]
    for reader in readers:
        reader.start()
    first.close()
    for reader in readers:
        reader.join(timeout=60)
    assert len(results) == 10
    assert all(results)


def test_two_pipelines_generate_at_the_same_time(make_config):
    other = LLMPipeline(MODEL, "CPU")
    mine = LLMPipeline(MODEL, "CPU")
    with contextlib.closing(stream(other, SUN, make_config(1_000_000))) as chunks:
        next(chunks)
        assert "".join(stream(mine, SUN, make_config(10)))
        assert next(chunks)


@pytest.mark.parametrize("function", [Tokenizer.decode, threading.main_thread])
def test_end_may_come_from_within_write(monkeypatch, function):
    """From garbage collection: it may close a forgotten generator on any thread, at any time."""
    calls, results = [], []

    def ending(*arguments):
        calls.append(function)
        if len(calls) == 1:
            streamer.end()
        return function(*arguments)

    tokenizer = Tokenizer("tiny-qwen")
    tokens = tokenizer.tokens("Why")
    expected = tokenizer.decode(tokens)
    streamer = IterableStreamer(tokenizer)
    owner = Tokenizer if function is Tokenizer.decode else threading
    monkeypatch.setattr(owner, function.__name__, ending)
    writer = threading.Thread(target=lambda: results.append(streamer.write(tokens)), daemon=True)
    writer.start()
    writer.join(timeout=20)
    assert not writer.is_alive()
    assert results == [StreamingStatus.CANCEL]
    assert streamer.write(tokens) == StreamingStatus.CANCEL
    assert "".join(streamer) == expected


@pytest.fixture(params=["paged attention", "SDPA"])
def new_pipe(request):
    """SDPA keeps the state of one kind of prompt, and raises when another kind follows."""
    return LLMPipeline(MODEL, "CPU", **PROPERTIES[request.param])


MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": SUN},
]


@pytest.fixture
def expected_answer(load_pipe):
    """The answer to the messages, by what the library does with a `str`."""
    pipe = load_pipe("tiny-llama", **PROPERTIES["paged attention"])
    config = pipe.get_generation_config()
    config.max_new_tokens = 30
    config.apply_chat_template = False  # It has been through it already.
    text = pipe.get_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True)
    answer = "".join(stream(pipe, text, config))
    assert "Sun" in answer
    return answer


def test_a_history_is_a_prompt_and_is_not_changed(new_pipe, expected_answer):
    config = new_pipe.get_generation_config()
    config.max_new_tokens = 30
    history = ChatHistory(MESSAGES)
    assert "".join(stream(new_pipe, history, config)) == expected_answer
    assert history.get_messages() == MESSAGES


def test_tokens_are_a_prompt(new_pipe, expected_answer):
    tokenizer = new_pipe.get_tokenizer()
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    config = new_pipe.get_generation_config()
    config.max_new_tokens = 30
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream(new_pipe, tokens, config)) == expected_answer
