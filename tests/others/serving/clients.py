"""Ten lines for each client library: a chat, a stream, a structured answer, a call of a tool.

python clients.py MODEL    # a model with a chat template
"""

import argparse
import asyncio
import enum
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Annotated

import pydantic
import server

ASK = [{"role": "user", "content": "What is the capital of France?"}]


Digit = Annotated[int, pydantic.Field(ge=0, le=9)]


class City(pydantic.BaseModel):
    """A city."""

    name: str = pydantic.Field(max_length=12)
    size: int = pydantic.Field(ge=0, le=99)


class Kind(enum.Enum):
    """How one travels."""

    rail = "rail"
    road = "road"


class Trip(pydantic.BaseModel):
    """A trip: $defs, an enum, an optional field, a list of lists."""

    kind: Kind
    cities: list[City] = pydantic.Field(max_length=2)
    guide: City | None = None
    seats: list[Annotated[list[Digit], pydantic.Field(max_length=2)]] = pydantic.Field(max_length=2)


def litellm_(url):
    import litellm

    ask = {"model": "hosted_vllm/m", "api_base": f"{url}/v1", "api_key": "none", "messages": ASK}
    for provider in ("openai/m", "hosted_vllm/m"):
        ask["model"] = provider
        answer = litellm.completion(**ask, max_tokens=8, temperature=0, top_k=5)
        assert answer.choices[0].message.content and answer.usage.completion_tokens <= 8
        chunks = [*litellm.completion(
            **ask, max_tokens=8, temperature=0, stream=True, logprobs=True, top_logprobs=2
        )]  # fmt: skip
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == answer.choices[0].message.content, (text, answer)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    answer = litellm.completion(**ask, max_tokens=300, response_format=Trip)
    Trip.model_validate_json(answer.choices[0].message.content)
    text = litellm.text_completion(
        model="text-completion-openai/m", api_base=f"{url}/v1", api_key="none", prompt="One two",
        max_tokens=4,
    )  # fmt: skip
    assert text.choices[0].text


def langchain(url):
    import langchain_openai

    model = langchain_openai.ChatOpenAI(
        model="m",
        base_url=f"{url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=300,
        max_retries=0,
    )
    text = model.invoke("What is the capital of France?").content
    streamed = model.stream("What is the capital of France?")
    assert text and "".join(each.content for each in streamed) == text
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(Trip, method=method).invoke("A trip, please.")
        assert isinstance(found, Trip), method
    asked = model.bind_tools([City], tool_choice="any").invoke("A city, please.")
    assert asked.tool_calls[0]["name"] == "City" and asked.tool_calls[0]["args"]["name"]
    legacy = langchain_openai.OpenAI(model="m", base_url=f"{url}/v1", api_key="none", max_tokens=4)
    assert legacy.invoke("One two")


def pydantic_ai_(url):
    import pydantic_ai
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("m", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    settings = {"max_tokens": 300, "temperature": 0}
    agent = pydantic_ai.Agent(model, model_settings=settings)
    assert agent.run_sync("What is the capital of France?").output
    for kind in (pydantic_ai.ToolOutput, pydantic_ai.NativeOutput):
        typed = pydantic_ai.Agent(model, output_type=kind(Trip), model_settings=settings)
        assert isinstance(typed.run_sync("A trip, please.").output, Trip), kind
    called = []
    tools = pydantic_ai.Agent(model, output_type=City, model_settings=settings)

    @tools.tool_plain
    def population(name: str) -> int:
        called.append(name)
        return 7

    # The model must call one of the two; City ends the run.
    limits = pydantic_ai.UsageLimits(request_limit=3)
    try:
        assert isinstance(tools.run_sync("A city, please.", usage_limits=limits).output, City)
    except pydantic_ai.UsageLimitExceeded:
        assert called

    async def streamed():
        async with agent.run_stream("What is the capital of France?") as run:
            return [piece async for piece in run.stream_text(delta=True)]

    assert len(asyncio.run(streamed())) >= 1


def instructor_(url):
    import instructor
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        found = instructor.from_openai(client, mode=mode).chat.completions.create(
            model="m", response_model=Trip, max_tokens=300, max_retries=1, temperature=0,
            messages=[{"role": "user", "content": "By rail to Paris, of size 11."}],
        )  # fmt: skip
        assert isinstance(found, Trip), mode


def llm(url):
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "extra-openai-models.yaml").write_text(json.dumps([
            {"model_id": "mine", "model_name": "m", "api_base": f"{url}/v1"},
            {"model_id": "text", "model_name": "m", "api_base": f"{url}/v1", "completion": True},
        ]))  # fmt: skip
        env = {**os.environ, "LLM_USER_PATH": folder}
        command = [pathlib.Path(sys.executable).with_name("llm"), "-o", "max_tokens", "8",
                   "-o", "temperature", "0"]  # fmt: skip
        for more in (["-m", "mine"], ["-m", "mine", "--no-stream"], ["-m", "text"]):
            said = subprocess.run(
                [*command, *more, "One two three"], env=env, text=True, capture_output=True
            )
            assert said.returncode == 0 and said.stdout.strip(), (more, said.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    flags = ("--context", 2048, "--served-model-name", "m")
    with server.running("--model", parser.parse_args().model, *flags) as url:
        return server.report(url, litellm_, langchain, pydantic_ai_, instructor_, llm)


if __name__ == "__main__":
    sys.exit(main())
