"""Chat in the terminal with a model that remembers what was said.

    python examples/talk.py

Ctrl+C ends an answer or, while it waits for you, the program.
"""

import os
import sys
from pathlib import Path

# The folder of multinomial_causal_lm.py, in a clone of the repository.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from multinomial_causal_lm import stream
from openvino_genai import ChatHistory, LLMPipeline

MODEL = os.environ.get("MODEL", "tests/models/tiny-llama")

pipe = LLMPipeline(MODEL, "CPU")
config = pipe.get_generation_config()
config.max_new_tokens = 500
messages = [{"role": "system", "content": "You are a helpful assistant."}]
try:
    while True:
        messages.append({"role": "user", "content": input("> ")})
        answer = {"role": "assistant", "content": ""}
        try:
            for chunk in stream(pipe, ChatHistory(messages), config):
                print(chunk, end="", flush=True)
                answer["content"] += chunk
        except KeyboardInterrupt:  # Only the answer ends. What has come of it is kept.
            pass
        print()
        messages.append(answer)
except (EOFError, KeyboardInterrupt):  # At the prompt: the program ends.
    print()
