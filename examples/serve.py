"""A server for many people at once, which any client of OpenAI's chat completions connects to.

pip install fastapi uvicorn
uvicorn --app-dir examples serve:app --timeout-graceful-shutdown 2
"""

import asyncio
import json
import os
import secrets
import time
from typing import Literal

from batch import Batch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

MODEL = os.environ.get("MODEL", "tests/models/tiny-llama")
MAX_TOKENS = 4096
MAX_BYTES = 100_000

batch = Batch(MODEL)
NAME = os.path.basename(MODEL)


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    def text(self):
        return "".join(part.text if isinstance(part, Part) else part for part in self.content)


class Question(BaseModel):  # Other fields are ignored.
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = Field(None, max_length=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    n: Literal[1] | None = 1
    tools: list | None = Field(None, max_length=0)

    def start(self, usage):
        """Return the chunks of the answer."""
        config = batch.pipe.get_config()
        config.update_generation_config(**self.model_dump(exclude_none=True))  # What it knows.
        config.do_sample = config.do_sample if self.temperature is None else self.temperature > 0
        config.max_new_tokens = self.max_completion_tokens or self.max_tokens or 500
        config.rng_seed = time.time_ns() if self.seed is None else self.seed
        config.stop_strings |= {self.stop} if isinstance(self.stop, str) else set(self.stop or [])
        messages = [{"role": each.role, "content": each.text()} for each in self.messages]
        return batch.stream(messages, config, usage)


def check_key(request: Request):
    key, given = os.environ.get("API_KEY", ""), request.headers.get("authorization", "")
    if key and not secrets.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise HTTPException(401, "The API key is wrong.")


app = FastAPI(dependencies=[Depends(check_key)])


@app.exception_handler(HTTPException)
@app.exception_handler(MemoryError)
@app.exception_handler(Exception)
def refuse(_, error):
    status = getattr(error, "status_code", 400 if isinstance(error, MemoryError) else 500)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    details = {"message": getattr(error, "detail", str(error)), "type": kind}
    return JSONResponse({"error": details | {"param": None, "code": None}}, status)


async def unless_it_leaves(request, answer):
    """Wait for it, or cancel it when the client leaves."""
    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(request.receive())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else ""
    finally:
        [task.cancel() for task in tasks]


async def join(chunks):
    return "".join([chunk async for chunk in chunks])


def event(content):
    return f"data: {json.dumps(content)}\n\n"


@app.get("/v1/models")
async def models():
    model = {"id": NAME, "object": "model", "created": 0, "owned_by": "openvino"}
    return {"object": "list", "data": [model]}


@app.post("/v1/chat/completions")
async def complete(request: Request):
    if int(request.headers.get("content-length", MAX_BYTES + 1)) > MAX_BYTES:
        raise HTTPException(400, f"The body has no length, or more than {MAX_BYTES:,} bytes.")
    usage: dict = {}
    try:
        question = Question.model_validate_json(await request.body())
        chunks = question.start(usage)
    except (ValueError, RuntimeError) as error:
        raise HTTPException(400, str(error).strip()) from error
    head = {"id": f"chatcmpl-{secrets.token_hex(8)}", "created": int(time.time()), "model": NAME}
    head["object"] = "chat.completion" + ".chunk" * question.stream

    def form(reason=None, **content):
        return head | {"choices": [{"index": 0, "finish_reason": reason} | content]}

    text = await unless_it_leaves(request, anext(chunks, "") if question.stream else join(chunks))
    first = {"role": "assistant", "content": text}
    if not question.stream:
        return form(usage.pop("finish_reason", None), message=first) | {"usage": usage}

    async def events():
        yield event(form(delta=first))
        try:
            async for chunk in chunks:
                yield event(form(delta={"content": chunk}))
            yield event(form(usage.pop("finish_reason"), delta={}))
            if (question.stream_options or {}).get("include_usage"):
                yield event(head | {"choices": [], "usage": usage})
        except Exception as error:  # noqa: BLE001 - it is too late for a status.
            yield event(json.loads(bytes(refuse(request, error).body)))
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")
