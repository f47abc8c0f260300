"""`stream` on real pipelines: it yields what `generate` returns."""

import pytest
from conftest import PROPERTIES
from families import FAMILIES, GGUF, PROMPTS

from multinomial_causal_lm import stream


@pytest.fixture(params=FAMILIES + GGUF)
def family(request):
    return request.param


@pytest.fixture(params=PROPERTIES)
def pipe(request, family, load_pipe):
    return load_pipe(family, **PROPERTIES[request.param])


@pytest.fixture
def config(pipe, request):
    config = pipe.get_generation_config()
    config.max_new_tokens = 60
    config.do_sample = True
    config.top_p = 0.9
    config.top_k = 30
    if "prompt lookup" in request.node.name:  # Several tokens in one call of `write`.
        config.num_assistant_tokens = 5
        config.max_ngram_size = 3
    return config


@pytest.mark.parametrize("seed", range(20))
def test_the_chunks_add_up_to_what_generate_returns(pipe, config, seed):
    config.rng_seed = seed
    prompt = PROMPTS[seed % len(PROMPTS)]
    assert "".join(stream(pipe, prompt, config)) == pipe.generate(prompt, config)
