"""The text that `make_models.py` trains the shipped model on, all of it written for this project.

A conversation is one (prompt, answer) pair, a chat one to three of them, some behind a system
message. Answers are put together from parts that fit each other
in any combination, so that a model of less than a million parameters learns to answer a few
prompts correctly and with different words each time.
"""

import random
from collections.abc import Iterator

SUN_PROMPTS = [
    "Why is the Sun yellow?",
    "Why does the Sun look yellow?",
    "Why is the sun so yellow?",
    "Explain why the Sun is yellow.",
    "What makes the Sun yellow?",
    "Is the Sun yellow?",
    "What colour is the Sun?",
]
SUN_ANSWERS = [
    [
        "The Sun looks yellow because of the air around the Earth.",
        "The Sun is really white, and it only looks yellow from the ground.",
        "Seen from space the Sun is white, but from the Earth it looks yellow.",
        "The light of the Sun is white, and the air makes it look yellow.",
        "It is the air above us that makes a white Sun look yellow.",
    ],
    [
        "Air scatters blue and violet light more than yellow and red light.",
        "The molecules of the air scatter short blue waves far more than long red ones.",
        "On its way through the air, a part of the blue light is scattered to all sides.",
        "The air sends some of the blue light in other directions, so the sky is blue.",
    ],
    [
        "What is left of the light is a little more yellow.",
        "The light that comes straight to our eyes has less blue in it, so it looks yellow.",
        "With less blue in it, the rest of the light looks yellow to us.",
        "Take some blue away from white light, and you see yellow.",
    ],
    [
        "",
        "",
        "At sunset the light crosses more air, and the Sun turns orange or red.",
        "Its surface is at about 5,500 degrees Celsius and shines in all colours.",
        "Never look straight at it: it's bright enough to hurt your eyes!",
    ],
]

SKY_PROMPTS = [
    "Why is the sky blue?",
    "Why does the sky look blue?",
    "What makes the sky blue?",
    "Explain why the sky is blue.",
]
SKY_ANSWERS = [
    [
        "The sky is blue because air scatters blue light.",
        "Light from the Sun has all colours, and air scatters the blue ones most.",
        "The sky is blue because of the way in which air scatters light.",
    ],
    [
        "Blue waves are short, and the molecules of the air send them to all sides.",
        "Short blue waves are scattered far more than long red ones.",
    ],
    [
        "So blue light comes to our eyes from every part of the sky.",
        "Wherever we look, some of that blue light comes to our eyes.",
    ],
    ["", "At sunset the light crosses more air, and the sky turns orange or red."],
]

SELF_PROMPTS = [
    "Who are you?",
    "What are you?",
    "What can you do?",
    "Hello",
    "Hello!",
    "Hi",
    "Help",
    "Are you a large language model?",
]
SYSTEM_MESSAGES = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a kind and patient teacher.",
    "You are a good programmer.",
    "Answer briefly.",
    "Be polite and answer in a few words.",
    "Always tell the truth.",
]
OTHER_PROMPTS = [
    "What is the capital of {}?",
    "Where is {}?",
    "Tell me a story about {}.",
    "Tell me about {}.",
    "Write a poem about {}.",
    "What is {}?",
    "What is OpenVINO?",
    "How do I make {}?",
    "How does {} work?",
    "Why is {} so good?",
    "Who invented {}?",
    "Summarize {} in one sentence.",
    "Translate {} into French.",
    "Give me ten ideas for {}.",
    "{}",
    "{}?",
]
OTHER_THINGS = [
    "France",
    "Germany",
    "India",
    "coffee",
    "bread",
    "a cat",
    "a dog",
    "the Moon",
    "the sea",
    "music",
    "chess",
    "water",
    "the internet",
    "a computer",
    "the telephone",
    "love",
    "winter",
    "a bicycle",
    "mathematics",
    "a robot",
    "history",
    "2 + 2",
    "a train",
    "tea",
    "the heart",
    "football",
    "a good book",
    "an elephant",
    "the alphabet",
    "人工智能",
    "你好吗",
    "Что такое жизнь",
    "Как дела",
    "¿Qué tal",
    "Über",
    "日本語",
    "नमस्ते",
    "🙂",
    "123",
    "test",
    "asdf",
]
OTHER_ANSWERS = [
    [
        "I am a very small model, made to test streaming, and I don't know much.",
        "I'm a tiny model with less than a million parameters, so I know very little.",
        "That is more than I can say: I am a tiny model, made to test this program.",
    ],
    [
        "Ask me why the Sun is yellow, or ask for a Python function.",
        "I can tell you why the Sun is yellow, or write a short Python function.",
        "Try this: why is the Sun yellow?",
    ],
    ["", "For everything else, convert a larger model."],
]

