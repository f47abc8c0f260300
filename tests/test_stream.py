"""`stream` on real pipelines: it yields what `generate` returns."""

import json
import re
import shutil

import pytest
from conftest import PROPERTIES, make_config
from families import FAMILIES, GGUF, MODELS, PROMPTS, SUN
from multinomial_causal_lm import stream
from openvino_genai import LLMPipeline, StructuredOutputConfig, draft_model
from programs import BLOCKS, README


@pytest.fixture(params=FAMILIES + GGUF)
def family(request):
    return request.param


@pytest.fixture(params=PROPERTIES)
def pipe(request, family, load_pipe):
    return load_pipe(family, **PROPERTIES[request.param])


@pytest.fixture
def config(pipe, request):
    config = make_config(pipe, 60)
    config.do_sample = True
    config.top_p = 0.9
    config.top_k = 30
    if "prompt lookup" in request.node.name:  # Several tokens in one call of `write`.
        config.num_assistant_tokens = 5
        config.max_ngram_size = 3
    return config


@pytest.mark.runs(2, 20)
def test_the_chunks_add_up_to_what_generate_returns(pipe, config, run):
    config.rng_seed = run
    prompt = PROMPTS[run % len(PROMPTS)]
    assert "".join(stream(pipe, prompt, config)) == pipe.generate(prompt, config)


STOPS = [["Sun"], [":"], ["return"], ["Emoji:"], ["yellow"], ["The"], ["ello"], ["The Sun ", "Sun"]]


@pytest.mark.parametrize("backend", ["paged attention", "SDPA"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_ends_before_the_first_stop_string(load_pipe, choose, backend, prompt):
    """Of realistic ones, and of one at each place of the answer."""
    pipe = load_pipe("tiny-llama", **PROPERTIES[backend])
    full = pipe.generate(prompt, make_config(pipe, 60))
    places = range(0, len(full) - 8, choose(60, 1))
    for stops in STOPS + [[full[place : place + 1 + place % 8]] for place in places]:
        config = make_config(pipe, 60)
        config.stop_strings = set(stops)
        ends = [full.index(stop) for stop in stops if stop in full]
        assert "".join(stream(pipe, prompt, config)) == full[: min([len(full), *ends])]
        assert config.stop_strings == set(stops)


def test_a_model_without_a_template_gets_the_one_of_the_readme(tmp_path, load_pipe):
    """With it, and with two tokens that end an answer, as first-generation Qwen needs them."""
    (template,) = (block for language, block in BLOCKS if language == "jinja")
    settings = json.loads(*(block for language, block in BLOCKS if language == "json"))
    without = load_pipe("tiny-qwen", **PROPERTIES["paged attention"])
    assert not without.get_tokenizer().chat_template
    text = f"<|im_start|>user\n{SUN}<|im_end|>\n<|im_start|>assistant\n"
    config = make_config(without, 30)
    expected = "".join(stream(without, text, config))
    assert "".join(stream(without, SUN, config)) != expected

    tokenizer = without.get_tokenizer()
    tokens = tokenizer.encode(expected, add_special_tokens=False).input_ids.data[0].tolist()
    folder = shutil.copytree(MODELS / "tiny-qwen", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template.removesuffix("\n"), encoding="utf-8")
    pipe = LLMPipeline(folder, "CPU", **PROPERTIES["paged attention"])
    config = make_config(pipe, 30)
    assert "".join(stream(pipe, SUN, config)) == expected

    own = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert list(settings) == ["eos_token_id"] and len(settings["eos_token_id"]) == 2
    own["eos_token_id"] = [own["eos_token_id"], tokens[-1]]
    (folder / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    pipe = LLMPipeline(folder, "CPU", **PROPERTIES["paged attention"])
    config = make_config(pipe, 30)
    shorter = "".join(stream(pipe, SUN, config))
    assert expected.startswith(shorter) and len(shorter) < len(expected)


FASTER = re.findall(r"^\| `(LLMPipeline\(model, .*?\))` \| (.*) \|$", README, re.MULTILINE)


@pytest.mark.parametrize(("line", "advice"), FASTER)
def test_what_makes_it_faster_needs_no_change_of_stream(tmp_path, monkeypatch, line, advice):
    monkeypatch.chdir(tmp_path)
    paths = {"model": MODELS / "tiny-llama", "small": MODELS / "tiny-llama", "device": "CPU"}
    line = line.replace("openvino_genai.", "")
    pipe = eval(line, {"LLMPipeline": LLMPipeline, "draft_model": draft_model} | paths)
    config = make_config(pipe, 100)
    for setting, value in re.findall(r"`config\.(\w+) = (\d+)`", advice):
        setattr(config, setting, int(value))
    assert "yellow" in "".join(stream(pipe, SUN, config))
    assert len(FASTER) == 4


def test_structured_answers_are_valid(load_pipe):
    pipe = load_pipe("tiny-qwen")  # Its weights are random.
    config = make_config(pipe, 60)
    config.structured_output_config = StructuredOutputConfig(
        json_schema='{"enum": ["red", "blue"]}'
    )
    assert json.loads("".join(stream(pipe, "Hi", config))) in ["red", "blue"]
