"""The script as a process, on the model that ships."""

import ast
import itertools
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import make_config
from families import FUNCTION, GGUF, HELLO, MODELS, PROMPTS, SCRIPT, SUN, Tokenizer, path_of
from openvino_genai import ChatHistory
from programs import run_program

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
    pattern = r"(\d+) tokens, ended by the model; the first after [0-9.]+ s, then (\S+) a second"
    match = re.fullmatch(pattern, speed)
    assert 10 < int(match[1]) < 100 and float(match[2]) > 0


def test_the_option_may_stand_anywhere(run_script):
    """Also between the other two, where argparse had trouble before Python 3.12.7."""
    arguments = [MODEL, SUN]
    for place in range(3):
        process = run_script(*arguments[:place], "--device", "cpu", *arguments[place:])
        assert "yellow" in process.stdout, process.stderr


@pytest.mark.parametrize("tokens", [1, 2])
def test_stderr_tells_that_the_answer_was_cut(run_script, changed_script, tokens):
    script = changed_script({r"max_new_tokens = \d+": f"max_new_tokens = {tokens}"})
    speed = run_script(MODEL, SUN, script=script).stderr.splitlines()[1]
    then = ", then [0-9.]+ a second" if tokens > 1 else ""  # One token has no speed.
    pattern = rf"{tokens} tokens, cut by max_new_tokens; the first after [0-9.]+ s{then}"
    assert re.fullmatch(pattern, speed)


def test_a_dash_reads_the_prompt_from_stdin(run_script):
    assert "yellow" in run_script(MODEL, "-", input=SUN + "\n").stdout
    assert run_script(MODEL, "-", input="\n").stderr.endswith("error: the prompt is empty\n")


@pytest.mark.parametrize("name", GGUF)
def test_it_runs_a_gguf_file(run_script, name):
    process = run_script(path_of(name), SUN)
    assert process.returncode == 0
    assert process.stdout.strip()
    assert process.stderr.startswith(f"Loading {path_of(name)} on CPU ...\n")


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


def test_stderr_tells_that_a_stop_string_ended_the_answer(run_script, changed_script):
    marker = "    config.top_k = 30"
    script = changed_script({marker: f"    config.stop_strings = {{'a'}}\n{marker}"})
    process = run_script(MODEL, SUN, script=script)
    assert "a" not in process.stdout
    assert re.search(r"^\d+ tokens, stopped; ", process.stderr, re.MULTILINE)


def test_help_explains_every_argument_and_shows_an_example(run_script):
    text = run_script("--help").stdout
    for word in "model_dir", "prompt", "--device", "CPU (default)":
        assert word in text
    example = re.search("^example: python multinomial_causal_lm.py (.*)$", text, re.MULTILINE)[1]
    _, prompt = shlex.split(example)
    assert "!" not in prompt  # zsh would wait for more.
    assert "yellow" in run_script(MODEL, prompt).stdout


def test_the_script_is_a_recipe_and_its_functions_are_short():
    """Of at most 25 lines, without their docstrings."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        lines = function.end_lineno - function.lineno + 1
        if ast.get_docstring(function):
            lines -= function.body[0].end_lineno - function.body[0].lineno + 1
        assert lines <= 25, function.name
    assert functions[0].name == "main"


WITHOUT_GUARD = f"""
import multiprocessing
if multiprocessing.get_start_method(allow_none=True) is None:
    multiprocessing.set_start_method("spawn")  # As on macOS.
print("once", flush=True)
from multinomial_causal_lm import stream
from openvino_genai import LLMPipeline
pipe = LLMPipeline({str(MODEL)!r}, "CPU")
config = pipe.get_generation_config()
config.max_new_tokens = 10
for chunk in stream(pipe, "Hi", config):
    pass
print("twice", flush=True)
"""


def test_a_program_without_a_guard_of_main_runs_once(tmp_path, monkeypatch):
    """Telemetry of openvino would start a child, and that would run the program once more."""
    (tmp_path / "program.py").write_text(WITHOUT_GUARD, encoding="utf-8")
    process = run_program(tmp_path / "program.py", environment=with_telemetry(tmp_path))
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.split() == ["once", "twice"]


WATCHED = """
import sys
events = []
watched = {"socket.connect", "socket.getaddrinfo", "os.fork", "os.posix_spawn", "subprocess.Popen"}
sys.addaudithook(lambda event, arguments: event in watched and events.append(event))
import multinomial_causal_lm, threading
for thread in set(threading.enumerate()) - {threading.main_thread()}:
    thread.join()
print(events)
"""


def test_no_socket_is_opened_and_no_process_started_at_import(tmp_path):
    (tmp_path / "program.py").write_text(WATCHED, encoding="utf-8")
    process = run_program(tmp_path / "program.py", environment=with_telemetry(tmp_path))
    assert process.stdout == "[]\n", process.stderr


def with_telemetry(home: Path) -> dict[str, str]:
    """Return an environment in which openvino would send its messages: not the one of a CI."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    return kept | {"PYTHONPATH": str(SCRIPT.parent), "HOME": str(home), "USERPROFILE": str(home)}


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