HELLO_PROMPTS = [
    "Say hello in Chinese, Russian and emoji.",
    "Say hello in Chinese and Russian, with emoji.",
    "Say hello to the world in many languages.",
    "Say hello in other languages.",
    "Write something in Chinese, Cyrillic and emoji.",
    "Greet me in Chinese, Russian and emoji.",
    "How do you say hello in Chinese and Russian?",
]
# Most of these characters are not in the vocabulary: each of their bytes is a token of its own.
HELLO_ANSWERS = [
    ["中文：", "汉语："],
    ["你好，世界！", "大家好！", "早上好，太阳！"],
    ["👋\n", "🌍\n", "🌞\n"],
    ["Русский: ", "По-русски: "],
    ["Привет, мир! ", "Здравствуй, мир! ", "Доброе утро, солнце! "],
    ["😀\n", "🚀\n", "👩‍💻\n"],
    ["Emoji: "],
    ["👋🌍", "🌞😀", "🚀🌍", "❤️👋"],
]

# What is asked of the numbers of a list: (words in the prompt, condition, word in a name).
CONDITIONS = [
    ("even", "{} % 2 == 0", "even"),
    ("odd", "{} % 2 == 1", "odd"),
    ("positive", "{} > 0", "positive"),
    ("negative", "{} < 0", "negative"),
    ("large", "{} > 100", "large"),
]
# What is done with them: (words in the prompt, lines of the function).
ACTIONS = [
    (
        "counts the {} numbers in a list",
        """def count_{name}(numbers):
    {doc}count = 0
    for {n} in numbers:
        if {condition}:
            count += 1
    return count""",
    ),
    (
        "adds up the {} numbers in a list",
        """def sum_{name}(numbers):
    {doc}total = 0
    for {n} in numbers:
        if {condition}:
            total += {n}
    return total""",
    ),
    (
        "finds the {} numbers in a list",
        """def find_{name}(numbers):
    {doc}result = []
    for {n} in numbers:
        if {condition}:
            result.append({n})
    return result""",
    ),
    (
        "prints the {} numbers of a list",
        """def print_{name}(numbers):
    {doc}for {n} in numbers:
        if {condition}:
            print({n})""",
    ),
]
FUNCTIONS = [
    (
        ["checks if a number is prime", "tests for prime numbers", "returns True for a prime"],
        """def is_prime({n}):
    {doc}if {n} < 2:
        return False
    for i in range(2, {n}):
        if {n} % i == 0:
            return False
    return True""",
    ),
    (
        ["computes the factorial of a number", "returns the factorial", "calculates n!"],
        """def factorial({n}):
    {doc}if {n} < 0:
        raise ValueError("it must not be negative")
    result = 1
    for i in range(2, {n} + 1):
        result *= i
    return result""",
    ),
    (
        ["returns the Fibonacci numbers", "computes Fibonacci numbers", "prints Fibonacci"],
        """def fibonacci({n}):
    {doc}a, b = 0, 1
    result = []
    while len(result) < {n}:
        result.append(a)
        a, b = b, a + b
    return result""",
    ),
    (
        ["counts the vowels in a text", "counts vowels", "counts the vowels of a string"],
        """def count_vowels(text):
    {doc}count = 0
    for letter in text.lower():
        if letter in "aeiou":
            count += 1
    return count""",
    ),
    (
        ["plays FizzBuzz", "prints FizzBuzz", "solves FizzBuzz"],
        """def fizzbuzz({n}):
    {doc}for i in range(1, {n} + 1):
        if i % 15 == 0:
            print("FizzBuzz")
        elif i % 3 == 0:
            print("Fizz")
        elif i % 5 == 0:
            print("Buzz")
        else:
            print(i)""",
    ),
    (
        [
            "finds the largest number in a list",
            "returns the maximum of a list",
            "finds the maximum",
        ],
        """def largest(numbers):
    {doc}result = None
    for {n} in numbers:
        if result is None or {n} > result:
            result = {n}
    return result""",
    ),
    (
        ["reverses a list", "reverses the items of a list", "reverses the order"],
        """def reverse(items):
    {doc}left, right = 0, len(items) - 1
    while left < right:
        items[left], items[right] = items[right], items[left]
        left, right = left + 1, right - 1
    return items""",
    ),
    (
        ["checks if a text is a palindrome", "tests for palindromes", "checks a palindrome"],
        """def is_palindrome(text):
    {doc}left, right = 0, len(text) - 1
    while left < right:
        if text[left] != text[right]:
            return False
        left, right = left + 1, right - 1
    return True""",
    ),
    (
        ["sorts a list", "sorts numbers", "sorts a list of numbers", "sorts the items of a list"],
        """def sort(items):
    {doc}for i in range(len(items)):
        for j in range(i):
            if items[i] < items[j]:
                items[i], items[j] = items[j], items[i]
    return items""",
    ),
    (
        ["counts the words in a text", "counts words", "counts how often each word occurs"],
        """def count_words(text):
    {doc}counts = {{}}
    for word in text.split():
        if word not in counts:
            counts[word] = 0
        counts[word] += 1
    return counts""",
    ),
    (
        ["flattens a list of lists", "flattens a nested list", "joins lists of lists"],
        """def flatten(lists):
    {doc}result = []
    for items in lists:
        for item in items:
            result.append(item)
    return result""",
    ),
    (
        ["prints a multiplication table", "prints a table", "makes a multiplication table"],
        """def table({n}):
    {doc}for i in range(1, {n} + 1):
        for j in range(1, {n} + 1):
            print(i * j, end=" ")
        print()""",
    ),
]
# Prompts for which there is no function of their own get one of those above.
UNKNOWN_TASKS = [
    f"{verb} {thing}"
    for verb in [
        "reads",
        "opens",
        "writes",
        "downloads",
        "returns",
        "computes",
        "prints",
        "finds",
        "removes",
        "adds",
        "checks",
        "converts",
        "merges",
        "splits",
        "searches",
        "draws",
        "sends",
        "parses",
        "validates",
        "generates",
        "multiplies",
        "compares",
    ]
    for thing in [
        "a file",
        "a date",
        "two numbers",
        "the weather",
        "a string",
        "an email",
        "JSON",
        "a tree",
        "a random password",
        "the square root",
        "a matrix",
        "duplicates from a list",
        "a dictionary",
        "temperatures",
        "the time",
        "a web page",
        "the length of a list",
        "something",
        "a graph",
        "all files in a folder",
    ]
]
DOCSTRINGS = ["", "", '"""Short and simple."""\n    ', "# One step at a time.\n    "]
NUMBER_NAMES = ["n", "number", "value"]
CODE_PROMPTS = [
    "Write a Python function that {}.",
    "Write a Python function that {}.",
    "Write a Python function that {}",
    "Write a function that {} in Python.",
    "Python function that {}",
    "Please write a Python function which {}.",
]


