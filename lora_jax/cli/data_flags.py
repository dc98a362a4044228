"""The flags of the data: what `train` trains on and `inspect` shows."""

from lora_jax.cli import arguments, model_flags
from lora_jax.training.settings import groups


def add(flags: arguments.Flags) -> None:
    """--dataset, --weights, --dpo, --eval-dataset, --columns, --seq-len, --split-texts,
    --train-on-inputs, --packing, --streaming, --skip-bad-rows, --as-chat, --chat-template,
    --add-special-tokens, --add-tokens, --chat-time."""
    flags.group("data")
    flags.add("--dataset", ".jsonl, .json, .csv, .parquet, .txt, a folder of them or hub id; "
              "examples with text, "
              "prompt/completion, instruction/output or chat messages; several are mixed",
              nargs="+", metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--weights", "share of each data set in the sequences, e.g. 3,1; an epoch keeps its "
              "length (default: each example once an epoch)", metavar="W,W")  # fmt: skip
    flags.switch("--dpo", "train on preferences (DPO): examples with prompt, chosen and rejected, "
                 "as strings or message lists")  # fmt: skip
    flags.add("--eval-dataset", "held-out data (default, with --eval-every: --eval-size of "
              "--dataset)", metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--columns", "map fields to columns with other names, e.g. "
              "prompt=question,completion=answer", nargs="+", metavar="FIELD=COLUMN")  # fmt: skip
    flags.add("--seq-len", f"cut examples after T tokens (default: {groups.SEQ_LEN}, or the "
              "model's context if that is shorter)", type=int, metavar="T")  # fmt: skip
    flags.switch("--split-texts", "cut examples with text into several of T tokens, instead of "
                 "leaving out their ends")  # fmt: skip
    flags.switch("--train-on-inputs", "train prompts and all messages of chats, not the answers "
                 "alone")  # fmt: skip
    flags.switch("--packing", "pack several examples into each sequence of T tokens; attention "
                 "stays within an example; --batch-size counts sequences")  # fmt: skip
    flags.switch("--streaming", "read the data during training, in order, shuffled within "
                 "blocks of a few thousand examples; needs --max-steps")  # fmt: skip
    flags.add("--skip-bad-rows", "skip and report up to N rows that cannot be read or trained on",
              type=int, metavar="N")  # fmt: skip
    flags.switch("--as-chat", "put prompt/completion, instruction/output and preferences of "
                 "strings into the chat template, with system and history")  # fmt: skip
    model_flags.add_chat_template(flags)
    flags.add("--add-special-tokens", "new tokens that separate, such as those of a chat template "
              "that the tokenizer does not have; their embeddings are trained", nargs="+",
              metavar="TOKEN")  # fmt: skip
    flags.add("--add-tokens", "new tokens that are text, such as words; their embeddings are "
              "trained", nargs="+", metavar="TOKEN")  # fmt: skip
    flags.add("--chat-time", "the time that a chat template prints, e.g. 2026-01-31 (default: when "
              "the run starts)", metavar="TIME")  # fmt: skip
