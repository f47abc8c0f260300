"""Compare streamers, in one run on one machine. From the top of the repository:

    python tests/benchmark_streaming.py

"Time" and "CPU" are of a token of the shipped model, as ratios to a streamer that does nothing.
The model writes text all the time, and `TextStreamer` calls a Python function, as programs have it.
"Lag" is how many tokens the text is behind, where tokens arrive slowly. The cost of a token of one
long line is that of the streamer alone, where each token is decoded. "Changed" counts sequences
of tokens whose text differs from `decode` of all of them; raising an exception counts too. Half of
the sequences are four lines of a text, half are random tokens, both frozen.
"""

import itertools
import os
import platform
import random
import statistics
import sys
import time

import multinomial_causal_lm
import openvino_genai
from families import BYTE_LEVEL, MODELS, PROSE, SENTENCEPIECE, SUN, TEXTS, Clock, Tokenizer
from multinomial_causal_lm import IterableStreamer
from openvino_genai import StreamingStatus, TextStreamer

NAMES = ["no streamer", "does nothing", "TextStreamer", "IterableStreamer"]
ROUNDS, TOKENS = 40, 500
SEQUENCES = 125  # Of each kind, for each family.
LINE = 8192


class Nothing(openvino_genai.StreamerBase):
    def write(self, token):
        return StreamingStatus.RUNNING

    def end(self):
        pass


def make_streamer(name: str, tokenizer, texts: list[str]):
    """Return a streamer that appends its text to `texts`, and a function that makes it do so."""
    if name == "no streamer":
        return None, lambda: None
    if name == "does nothing":
        return Nothing(), lambda: None
    if name == "TextStreamer":

        def callback(text):  # `texts.append` itself would be cheaper, but is no Python function.
            texts.append(text)

        return TextStreamer(tokenizer, callback), lambda: None
    streamer = IterableStreamer(tokenizer)

    def read():
        while not streamer._queue.empty() and (chunk := streamer._queue.get()):
            texts.append(chunk)

    return streamer, read


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)


def time_generation() -> tuple[float, dict[str, tuple[float, float]]]:
    """Return the seconds of a token with a streamer that does nothing, and for each streamer the
    medians of the ratios to it, of time and CPU time. Each round runs all, in random order."""
    ratios = {name: [] for name in NAMES}
    base = []
    for round_ in range(ROUNDS):
        progress(f"generating, round {round_ + 1} of {ROUNDS}")
        if round_ % 10 == 0:  # How fast a pipeline is depends a little on where it was loaded.
            pipe = openvino_genai.LLMPipeline(MODELS / "tiny-llama", "CPU")
            config = pipe.get_generation_config()
            config.do_sample = True
            config.min_new_tokens = config.max_new_tokens = TOKENS  # Text, not special tokens.
        config.rng_seed = round_
        times = {}
        for name in random.sample(NAMES, len(NAMES)):
            streamer, _ = make_streamer(name, pipe.get_tokenizer(), [])
            start, cpu_start = time.perf_counter(), time.process_time()
            pipe.generate(SUN, config, streamer)
            cpu, wall = time.process_time() - cpu_start, time.perf_counter() - start
            times[name] = wall / TOKENS, cpu / TOKENS
        base.append(times["does nothing"])
        for name in NAMES:
            ratios[name].append([mine / its for mine, its in zip(times[name], base[-1])])
    medians = {name: tuple(map(statistics.median, zip(*ratios[name]))) for name in NAMES}
    return statistics.median(wall for wall, _ in base), medians


def measure_lag(name: str, tokenizer: Tokenizer) -> tuple[int, float, int]:
    """Return the tokens until the first text, and how many tokens text is behind: mean, most."""
    tokens = tokenizer.tokens("The Sun is yellow. " + TEXTS["code"])[:300]
    lengths = [len(tokenizer.decode(tokens[:count])) for count in range(len(tokens) + 1)]
    texts, lags = [], []
    streamer, read = make_streamer(name, tokenizer.tokenizer, texts)
    for count, token in enumerate(tokens, start=1):
        progress(f"lag of {name}, token {count} of {len(tokens)}")
        time.sleep(0.011)
        streamer.write(token)
        read()
        shown = len("".join(texts))
        lags.append(count - max(n for n in range(count + 1) if lengths[n] <= shown))
    first = next(count for count, lag in enumerate(lags, start=1) if lag < count)
    return first, statistics.mean(lags), max(lags)


