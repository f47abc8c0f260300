#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stream the answer of a large language model, chosen by random sampling, with OpenVINO GenAI.

Run it with the folder of a converted model and a prompt:

    python multinomial_causal_lm.py TinyLlama-1.1B-Chat-v1.0 "Why is the Sun yellow?"
"""

import argparse
import contextlib
import errno
import functools
import itertools
import os
import queue
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    # Ctrl+C ends the process at once, also inside the library, where Python would not see it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Before the imports below, which are slow.

import openvino
import openvino_genai
from openvino_genai import StreamingStatus

# All control characters but tab, newline and carriage return.
CONTROL = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\U0010ffff]")


class IterableStreamer(openvino_genai.StreamerBase):
    """Turns tokens into text while they are generated. Iterate over it to get the text.

    Pass one to `pipe.generate(prompt, config, streamer)` on one thread, and read it on another:
    `for chunk in streamer: print(chunk, end="", flush=True)`. A streamer serves one generation.

    The chunks (`str`) add up to `tokenizer.decode(all tokens)`, exactly. What no later token can
    change is in the queue when `write` returns, or about 10 ms later if tokens come faster.
    """

    def __init__(self, tokenizer: openvino_genai.Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._chunks = queue.SimpleQueue()  # of str, then the end: None, or an exception.
        self._lock = threading.Lock()  # `end` and `cancel` may come from any thread.
        self._ended = False
        self._tokens: list[int] = []  # What the next decode needs,
        self._yielded = 0  # and how many characters of its text are in the queue already.
        self._decoded_at = float("-inf")  # Seconds.

        # Behind these, tokens decode as they do in the middle of a text, not as at its beginning.
        context, text = [], ""
        with contextlib.suppress(Exception):  # Of an object that can only decode.
            context = tokenizer.encode("a .").input_ids.data[0].tolist()
            text = tokenizer.decode(context)
        self._context, self._context_length = context, len(text)
        self._is_silent = functools.cache(lambda token: tokenizer.decode([*context, token]) == text)

        # A later token can complete a character, which decodes to U+FFFD until then. Where the
        # tokenizer cleans up, it can also remove a space: " n" + "'t" -> "n't", " " + "." -> ".".
        spaces = "" if text == "a ." else r" (n'?|'[rv]?)?\Z|"
        self._changeable = re.compile(spaces + r"\ufffd{1,3}\Z|\Z")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Return the next chunk, once there is one. Raise what went wrong in `write` or `end`."""
        chunk = self._chunks.get()
        if isinstance(chunk, str):
            return chunk
        self._chunks.put(None)  # The end stays the end, for every reader.
        raise chunk or StopIteration

    def write(self, token: int | list[int]) -> StreamingStatus:
        """Take the next token, or several. The library calls it, on a thread of its own.

        CANCEL, after `cancel`, `end` or an exception, makes the library stop. It never raises.
        """
        return self._update([token] if isinstance(token, int) else token)

    def end(self) -> None:
        """Yield the rest of the text, then end the iteration. Any thread may call it, repeatedly."""
        self._update([], last=True)

    cancel = end  # A generation that still runs stops at its next token.

    def _update(self, tokens: list[int], last: bool = False) -> StreamingStatus:
        with self._lock:
            try:
                if not self._ended:
                    for token in tokens:
                        self._tokens.append(token)
                        if len(self._tokens) % 32 == 0:
                            self._decode()
                    if last or time.perf_counter() - self._decoded_at >= 0.01:
                        self._decode(last)
            except BaseException as error:  # noqa: BLE001 - if it left, the library would abort.
                self._ended = True
                self._chunks.put(error)
            return StreamingStatus.CANCEL if self._ended else StreamingStatus.RUNNING

    def _decode(self, last: bool = False) -> None:
        text = self._tokenizer.decode(self._tokens)
        self._decoded_at = time.perf_counter()
        end = len(text) if last else self._changeable.search(text, self._yielded).start()
        if end > self._yielded:
            self._chunks.put(text[self._yielded : end])
            self._yielded = end
        if last:
            self._ended = True
            self._chunks.put(None)
        elif text and end == len(text) and self._context_length:
            self._tokens, self._yielded = self._context.copy(), self._context_length
        elif text and len(self._tokens) > 32:
            self._shorten(text[end:])

    def _shorten(self, changeable: str) -> None:
        """Forget old tokens, if the end of the text, which may change, does not come from them."""
        tokens = []
        for silent, run in itertools.groupby(self._tokens, self._is_silent):
            tokens += list(run)[: 1 if silent else None]  # One special token does what many do.
        for count in 16, 15, 14, 13:  # After "a", " ' ' '" is "''": it matters where one begins.
            kept = self._context + tokens[-count:]
            text = self._tokenizer.decode(kept)
            end = self._changeable.search(text).start()
            if text[end:] == changeable:
                self._tokens, self._yielded = kept, end
                return


