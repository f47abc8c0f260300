"""Show the space that the usual streamer loses, on the tokenizer of the tiny model that ships.

python examples/compare.py
"""

import os
import sys
from pathlib import Path

# The folder of multinomial_causal_lm.py, in a clone of the repository.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from multinomial_causal_lm import IterableStreamer
from openvino_genai import TextStreamer, Tokenizer

MODEL = os.environ.get("MODEL", "tests/models/tiny-llama")

tokenizer = Tokenizer(MODEL)
tokens = tokenizer.encode("if n > 0:\n    return n", add_special_tokens=False)
usual: list[str] = []
theirs = TextStreamer(tokenizer, usual.append)
ours = IterableStreamer(tokenizer)
for token in tokens.input_ids.data[0].tolist():
    theirs.write(token)
    ours.write(token)
theirs.end()
ours.end()
print("openvino_genai.TextStreamer:", "".join(usual), sep="\n")
print("IterableStreamer:", "".join(ours), sep="\n")
