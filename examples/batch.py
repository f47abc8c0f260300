"""Answer as many prompts at once as you like, in asyncio and in bounded memory.

python examples/batch.py
"""

import asyncio
import collections
import contextlib
import os
import queue
import sys
import threading
import time
import weakref
from pathlib import Path

# The folder of multinomial_causal_lm.py, in a clone of the repository.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from multinomial_causal_lm import IncrementalDetokenizer, find_stop_string
from openvino_genai import ContinuousBatchingPipeline, SchedulerConfig

MODEL = os.environ.get("MODEL", "tests/models/tiny-llama")


class Answer:
    """The text of one request. Read it with `async for` in the event loop that it was made in."""

    def __init__(self, tokenizer, stop_strings, sent, usage):
        self.detokenizer = IncrementalDetokenizer(tokenizer)
        self.stop_strings = tuple(stop for stop in stop_strings if stop)
        self.usage = usage
        self.held_back = ""  # Text that may be the beginning of a stop string.
        self.next_decode = 0.0  # Tokens that come before this time, in seconds, wait.
        self.ended = ""  # Why no more text comes: "end", or "stop" for a stop string.
        loop = asyncio.get_running_loop()
        self.queue = asyncio.Queue()
        self.put = lambda chunk: sent[loop].append((self.queue, chunk))

    async def __aiter__(self):
        waiting = []
        while isinstance(chunk := await self.queue.get(), str):
            waiting.append(chunk)
            if self.queue.empty():  # A reader that is late gets all that waits as one chunk.
                yield "".join(waiting)
                waiting.clear()
        if waiting:
            yield "".join(waiting)
        if chunk is not None:
            raise chunk

    def show(self, decoded, final):
        """Put what is new in the text of the detokenizer's tokens, as `IterableStreamer` does."""
        text = self.held_back + self.detokenizer.take(final, decoded)
        end, found = find_stop_string(text, self.stop_strings, final)
        self.held_back = text[end:]
        if end > 0:
            self.put(text[:end])
        if found:
            self.ended = "stop"
            self.put(None)
        self.next_decode = time.perf_counter() + 0.01


class Batch:
    """Answers many prompts at once: one thread makes tokens for all, another one decodes them."""

    def __init__(self, model_dir, device="CPU", cache_gb=1):
        scheduler = SchedulerConfig()
        scheduler.cache_size = cache_gb  # For the contexts of all; those that do not fit, wait.
        self.pipe = ContinuousBatchingPipeline(model_dir, scheduler, device)
        self._started, news = queue.SimpleQueue(), queue.SimpleQueue()
        self._sent = collections.defaultdict(list)  # Chunks for each event loop.
        threading.Thread(target=step, args=[self.pipe, self._started, news]).start()
        tokenizer = self.pipe.get_tokenizer()
        threading.Thread(target=decode, args=[tokenizer, news, self._sent]).start()
        weakref.finalize(self, self._started.put, None)  # Nobody holds it: the threads end.

    def stream(self, prompt, config, usage=None):
        """Return an iterator, for `async for`, over the answer to a `str` or to messages of a chat.

        It raises what is refused. Leaving the loop stops the generation. At its end, a `dict` given
        as `usage` has prompt_tokens, completion_tokens, total_tokens; finish_reason: stop, length.
        """
        tokenizer = self.pipe.get_tokenizer()
        if isinstance(prompt, str) and tokenizer.chat_template and config.apply_chat_template:
            prompt = [{"role": "user", "content": prompt}]  # As `LLMPipeline` does it.
        if chat := not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        tokens = tokenizer.encode(prompt, add_special_tokens=not chat).input_ids
        config.validate()
        usage = {} if usage is None else usage
        count = tokens.shape[1]
        usage.update(prompt_tokens=count, completion_tokens=0, total_tokens=count)
        return self._read(tokens, config, usage)

    async def _read(self, tokens, config, usage):
        stops, config.stop_strings = config.stop_strings, set()  # Ours are exact.
        answer = Answer(self.pipe.get_tokenizer(), stops, self._sent, usage)
        try:
            try:  # Between the two, no name holds the request: an interrupt leaves nothing behind.
                self._started.put((answer, self.pipe.add_request(id(answer), tokens, config)))
            finally:
                config.stop_strings = stops
            async for chunk in answer:
                yield chunk
            if answer.ended == "stop":  # It was a stop string.
                usage["finish_reason"] = "stop"
        finally:
            answer.ended = answer.ended or "end"  # The thread sees it after its next step.


def step(pipe, started, news):
    running, wanted = {}, True
    while wanted or pipe.has_non_finished_requests():
        with contextlib.suppress(queue.Empty):
            while request := started.get(not running, 0.1):  # Sleep while nothing runs.
                running.update([request])
            wanted = False  # Nobody holds the `Batch`.
        wanted = wanted and threading.main_thread().is_alive()
        outputs, over, error = [], [], None
        try:
            pipe.step()
        except Exception as raised:  # noqa: BLE001 - all readers get it.
            error = raised
        for answer, handle in [*running.items()]:
            while handle.can_read():
                outputs += [(answer, output) for output in handle.read().values()]
            if error or answer.ended or not wanted:
                handle.cancel()
            if (status := handle.get_status().name) != "RUNNING":
                full = MemoryError("prompt and answer do not fit in the cache")
                over.append((answer, full if status == "IGNORED" else error))
                del running[answer]
        news.put((outputs, over))
        if error and not wanted:
            break  # It would raise for ever.
    news.put(None)


def decode(tokenizer, news, sent):
    # Lists of one call are padded to one length, and some detokenizers show the padding.
    together = tokenizer.decode([[0], [0, 0]])[0] == tokenizer.decode([0])
    while step := news.get():
        outputs, over = step
        due = {}
        for answer, output in outputs:
            if answer.ended:  # By a stop string: what came since then does not count.
                continue
            for name in "completion_tokens", "total_tokens":
                answer.usage[name] += len(output.generated_ids)
            answer.usage["finish_reason"] = output.finish_reason.name.lower()
            answer.detokenizer.add(output.generated_ids)
            if time.perf_counter() >= answer.next_decode:
                due[answer] = False
        for answer, _ in over:
            if not answer.ended:
                due[answer] = True  # No more tokens come.
        texts = [None] * len(due)  # Each decodes its own.
        if together and due:
            with contextlib.suppress(Exception):  # One call for all, while the next step runs.
                texts = tokenizer.decode([answer.detokenizer.tokens for answer in due])
        for (answer, final), text in zip(due.items(), texts):
            try:
                answer.show(text, final)
            except Exception as error:  # noqa: BLE001 - who caused it, gets it.
                answer.ended = "end"
                answer.put(error)
        for answer, failure in over:
            answer.put(failure)
        for loop in [*sent]:  # Wake each event loop once.
            with contextlib.suppress(RuntimeError):  # It is closed.
                loop.call_soon_threadsafe(receive, sent.pop(loop))


def receive(chunks):
    for received, chunk in chunks:
        received.put_nowait(chunk)


if __name__ == "__main__":
    batch = Batch(MODEL)

    async def answer(prompt):
        return "".join([chunk async for chunk in batch.stream(prompt, batch.pipe.get_config())])

    async def main(*prompts):
        print(*await asyncio.gather(*map(answer, prompts)), sep="\n")

    asyncio.run(main("Why is the Sun yellow?", "Say hello in Chinese.", "Who are you?"))
