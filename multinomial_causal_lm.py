# SPDX-License-Identifier: Apache-2.0
"""Stream the answer of a large language model, chosen by random sampling, with OpenVINO GenAI."""

import argparse
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext, suppress
from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary

interactive = hasattr(sys, "ps1") or sys.flags.interactive
if __name__ == "__main__" and not interactive and signal.getsignal(2) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends it at once, also in the library.
import openvino  # Slow: Ctrl+C is to end this, too.
import openvino_genai
from openvino_genai import StreamingStatus, Tokenizer


class IterableStreamer(openvino_genai.StreamerBase):
    """Turns the tokens of one `pipe.generate(prompt, config, streamer)` into chunks of text, `str`.

    Iterate over it on another thread. The chunks add up to `tokenizer.decode(all tokens)`, exactly,
    but end before a stop string. What no later token can change is there within 10 ms.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Iterable[str] = ()) -> None:
        super().__init__()
        self._tokenizer, self._stop_strings = tokenizer, tuple(filter(None, stop_strings))
        self._chunks: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self.put = self._chunks.put  # Takes chunks, then None or an exception. May be replaced.
        self._lock = threading.RLock()  # `end` may come from any thread, garbage collection too.
        self._last, self.ended = False, ""  # No more tokens come; why no text: end, stop, error.
        self._due = 0.0  # When the next decode is, in seconds.
        self._tokens: list[int] = []  # What it needs: the newest, and those before, for context.
        self._shown = self._yielded = 0  # Tokens whose text was yielded; characters, if more were.
        self._before = tokenizer.encode("a").input_ids.data[0].tolist()  # So that none is first.

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Return the next chunk, once there is one. Raise what went wrong in `write` or `end`."""
        while True:  # Wait in slices: between them, Python sees interrupts that do not wake it.
            with suppress(queue.Empty):
                if isinstance(chunk := self._chunks.get(timeout=0.1), str):
                    return chunk
                self._chunks.put(None)  # The end stays the end, for every reader.
                raise chunk or StopIteration

    def write(self, token: int | list[int]) -> StreamingStatus:  # pyright: ignore
        """Take the next tokens. The library calls it, on its thread; CANCEL makes it stop."""
        try:
            if due := self.add([token] if isinstance(token, int) else token):
                self.show(*self._tokenizer.decode(due))
        except BaseException as error:  # noqa: BLE001 - if it left, the library would abort.
            self.ended = "error"
            self.put(error)
        return StreamingStatus.CANCEL if self.ended else StreamingStatus.RUNNING

    def add(self, tokens: list[int]) -> list[list[int]]:
        """Do half of `write`: return two lists of tokens to decode now, for `show`, or nothing."""
        self._tokens += tokens
        self._last = self._last or not threading.main_thread().is_alive()  # It waits for us.
        due = self._last or 50 < len(self._tokens) < 64 or time.perf_counter() >= self._due
        return [self._tokens[: self._shown], self._tokens] if due and not self.ended else []

    def show(self, shown: str, text: str) -> None:
        """Do the other half, with the two texts: yield what no later token can change."""
        with self._lock:
            if self.ended:
                return
            self._yielded, self.ended = max(self._yielded, len(shown)), "end" if self._last else ""
            # A later token can complete a character, or remove a space: " n" + "'t" -> "n't".
            stable = text if self.ended else re.sub(r"(\ufffd{1,3}| (n'?|'[rv]?)?)\Z", "", text)
            end = len(stable)
            for stop in self._stop_strings:  # One that has begun waits. The library misses it.
                starts = range(self._yielded, len(stable) + (1 - len(stop)) * bool(self.ended))
                begun = (n for n in starts if stop.startswith(stable[n : n + len(stop)]))
                end = min(end, next(begun, end))
            self.ended = "stop" if stable.startswith(self._stop_strings, end) else self.ended
            if end > self._yielded:
                self.put(stable[self._yielded : end])
                self._yielded = end
                if end == len(text):  # The newest tokens stay: half a character may hide in them.
                    self._tokens = self._before + self._tokens[self._shown :]
                    self._yielded, self._shown = 0, len(self._tokens)
            if self.ended:
                self.put(None)
            self._due = time.perf_counter() + 0.01 * bool(self._tokens)  # No token, no delay.

    def end(self) -> None:
        """Yield the rest of the text, then end the iteration. Any thread may call it, any time."""
        self._last = True
        IterableStreamer.write(self, [])  # Not a `write` that replaces it.

    cancel = end  # A generation that still runs stops at its next token.


TURNS: WeakKeyDictionary[object, threading.Lock] = WeakKeyDictionary()  # A lock for each pipeline.
openvino.Tensor(openvino.Type.i64, [1]).data  # noqa: B018 - two threads that use it first, freeze.


