# SPDX-License-Identifier: Apache-2.0
"""Stream the answer of a large language model with OpenVINO GenAI, using random sampling."""

# Two threads share the work, so that text is shown while the next tokens are generated:
#   the thread that `stream` starts: pipe.generate -> tokens -> IterableStreamer -> queue of text
#   the thread that calls `stream`:  queue of text -> for chunk in stream(...)

import argparse
import errno
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any
from weakref import WeakKeyDictionary

# Switch off openvino's telemetry. At each import it would start a process, for which macOS and
# Python 3.14 run the main program once more, and wait up to 3 s for a network that does not answer.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino
import openvino_genai
from openvino_genai import (
    ChatHistory,
    DecodedResults,
    GenerationConfig,
    LLMPipeline,
    StreamingStatus,
    TokenizedInputs,
    Tokenizer,
)


def main() -> None:
    args = parse_arguments()
    pipe = load(args.model_dir, args.device)

    config = pipe.get_generation_config()  # What is not set here stays as the model has it.
    config.max_new_tokens = 100  # End the answer after so many tokens, at the latest.
    config.do_sample = True  # Choose each token at random. False takes the most probable one.
    config.top_p = 0.9  # Choose among the most probable tokens that add up to this probability,
    config.top_k = 30  # and among no more than this many.
    config.rng_seed = time.time_ns()  # Another text on every run. A constant repeats one.

    results: list[DecodedResults] = []  # It will hold one.
    for chunk in stream(pipe, args.prompt, config, on_end=results.append):
        print(printable(chunk), end="", flush=True)
    print(flush=True)
    print(summary(results[0]), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Return what the command line says, or exit and say what is wrong with it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage='%(prog)s [-h] [--device DEVICE] model_dir "prompt in quotes"',
        epilog='example: python %(prog)s model_dir "Why is the Sun yellow?"',
    )
    parser.add_argument("model_dir", help="folder of a converted model, or a GGUF file")
    # Optional only so that a mistyped option is not reported as a missing prompt.
    parser.add_argument("prompt", nargs="?", default="", help='"-" reads it from stdin')
    parser.add_argument("--device", type=str.upper, default="CPU", help="CPU (default), GPU, NPU")
    args = parser.parse_intermixed_args()
    try:
        if args.prompt == "-":
            args.prompt = sys.stdin.read()
        args.prompt.encode()  # Raises an error for bytes that were no text.
    except UnicodeError as error:
        parser.error(f"the prompt is not valid Unicode: {error}")
    if not args.prompt.strip():
        parser.error("the prompt is empty")
    return args


def load(model_dir: str, device: str) -> LLMPipeline:
    """Load a model on a device, or exit and say why that cannot be."""
    if not os.path.exists(model_dir):
        sys.exit(f"error: {model_dir} does not exist. Give a folder with a model, or a GGUF file")
    available = openvino.Core().available_devices
    known = {name.split(".")[0] for name in available}
    known |= {"AUTO", "BATCH", "HETERO", "MULTI"}  # They are made of others: "HETERO:GPU.1,CPU".
    for name in re.findall("[A-Z]+", device):
        if name not in known:
            sys.exit(f"error: there is no {name} here. Available devices: {', '.join(available)}")
    print(f"Loading {model_dir} on {device} ...", file=sys.stderr, flush=True)
    try:
        return LLMPipeline(model_dir, device)
    except Exception as error:  # noqa: BLE001 - the library raises many types.
        sys.exit(f"error: cannot load {model_dir} on {device}: {reason(error)}")


def reason(error: Exception) -> str:
    """Return the message of an error of the library, without lines such as "src/core.cpp:84:"."""
    return re.sub(r".*\.[ch]pp:\d+:\s", "", str(error)).strip()


def printable(text: str) -> str:
    """Replace what stdout cannot show by "?", and on a terminal ESC, which commands it, by "\\x1b"."""
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, errors="replace").decode(encoding)
    if sys.stdout.isatty():
        control_characters = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
        text = re.sub(control_characters, lambda match: f"\\x{ord(match[0]):02x}", text)
    return text


