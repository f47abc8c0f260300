"""Answer as many prompts at once as you like, in asyncio and in bounded memory.

    python examples/batch.py

The engine, which makes a token for all prompts in each of its steps, is a process of its own: a
step keeps Python's lock, and beside it no event loop would turn. Between the two go lines of JSON:
prompts as tokens in, new tokens out. Text becomes tokens and tokens become text in your program,
while the next step runs.
"""

import asyncio
import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

# The folder of multinomial_causal_lm.py, in a clone of the repository.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy
from multinomial_causal_lm import IncrementalDetokenizer, find_stop_string, reason
from openvino import Model, Tensor, Type, save_model
from openvino import opset13 as opset
from openvino_genai import (
    ContinuousBatchingPipeline,
    GenerationConfig,
    GenerationFinishReason,
    LLMPipeline,
    SchedulerConfig,
    StructuredOutputConfig,
    Tokenizer,
)

MODEL = os.environ.get("MODEL", "tests/models/tiny-llama")

CANCEL = "cancel"  # What is asked of the engine, in place of an answer.

# What a request may set. Other fields of `GenerationConfig` are for one pipeline, not for one
# answer of many: with some, an answer would have several texts, or never come.
SETTINGS = [
    "max_new_tokens",
    "min_new_tokens",
    "max_length",
    "ignore_eos",
    "eos_token_id",
    "stop_token_ids",
    "stop_strings",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "rng_seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "structured_output_config",
    "apply_chat_template",
]


async def main() -> None:
    batch = Batch(MODEL)

    async def answer(prompt: str) -> str:
        chunks = [chunk async for chunk in batch.stream(prompt, max_new_tokens=100)]
        return "".join(chunks)

    prompts = ["Why is the Sun yellow?", "Say hello in Chinese.", "Who are you?"]
    for text in await asyncio.gather(*(answer(prompt) for prompt in prompts)):
        print(text)


class Batch:
    """Answers many prompts at once. When nobody holds it any more, it frees its model."""

    def __init__(self, model_dir: str | Path, device: str = "CPU", cache_gb: int = 1) -> None:
        """Load a model. Raise `RuntimeError` if that fails.

        The contexts of all answers together take at most `cache_gb`; those that do not fit, wait.
        """
        self.engine = Engine(str(model_dir), device, cache_gb)
        weakref.finalize(self, self.engine.requests.put, None)

    async def stream(
        self,
        prompt: str | list[dict[str, Any]],
        usage: dict[str, Any] | None = None,
        extra_context: dict[str, Any] | None = None,
        **settings: Any,
    ) -> AsyncGenerator[str, None]:
        """Yield the answer to a `str`, or to the messages of a chat, in chunks (`str`) as it comes.

        `settings` are fields of `GenerationConfig`, such as `max_new_tokens=100`; what is not given
        stays as the model has it. `structured_output_config` is a `dict` of the fields of its class.
        `extra_context` is for the chat template. `usage` gets "prompt_tokens",
        "completion_tokens", "total_tokens" and, at the end, "finish_reason": "stop" or "length".

        Leaving the loop, or cancelling its task, stops the generation at the next step. Raise
        `ValueError` for what is refused, `MemoryError` for a context that is larger than the cache,
        and `RuntimeError` for all else.
        """
        answer = Answer(self.engine.tokenizer, {} if usage is None else usage)
        number = next(self.engine.numbers)
        try:
            self.engine.answers[number] = answer
            if self.engine.epitaph:  # Asked last, since the engine may end at any time.
                self.engine.answers.pop(number, None)
                raise RuntimeError(self.engine.epitaph)
            self.engine.requests.put((number, (prompt, extra_context, settings)))
            while not answer.is_read:
                chunk = await answer.next_chunk()
                if chunk:
                    yield chunk
            if answer.error:
                raise answer.error
        finally:
            answer.is_over = True
            self.engine.requests.put((number, CANCEL))