def stream(
    pipe: openvino_genai.LLMPipeline,
    prompt: str | openvino_genai.ChatHistory | openvino_genai.TokenizedInputs,
    config: openvino_genai.GenerationConfig,
    done: Callable[[openvino_genai.DecodedResults], object] = bool,  # Does nothing.
) -> Generator[str, None, None]:
    """Generate on another thread, and yield the text (`str`) in chunks as it comes.

    Any thread may call it: callers take turns. What `generate` or the tokenizer raises is raised
    here; what `generate` returns, `done` gets. Leaving the loop at a chunk stops the generation; if
    the generator has a name, closing it does: `with contextlib.closing(stream(...)) as chunks:`.
    """
    streamer = IterableStreamer(pipe.get_tokenizer(), config.stop_strings)
    inputs = [prompt] if isinstance(prompt, str) else prompt  # A list brings all results.

    def generate() -> None:
        try:
            with TURNS.setdefault(pipe, threading.Lock()):
                if streamer.write([]) == StreamingStatus.RUNNING:  # The caller has not left yet.
                    done(pipe.generate(inputs, config, streamer, stop_strings=set()))  # See `show`.
        except BaseException as error:  # noqa: BLE001 - raised again on the thread that reads.
            streamer.end()  # `generate` does not call it when it refuses its arguments.
            streamer.put(error)

    try:  # An interrupt from here on must cancel: the thread may run already.
        (thread := threading.Thread(target=generate)).start()
        yield from streamer
        while thread.is_alive():
            thread.join(0.1)
        next(streamer, None)  # Skip the end: the library calls `end` before it raises,
        yield from streamer  # so that an error may stand behind it.
    finally:
        streamer.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog='example: %(prog)s model "Hi!"')
    parser.add_argument("model", metavar="model_dir", help="folder of a model, or GGUF file")
    parser.add_argument("prompt", metavar='"prompt in quotes"', help='"-" reads it from stdin')
    parser.add_argument("--device", type=str.upper, default="CPU", help="CPU (default), GPU, NPU")
    args = parser.parse_args()
    log = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - print would use stdout.
    try:
        prompt = getattr(sys.stdin, "read", str)() if args.prompt == "-" else args.prompt
        known = ", ".join([*openvino.Core().available_devices, "AUTO", "BATCH", "HETERO", "MULTI"])
        path = re.sub("(?i)[.]gguf$", ".gguf", args.model)  # The library knows only this spelling.
        kinds = ("model", "tokenizer", "detokenizer") * (not path.endswith(".gguf"))
        files = [os.path.join(args.model, f"openvino_{kind}.xml") for kind in kinds] or [args.model]
        lost = next((f for f in files if not os.path.exists(f) or os.path.getsize(f) < 1000), "")
        absent = [name for name in re.findall("[A-Z]+", args.device) if name not in known]
        problems = {  # The library would report them in many lines, or late.
            "the prompt is empty": not prompt.strip(),
            "the prompt is not valid Unicode": re.search("[\ud800-\udfff]", prompt),
            "stdout is closed": not sys.stdout,
            f"there is no {', '.join(absent)} here. Available devices: {known}": absent,
            f"{lost} is missing or cut: give a downloaded or converted model folder or GGUF": lost,
        }
        for problem in filter(problems.get, problems):
            sys.exit(f"error: {problem}")
        getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # "?" for what it cannot show.
        print(f"Loading {args.model} on {args.device} ...", file=log, flush=True)
        with nullcontext() if os.path.exists(path) else TemporaryDirectory() as folder:
            if folder:  # Here, x.GGUF is another name: link to it for as long as it loads.
                os.symlink(os.path.abspath(args.model), path := os.path.join(folder, "x.gguf"))
            pipe = openvino_genai.LLMPipeline(path, args.device)
        config = pipe.get_generation_config()  # Of the model; what is not set here, stays.
        config.max_new_tokens = 100  # Stop here, if the model does not stop before.
        config.do_sample = True  # Choose each token at random. False takes the most probable one.
        config.top_p = 0.9  # Choose from the most probable tokens that add up to this probability,
        config.top_k = 30  # and from no more than so many of them.
        config.rng_seed = time.time_ns()  # Another text on every run; a constant repeats one.
        results: list[openvino_genai.DecodedResults] = []
        for chunk in stream(pipe, prompt, config, results.append):
            if sys.stdout.isatty():  # Show control characters: they could command the terminal.
                chunk = re.sub(r"[^\t\n\r -~\xa0-\U0010ffff]", lambda c: ascii(c[0])[1:-1], chunk)
            print(chunk, end="", flush=True)
        print(flush=True)
        metrics, (reason,) = results[0].perf_metrics, results[0].finish_reasons
        count, first = metrics.get_num_generated_tokens(), metrics.get_ttft().mean / 1000
        end = " (max_new_tokens)" if reason.name == "LENGTH" else ""
        speed = f", then {metrics.get_throughput().mean:.1f} a second" if count > 1 else ""
        print(f"{count} tokens{end}, the first after {first:.2f} s{speed}", file=log)
    except (RuntimeError, UnicodeError) as error:  # Its last line has no places in C++ sources.
        sys.exit(f"error: {args.model} on {args.device}: {str(error).strip().splitlines()[-1]}")
    except OSError as error:  # That the reader of stdout has gone, as in `| head`, is no error.
        if not isinstance(error, BrokenPipeError) and error.errno != 22:  # EINVAL, on Windows.
            print(f"error: {error}", file=log)
        os._exit(1)  # sys.exit would write to stdout again, and fail again.


if __name__ == "__main__":
    main()
