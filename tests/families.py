"""The families of models in tests/models, and what the tests and the benchmark feed to them."""

import functools
import itertools
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy
import openvino
import openvino_genai

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "multinomial_causal_lm.py"
MODELS = ROOT / "tests" / "models"
SENTENCEPIECE, BYTE_LEVEL = ["tiny-llama", "tiny-chatglm"], ["tiny-llama3", "tiny-qwen"]
# The same with a pad token that has a text, as ChatGLM3 has it: see `path_of`.
PADDED = ["tiny-chatglm-padded", "tiny-qwen-padded"]
FAMILIES = SENTENCEPIECE + BYTE_LEVEL + PADDED
GGUF = ["tiny-llama3.gguf", "tiny-qwen.gguf", "tiny-qwen-padded.gguf"]
# Detokenizers that show nothing of half a character, or its bytes, in place of U+FFFD.
DETOKENIZERS = ["tiny-llama-ignore", "tiny-llama-none", "tiny-qwen-ignore", "tiny-qwen-none"]
sys.path.insert(0, str(ROOT))  # To import the script.
COPIES = tempfile.TemporaryDirectory()  # Of models that are changed.


@functools.cache
def path_of(name: str) -> Path:
    """Return the path of a model. Where it is "padded", make a copy that shows its pad token."""
    original = MODELS / name.replace("-padded", "")
    copy = Path(COPIES.name, name)
    if "-padded" not in name:
        return original
    if name.endswith(".gguf"):
        key = b"tokenizer.ggml.padding_token_id" + (4).to_bytes(4, "little")  # A number follows.
        before, after = original.read_bytes().split(key)
        copy.write_bytes(before + key + (2).to_bytes(4, "little") + after[4:])
        return copy
    shutil.copytree(original, copy)
    token = 0 if "chatglm" in name else 2  # "<unk>", and "!".
    for part in "tokenizer", "detokenizer":
        xml = copy / f"openvino_{part}.xml"
        text = re.sub(r"<pad_token_id .*/>", "", xml.read_text(encoding="utf-8"))
        text = text.replace("<rt_info>", f'<rt_info><pad_token_id value="{token}" />')
        xml.write_text(text, encoding="utf-8")
    return copy


# Prompts that the shipped model answers.
SUN = "Why is the Sun yellow?"
FUNCTION = "Write a Python function that finds the even numbers in a list."
HELLO = "Say hello in Chinese, Russian and emoji."
PROMPTS = [SUN, FUNCTION, HELLO]
MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": SUN},
]

# Not the script itself: a change of it would change what is measured.
CODE = (ROOT / "tests" / "frozen_text.txt").read_text(encoding="utf-8")
PROSE = """The Sun isn't yellow , is it ? It 's white!  They 've "seen" it: 'white', said n
\tЯ читаю это медленно.\n\n\n    你好，世界！ こんにちは नमस्ते مرحبا
    👩‍💻 👨‍👩‍👧‍👦 🏳️‍🌈 🇺🇦 ❤️ é e\u0301 \u2028 end   \n"""
SCRIPTS = "太阳是黄色的。 Привет 🌞🌻 é, naïve café — こんにちは"
RUSSIAN = "он об ов од ой ок ол слово молоко"  # A token may be "о" and half of what follows.
TEXTS = {
    "code": CODE[:3000],
    "prose": PROSE,
    "one line": " ".join(CODE.split())[:3000],
    "scripts": f"{SCRIPTS} {RUSSIAN} " * 3,
}


class Clock:
    """Stands in for the `time` module of the script, and goes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Tokenizer:
    """A tokenizer of tests/models that keeps an account of its work."""

    def __init__(self, name: str) -> None:
        family = re.sub(r"\.gguf|-ignore|-none|-padded", "", name)
        if name in DETOKENIZERS:
            detokenizer = MODELS / "detokenizers" / f"{name}.xml"
            files = [MODELS / family / "openvino_tokenizer.xml", detokenizer]
            weights = [
                openvino.Tensor(numpy.fromfile(MODELS / family / f"{part}.bin", "uint8"))
                for part in ("openvino_tokenizer", "openvino_detokenizer")
            ]
            tokenizer, detokenizer = (file.read_text(encoding="utf-8") for file in files)
            arguments = tokenizer, weights[0], detokenizer, weights[1]
            self.tokenizer = openvino_genai.Tokenizer(*arguments)
        else:
            self.tokenizer = openvino_genai.Tokenizer(path_of(name))
        config = json.loads((MODELS / family / "config.json").read_text(encoding="utf-8"))
        self.size = config["vocab_size"]
        self.texts = self.tokenizer.decode([[token] for token in range(self.size)])
        self.lengths = []

    def encode(self, text: str, **options):
        return self.tokenizer.encode(text, **options)

    def decode(self, tokens):
        nested = any(isinstance(token, list) for token in tokens)
        self.lengths.append(max(map(len, tokens)) if nested else len(tokens))
        return self.tokenizer.decode(tokens)

    def tokens(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False).input_ids.data[0].tolist()

    def inner_tokens(self, text: str) -> list[int]:
        """Return the tokens of a text that is not at the beginning."""
        return self.tokens("a" + text)[len(self.tokens("a")) :]

    def pools(self) -> list[list[int]]:
        """Groups of tokens that make streaming hard, after all of them."""

        def pool(condition) -> list[int]:
            return [token for token, text in enumerate(self.texts) if condition(text)]

        pools = [
            list(range(self.size)),
            pool(lambda text: not text),  # Special tokens, for one.
            pool(lambda text: not text.strip()),
            pool(lambda text: "\ufffd" in text),  # Bytes.
            pool(lambda text: set(text) & set(".,!?'\\")),
            pool(lambda text: text.strip() in ["", "n", "t", "s", "m", "v", "e", "'", "'t", "."]),
        ]
        return [*pools, list(itertools.chain(*pools[1:]))]
