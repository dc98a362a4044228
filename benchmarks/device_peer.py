"""PEFT and bitsandbytes in the cases of device.py: JSON in, a line of JSON out.

Needs torch, transformers, peft and bitsandbytes, not jax.
"""

import functools
import importlib.metadata
import json
import statistics
import sys
import time
from typing import Any

import device_cases
import device_record

ALL_LINEAR = "all-linear"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def load(case: device_cases.Train | device_cases.Decode, torch, device: str):
    """A random model with adapters, built layer by layer: it is never dense as a whole."""
    import peft
    import transformers

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
    sizes = dict(zip(names, device_cases.MODELS[case.model], strict=True))
    settings = transformers.LlamaConfig(**sizes, eos_token_id=None, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            new = linear(torch, module.in_features, module.out_features, case.quant).to(device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                value = torch.empty_like(value, device=device).normal_(std=0.02)
                setattr(module, name, torch.nn.Parameter(value if value.ndim > 1 else value + 1))
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)
    rank, targets = getattr(case, "rank", 8), getattr(case, "targets", device_cases.QV)
    targets = targets if targets == ALL_LINEAR else list(targets)
    adapters = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=targets)
    return peft.get_peft_model(model, adapters)


def linear(torch, k: int, n: int, quant: str):
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type=quant, compress_statistics=False
    )
    torch.nn.init.normal_(layer.weight.data, std=0.02)
    return layer.to(torch.bfloat16)


class Clock:
    """Times calls on a device that computes asynchronously."""

    def __init__(self, torch, device: str):
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.least = 8.0 if device == "cuda" else 0.1

    def times(self, call, warm: int = 2) -> list[float]:
        """Seconds of each call after `warm` others: at least 3, until `least` seconds are over."""
        found: list[float] = []
        while len(found) < warm + 3 or (sum(found) < self.least and len(found) < 20):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - start)
        return found[warm:]


def train(case: device_cases.Train, torch, device: str) -> dict[str, Any]:
    model = load(case, torch, device)
    model.train()
    if case.remat == "full":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    vocab = device_cases.MODELS[case.model][0]
    ids = torch.randint(vocab, (case.rows, case.length), device=device)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = Clock(torch, device).times(step)
    median = statistics.median(times)
    return {"seconds": median, "number": len(times), "tokens_per_second": case.tokens / median}


def decode(case: device_cases.Decode, torch, device: str) -> dict[str, Any]:
    """The difference of a long and a short generation, so that the prompts do not count."""
    model = load(case, torch, device)
    model.eval()
    vocab = device_cases.MODELS[case.model][0]
    ids = torch.randint(vocab, (case.rows, case.prompt), device=device)
    run = functools.partial(
        model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False
    )
    clock = Clock(torch, device)
    short, long = (
        statistics.median(
            clock.times(functools.partial(run, min_new_tokens=new, max_new_tokens=new), warm=1)
        )
        for new in (1, 1 + case.new)
    )
    taken = (long - short) / case.new
    return {"seconds": taken, "number": 3 * case.new, "tokens_per_second": case.rows / taken}


def matmul(case: device_cases.Matmul, torch, device: str) -> dict[str, Any]:
    found = []
    clock = Clock(torch, device)
    clock.least = min(clock.least, 0.3)
    for rows in case.rows:
        count = max(2, int(case.weights / (case.k * case.n / 2))) if rows <= 64 else 2
        layers = [linear(torch, case.k, case.n, case.quant).to(device) for _ in range(count)]
        x = torch.randn(rows, case.k, dtype=torch.bfloat16, device=device)
        with torch.inference_mode():
            times = clock.times(functools.partial(_each, layers, x))
        taken = statistics.median(times) / count
        found.append({"rows": rows, "form": "bitsandbytes", "seconds": taken})
    return {"products": found}


def _each(layers, x) -> None:
    for layer in layers:
        layer(x)


def measure(case: device_cases.Case, *, anywhere: bool) -> dict[str, Any]:
    """anywhere: also without a GPU."""
    try:
        import bitsandbytes
        import peft
        import torch
    except ImportError as error:
        return {"status": device_record.UNAVAILABLE, "reason": str(error)}
    del bitsandbytes, peft
    if not torch.cuda.is_available() and not anywhere:
        return {"status": device_record.UNAVAILABLE, "reason": "torch sees no GPU"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = {device_cases.Train: train, device_cases.Decode: decode, device_cases.Matmul: matmul}
    try:
        found = run[type(case)](case, torch, device)
    except torch.OutOfMemoryError as error:
        return {"status": device_record.TOO_LARGE, "reason": str(error).split(".")[0]}
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"status": device_record.MEASURED, **found, "peak_bytes": peak, "versions": versions}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(measure(device_cases.read(asked["case"]), anywhere=asked["anywhere"])))
