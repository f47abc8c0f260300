"""Make the models in `tests/models` again, from nothing.

    pip install --upgrade-strategy eager -r export-requirements.txt
    pip install gguf==0.19.0
    python tests/make_models.py

It trains a tokenizer and a small LLaMA on the text in `training_text.py`, and exports them with
`optimum-cli` as a user would. Seeds are fixed. It takes about twenty minutes on two cores.
"""

import argparse
import io
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openvino
import sentencepiece
import torch
from openvino_tokenizers import convert_tokenizer
from openvino_tokenizers.constants import UTF8ReplaceMode
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from training_text import chats, conversations
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizerFast,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

MODELS = Path(__file__).parent / "models"
SEED = 0
VOCAB_SIZE = 1024
STEPS = 1500
BATCH = 24

# The template of TinyLlama-1.1B-Chat. "</s>" is the end-of-sequence token.
CHAT_TEMPLATE = """{% for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


def llama_tokenizer(
    folder: Path, text: list[str], vocab_size: int, remove_extra_whitespaces: bool = False
) -> LlamaTokenizerFast:
    """Train a byte-fallback BPE with the settings of LLaMA's, and save it in `folder`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # No emoji: each of their bytes is to be a token of its own, as in real vocabularies.
        sentence_iterator=(
            re.sub("[\u200d\u2600-\u27bf\ufe0f\U0001f000-\U0001ffff]", "", line) for line in text
        ),
        model_writer=model,  # A file's name would become a part of the model.
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9985,  # The rarest characters become bytes.
        normalization_rule_name="identity",
        remove_extra_whitespaces=remove_extra_whitespaces,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizerFast(
        str(folder / "tokenizer.model"), legacy=True, add_prefix_space=True
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode(tokenizer: LlamaTokenizerFast, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Return the tokens of a chat, and the labels: its answers, and -100 elsewhere."""

    def render(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )

    answers = [
        (len(render(place, prompt=True)), len(render(place + 1)) - 1)  # "</s>" belongs to it.
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    text = render(len(messages)).removesuffix("\n")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(first <= start < end <= last for first, last in answers) else -100
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    return encoded.input_ids, labels


def batches(tokenizer: LlamaTokenizerFast) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Yield batches of chats of about the same length, to pad them little."""
    samples, shuffle = chats(SEED), random.Random(SEED).shuffle
    while True:
        pool = [encode(tokenizer, next(samples)) for _ in range(8 * BATCH)]
        pool.sort(key=lambda sample: len(sample[0]))
        starts = list(range(0, len(pool), BATCH))
        shuffle(starts)
        yield from (pool[start : start + BATCH] for start in starts)


def train(tokenizer: LlamaTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters, {STEPS} steps of {BATCH} chats")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.1)
    warm_up = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(step / warm_up, 0.51 + 0.49 * math.cos(math.pi * step / STEPS)),
    )
    for step, batch in enumerate(itertools.islice(batches(tokenizer), STEPS), start=1):
        length = max(len(ids) for ids, _ in batch)
        inputs = torch.full((BATCH, length), tokenizer.eos_token_id)
        labels = torch.full((BATCH, length), -100)  # The loss passes over these.
        for row, (ids, targets) in enumerate(batch):
            inputs[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(targets)
        loss = model(inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{STEPS}, loss {loss.item():.3f}", flush=True)
    return model


def export(checkpoint: Path, folder: Path, *options: str) -> None:
    subprocess.run(
        ["optimum-cli", "export", "openvino", "--model", str(checkpoint)]
        + ["--task", "text-generation-with-past", *options, str(folder)],
        check=True,
    )
    (folder / "openvino_config.json").unlink()  # It names folders of this machine; nobody reads it.


def trained_llama(text: list[str], checkpoint: Path) -> None:
    """The model that ships: LLaMA's tokenizer, and weights that were trained."""
    tokenizer = llama_tokenizer(checkpoint, text, VOCAB_SIZE)
    train(tokenizer).save_pretrained(checkpoint)


def llama(text: list[str], checkpoint: Path) -> None:
    """The same with random weights, and as wide as a group of int4 weights."""
    tokenizer = llama_tokenizer(checkpoint, text, 600)
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    save_random(LlamaForCausalLM, LlamaConfig, tokenizer, checkpoint, **wide)


def byte_level_tokenizer(text: list[str], pattern: str, **options) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the settings that LLaMA 3 and Qwen share."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [options["bos_token"], options["eos_token"]]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


# Random weights: what they say is noise, which is what a test of streaming wants.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}


def llama3(text: list[str], checkpoint: Path) -> None:
    """LLaMA 3's tokenizer: bytes, and a clean-up of spaces when decoding."""
    tokenizer = byte_level_tokenizer(
        text,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=True,
    )
    save_random(LlamaForCausalLM, LlamaConfig, tokenizer, checkpoint)


def qwen_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    """Qwen's tokenizer: bytes, and no clean-up."""
    return byte_level_tokenizer(
        text,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )


def qwen(text: list[str], checkpoint: Path) -> None:
    save_random(Qwen2ForCausalLM, Qwen2Config, qwen_tokenizer(text), checkpoint)


def qwen3(text: list[str], checkpoint: Path) -> None:
    save_random(Qwen3ForCausalLM, Qwen3Config, qwen_tokenizer(text), checkpoint)


def qwen_with_halves(text: list[str], checkpoint: Path) -> None:
    """With tokens such as "о" and half a letter, which all real vocabularies of bytes have."""
    words = (
        "он об ов од ой ок ол ом оп ор ос от ох слово молоко хорошо город дорога しています ました"
    )
    qwen(text + [words] * 400, checkpoint)


def chatglm(text: list[str], checkpoint: Path) -> None:
    """ChatGLM's kind of detokenizer, one SentencePiece operation, on the GLM architecture.

    ChatGLM's own code is on Hugging Face only, and a GLM checkpoint has a byte-level tokenizer.
    """
    tokenizer = llama_tokenizer(checkpoint, text, 600, remove_extra_whitespaces=True)
    save_random(GlmForCausalLM, GlmConfig, tokenizer, checkpoint)


def chatglm3(text: list[str], checkpoint: Path) -> None:
    """The same with ChatGLM3's pad token, "<unk>", which its detokenizer shows."""
    chatglm(text, checkpoint)
    tokenizer = LlamaTokenizerFast.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(checkpoint)


def use_sentencepiece_operations(checkpoint: Path, folder: Path) -> None:
    """Convert the tokenizer again, to the operations that exports of ChatGLM have."""
    tokenizer = LlamaTokenizerFast.from_pretrained(checkpoint)
    for model, name in zip(
        convert_tokenizer(tokenizer, with_detokenizer=True, use_sentencepiece_backend=True),
        ("tokenizer", "detokenizer"),
        strict=True,
    ):
        openvino.save_model(model, folder / f"openvino_{name}.xml")


def convert_detokenizers(family: str) -> None:
    """Convert the detokenizer of a family again, to what half a character decodes to elsewhere.

    To nothing ("ignore"), or to its bytes ("none"). Only the .xml differs from the family's own.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODELS / family)
    for name, mode in ("ignore", UTF8ReplaceMode.IGNORE), ("none", None):
        _, model = convert_tokenizer(tokenizer, with_detokenizer=True, utf8_replace_mode=mode)
        with tempfile.TemporaryDirectory() as temporary:
            xml = Path(temporary, f"{family}-{name}.xml")
            openvino.save_model(model, xml)
            weights = (MODELS / family / "openvino_detokenizer.bin").read_bytes()
            assert xml.with_suffix(".bin").read_bytes() == weights
            shutil.copy(xml, MODELS / "detokenizers")


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint of LLaMA 3 or Qwen2 as a GGUF file, as llama.cpp converts them."""
    import gguf  # Here, because the tests of the export import this file without it.

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config, is_llama = model.config, model.config.model_type == "llama"
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    types = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if is_llama else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([types[token in tokenizer.all_special_tokens] for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)

    architecture = gguf.MODEL_ARCH.LLAMA if is_llama else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # That of the embeddings.
            continue
        array = tensor.float().numpy()
        if is_llama and ("q_proj" in name or "k_proj" in name):  # It rotates neighbours instead.
            heads = getattr(config, f"num_{'attention' if 'q_' in name else 'key_value'}_heads")
            halves = array.reshape(heads, 2, -1, config.hidden_size)
            array = halves.swapaxes(1, 2).reshape(array.shape)
        array = array.astype("float32" if array.ndim == 1 else "float16")
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_random(model_class, config_class, tokenizer, checkpoint: Path, **sizes: int) -> None:
    torch.manual_seed(SEED)
    config = config_class(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **(TINY | sizes),
    )
    model_class(config).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


def training_lines() -> list[str]:
    """The text that tokenizers are trained on."""
    pairs = itertools.islice(conversations(SEED), 8000)
    text = [part for pair in pairs if pair[0].isascii() for part in pair]
    return "\n".join(f"<|user|>\n{part}\n<|assistant|>" for part in text).split("\n")


def main() -> None:
    makers = {
        "tiny-llama": trained_llama,
        "tiny-llama3": llama3,
        "tiny-qwen": qwen,
        "tiny-chatglm": chatglm,
        "tiny-llama3.gguf": llama3,
        "tiny-qwen.gguf": qwen_with_halves,
        "detokenizers": None,
    }
    parser = argparse.ArgumentParser(description="Make the models in tests/models again.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of: {', '.join(makers)}")
    for name in parser.parse_args().names or makers:
        folder = MODELS / name
        if name == "detokenizers":
            folder.mkdir(exist_ok=True)
            convert_detokenizers("tiny-llama")
            convert_detokenizers("tiny-qwen")
            continue
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as temporary:
            checkpoint = Path(temporary)
            makers[name](training_lines(), checkpoint)
            if name.endswith(".gguf"):
                write_gguf(checkpoint, folder)
                continue
            export(checkpoint, folder, "--weight-format", "int8")
            if name == "tiny-chatglm":
                use_sentencepiece_operations(checkpoint, folder)


if __name__ == "__main__":
    main()
