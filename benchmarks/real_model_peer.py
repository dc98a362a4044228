"""What real_model.py compares with, by transformers and PEFT: JSON in, a line of JSON out.

Needs torch, transformers and peft, not jax.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
import peft
import torch
import transformers


def loaded(folder: str, adapter: str = "", *, trainable: bool = False) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    return model


def begin(case: dict[str, Any]) -> None:
    """Writes a new adapter on all linear layers, and the base in float32."""
    torch.manual_seed(0)
    model = loaded(case["model"])
    model.save_pretrained(case["base"])
    transformers.AutoTokenizer.from_pretrained(case["model"]).save_pretrained(case["base"])
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    settings.task_type = "CAUSAL_LM"
    peft.get_peft_model(model, settings).save_pretrained(case["adapter"])


def losses(case: dict[str, Any]) -> list[float]:
    """The loss of each step, on the same batches with the same learning rates."""
    model = loaded(case["base"], case["initial"], trainable=True)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    batches, found = np.load(case["batches"]), []
    for n, rate in enumerate(case["rates"]):
        batch = {name: torch.from_numpy(batches[name][n]).long() for name in batches.files}
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        found.append(loss.item())
    return found


@torch.no_grad()
def outputs(model: torch.nn.Module, case: dict[str, Any]) -> tuple[np.ndarray, list[list[int]]]:
    """(logits of one sequence, greedy continuations of the prompts)."""
    model.eval()
    logits = model(torch.tensor([case["ids"]])).logits[0].numpy()
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=case["new"], eos_token_id=case["stop"], pad_token_id=0
    )
    prompts = (torch.tensor([ids]) for ids in case["prompts"])
    texts = [
        model.generate(ids, generation_config=settings)[0, ids.shape[1] :].tolist()
        for ids in prompts
    ]
    return logits, texts


def rounded_merge_differs(merged: torch.nn.Module, folder: str) -> int:
    """How many weights of a folder are not those of `merged` in the folder's dtype."""
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    theirs = merged.state_dict()
    return sum(int((theirs[name].to(own[name].dtype) != own[name]).sum()) for name in own)


def ids(case: dict[str, Any]) -> list[list[int]]:
    """The token ids of each row, as transformers gives them."""
    reader = transformers.AutoTokenizer.from_pretrained(case["model"])
    rows = map(json.loads, pathlib.Path(case["rows"]).read_text().splitlines())
    return [
        reader.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        if "messages" in row
        else [*reader(row["prompt"] + row["completion"]).input_ids, reader.eos_token_id]
        for row in rows
    ]


def compare(case: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"ids": ids(case), "losses": losses(case)}
    model = loaded(case["base"], case["trained"])
    adapted, _ = outputs(model, case)
    merged = model.merge_and_unload()
    logits, result["texts"] = outputs(merged, case)
    np.savez(case["logits"], adapted=adapted, merged=logits)
    result["rounded"] = rounded_merge_differs(merged, case["published"])
    return result


def main() -> None:
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    case = json.loads(sys.argv[1])
    print(json.dumps(compare(case) if "losses" in case["what"] else begin(case)))


if __name__ == "__main__":
    main()
