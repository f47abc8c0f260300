"""A chat page that remembers what was said, in Gradio 6. It loads the model itself.

    pip install gradio
    python examples/chat.py

Tabs do not wait for each other, and Stop works at any time; a tab that was closed generates up to
`MAX_TOKENS`. For a model that writes Markdown, leave out `render_markdown=False` and `css`.
"""

import os

import gradio
from batch import Batch

MODEL = os.environ.get("MODEL", "tests/models/tiny-llama")
MAX_TOKENS = 500

batch = Batch(MODEL)


def text_of(turn):
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


async def answer(message, history):
    messages = [{"role": turn["role"], "content": text_of(turn)} for turn in history]
    messages.append({"role": "user", "content": message})
    part = {"type": "text", "text": ""}
    reply = {"role": "assistant", "content": [part]}  # Gradio would dedent a mere `str`.
    try:
        async for chunk in batch.stream(messages, max_new_tokens=MAX_TOKENS):
            part["text"] += chunk
            yield reply
    except Exception as error:  # noqa: BLE001 - the page shows it.
        part["text"] += f"\n\nError: {error}"
        yield reply


chatbot = gradio.Chatbot(render_markdown=False)
chat = gradio.ChatInterface(
    answer, chatbot=chatbot, concurrency_limit=None, api_visibility="private"
)
chat.launch(css=".chatbot { white-space: pre-wrap }")  # Show the indentation.
