"""A chat page with a stop button, in Streamlit, beside the server that serve.py is.

    pip install streamlit openai
    streamlit run examples/app.py

Streamlit's own Stop button ends the generation and keeps what has come. For a model that writes
Markdown, write `.markdown` in place of `.text`; `write_stream` would lose indentation.
"""

import os

import streamlit
from openai import OpenAI

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "any")

client = OpenAI(base_url=URL, api_key=KEY)
messages = streamlit.session_state.setdefault("messages", [])
for message in messages:
    streamlit.chat_message(message["role"]).text(message["content"])
if prompt := streamlit.chat_input():
    messages.append({"role": "user", "content": prompt})
    streamlit.chat_message("user").text(prompt)
    view = streamlit.chat_message("assistant").empty()
    with client.chat.completions.create(model="any", messages=messages, stream=True) as chunks:
        messages.append({"role": "assistant", "content": ""})  # Grows, and stays after a stop.
        for chunk in chunks:
            messages[-1]["content"] += chunk.choices[0].delta.content or ""
            view.text(messages[-1]["content"])
