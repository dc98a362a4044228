"""A Hugging Face hub on 127.0.0.1, and a tiny model laid out as huggyllama/llama-7b to serve.

    with hub_server.serve({"huggyllama/llama-7b": hub_server.llama_7b(folder)}) as server:
        subprocess.run(command, env=server.environment(home))
        server.requested("GET")  # the names of the files that were downloaded

It speaks the part of the hub's interface that huggingface_hub's snapshot_download uses.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import re
import threading
from collections.abc import Iterator

import numpy as np
import safetensors.numpy
import tiny_tokenizer

COMMIT = "8416d3fefb0cb3ff5775a7b13c1692d10ff1aa16"


@dataclasses.dataclass
class Server:
    """repos: {id: folder}; ids in `gated` refuse every access."""

    repos: dict[str, pathlib.Path]
    gated: frozenset[str]
    url: str = ""
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def environment(self, home: pathlib.Path) -> dict[str, str]:
        """os.environ with this hub as the hub, and an empty cache and no token in `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        kept = {k: v for k, v in kept.items() if not k.lower().endswith("_proxy")}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home)}

    def requested(self, method: str) -> list[str]:
        """Names of the files asked for by `method`, in order."""
        found = (re.match(r"/.+/resolve/[^/]+/(.+)", p) for m, p in self.requests if m == method)
        return [match.group(1) for match in found if match]


@contextlib.contextmanager
def serve(repos: dict[str, pathlib.Path], gated: tuple[str, ...] = ()) -> Iterator[Server]:
    server = Server(repos, frozenset(gated))

    class Handler(_Handler):
        hub = server

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(*self._find())

    def do_GET(self):
        self._answer(*self._find())

    def log_message(self, *_):
        pass

    def _find(self) -> tuple[int, dict[str, str], bytes]:
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path))
        api = re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/(.+))?", path
        )
        file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (api or file):
            return _error(404, "EntryNotFound")
        repo, revision = (api.group(1), api.group(3) or "main") if api else file.group(1, 2)
        if repo in self.hub.gated:
            return _error(403, "GatedRepo")
        if repo not in self.hub.repos:
            # The hub answers so to anonymous users, to not tell which private names exist.
            return _error(401, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return _error(404, "RevisionNotFound")
        folder = self.hub.repos[repo]
        if file:
            path = folder / file.group(3)
            if not path.is_file():
                return _error(404, "EntryNotFound")
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            return 200, {**headers, "X-Linked-Size": str(len(content))}, content
        under = folder / (api.group(4) or "")
        if not under.is_dir():
            return _error(404, "EntryNotFound")
        pattern = "*" if "recursive=false" in self.path else "**/*"
        paths = sorted(p for p in under.glob(pattern) if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in paths]
        if api.group(2) != "tree":
            answer = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        else:
            answer = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40}
                for n, p in zip(names, paths, strict=True)
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b""


def llama_7b(folder: pathlib.Path) -> pathlib.Path:
    """Writes the files of huggyllama/llama-7b, with 2 narrow layers of random weights: float16
    shards with an index (inv_freq among the tensors), pickles beside them, a config of its age."""
    hidden, ffn, heads, layers, vocab = 64, 176, 4, 2, tiny_tokenizer.VOCAB_SIZE
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (0.05 * rng.standard_normal(shape)).astype(np.float16)

    head_dim = hidden // heads
    inv_freq = 1 / 10000 ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    ones = np.ones(hidden, np.float16)
    shards: list[dict[str, np.ndarray]] = [{"model.embed_tokens.weight": matrix(vocab, hidden)}, {}]
    for i in range(layers):
        layer = shards[i * len(shards) // layers]
        at = f"model.layers.{i}"
        for name in "qkvo":
            layer[f"{at}.self_attn.{name}_proj.weight"] = matrix(hidden, hidden)
        layer[f"{at}.self_attn.rotary_emb.inv_freq"] = inv_freq
        layer[f"{at}.mlp.gate_proj.weight"] = matrix(ffn, hidden)
        layer[f"{at}.mlp.up_proj.weight"] = matrix(ffn, hidden)
        layer[f"{at}.mlp.down_proj.weight"] = matrix(hidden, ffn)
        layer[f"{at}.input_layernorm.weight"] = ones
        layer[f"{at}.post_attention_layernorm.weight"] = ones
    shards[-1]["model.norm.weight"] = ones
    shards[-1]["lm_head.weight"] = matrix(vocab, hidden)

    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors.numpy.save_file(shard, folder / name, metadata={"format": "pt"})
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in shard.values())
        index["weight_map"] |= dict.fromkeys(shard, name)
        pickle = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        (folder / pickle).write_bytes(b"a pickle that nobody may ask for")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
        "max_sequence_length": 2048,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.28.0.dev0",
        "use_cache": True,
        "vocab_size": vocab,
    }
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    for name, content in (
        ("model.safetensors.index.json", index),
        ("pytorch_model.bin.index.json", index),
        ("config.json", config),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content))
    tiny_tokenizer.save(folder)
    (folder / "README.md").write_text("# LLaMA-7B\n")
    for other in ("original", "tokenizer", "additional_chat_templates"):
        (folder / other).mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("not the tokenizer")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "original" / "consolidated.00.pth").write_bytes(b"another pickle")
    (folder / "original" / "tokenizer.model").write_bytes(b"not the tokenizer")
    return folder
