"""A server with a scripted engine."""

import contextlib

import asgi_client
import fake_engine
import pytest
import tiny_tokenizer

from lora_jax import tokenizer
from lora_jax.serving import app, models, server, settings

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | length }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if not loop.last or m.role != 'assistant' or not add_generation_prompt %}_{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    read = tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer")))
    read.chat_template = TEMPLATE
    return read


class Served(asgi_client.Client):
    """A client, the engine that it asks, and the server between them."""

    def __init__(self, engine, limits):
        known = models.Models(engine.pool, "base", engine.context, limits, "models/base")
        self.engine, self.server = engine, server.Server(engine, known, limits)
        super().__init__(app.make(self.server))

    def chat(self, text="ab", headers=None, **fields):
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        return self.post("/v1/chat/completions", headers=headers, messages=messages, **fields)

    def complete(self, prompt="ab", headers=None, **fields):
        return self.post("/v1/completions", headers=headers, prompt=prompt, **fields)


@pytest.fixture
def serve(reader):
    """Makes clients: serve(script, engine's arguments, **limits)."""
    with contextlib.ExitStack() as stack:

        def make(script=None, *, context=64, slots=2, adapters=(), **limits):
            script = script or fake_engine.saying("Hel", "lo")
            engine = fake_engine.Engine(
                reader, script, context=context, slots=slots, adapters=adapters
            )
            engine.start()
            stack.callback(engine.close)
            return stack.enter_context(Served(engine, settings.ServeSettings(**limits)))

        yield make
