"""A client of a server with its engine, and a chat template."""

import asgi_client

from lora_jax.serving import app, models, server

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | length }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if not loop.last or m.role != 'assistant' or not add_generation_prompt %}_{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
