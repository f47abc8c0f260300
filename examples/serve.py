"""A server for a team, which any client of OpenAI's chat completions connects to.

    pip install fastapi uvicorn
    uvicorn --app-dir examples serve:app --timeout-graceful-shutdown 2 --timeout-keep-alive 75

Settings are environment variables, named below. README.md beside this file has the clients.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Literal

from batch import Batch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

MODEL = os.environ.get("MODEL", "tests/models/tiny-llama")  # A folder, or a GGUF file.
DEVICE = os.environ.get("DEVICE", "CPU")
CACHE_GB = int(os.environ.get("CACHE_GB", "1"))  # For the contexts of all answers under way.
API_KEY = os.environ.get("API_KEY", "")  # If it is set, clients must give it.
MAX_TOKENS = int(os.environ.get("MAX_TOKENS", "32768"))  # The most that a client may ask for.
MAX_BYTES = int(os.environ.get("MAX_BYTES", "1000000"))  # The largest body of a request.

NAME = os.path.basename(MODEL)
LOG = logging.getLogger("uvicorn.error")


def context_length() -> int | None:
    """Return how many tokens a prompt and its answer may have together, if the model says so."""
    try:
        config = json.loads(Path(MODEL, "config.json").read_text(encoding="utf-8"))
        return config["max_position_embeddings"]
    except (OSError, ValueError, KeyError):
        return None


batch = Batch(MODEL, DEVICE, CACHE_GB)
CONTEXT = context_length()


def end_with_the_engine() -> None:
    """End the server when its engine has ended, so that whoever started it starts it again."""
    batch.engine.process.wait()
    time.sleep(1)  # Clients get their errors.
    if threading.main_thread().is_alive():
        LOG.error("the engine has ended, and so does the server")
        os._exit(1)


threading.Thread(target=end_with_the_engine, daemon=True).start()


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None

    def as_dict(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, list):
            return {"role": role, "content": "".join(part.text for part in self.content)}
        return {"role": role, "content": self.content or ""}


class Schema(BaseModel):
    schema_: dict[str, Any] = Field(alias="schema")


class Format(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    def schema_of_answer(self) -> str:
        schema = self.json_schema.schema_ if self.json_schema else {"type": "object"}
        return json.dumps(schema)


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Question(BaseModel):
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = Field(None, max_length=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    response_format: Format | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # What cannot be done is refused. Fields that change no text, such as `user`, are ignored.
    n: Literal[1] | None = None
    tools: list | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    functions: list | None = Field(None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: dict | None = Field(None, max_length=0)
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings of `GenerationConfig`. What is not asked for stays the model's own."""
        names = "temperature", "top_p", "frequency_penalty", "presence_penalty"
        settings = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.temperature is not None:
            settings["do_sample"] = self.temperature > 0
        if self.temperature == 0:
            del settings["temperature"]
        settings["rng_seed"] = time.time_ns() if self.seed is None else self.seed % 2**64
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        settings["stop_strings"] = [*batch.engine.stop_strings, *stop]
        if self.response_format and self.response_format.type != "text":
            schema = self.response_format.schema_of_answer()
            settings["structured_output_config"] = {"json_schema": schema}
        return settings | self.length()

    def length(self) -> dict[str, int]:
        """Return where an answer is cut: as asked for, or else at the end of the context."""
        asked = self.max_completion_tokens or self.max_tokens
        if asked is None and CONTEXT:
            return {"max_new_tokens": 2**64 - 1, "max_length": CONTEXT}  # The first one: no limit.
        return {"max_new_tokens": asked or MAX_TOKENS}

    def chunks(self, usage: dict[str, Any]) -> AsyncGenerator[str, None]:
        messages = [message.as_dict() for message in self.messages]
        return batch.stream(messages, usage, self.chat_template_kwargs, **self.settings())


def check_key(request: Request) -> None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    is_right = secrets.compare_digest(key.strip().encode(), API_KEY.encode())
    if API_KEY and not (scheme.lower() == "bearer" and is_right):
        raise HTTPException(401, "The API key is wrong.", {"WWW-Authenticate": "Bearer"})


KEY = [Depends(check_key)]
# Without pages that tell strangers about it, where there is a key.
app = FastAPI(openapi_url=None if API_KEY else "/openapi.json")


