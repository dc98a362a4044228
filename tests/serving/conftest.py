"""A server with a scripted engine."""

import contextlib

import fake_engine
import pytest
import served
import tiny_tokenizer

from lora_jax import tokenizer
from lora_jax.serving import settings


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    read = tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer")))
    read.chat_template = served.TEMPLATE
    return read


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
            return stack.enter_context(served.Served(engine, settings.ServeSettings(**limits)))

        yield make