def cost_of_a_line(name: str, tokenizer: Tokenizer) -> float:
    """Return what the last tokens of a long line cost, as a ratio to the first ones of another."""
    words = tokenizer.tokens("The Sun is yellow because of the air around the Earth, and ")
    tokens = (words * LINE)[:LINE]
    old, _ = make_streamer(name, tokenizer.tokenizer, [])
    new, _ = make_streamer(name, tokenizer.tokenizer, [])
    times = []
    for count, token in enumerate(tokens):
        if count % 512 == 0:
            progress(f"one line with {name}, token {count} of {LINE}")
        multinomial_causal_lm.time.now += 1  # So that ours decodes each token, too.
        start = time.perf_counter()
        old.write(token)
        middle = time.perf_counter()
        if count >= LINE - 256:  # In turns, because the speed of a machine changes.
            new.write(token)
            times.append((middle - start, time.perf_counter() - middle))
    late, early = map(statistics.median, zip(*times, strict=True))
    return late / early


def count_changed(name: str, families: list[str], make_tokens) -> str:
    """Return how many sequences of tokens the streamer changed, and how many it was given."""
    changed = 0
    for family in families:
        tokenizer = Tokenizer(family)
        generator = random.Random(0)
        for number in range(SEQUENCES):
            if number % 25 == 0:
                progress(f"{name}, {family}, sequence {number} of {SEQUENCES}")
            tokens = make_tokens(generator, tokenizer)
            texts = []
            streamer, read = make_streamer(name, tokenizer.tokenizer, texts)
            try:
                for token in tokens:
                    streamer.write(token)
                streamer.end()
                read()
                changed += "".join(texts) != tokenizer.decode(tokens)
            except Exception:  # noqa: BLE001 - TextStreamer raises UnicodeDecodeError for some.
                changed += 1
    return f"{changed} of {SEQUENCES * len(families)}"


def tokens_of_text(generator: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Return four lines."""
    lines = (TEXTS["code"] + PROSE).splitlines(keepends=True)
    start = generator.randrange(len(lines) - 4)
    return tokenizer.tokens("".join(lines[start : start + 4]))


def random_tokens(generator: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Return tokens of groups that make streaming hard."""
    pools = [pool for pool in tokenizer.pools() if pool]
    return [generator.choice(generator.choice(pools)) for _ in range(40)]


def main() -> None:
    cores = os.cpu_count()
    print(f"{platform.system()} {platform.machine()}, {cores} cores, {cpu_name()}")
    print(f"Python {platform.python_version()}, openvino-genai {openvino_genai.__version__}\n")
    token, generation = time_generation()
    tokenizer = Tokenizer("tiny-llama")
    rows = [["", "time", "CPU", "first text", "lag: mean, most", "8,192nd token of a line"]]
    changed = [["changed", "SentencePiece: text", "random", "byte-level: text", "random"]]
    for name in NAMES:
        row = [name, *(f"{ratio:.2f}" for ratio in generation[name])]
        if name in ("TextStreamer", "IterableStreamer"):
            first, mean, most = measure_lag(name, tokenizer)
            real_time, multinomial_causal_lm.time = multinomial_causal_lm.time, Clock()
            growth = cost_of_a_line(name, tokenizer)
            multinomial_causal_lm.time = real_time
            row += [f"token {first}", f"{mean:.1f}, {most} tokens"]
            row += [f"{growth:.1f} times the first"]
            kinds = itertools.product((SENTENCEPIECE, BYTE_LEVEL), (tokens_of_text, random_tokens))
            changed.append([name, *(count_changed(name, *kind) for kind in kinds)])
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    progress("\r")
    print(f"A token takes {token * 1e3:.2f} ms with a streamer that does nothing.\n")
    for table in rows, changed:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * width for width in widths])
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("| " + " | ".join(cells) + " |")
        print()


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(": ")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