class Answer:
    """One answer: what the engine has made of it, and what its reader has not read yet."""

    def __init__(self, tokenizer: Tokenizer, usage: dict[str, Any]) -> None:
        self.usage = usage
        self.usage.update(prompt_tokens=0, completion_tokens=0, total_tokens=0)
        self.detokenizer = IncrementalDetokenizer(tokenizer)
        self.stop_strings: tuple[str, ...] = ()
        self.held_back = ""  # Text that may be the beginning of a stop string.
        self.next_decode = 0.0  # Decode at most every 10 ms: not before this time, in seconds.
        self.is_over = False  # No more of it is wanted.
        self.is_read = False  # The reader has got all of it.
        self.error: Exception | None = None  # What to raise then.
        self.loop = asyncio.get_running_loop()
        # Chunks of text, then an error if there was one, then None for the end.
        self.queue: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    async def next_chunk(self) -> str:
        """Return all text that waits: a reader that is late gets it as one chunk."""
        items = [await self.queue.get()]
        while not self.queue.empty():
            items.append(self.queue.get_nowait())
        for item in items:
            if isinstance(item, Exception):
                self.error = item
        self.is_read = items[-1] is None
        return "".join(item for item in items if isinstance(item, str))

    def count(self, name: str, tokens: int) -> None:
        self.usage[name] += tokens
        self.usage["total_tokens"] += tokens

    def items(self, ended: str, decoded: str | None) -> list[str | Exception | None]:
        """Return what the reader gets next. `decoded` is the text of the detokenizer's tokens."""
        self.next_decode = time.perf_counter() + 0.01
        items: list[str | Exception | None] = []
        try:
            text = self.held_back + self.detokenizer.take(bool(ended), decoded)
            end, found = find_stop_string(text, self.stop_strings, final=bool(ended))
        except Exception as error:  # noqa: BLE001 - only this one reader gets it.
            self.is_over = True
            return [error, None]
        self.held_back = text[end:]
        items.append(text[:end])
        if found:
            self.usage["finish_reason"] = "stop"
        elif ended in ("stop", "length"):
            self.usage["finish_reason"] = ended
        elif ended:
            kind, _, message = ended.partition(": ")
            items.append(ERRORS[kind](message))
        self.is_over = found or bool(ended)
        if self.is_over:
            items.append(None)
        return items


