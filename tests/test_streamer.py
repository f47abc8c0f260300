"""The contracts of `IterableStreamer` and its parts, on all kinds of tokenizers."""

import itertools
import os
import queue
import statistics
import threading

import multinomial_causal_lm
import pytest
from families import CODE, DETOKENIZERS, FAMILIES, GGUF, TEXTS, Clock, Tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multinomial_causal_lm import IncrementalDetokenizer, IterableStreamer, find_stop_string
from openvino_genai import StreamingStatus

SLOW, FAST = 0.02, 0.0005  # Seconds from one call of `write` to the next.
WAITING = [" ", " n", " n'", " '", " 'r", " 'v"]
CONTRACTIONS = ["'", "'t", "'s", "'m", "'ve", "'re", "n't", "' ", "."]


@pytest.fixture(scope="module", params=FAMILIES + GGUF + DETOKENIZERS)
def tokenizer(request):
    return Tokenizer(request.param)


@pytest.fixture(scope="module")
def clock():
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(multinomial_causal_lm, "time", clock)
        yield clock


def write_all(tokenizer, clock, tokens, interval=SLOW, sizes=(1,)) -> list[str]:
    """Write the tokens in parts of these sizes; return what is there to read after each part."""
    streamer = IterableStreamer(tokenizer)
    tokenizer.lengths.clear()
    texts, start = [], 0
    for size in itertools.cycle(sizes):
        part = tokens[start : start + size]
        if not part:
            break
        clock.now += interval
        streamer.write(part if size > 1 else part[0])
        texts.append((texts or [""])[-1] + drain(streamer))
        start += size
    streamer.end()
    return [*texts, (texts or [""])[-1] + "".join(streamer)]


def drain(streamer) -> str:
    """Take what can be read without waiting."""
    return "".join(streamer._queue.get() for _ in range(streamer._queue.qsize()))


def sequences(pools: list[list[int]]):
    token = st.one_of([st.sampled_from(pool) for pool in pools if pool])
    run = st.builds(lambda token, count: [token] * count, token, st.integers(1, 60))
    some = st.one_of([st.lists(st.sampled_from(pool), max_size=12) for pool in pools if pool])
    return st.lists(st.one_of(run, some), max_size=6).map(
        lambda parts: list(itertools.chain(*parts))
    )


def test_any_tokens_in_any_parts_come_out_as_decode_says(tokenizer, clock):
    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        tokens=sequences(tokenizer.pools()),
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5) | st.just([1]),
        interval=st.sampled_from([SLOW, FAST]),
    )
    def check(tokens, sizes, interval):
        *_, text = write_all(tokenizer, clock, tokens, interval, sizes)
        assert text == tokenizer.decode(tokens)

    check()


def cut(text: str, stops: list[str]) -> str:
    return text[: min([len(text), *(text.index(stop) for stop in stops if stop in text)])]


def test_any_tokens_with_stop_strings_come_out_as_decode_says_before_the_first(tokenizer, clock):
    """Stop strings from the text itself, in parts, and others that it only begins."""
    examples = settings.default.max_examples // 4  # Of two to ten stop strings each.

    @settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=examples)
    @given(
        tokens=sequences(tokenizer.pools()),
        places=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 12)), min_size=1, max_size=3),
        others=st.lists(st.sampled_from(["", "zzz", " n't!", "  ", "\ufffd\ufffd"]), max_size=2),
        interval=st.sampled_from([SLOW, FAST]),
    )
    def check(tokens, places, others, interval):
        text = tokenizer.decode(tokens)
        starts = [(int(place * len(text)), length) for place, length in places]
        stops = [text[start : start + length] for start, length in starts] + others
        stops += [stop + "\u2603" for stop in stops]
        streamer = IterableStreamer(tokenizer, stops)
        for token in tokens:
            clock.now += interval
            streamer.write(token)
        streamer.end()
        assert "".join(streamer) == cut(text, list(filter(None, stops)))

    check()


def test_a_stop_string_makes_the_library_stop_when_it_is_whole(tokenizer, clock):
    tokens = tokenizer.tokens("The Sun is yellow, and so on")
    text = tokenizer.decode(tokens)
    streamer = IterableStreamer(tokenizer, ["yellow"])
    for count, token in enumerate(tokens, start=1):
        clock.now += SLOW
        status = streamer.write(token)
        whole = "yellow" in tokenizer.decode(tokens[:count])
        assert (status == StreamingStatus.CANCEL) == whole
    assert "".join(streamer) == text[: text.index("yellow")]


def test_the_families_that_are_called_padded_show_their_pad_token_and_no_others_do(
    request, tokenizer
):
    texts = tokenizer.tokenizer.decode([[5], [5, 5, 5]])
    shows = texts[0] != tokenizer.decode([5])
    assert shows == ("padded" in request.node.callspec.params["tokenizer"])