def details(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the content of an answer that is an error."""
    status = 400 if isinstance(error, ValueError | MemoryError) else 500
    status = getattr(error, "status_code", status)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    message = str(getattr(error, "detail", error))
    return status, {"error": {"message": message, "type": kind, "param": None, "code": None}}


@app.exception_handler(HTTPException)
@app.exception_handler(ValueError)
@app.exception_handler(MemoryError)
@app.exception_handler(RuntimeError)
def refuse(_: Request, error: Exception) -> JSONResponse:
    status, content = details(error)
    return JSONResponse(content, status, headers=getattr(error, "headers", None))


@app.get("/health")
async def health() -> JSONResponse:
    """For whoever watches the server, without a key."""
    is_dead = bool(batch.engine.epitaph)
    state = {"status": batch.engine.epitaph or "ok", "answers": len(batch.engine.answers)}
    return JSONResponse(state, 503 if is_dead else 200)


@app.get("/v1/models", dependencies=KEY)
async def models() -> dict[str, Any]:
    return {"object": "list", "data": [await model(NAME)]}


@app.get("/v1/models/{name}", dependencies=KEY)
async def model(name: str) -> dict[str, Any]:
    if name != NAME:
        raise HTTPException(404, f"The model is {NAME}.")
    return {"id": NAME, "object": "model", "created": 0, "owned_by": "openvino"}


async def read_question(request: Request) -> Question:
    """Return what a client asks, or refuse it."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # A page of other people may send other types unasked.
        raise HTTPException(415, "Send application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"The body has more than {MAX_BYTES:,} bytes.")
    return Question.model_validate_json(bytes(body))


async def logged(chunks: AsyncGenerator[str, None], usage: dict) -> AsyncGenerator[str, None]:
    """Yield the chunks. Log how the answer ended, and a failure with its traceback."""
    start = time.monotonic()
    ended = "the client left"
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk
        ended = usage["finish_reason"]
    except (ValueError, MemoryError) as error:
        ended = f"refused: {error}"
        raise
    except RuntimeError:
        ended = "failed"
        LOG.exception("an answer failed")
        raise
    finally:
        tokens = f"{usage.get('prompt_tokens', 0)} + {usage.get('completion_tokens', 0)} tokens"
        LOG.info("%s in %.1f s: %s", tokens, time.monotonic() - start, ended)


async def unless_it_leaves(request: Request, answer: Coroutine[Any, Any, str]) -> str:
    """Wait for an answer, or cancel it when its client leaves."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(request.receive())  # The body has been read: it waits.
    try:
        await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else ""
    finally:
        answering.cancel()
        leaving.cancel()


async def first_of(chunks: AsyncGenerator[str, None]) -> str:
    async for chunk in chunks:
        return chunk
    return ""


async def all_of(chunks: AsyncGenerator[str, None]) -> str:
    return "".join([chunk async for chunk in chunks])


@app.post("/v1/chat/completions", dependencies=KEY, response_model=None)
async def complete(request: Request) -> dict[str, Any] | JSONResponse | StreamingResponse:
    try:
        question = await read_question(request)
    except ClientDisconnect:
        return JSONResponse({}, 400)  # Nobody reads it.
    usage: dict[str, Any] = {}
    chunks = logged(question.chunks(usage), usage)
    head = {"id": f"chatcmpl-{secrets.token_hex(8)}", "created": int(time.time()), "model": NAME}
    if question.stream:
        # The first chunk is waited for, so that what is refused has its status.
        first = await unless_it_leaves(request, first_of(chunks))
        events = stream_events(question, chunks, first, head, usage)
        return StreamingResponse(events, media_type="text/event-stream")
    text = await unless_it_leaves(request, all_of(chunks))
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": usage.pop("finish_reason", None)}
    return head | {"object": "chat.completion", "choices": [choice], "usage": usage}


async def stream_events(
    question: Question, chunks: AsyncGenerator[str, None], first: str, head: dict, usage: dict
) -> AsyncIterator[str]:
    """Yield the events of an answer that is streamed."""

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content)}\n\n"

    def choice(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        return event(head | {"choices": choices})

    head["object"] = "chat.completion.chunk"
    yield choice({"role": "assistant", "content": first})
    try:
        async for chunk in chunks:
            yield choice({"content": chunk})
        yield choice({}, usage.pop("finish_reason", "stop"))
        if question.stream_options and question.stream_options.include_usage:
            yield event(head | {"choices": [], "usage": usage})
    except Exception as error:  # noqa: BLE001 - it is too late for a status.
        yield event(details(error)[1])
    yield "data: [DONE]\n\n"