def summary(results: DecodedResults) -> str:
    """Return a line that says how long the answer is, why it ended, and how fast it was."""
    reasons = {"LENGTH": "cut by max_new_tokens", "STOP": "ended by the model"}
    metrics = results.perf_metrics
    tokens = metrics.get_num_generated_tokens()
    line = f"{tokens} tokens, {reasons.get(results.finish_reasons[0].name, 'stopped')}"
    line += f"; the first after {metrics.get_ttft().mean / 1000:.2f} s"
    if tokens > 1:
        line += f", then {metrics.get_throughput().mean:.1f} a second"
    return line


# For a program of your own, copy the imports, and from here to `if __name__ == "__main__"`.

# A lock for each pipeline, which goes when the pipeline goes.
PIPELINE_LOCKS: WeakKeyDictionary[LLMPipeline, threading.Lock] = WeakKeyDictionary()


def stream(
    pipe: LLMPipeline,
    prompt: str | ChatHistory | TokenizedInputs,
    config: GenerationConfig,
    on_end: Callable[[Any], object] | None = None,
) -> Generator[str, None, None]:
    """Generate on another thread, and yield the text (`str`) in chunks as it comes.

    What `pipe.generate` raises is raised here, after the text that came before it. What it returns
    (`DecodedResults`, for `TokenizedInputs` `EncodedResults`) is given to `on_end`, on this thread,
    after the last chunk. At a stop string its `texts` continue past the chunks, so keep
    `"".join(chunks)` for a history. Do not change `config` until the loop ends.

    Leaving the loop stops the generation at its next token. If you store the generator in a
    variable, close it: `with contextlib.closing(stream(...)) as chunks:`. Any thread may call
    `stream`: a pipeline answers one prompt at a time, and the others wait for their turn.
    """
    streamer = IterableStreamer(pipe.get_tokenizer(), config.stop_strings)
    outcome: Future[Any] = Future()
    arguments = (pipe, prompt, config, streamer, outcome)
    thread = threading.Thread(target=generate, args=arguments)
    try:
        thread.start()
        yield from streamer
        while thread.is_alive():
            thread.join(timeout=0.1)  # Without a timeout, Windows would not notice Ctrl+C.
    finally:
        streamer.cancel()  # This matters only if the loop was left before the end.
    results = outcome.result()  # Raises what `generate` raised.
    if on_end is not None:
        on_end(results)


def generate(
    pipe: LLMPipeline,
    prompt: str | ChatHistory | TokenizedInputs,
    config: GenerationConfig,
    streamer: "IterableStreamer",
    outcome: Future[Any],
) -> None:
    """Wait for the turn of this prompt, generate, and set `outcome` to what that returns or raises."""
    inputs = [prompt] if isinstance(prompt, str) else prompt  # For a `str`, it returns no metrics.
    try:
        with PIPELINE_LOCKS.setdefault(pipe, threading.Lock()):
            if streamer.ended:
                return  # Its reader has left meanwhile: nobody waits for the outcome.
            # The library's own search for stop strings misses some, so the streamer does it.
            outcome.set_result(pipe.generate(inputs, config, streamer, stop_strings=set()))
    except BaseException as error:  # noqa: BLE001 - `stream` raises it.
        outcome.set_exception(error)
    finally:
        streamer.cancel()  # `pipe.generate` does not call `end` if it refuses its arguments.