def test_texts_that_were_decoded_elsewhere_come_out_as_decode_says(tokenizer):
    """As a program for many users does it, which decodes the tokens of all in one call."""
    examples = settings.default.max_examples // 5 + 1  # Of five sequences each, on average.

    @settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=examples)
    @given(texts=st.lists(sequences(tokenizer.pools()), min_size=2, max_size=8))
    def check(texts):
        detokenizers = [IncrementalDetokenizer(tokenizer) for _ in texts]
        pieces = [[] for _ in texts]
        for number, tokens in [*enumerate(texts)] * 2:
            half = len(tokens) // 2
            for token in tokens[half:] if pieces[number] else tokens[:half]:
                detokenizer = detokenizers[number]
                detokenizer.add([token])
                text = tokenizer.decode(detokenizer.tokens)
                pieces[number].append(detokenizer.take(text=text))
            pieces[number] = pieces[number] or [""]
        for detokenizer, piece, tokens in zip(detokenizers, pieces, texts, strict=True):
            assert "".join(piece) + detokenizer.take(final=True) == tokenizer.decode(tokens)

    check()


@pytest.mark.parametrize("text", [*TEXTS.values(), "\ufffd, a \ufffd of the model's own\ufffd"])
@pytest.mark.parametrize("interval", [SLOW, FAST])
def test_real_text_comes_out_as_decode_says(tokenizer, clock, choose, text, interval):
    tokens = tokenizer.tokens(text)[: choose(200, 3000)]
    *_, streamed = write_all(tokenizer, clock, tokens, interval)
    assert streamed == tokenizer.decode(tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_what_no_later_token_can_change_is_there_when_write_returns(tokenizer, clock, choose, text):
    """Compare with what can follow: any one token, a contraction, the rest of a character.

    What a clean-up could change waits for one more token, also if this tokenizer has none.
    """
    tokens = tokenizer.tokens(TEXTS[text])[:150]
    *streamed, _ = write_all(tokenizer, clock, tokens)
    following = [[token] for token in range(tokenizer.size)]
    following += [tokenizer.inner_tokens(piece) for piece in CONTRACTIONS]
    for count, known_text in enumerate(streamed[: choose(8, 150)], start=1):
        window = tokens[max(count - 30, 0) : count]
        decoded = tokenizer.tokenizer.decode(window)
        rest = [tokens[count : count + more] for more in (2, 3)]
        futures = tokenizer.tokenizer.decode([window + more for more in following + rest])
        can_change = len(decoded) - len(os.path.commonprefix([decoded, *futures]))
        complete = tokenizer.decode(tokens[:count])
        expected = complete[: len(complete) - can_change]
        assert known_text == expected or expected in [known_text + wait for wait in WAITING]


def test_a_contraction_in_single_letters_comes_out_as_decode_says(tokenizer, clock):
    for text in "a n't", "a 've", "a 're", "a 's", "a ' b", "a .":
        letters = [tokenizer.inner_tokens(letter) for letter in text[1:]]
        tokens = [*tokenizer.tokens("a"), *itertools.chain(*letters)]
        *_, streamed = write_all(tokenizer, clock, tokens)
        assert streamed == tokenizer.decode(tokens)


def test_the_first_token_is_there_at_once(tokenizer, clock):
    token = tokenizer.texts.index("def" if "def" in tokenizer.texts else "The")
    assert write_all(tokenizer, clock, [token])[0] == tokenizer.texts[token]


def test_bytes_that_never_become_a_character_keep_coming(tokenizer, clock):
    token = tokenizer.inner_tokens("😀")[0]  # Decodes to U+FFFD, or to nothing.
    *texts, _ = write_all(tokenizer, clock, [token] * 200)
    for count, text in enumerate(texts, start=1):
        assert len(text) >= len(tokenizer.tokenizer.decode([token] * count)) - 3


def test_a_replacement_character_of_the_model_after_such_bytes_comes_once(tokenizer, clock, choose):
    """SentencePiece shows two of it while it is unfinished, then one: the text gets shorter."""
    invalid = tokenizer.inner_tokens("😀")[0]
    character = tokenizer.inner_tokens("\ufffd")
    for count in range(0, 70, choose(14, 1)):
        tokens = [*[invalid] * count, *character, *[invalid] * 40]
        *_, text = write_all(tokenizer, clock, tokens)
        assert text == tokenizer.decode(tokens)


def test_a_decode_is_short_where_each_token_is_a_part_of_a_character(tokenizer, clock, choose):
    for character in "😀", "太":
        tokens = tokenizer.inner_tokens(character) * choose(50, 200)
        write_all(tokenizer, clock, tokens)
        assert max(tokenizer.lengths) <= 80


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("interval", [FAST, 0.003, SLOW])
def test_a_decode_takes_few_more_tokens_than_come_in_ten_milliseconds(
    tokenizer, clock, choose, text, interval
):
    """On average, of a text of any length."""
    tokens = (tokenizer.tokens(TEXTS[text]) * 20)[: choose(1000, 5000)]
    write_all(tokenizer, clock, tokens, interval)
    assert statistics.mean(tokenizer.lengths) <= 64 + 4 * 0.01 / interval


def test_long_runs_that_may_still_change_come_out_as_decode_says(tokenizer, clock, choose):
    character = tokenizer.inner_tokens("😀")
    special = [token for token in range(3) if not tokenizer.texts[token]]
    size = choose(100, 200)
    runs = [
        tokenizer.inner_tokens(" '" * size),  # Cleaned up, each pair depends on all before.
        tokenizer.inner_tokens(" " * size),
        [character[0]] * size,
        [token for byte in character for token in [byte, *special * 25]],
    ]
    for run, before in itertools.product(runs, range(choose(1, 5))):
        tokens = tokenizer.tokens("a") * before + run
        for interval in SLOW, FAST:
            *_, text = write_all(tokenizer, clock, tokens, interval)
            assert text == tokenizer.decode(tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_slow_tokens_cost_one_short_decode_each(tokenizer, clock, choose, text):
    tokens = (tokenizer.tokens(TEXTS[text]) * 20)[: choose(100, 1000)]
    write_all(tokenizer, clock, tokens)
    assert max(tokenizer.lengths) <= 80
    assert len(tokenizer.lengths) <= 1.1 * len(tokens)


def test_fast_tokens_are_decoded_together(tokenizer, clock):
    tokens = (tokenizer.tokens(CODE) * 3)[:3000]
    write_all(tokenizer, clock, tokens, interval=FAST)
    assert len(tokenizer.lengths) <= len(tokens) / 8

    special = tokenizer.texts.index("")
    write_all(tokenizer, clock, [special] * 1000, interval=FAST)
    assert len(tokenizer.lengths) <= 100


@pytest.mark.parametrize("interval", [0.0001, FAST, 0.003, 0.0099, SLOW])
def test_text_is_never_later_than_ten_milliseconds_or_one_token(tokenizer, clock, choose, interval):
    token = tokenizer.tokens("aa aa")[-1]
    tokens = [token] * choose(100, 500)
    *texts, _ = write_all(tokenizer, clock, tokens, interval)
    for count, text in enumerate(texts, start=1):
        late = max(count - len(text) // len(tokenizer.decode([token, token]).strip()) * 2, 0)
        assert late * interval <= 0.01 + interval + 1e-9


def test_many_tokens_in_one_call_are_decoded_at_once(tokenizer, clock):
    tokens = (tokenizer.tokens(CODE) * 3)[:3000]
    *_, text = write_all(tokenizer, clock, tokens, sizes=[3000])
    assert len(tokenizer.lengths) <= 4
    assert text == tokenizer.decode(tokens)


def test_the_end_is_the_end_for_every_reader(tokenizer, clock):
    streamer = IterableStreamer(tokenizer)
    readers = [threading.Thread(target=list, args=[streamer], daemon=True) for _ in range(3)]
    for reader in readers:
        reader.start()
    streamer.write(tokenizer.tokens("a"))
    for _ in range(3):
        streamer.end()
    for reader in readers:
        reader.join(timeout=10)
        assert not reader.is_alive()
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(streamer)


def test_cancel_may_come_from_any_thread_before_the_last_write(tokenizer, clock):
    streamer = IterableStreamer(tokenizer)
    tokens = tokenizer.tokens("a b")
    assert streamer.write(tokens) == StreamingStatus.RUNNING
    thread = threading.Thread(target=streamer.cancel)
    thread.start()
    thread.join()
    assert streamer.write(tokens) == StreamingStatus.CANCEL  # Nobody can read it any more.
    streamer.end()
    assert "".join(streamer) == tokenizer.decode(tokens)
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(streamer)


def test_a_streamer_that_was_never_written_to_ends(tokenizer):
    streamer = IterableStreamer(tokenizer)
    streamer.end()
    assert list(streamer) == []


class FalseError(LookupError):
    def __bool__(self):
        return False


@pytest.mark.parametrize("error", [LookupError, FalseError, queue.Empty, KeyboardInterrupt])
@pytest.mark.parametrize("final", [False, True])
def test_an_error_is_raised_once_and_makes_the_library_stop(tokenizer, monkeypatch, error, final):
    streamer = IterableStreamer(tokenizer)

    def fail(tokens):
        raise error

    monkeypatch.setattr(tokenizer, "decode", fail)
    if not final:
        for _ in range(3):
            assert streamer.write(1) == StreamingStatus.CANCEL
    streamer.end()
    streamer.end()
    with pytest.raises(error):
        next(streamer)
    assert list(streamer) == []


@pytest.mark.parametrize(
    ("text", "stops", "final", "expected"),
    [
        ("", ["x"], True, (0, False)),
        ("yellow", [], False, (6, False)),
        ("yellow", ["low", "ell"], False, (1, True)),
        ("yellow", ["low!"], False, (3, False)),  # It may have begun.
        ("yellow", ["low!"], True, (6, False)),
        ("yellow", ["ellow!", "low"], False, (1, False)),  # Which one is first, is not known yet.
        ("yellow", ["ellow!", "low"], True, (3, True)),
        ("yellow", ["low", "lower"], False, (3, True)),
    ],
)
def test_a_stop_string_is_found_at_its_first_place(text, stops, final, expected):
    assert find_stop_string(text, tuple(stops), final) == expected
