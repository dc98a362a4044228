"""The work of generation.py done by transformers or llama.cpp, in a Python that has them.

python benchmarks/generation_peers.py generate MODEL DTYPE
python benchmarks/generation_peers.py generate_batch MODEL DTYPE
python benchmarks/generation_peers.py llama.cpp MODEL GGUF_FILE

It answers the lines of JSON that generation.py writes. Imports nothing of this project.
"""

import json
import os
import pathlib
import sys
import time

import numpy as np

THREADS = len(os.sched_getaffinity(0))


class Generate:
    """transformers' `generate`, in batches of so many prompts, which wait for the longest text."""

    def __init__(self, model: str, dtype: str):
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(THREADS)
        self._torch, self._lib = torch, transformers
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype)
        ).eval()

    def _settings(self, number, **more):
        return self._lib.GenerationConfig(
            do_sample=False, max_new_tokens=number, eos_token_id=-1, pad_token_id=0, **more
        )

    def generate(self, prompts, counts, slots):
        found = []
        for first in range(0, len(prompts), slots):
            own = counts[first : first + slots]
            ids = self._torch.tensor(prompts[first : first + slots])
            with self._torch.inference_mode():
                out = self._model.generate(
                    ids,
                    attention_mask=self._torch.ones_like(ids),
                    generation_config=self._settings(max(own)),
                )
            rows = out[:, ids.shape[1] :].tolist()
            found += [row[:count] for row, count in zip(rows, own, strict=True)]
        return found


class GenerateBatch(Generate):
    """transformers' continuous batching, of at most `slots` requests at a time."""

    _manager, _slots = None, 0

    def generate(self, prompts, counts, slots):
        if slots != self._slots:
            self._start(slots)
        names = [
            self._manager.add_request(list(prompt), max_new_tokens=count)
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        found = {}
        while len(found) < len(names):
            result = self._manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(result.error if result else "no result within 60 s")
            if result.is_finished():
                found[result.request_id] = result.generated_tokens
        return [found[name] for name in names]

    def _start(self, slots):
        if self._manager:
            self._manager.stop(block=True)
            self._model.destroy_cached_continuous_batching_manager()
        settings = self._lib.ContinuousBatchingConfig(
            num_blocks=4 * slots, max_requests_per_batch=slots, max_batch_tokens=512
        )
        self._manager = self._model.init_continuous_batching(
            generation_config=self._settings(1), continuous_batching_config=settings
        )
        self._manager.start()
        self._slots = slots


class LlamaCpp:
    """Sequences side by side in one llama_batch, with its own argmax."""

    def __init__(self, model: str, file: str):
        write_gguf(pathlib.Path(model), pathlib.Path(file))
        import llama_cpp

        self._lib = lib = llama_cpp
        lib.llama_log_set(self._silence(), None)
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(
            file.encode(), lib.llama_model_default_params()
        )
        self._vocab = json.loads((pathlib.Path(model) / "config.json").read_text())["vocab_size"]
        self._contexts = {}

    def _silence(self):
        self._callback = self._lib.llama_log_callback(lambda *_: None)
        return self._callback

    def _context(self, slots, length):
        if (slots, length) not in self._contexts:
            params = self._lib.llama_context_default_params()
            params.n_seq_max, params.n_ctx = slots, slots * (-(-length // 256) * 256)
            params.n_batch = params.n_ubatch = 512
            params.n_threads = params.n_threads_batch = THREADS
            self._contexts[slots, length] = self._lib.llama_init_from_model(self._model, params)
        return self._contexts[slots, length]

    def generate(self, prompts, counts, slots):
        if len(prompts) > slots or len({*counts}) > 1:
            raise NotImplementedError("texts of unequal lengths")
        lib, length = self._lib, len(prompts[0]) + counts[0]
        context = self._context(slots, length)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch = lib.llama_batch_init(512, 0, 1)
        pending = [
            (row, place, token, place == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        found = [[] for _ in prompts]
        for step in range(counts[0]):
            for first in range(0, len(pending), 512):
                part = pending[first : first + 512]
                self._decode(context, batch, part, found)
            pending = [
                (row, len(prompt) + step, found[row][-1], True)
                for row, prompt in enumerate(prompts)
            ]
        lib.llama_batch_free(batch)
        return found

    def _decode(self, context, batch, part, found):
        batch.n_tokens = len(part)
        for index, (row, place, token, wanted) in enumerate(part):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = wanted
        if code := self._lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        for index, (row, _, _, wanted) in enumerate(part):
            if wanted:
                logits = self._lib.llama_get_logits_ith(context, index)
                found[row].append(int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax()))


NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def write_gguf(folder: pathlib.Path, file: pathlib.Path) -> None:
    """The model in Q4_0; its embedding and head in Q8_0, as llama-quantize keeps them larger."""
    import gguf
    import safetensors.torch

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(width)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType
    for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        stem = name.removesuffix(".weight").removeprefix("model.")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            own = f"blk.{layer}.{NAMES[part]}.weight"
            if NAMES[part] in ("attn_q", "attn_k"):  # pairs of rotary features are neighbors
                pairs = values.reshape(-1, 2, width // 2, values.shape[1])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
            stored = kind.Q4_0
        else:
            own = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem]
            own, stored = f"{own}.weight", kind.Q8_0
        if values.ndim == 1:
            stored = kind.F32
        writer.add_tensor(own, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(peer) -> None:
    """Answers each line {"prompts", "counts", "slots"} with {"seconds", "tokens"}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        try:
            tokens = peer.generate(**asked)
            answer = {"seconds": time.perf_counter() - start, "tokens": tokens}
        except Exception as error:  # it cannot do this; it can still do others
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


PEERS = {"generate": Generate, "generate_batch": GenerateBatch, "llama.cpp": LlamaCpp}

if __name__ == "__main__":
    serve(PEERS[sys.argv[1]](*sys.argv[2:]))
