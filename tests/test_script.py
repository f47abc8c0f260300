"""The script as a process, on the model that ships."""

import ast
import itertools
import json
import re
import shutil

import pytest
from conftest import make_config
from families import FUNCTION, GGUF, HELLO, MODELS, PROMPTS, SUN, Tokenizer
from openvino_genai import ChatHistory

MODEL = MODELS / "tiny-llama"


def test_it_answers_and_ends_with_one_newline(run_script):
    process = run_script(MODEL, SUN)
    assert process.returncode == 0
    assert "yellow" in process.stdout
    assert process.stdout.endswith((".\n", "!\n"))
    assert process.stdout.count("\n") == 1


@pytest.mark.parametrize("device", ["cpu", "HETERO:cpu"])
def test_stderr_tells_what_is_loaded_and_how_fast_it_was(run_script, device):
    process = run_script(MODEL, SUN, "--device", device)
    loading, speed = process.stderr.splitlines()
    assert loading == f"Loading {MODEL} on {device.upper()} ..."
    match = re.fullmatch(r"(\d+) tokens, the first after \d+\.\d\d s, then (\S+) a second", speed)
    assert 10 < int(match[1]) < 100 and float(match[2]) > 0


@pytest.mark.parametrize("tokens", [1, 2])
def test_stderr_tells_that_the_answer_was_cut(run_script, changed_script, tokens):
    script = changed_script({r"max_new_tokens = \d+": f"max_new_tokens = {tokens}"})
    speed = run_script(MODEL, SUN, script=script).stderr.splitlines()[1]
    then = ", then [0-9.]+ a second" if tokens > 1 else ""  # One token has no speed.
    pattern = rf"{tokens} tokens \(max_new_tokens\), the first after [0-9.]+ s{then}"
    assert re.fullmatch(pattern, speed)


def test_a_dash_reads_the_prompt_from_stdin(run_script):
    assert "yellow" in run_script(MODEL, "-", input=SUN + "\n").stdout
    assert run_script(MODEL, "-", input="\n").stderr == "error: the prompt is empty\n"


@pytest.mark.parametrize("name", GGUF)
def test_it_runs_a_gguf_file(run_script, name):
    process = run_script(MODELS / name, SUN)
    assert process.returncode == 0
    assert process.stdout.strip()
    assert process.stderr.startswith(f"Loading {MODELS / name} on CPU ...\n")


@pytest.mark.parametrize("name", ["tiny.GGUF", "tiny.Gguf"])
def test_it_runs_a_gguf_file_however_its_name_is_spelled(run_script, tmp_path, name, monkeypatch):
    """The library knows only `.gguf`. Nothing stays behind."""
    (tmp_path / "temporary").mkdir()
    shutil.copyfile(MODELS / GGUF[0], tmp_path / name)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    process = run_script(name, SUN, cwd=tmp_path)
    assert process.returncode == 0
    assert process.stdout.strip()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["temporary", name]
    assert not any((tmp_path / "temporary").iterdir())


def test_runs_print_different_texts(run_script):
    """Two of four may be the same by chance: the model does not know many."""
    assert len({run_script(MODEL, SUN).stdout for _ in range(4)}) > 1


def test_settings_of_the_model_stay_in_force(run_script, tmp_path):
    """Here, several tokens that end an answer, as LLaMA 3 has them: also the full stop."""
    full_stop = Tokenizer("tiny-llama").tokens("a.")[-1]
    folder = shutil.copytree(MODEL, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    settings["eos_token_id"] = [settings["eos_token_id"], full_stop]
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert run_script(folder, SUN).stdout.count(".") <= 1


def test_code_keeps_its_indentation(run_script):
    code = run_script(MODEL, FUNCTION).stdout
    ast.parse(code)
    assert "\n    for " in code
    assert "\n        if " in code


def test_characters_of_several_tokens_arrive_whole(run_script):
    text = run_script(MODEL, HELLO).stdout
    assert "\ufffd" not in text
    assert "：" in text
    assert "усски" in text
    assert any(ord(character) > 0xFFFF for character in text)


def test_help_explains_every_argument_and_shows_an_example(run_script):
    text = run_script("--help").stdout
    for word in "model_dir", "prompt", "--device", "CPU (default)", "\nexample:":
        assert word in text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_at_least_18_of_20_answers_of_the_model_are_well_formed(load_pipe, prompt):
    pipe = load_pipe("tiny-llama")
    config = pipe.get_generation_config()
    config.max_new_tokens = 100
    config.do_sample = True
    config.top_p = 0.9
    config.top_k = 30
    answers = []
    for config.rng_seed in range(20):
        answers.append(pipe.generate(prompt, config))
    assert sum(map(is_well_formed, answers)) >= 18
    assert len(set(answers)) >= 4


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_second_answers_of_the_model_are_well_formed(load_pipe, system):
    """Behind its own first answer, of the same kind or another one."""
    pipe = load_pipe("tiny-llama")
    config = make_config(pipe, 200)

    def answer(messages: list[dict], prompt: str) -> str:
        messages.append({"role": "user", "content": prompt})
        text = pipe.generate(ChatHistory(messages), config).texts[0]
        messages.append({"role": "assistant", "content": text})
        return text

    sampled = []
    for first, second in itertools.product(PROMPTS, PROMPTS):
        messages = [{"role": "system", "content": system}] if system else []
        for prompt in first, second:
            text = answer(messages, prompt)
            assert is_well_formed(text) and KINDS[prompt] in text, (first, second, text)
        config.do_sample, config.top_p, config.top_k = True, 0.9, 30
        for config.rng_seed in range(3):
            sampled.append(is_well_formed(answer(messages[:-2], second)))
        config.do_sample = False
    assert sum(sampled) >= 0.9 * len(sampled)


KINDS = {SUN: "yellow", FUNCTION: "def ", HELLO: "Emoji: "}


def is_well_formed(answer: str) -> bool:
    if "\ufffd" in answer:
        return False
    if answer.startswith("def "):
        try:
            ast.parse(answer)
        except SyntaxError:
            return False
        return "\n        " in answer
    if "Emoji: " in answer:
        return answer.count("\n") == 2
    return answer.endswith((".", "!")) and 2 <= answer.count(". ") + 1 <= 4