class Engine:
    """The process that makes tokens, and two threads that speak with it. They end with a program."""

    def __init__(self, model_dir: str, device: str, cache_gb: int) -> None:
        print(f"Loading {model_dir} on {device} ...", file=sys.stderr, flush=True)
        self.process = subprocess.Popen(
            [sys.executable, __file__, model_dir, device, str(cache_gb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # It imports the same.
            start_new_session=True,  # Ctrl+C is for the program alone. The same on Windows:
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        try:
            hello = json.loads(self._read_line() or '{"error": "the engine has ended"}')
            if "error" in hello:
                raise RuntimeError(f"cannot load {model_dir} on {device}: {hello['error']}")
            self.tokenizer = Tokenizer(model_dir)
        except BaseException:
            self.process.kill()
            self.process.communicate()
            raise
        self.stop_strings = hello["stop_strings"]  # The model's own.
        self.numbers = itertools.count()
        self.answers: dict[int, Answer] = {}  # Those that the engine is to make, by number.
        # What `send` is to do: the number of an answer with what is asked, or with CANCEL; or None,
        # when nobody holds the `Batch`.
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.epitaph = ""  # Why there is no engine any more.
        self.checker: LLMPipeline | None = None  # Made when it is needed: see `check`.
        threading.Thread(target=self.send, name="send").start()
        threading.Thread(target=self.receive, name="receive").start()

    def _read_line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def send(self) -> None:
        """Turn prompts into tokens, and send them, until nobody holds the `Batch`."""
        assert self.process.stdin
        with contextlib.suppress(OSError), self.process.stdin as stdin:  # The engine has ended.
            while threading.main_thread().is_alive():
                try:
                    request = self.requests.get(timeout=0.1)
                except queue.Empty:
                    continue
                if request is None:
                    return
                message = self.message(*request)
                if message:
                    print(message, file=stdin, flush=True)

    def message(self, number: int, asked: tuple[Any, Any, dict[str, Any]] | str) -> str:
        """Return the line that asks the engine for an answer, or cancels it."""
        answer = self.answers.get(number)
        if answer is None:
            return ""  # It has ended already.
        if isinstance(asked, str):
            return json.dumps({"cancel": number})
        prompt, extra_context, settings = asked
        try:
            tokens = self.encode(prompt, extra_context, settings)
            stop_strings = settings.pop("stop_strings", self.stop_strings)
            if isinstance(stop_strings, str) or not all(isinstance(s, str) for s in stop_strings):
                raise ValueError("stop_strings must be a list of strings")
            answer.stop_strings = tuple(stop for stop in stop_strings if stop)
            if "structured_output_config" in settings:
                self.check(settings["structured_output_config"])
            answer.count("prompt_tokens", len(tokens))
            request = {"number": number, "tokens": tokens, "settings": settings}
            return json.dumps(request, default=list, allow_nan=False)  # Sets become lists.
        except Exception as error:  # noqa: BLE001 - only this one reader gets it.
            self.answers.pop(number, None)
            self.deliver([(answer, [ValueError(reason(error)), None])])
            return ""

    def encode(self, prompt: Any, extra_context: Any, settings: dict[str, Any]) -> list[int]:
        """Return the tokens of a prompt, as `LLMPipeline` makes them."""
        is_text = isinstance(prompt, str)
        if is_text and self.tokenizer.chat_template and settings.get("apply_chat_template", True):
            prompt = [{"role": "user", "content": prompt}]
            is_text = False
        if not is_text:
            prompt = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, extra_context=extra_context
            )
        encoded = self.tokenizer.encode(prompt, add_special_tokens=is_text)
        return encoded.input_ids.data[0].tolist()

    def check(self, structure: dict[str, Any]) -> None:
        """Raise what the library says against it. In the engine, a step would fail, for everybody."""
        if self.checker is None:
            self.checker = make_checker(self.tokenizer)
        config = GenerationConfig(max_new_tokens=1)
        config.structured_output_config = StructuredOutputConfig(**structure)
        self.checker.generate(Tensor(numpy.zeros((1, 1), "int64")), config)

    def receive(self) -> None:
        """Turn tokens into text, and hand it over, until the engine has ended."""
        # Lists that are decoded together are padded, and some detokenizers show the padding.
        padding_shows = self.tokenizer.decode([[0], [0, 0]])[0] != self.tokenizer.decode([0])
        try:
            while line := self._read_line():
                self.show(json.loads(line), padding_shows)
        except BaseException:
            self.process.kill()  # Nobody reads what it says any more.
            raise
        finally:
            status = self.process.wait()
            self.epitaph = f"the engine has ended, with status {status}"
            self.requests.put(None)
            left = [*self.answers.values()]
            self.answers.clear()
            self.deliver([(answer, [RuntimeError(self.epitaph), None]) for answer in left])

    def show(self, news: list[tuple[int, list[int], str]], padding_shows: bool) -> None:
        """Hand over the text of a step: of each answer the new tokens, and how it ended, if so."""
        due = []
        for number, tokens, ended in news:
            answer = self.answers[number]
            if ended:
                del self.answers[number]
            if answer.is_over:
                continue
            answer.detokenizer.add(tokens)
            answer.count("completion_tokens", len(tokens))
            if ended or time.perf_counter() >= answer.next_decode:
                due.append((number, answer, ended))
        texts: list[str | None] = [None] * len(due)  # None: its own detokenizer decodes.
        if due and not padding_shows:
            with contextlib.suppress(Exception):  # One call for all is faster.
                texts[:] = self.tokenizer.decode(
                    [answer.detokenizer.tokens for _, answer, _ in due]
                )
        delivery = []
        for (number, answer, ended), text in zip(due, texts, strict=True):
            delivery.append((answer, answer.items(ended, text)))
            if answer.is_over and not ended:
                self.requests.put((number, CANCEL))
        self.deliver(delivery)

    def deliver(self, news: Any) -> None:
        """Give items to the readers of answers, and wake each event loop once."""
        loops: dict[asyncio.AbstractEventLoop, list[Any]] = {}
        for answer, items in news:
            loops.setdefault(answer.loop, []).append((answer, items))
        for loop, own in loops.items():
            with contextlib.suppress(RuntimeError):  # It is closed.
                loop.call_soon_threadsafe(put, own)


def put(news: list[tuple[Answer, list[str | Exception | None]]]) -> None:
    for answer, items in news:
        for item in items:
            if item != "":
                answer.queue.put_nowait(item)


def make_checker(tokenizer: Tokenizer) -> LLMPipeline:
    """Return a pipeline whose model has no weights: all tokens are equally probable."""
    parameters = []
    for name in "input_ids", "attention_mask", "position_ids", "beam_idx":
        shape, kind = ([-1], Type.i32) if name == "beam_idx" else ([-1, -1], Type.i64)
        parameters.append(opset.parameter(shape, kind, name))
        parameters[-1].output(0).set_names({name})
    size = max(tokenizer.get_vocab().values()) + 1
    weights = opset.constant(numpy.zeros((1, size), "float32"))
    zeros = opset.multiply(parameters[0], opset.constant(numpy.int64(0)))
    logits = opset.gather(weights, zeros, opset.constant(numpy.int64(0)))
    logits.output(0).set_names({"logits"})
    with tempfile.TemporaryDirectory() as folder:
        model = Model([logits], parameters)  # pyright: ignore
        save_model(model, os.path.join(folder, "openvino_model.xml"))
        return LLMPipeline(folder, tokenizer, "CPU", ATTENTION_BACKEND="SDPA")


# What follows runs in the process of the engine.

# How an answer can end, beside "stop" and "length": with an error, and a message behind ": ".
ERRORS = {"refused": ValueError, "full": MemoryError}


def run_engine(model_dir: str, device: str, cache_gb: str) -> None:
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What the library prints goes to stderr.

    def say(message: Any) -> None:
        try:
            print(json.dumps(message), file=protocol, flush=True)
        except OSError:  # The program has been killed.
            os._exit(1)

    scheduler = SchedulerConfig()
    scheduler.cache_size = int(cache_gb)
    try:
        pipe = ContinuousBatchingPipeline(model_dir, scheduler, device)
    except Exception as error:  # noqa: BLE001 - the program raises it.
        say({"error": reason(error)})
        return
    say({"stop_strings": list(pipe.get_config().stop_strings)})
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=[requests], daemon=True).start()
    handles: dict[int, Any] = {}  # Those of the answers that are not over, by number.
    while True:
        news = take_requests(requests, pipe, handles)
        if handles:
            pipe.step()
            news += read_handles(handles)
        if news:
            say(news)


def read_requests(requests: "queue.SimpleQueue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)  # The program has ended, or does not need its engine any more.


def take_requests(requests: Any, pipe: Any, handles: dict[int, Any]) -> list[Any]:
    """Start and cancel answers as the program asks, and wait for it if there is nothing else to do.

    Return those that were refused.
    """
    refused: list[Any] = []
    while not requests.empty() or not (handles or refused):
        request = requests.get()
        if "cancel" in request:
            if request["cancel"] in handles:
                handles[request["cancel"]].cancel()
            continue
        number = request["number"]
        try:
            config = make_config(pipe.get_config(), request["settings"])
            tokens = Tensor(numpy.array([request["tokens"]], "int64"))
            handles[number] = pipe.add_request(number, tokens, config)
        except Exception as error:  # noqa: BLE001 - only this one request fails.
            refused.append((number, [], f"refused: {reason(error)}"))
    return refused


def from_json(name: str, value: Any) -> Any:
    """Return the value of a setting with the type that it has in `GenerationConfig`."""
    if name == "structured_output_config":
        return StructuredOutputConfig(**value)
    if name == "stop_token_ids":
        return set(value)
    return value


def make_config(config: GenerationConfig, settings: dict[str, Any]) -> GenerationConfig:
    """Return the settings of the model with those of a request, or raise what is wrong with them."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"{name} is no setting of an answer: {', '.join(SETTINGS)}")
        try:
            setattr(config, name, from_json(name, value))
        except TypeError as error:
            raise ValueError(f"{name} cannot be {value!r}") from error
    config.stop_strings = set()  # The program ends an answer there.
    config.validate()
    return config


def read_handles(handles: dict[int, Any]) -> list[Any]:
    """Return the new tokens of each answer, and how it has ended, if so."""
    news = []
    for number, handle in [*handles.items()]:
        tokens: list[int] = []
        ended = ""
        while handle.can_read():
            for output in handle.read().values():
                tokens += output.generated_ids
                if output.finish_reason != GenerationFinishReason.NONE:
                    ended = output.finish_reason.name.lower()
        if not tokens and not ended:
            ended = end_of(handle)
        if ended:
            del handles[number]
        if tokens or ended:
            news.append((number, tokens, ended))
    return news


def end_of(handle: Any) -> str:
    """Return how an answer has ended that got no tokens in this step; it may only wait for them."""
    status = handle.get_status().name
    if status == "IGNORED":
        return "full: prompt and answer do not fit in the cache"
    return "" if status == "RUNNING" else "stop"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_engine(*sys.argv[1:])
    else:
        asyncio.run(main())
