"""`stream` with several callers, interrupts at any time, and prompts of every kind."""

import contextlib
import json
import queue
import threading

import pytest
from conftest import PROPERTIES, make_config, posix
from families import MESSAGES, MODELS, PROMPTS, SUN, Tokenizer
from multinomial_causal_lm import IterableStreamer, stream
from openvino_genai import ChatHistory, LLMPipeline, StreamingStatus
from programs import run_program

MODEL = MODELS / "tiny-llama"
PROGRAM = f"""
import _thread, json, os, random, signal, sys, threading, time
sys.path[:0] = ["", "tests"]
import openvino_genai
from conftest import make_config
from multinomial_causal_lm import IterableStreamer, stream
signal.signal(signal.SIGINT, signal.default_int_handler)  # It may be ignored, as behind "&".
MODEL = {str(MODEL)!r}
"""


def output_of(code: str, seconds: int) -> str:
    process = run_program("-c", PROGRAM + code, seconds=seconds)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(params=["paged attention", "SDPA"])
def pipe(request, load_pipe):
    return load_pipe("tiny-llama", **PROPERTIES[request.param])


def test_an_interrupt_while_the_thread_starts_stops_the_generation(pipe, monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream(pipe, "hi", make_config(pipe, 1_000_000)))
    monkeypatch.undo()
    assert list(stream(pipe, "hi", make_config(pipe, 10)))


@posix
def test_signals_leave_the_pipeline_free(choose):
    """Of a timer, after 0 to 15 ms: before, while and after the thread starts."""
    output = output_of(
        f"""
pipe = openvino_genai.LLMPipeline(MODEL, "CPU")
interrupt = [os.getpid(), signal.SIGINT]
for count in range({choose(20, 300)}):
    try:
        timer = threading.Timer(random.random() * 0.015, os.kill, interrupt)
        timer.start()
        for chunk in stream(pipe, "hi", make_config(pipe, 1_000_000)):
            pass
    except KeyboardInterrupt:
        pass
    assert list(stream(pipe, "hi", make_config(pipe, 3)))
print("free")
""",
        seconds=120,
    )
    assert output == "free\n"


@pytest.mark.parametrize("wait", ["the prompt", "silence", "chunks", "the turn", "the end"])
def test_an_interrupt_that_is_no_signal_is_seen_at_once(wait, choose):
    """As they come on Windows and in its notebooks: it does not wake a thread that waits."""
    count = choose(1, 25) if wait == "the prompt" else choose(3, 100)  # That one takes seconds.
    output = output_of(
        f"""
pipe = openvino_genai.LLMPipeline(MODEL, "CPU")
tokenizer = pipe.get_tokenizer()

class Silent:  # Its tokens have no text.
    generate, encode = pipe.generate, tokenizer.encode
    def get_tokenizer(self): return self
    def decode(self, tokens): return ""

class Lingering(Silent):  # It calls `end` long before it returns.
    decode = tokenizer.decode
    def generate(self, *arguments, **settings):
        pipe.generate(*arguments, **settings)
        done.wait(60)

def interrupt():
    global sent
    sent = time.monotonic()
    _thread.interrupt_main()

wait, latencies = {wait!r}, []
which = {{"silence": Silent(), "the end": Lingering()}}.get(wait, pipe)
endless, short = make_config(pipe, 1_000_000), make_config(pipe, 3)
for count in range({count}):
    done = threading.Event()
    prompt = f"{{count}} " + "Why? " * (9000 if wait == "the prompt" else 1)
    if wait == "the turn":
        first = stream(pipe, prompt, endless)
        next(first)
    try:
        timer = threading.Timer(random.random() * 0.3, interrupt)
        timer.start()
        for chunk in stream(which, prompt, short if wait == "the end" else endless):
            pass
    except KeyboardInterrupt:
        latencies.append(time.monotonic() - sent)
    done.set()
    if wait == "the turn":
        assert next(first)
        first.close()
    list(stream(which, "hi", short))  # It is free.
print(json.dumps(latencies))
""",
        seconds=choose(60, 300),
    )
    latencies = json.loads(output)
    assert len(latencies) == count
    assert max(latencies) < 2  # About 0.1 s here; the answers would take hours.


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


def test_50_threads_get_their_whole_texts(pipe, choose):
    prompts = [f"{PROMPTS[number % 3]} {number}" for number in range(choose(20, 50))]
    expected = ["".join(stream(pipe, prompt, make_config(pipe, 20))) for prompt in prompts]
    config = [make_config(pipe, 20) for _ in prompts]
    texts = in_threads(
        len(prompts), lambda number: "".join(stream(pipe, prompts[number], config[number]))
    )
    same = sum(map(str.__eq__, texts, expected))
    assert same >= len(prompts) - 2  # A prefix that is cached computes a little differently.
    assert all(texts)


