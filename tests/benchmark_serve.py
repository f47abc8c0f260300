"""Measure `serve.py` over HTTP with a model of real size, beside the bare steps of the library:

    pip install gguf==0.19.0
    python tests/benchmark_serve.py

20 clients stream 60 tokens each, three times in turn with the same steps and nothing between them.
The model is a LLaMA of 0.6 GB in F16 with random weights, which is made first and not kept. Then
another client asks for `/health`, while they stream and while a prompt of 6,000 tokens is read.
"""

import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import gguf
import numpy
import openvino_genai
from families import MODELS, SUN
from servers import Server, question, serve_with

CLIENTS, TOKENS, ROUNDS = 20, 60, 3
WIDTH, INNER, LAYERS, HEADS = 1536, 4096, 11, 12


def write_model(path: Path) -> None:
    """Write a model with the tokenizer of `tiny-llama3.gguf`."""
    original = gguf.GGUFReader(MODELS / "tiny-llama3.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {
        "llama.block_count": LAYERS,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.context_length": 16384,
    }
    for name, field in original.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = sizes.get(name, field.contents())
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub_type)
    writer.add_chat_template("{{ messages[0].content }}")
    generator = numpy.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, numpy.ones(shape, "float32"))
        else:
            values = generator.standard_normal(shape, "float32") * 0.02
            if name == "token_embd.weight":
                values[:260] = 0  # So that it writes words, not special tokens or single bytes.
            writer.add_tensor(name, values.astype("float16"))

    vocabulary = len(original.fields["tokenizer.ggml.tokens"].contents())
    add("token_embd.weight", vocabulary, WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for part in "attn_q", "attn_k", "attn_v", "attn_output":
            add(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
        for part, shape in {
            "gate": (INNER, WIDTH),
            "up": (INNER, WIDTH),
            "down": (WIDTH, INNER),
        }.items():
            add(f"blk.{layer}.ffn_{part}.weight", *shape)
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bare_steps(pipe, prompts: list) -> float:
    """Return the seconds that the same answers take without any text."""
    config = pipe.get_config()
    config.max_new_tokens, config.ignore_eos = TOKENS, True
    start, handles = time.perf_counter(), []
    for number, tokens in enumerate(prompts):
        handles.append(pipe.add_request(number, tokens, config))
    while pipe.has_non_finished_requests():
        pipe.step()
    return time.perf_counter() - start


async def ask(url: str, method: str, path: str, body: dict | None = None) -> list[float]:
    """Return when each part of an answer came. A client of few lines: it has the same two cores."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode() if body else b""
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + content)
    times = []
    while part := await reader.read(100_000):
        if b'"content": "' in part or method == "GET":
            times.append(time.perf_counter())
    writer.close()
    return times


async def watch(url: str, lags: list[float]) -> None:
    while True:
        start = time.perf_counter()
        times = await ask(url, "GET", "/health")
        lags.append((times[0] - start) * 1000)
        await asyncio.sleep(0.05)


async def stream_all(url: str, prompts: list[str]) -> tuple[float, float, float]:
    """Return the seconds for all and until the first text, and chunks, on average."""
    bodies = [question(prompt, stream=True) for prompt in prompts]
    await asyncio.sleep(1)  # Until the threads of what was measured before sleep, too.
    start = time.perf_counter()
    reading = (ask(url, "POST", "/v1/chat/completions", body) for body in bodies)
    arrivals = await asyncio.gather(*reading)
    seconds = time.perf_counter() - start
    firsts = statistics.mean(times[0] - start for times in arrivals)
    return seconds, firsts, statistics.mean(map(len, arrivals))


async def lags_beside(url: str, work) -> list[float]:
    """Return how long `/health` takes, in milliseconds, again and again until the work is done."""
    lags: list[float] = []
    watching = asyncio.create_task(watch(url, lags))
    await work
    watching.cancel()
    return lags


def say(name: str, lags: list[float]) -> None:
    print(f"/health {name}: mean {statistics.mean(lags):.1f} ms, worst {max(lags):.0f} ms")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_model(path)
        os.environ |= {"MODEL": str(path)}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1
        pipe = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU")
        tokenizer = pipe.get_tokenizer()
        changes = serve_with(f"max_new_tokens={TOKENS}, ignore_eos=True")
        with Server(Path(folder), changes) as server:
            url = server.url
            asyncio.run(stream_all(url, ["Hi"]))  # To be warm.
            for round_ in range(ROUNDS):
                # All of them new: what is in the cache would be read in no time.
                prompts = [f"{round_} {number} {SUN}" for number in range(CLIENTS)]
                floor = bare_steps(pipe, [tokenizer.encode(prompt).input_ids for prompt in prompts])
                seconds, first, chunks = asyncio.run(stream_all(url, prompts))
                print(
                    f"{CLIENTS} clients: {floor / seconds:.2f} of the tokens a second of bare steps"
                    f" ({floor / TOKENS * 1000:.0f} ms each), first text after {first:.2f} s,"
                    f" {chunks:.0f} chunks for {TOKENS} tokens",
                    flush=True,
                )
            say("beside them", asyncio.run(lags_beside(url, stream_all(url, [SUN] * CLIENTS))))
            long = ask(url, "POST", "/v1/chat/completions", question("Why? " * 1500))
            say("beside a long prompt", asyncio.run(lags_beside(url, long)))


if __name__ == "__main__":
    main()