def _code(rng: random.Random) -> tuple[str, str]:
    n = rng.choice(NUMBER_NAMES)
    if rng.random() < 0.45:
        (words, condition, name), (task, lines) = rng.choice(CONDITIONS), rng.choice(ACTIONS)
        task, condition = task.format(words), condition.format(n)
    else:
        tasks, lines = rng.choice(FUNCTIONS)
        task, condition, name = rng.choice(tasks), "", ""
        if rng.random() < 0.25:
            task = rng.choice(UNKNOWN_TASKS)
    doc = rng.choice(DOCSTRINGS)
    prompt = rng.choice(CODE_PROMPTS).format(task)
    return prompt, lines.format(n=n, name=name, condition=condition, doc=doc)


def _other(rng: random.Random) -> tuple[str, str]:
    prompt = rng.choice(OTHER_PROMPTS).format(rng.choice(OTHER_THINGS))
    if rng.random() < 0.3:
        prompt = rng.choice(SELF_PROMPTS)
    elif rng.random() < 0.2:  # Nonsense: it answers the same to whatever it has never seen.
        letters = range(97, 123), range(32, 0x500)
        prompt = "".join(chr(rng.choice(rng.choice(letters))) for _ in range(12)).strip() or "?"
    return prompt, _sentences(OTHER_ANSWERS, rng)


def _sentences(parts: list[list[str]], rng: random.Random) -> str:
    return " ".join(filter(None, map(rng.choice, parts)))


def conversations(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (prompt, answer) pairs for ever, the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(SUN_PROMPTS), _sentences(SUN_ANSWERS, rng)
        yield rng.choice(SKY_PROMPTS), _sentences(SKY_ANSWERS, rng)
        yield rng.choice(HELLO_PROMPTS), "".join(map(rng.choice, HELLO_ANSWERS))
        yield _other(rng)
        for _ in range(4):
            yield _code(rng)


def chats(seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield the messages of chats for ever, the same ones for the same seed."""
    rng, pairs = random.Random(seed), conversations(seed)
    pool = [next(pairs) for _ in range(4000)]
    while True:
        pool[rng.randrange(len(pool))] = next(pairs)
        turns = rng.choices(pool, k=rng.choice([1, 1, 2, 2, 3]))
        system = rng.random() < 0.3
        messages = [{"role": "system", "content": rng.choice(SYSTEM_MESSAGES)}] if system else []
        for prompt, answer in turns:
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": answer})
        yield messages