def test_callers_that_leave_while_they_wait_never_generate(pipe, monkeypatch):
    first = stream(pipe, SUN, make_config(pipe, 1_000_000))
    next(first)  # Now the others wait.
    waiting = [stream(pipe, SUN, make_config(pipe, 20)) for _ in range(50)]
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


def test_two_pipelines_generate_at_the_same_time():
    other = LLMPipeline(MODEL, "CPU")
    mine = LLMPipeline(MODEL, "CPU")
    with contextlib.closing(stream(other, SUN, make_config(other, 1_000_000))) as chunks:
        next(chunks)
        assert "".join(stream(mine, SUN, make_config(mine, 10)))
        assert next(chunks)


def test_cancel_may_come_from_within_write(monkeypatch):
    """From garbage collection: it may close a forgotten generator on any thread, at any time."""
    results = []
    tokenizer = Tokenizer("tiny-qwen")
    tokens = tokenizer.tokens("Why")
    streamer = IterableStreamer(tokenizer)
    decode = tokenizer.decode

    def cancelling(tokens):
        streamer.cancel()
        return decode(tokens)

    monkeypatch.setattr(tokenizer, "decode", cancelling)
    writer = threading.Thread(target=lambda: results.append(streamer.write(tokens)), daemon=True)
    writer.start()
    writer.join(timeout=20)
    assert not writer.is_alive()
    assert results == [StreamingStatus.CANCEL]
    assert streamer.write(tokens) == StreamingStatus.CANCEL
    list(streamer)  # It ends.


def test_results_come_on_the_reading_thread_behind_the_last_chunk(pipe):
    events = []

    def note(results) -> None:
        events.append(results.texts[0])
        events.append(threading.current_thread())

    events.extend(stream(pipe, SUN, make_config(pipe, 30), on_end=note))
    *chunks, text, thread = events
    assert len(chunks) > 1 and "".join(chunks) == text
    assert thread == threading.current_thread()


def test_results_do_not_come_when_the_loop_is_left(pipe):
    results = []
    for _ in stream(pipe, SUN, make_config(pipe, 1000), on_end=results.append):
        break
    assert list(stream(pipe, "hi", make_config(pipe, 3)))
    assert results == []


def test_what_gets_the_results_may_stream_again_on_the_same_pipeline(pipe):
    texts = []

    def ask_again(results) -> None:
        texts.append("".join(stream(pipe, SUN, make_config(pipe, 20))))

    texts.append("".join(stream(pipe, SUN, make_config(pipe, 20), on_end=ask_again)))
    assert len(texts) == 2 and all(texts)


class FalseError(Exception):
    def __bool__(self):
        return False


@pytest.mark.parametrize("error", [FalseError, queue.Empty, StopAsyncIteration, SystemExit])
def test_what_a_callback_raises_is_raised_where_the_chunks_are_read(pipe, error):
    def fail(results) -> None:
        raise error

    with pytest.raises(error):
        list(stream(pipe, SUN, make_config(pipe, 3), on_end=fail))


def test_at_a_stop_string_the_texts_of_the_library_go_on(pipe):
    """So says the docstring."""
    results = []
    config = make_config(pipe, 30)
    config.stop_strings = {"ello"}
    text = "".join(stream(pipe, SUN, config, on_end=results.append))
    assert text.endswith("y") and results[0].texts[0].startswith(text + "ello")


@pytest.fixture(params=["paged attention", "SDPA"])
def new_pipe(request):
    """SDPA keeps the state of one kind of prompt, and raises when another kind follows."""
    return LLMPipeline(MODEL, "CPU", **PROPERTIES[request.param])


@pytest.fixture
def expected_answer(load_pipe):
    """The answer to the messages, by what the library does with a `str`."""
    pipe = load_pipe("tiny-llama", **PROPERTIES["paged attention"])
    config = make_config(pipe, 30)
    config.apply_chat_template = False  # It has been through it already.
    text = pipe.get_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True)
    answer = "".join(stream(pipe, text, config))
    assert "Sun" in answer
    return answer


def test_a_history_is_a_prompt_and_is_not_changed(new_pipe, expected_answer):
    history = ChatHistory(MESSAGES)
    assert "".join(stream(new_pipe, history, make_config(new_pipe, 30))) == expected_answer
    assert history.get_messages() == MESSAGES


def test_tokens_are_a_prompt(new_pipe, expected_answer):
    tokenizer = new_pipe.get_tokenizer()
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream(new_pipe, tokens, make_config(new_pipe, 30))) == expected_answer