def stream(
    pipe: openvino_genai.LLMPipeline, prompt: str, config: openvino_genai.GenerationConfig
) -> Iterator[str]:
    """Generate on another thread, and yield the text (`str`) in chunks as it comes.

        for chunk in stream(pipe, prompt, config):
            print(chunk, end="", flush=True)

    Leaving the loop early, also by an exception, stops the generation and waits for its thread.
    What `generate` or the tokenizer raises is raised here, after the text that was complete.
    """
    streamer = IterableStreamer(pipe.get_tokenizer())
    with ThreadPoolExecutor(max_workers=1) as executor:
        generation = executor.submit(pipe.generate, prompt, config, streamer)
        # `generate` does not call `end` when it refuses its arguments.
        generation.add_done_callback(lambda _: streamer.end())
        try:
            yield from streamer
            generation.result()
        finally:
            streamer.cancel()


def explain(error: RuntimeError, model_dir: str, device: str) -> str:
    """Return one line that says why the library refused a model or a device, and what to do."""
    folder = Path(model_dir)
    if not folder.exists():
        return f"error: no such folder: {model_dir}"
    names = "openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"
    missing = [name for name in names if folder.is_dir() and not (folder / name).exists()]
    if "openvino_model.xml" in missing:
        return (
            f"error: there is no OpenVINO model in {model_dir}. If it is a checkpoint, convert it: "
            f'optimum-cli export openvino --task text-generation-with-past --model "{model_dir}" '
            f'"{folder.name}-openvino"'
        )
    if missing:
        return (
            f"error: there is no {missing[0]} in {model_dir}. "
            'Convert the model again after: pip install "openvino-tokenizers[transformers]"'
        )
    reason = str(error).strip().splitlines()[-1]  # Before it come places in the library's source.
    message = f"error: cannot run {model_dir} on {device}: {reason}"
    devices = openvino.Core().available_devices
    return message if device in devices else f"{message} (available devices: {', '.join(devices)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Stream the answer of a large language model, chosen by random sampling.",
        epilog='example: %(prog)s TinyLlama-1.1B-Chat-v1.0 "Why is the Sun yellow?" --device GPU',
    )
    parser.add_argument("model_dir", help="folder of a model converted to OpenVINO")
    parser.add_argument("prompt", help="what to ask the model")
    parser.add_argument("--device", default="CPU", help="CPU, GPU, NPU, ... (default: %(default)s)")
    args = parser.parse_args()
    if not args.prompt.strip() or re.search("[\ud800-\udfff]", args.prompt):
        parser.error("the prompt must be text, in valid Unicode")
    sys.stdout.reconfigure(errors="replace")  # Print "?" for what the terminal cannot show.

    try:
        # The library tries other formats, with many messages, if an .xml file is none.
        model = Path(args.model_dir, "openvino_model.xml")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), model.open("rb") as file:
            if not file.read(4).startswith((b"<", b"\xef\xbb\xbf<")):
                sys.exit(
                    f"error: {model} is not an OpenVINO model. From a Git clone? Try: git lfs pull"
                )

        print(f"Loading {args.model_dir} on {args.device} ...", file=sys.stderr, flush=True)
        pipe = openvino_genai.LLMPipeline(args.model_dir, args.device)

        # What is not set here stays as the model's own generation_config.json has it.
        config = pipe.get_generation_config()
        config.max_new_tokens = 100  # Stop here, if the model does not stop before.
        config.do_sample = True  # Choose each token at random. False takes the most probable one.
        config.top_p = 0.9  # Choose from the most probable tokens that add up to this probability,
        config.top_k = 30  # and from no more than so many of them.
        config.rng_seed = secrets.randbits(32)  # Another text on every run; a constant repeats one.

        for chunk in stream(pipe, args.prompt, config):
            if sys.stdout.isatty():  # Show control characters: they could command the terminal.
                chunk = CONTROL.sub(lambda character: ascii(character[0])[1:-1], chunk)
            print(chunk, end="", flush=True)
        print(flush=True)
    except RuntimeError as error:
        sys.exit(explain(error, args.model_dir, args.device))
    except OSError as error:  # That the reader of stdout has gone, as in `| head`, is no error.
        if error.errno not in (errno.EPIPE, errno.EINVAL):
            print(f"error: {error}", file=sys.stderr)
        os._exit(1)  # sys.exit would write to stdout again, and fail again.


if __name__ == "__main__":
    main()