class IterableStreamer(openvino_genai.StreamerBase):
    """Hands the text of one generation over to another thread, which iterates over it.

    The chunks (`str`) add up to `tokenizer.decode(all tokens)`, or to the text before the first
    stop string. Use a streamer once, for one `pipe.generate(prompt, config, streamer)`.

    The library calls `write` and `end`, on a thread of its own. One reader, on any other thread,
    calls `next`. Anybody may call `cancel`, at any time.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Iterable[str] = ()) -> None:
        super().__init__()
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop_strings = tuple(stop for stop in stop_strings if stop)
        self._held_back = ""  # Text that may be the beginning of a stop string.
        self._next_decode = 0.0  # Decode at most every 10 ms: not before this time, in seconds.
        # Chunks of text, then an error if there was one, then None for the end.
        self._queue: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self.ended = False  # The generation is to stop, and no more text is wanted.

    def write(self, token: int | list[int]) -> StreamingStatus:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take the next tokens, and return whether the generation is to go on.

        Text is put into the queue with the token that completes it. Only if tokens come faster than
        every 10 ms, it may wait for a later one, or for `end`.
        """
        self._detokenizer.add([token] if isinstance(token, int) else token)
        if time.perf_counter() >= self._next_decode:
            self._decode()
            self._next_decode = time.perf_counter() + 0.01
        exiting = not threading.main_thread().is_alive()  # Python waits for this thread, too.
        return StreamingStatus.CANCEL if self.ended or exiting else StreamingStatus.RUNNING

    def end(self) -> None:
        """Put the rest of the text into the queue, and end the iteration."""
        self._decode(final=True)
        self.cancel()

    def cancel(self) -> None:
        """End the iteration after what is in the queue, and the generation at its next token."""
        self.ended = True
        self._queue.put(None)

    def _decode(self, final: bool = False) -> None:
        """Put the text that is complete, and cannot belong to a stop string, into the queue."""
        if self.ended:
            return
        try:
            text = self._held_back + self._detokenizer.take(final)
            end, found = find_stop_string(text, self._stop_strings, final)
            self._held_back = text[end:]
            if end > 0:
                self._queue.put(text[:end])
            if found:
                self.cancel()
        except BaseException as error:  # noqa: BLE001 - in C++, it would abort the process.
            self._queue.put(error)
            self.cancel()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Wait for the next chunk. Raise what went wrong in `write` or `end`."""
        while True:
            try:  # Without a timeout, Windows would not notice Ctrl+C.
                chunk = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(chunk, str):
                return chunk
            if chunk is not None:
                raise chunk
            self._queue.put(None)  # The end stays the end, however often it is asked for.
            raise StopIteration


def find_stop_string(text: str, stop_strings: tuple[str, ...], final: bool) -> tuple[int, bool]:
    """Return how much of the text stands before the first stop string, and whether there is one.

    If the text is not final, leave out the beginning of a possible stop string at its end, too.
    """
    if stop_strings:
        for start in range(len(text)):
            if text.startswith(stop_strings, start):
                return start, True
            if not final and any(stop.startswith(text[start:]) for stop in stop_strings):
                return start, False
    return len(text), False


class IncrementalDetokenizer:
    """Turns tokens into text, piece by piece. The pieces add up to `tokenizer.decode(all tokens)`.

    A token alone cannot be decoded: it may be a part of a character, and tokenizers remove the
    first space of what they decode. So the latest tokens are decoded together with some older ones,
    their context, as vLLM's `detokenize_incrementally` does it, and text that a later token can
    change is held back. Use it on one thread.
    """

    UNFINISHED = re.compile(
        r"""( \ufffd{1,3}         # Some bytes of a character: of an emoji, up to three.
            | [ ](n'?|'[rv]?)?  # A space that may be removed: " n" and "'t" may become "n't".
            ) \Z""",
        re.VERBOSE,
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens: list[int] = []  # The latest tokens, with their context in front.
        self._returned = 0  # So many characters of their text have been returned.
        self._settled = 0  # So many of `tokens` were there when last all text had been returned.

    def add(self, tokens: list[int]) -> None:
        self.tokens += tokens

    def take(self, final: bool = False, text: str | None = None) -> str:
        """Return the text that is new; if no more tokens come (`final`), all that is left.

        A caller that decodes the `tokens` of many answers in one call gives the `text` of these.
        """
        if text is None:
            text = self._tokenizer.decode(self.tokens)
        complete = text if final else self.UNFINISHED.sub("", text)
        new = complete[self._returned :]
        if new:
            self._returned = len(complete)
            if complete == text:
                self._forget_old_tokens()
        return new

    def _forget_old_tokens(self) -> None:
        """Keep those that came last as the context of the next, when all text has been returned."""
        if len(self.tokens) > 64:  # A longer list takes longer to decode.
            context = self.tokens[self._settled :]
            text = self._tokenizer.decode(context)
            if text.strip():  # Else the next token would count as the first, and lose its space.
                self.tokens = context
                self._returned = len(text)
        self._settled = len(self.tokens)


if __name__ == "__main__":
    # End at once at Ctrl+C, also while the model loads; but not in a notebook (which has `sys.ps1`),
    # nor where Ctrl+C is ignored, as behind `nohup`.
    unchanged = signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if unchanged and not hasattr(sys, "ps1"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"error: {reason(error)}")
    except OSError as error:
        # That the reader of stdout has gone, as in `| head`, is none: EPIPE, or EINVAL on Windows.
        if error.errno not in (errno.EPIPE, errno.EINVAL):
            print(f"error: {error}", file=sys.stderr)
        os._exit(1)  # `sys.exit` would write to stdout once more, and fail again.
