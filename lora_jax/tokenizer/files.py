"""A model folder → its tokenizer. `conversion` reads those that have no tokenizer.json.

Imports no jax. transformers, which takes seconds to import, is imported when a tokenizer is loaded.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
import typing

from lora_jax import errors, extras, hub
from lora_jax.tokenizer import conversion

if typing.TYPE_CHECKING:
    import transformers

# The first that is there is read.
_TOKENIZERS = ("tokenizer.json", *conversion.FILES)
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# The default chat template, and a folder of others by their names.
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_OF_PROCESSOR = "chat_template.json"
# What transformers writes of how a tokenizer was loaded, and its template.
_OF_READER = ("backend", "is_local", "local_files_only", "model_max_length", "chat_template")


def load(
    folder: str | pathlib.Path,
    adapter: str | pathlib.Path | None = None,
    *,
    chat_template: str | None = None,
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of the model in `folder`.

    adapter: the folder of an adapter. If it has a tokenizer or a chat template, which is saved with
    an adapter where it is not the base's, that is used instead.
    chat_template: replaces that of the tokenizer: a Jinja file, the folder or hub id of a model
    that has one, or the template itself.

    tokenizer.json is used as it is, whatever tokenizer_class says: transformers 5.23's
    LlamaTokenizer (AutoTokenizer's choice) rebuilds it and encodes runs of spaces differently from
    the model's own SentencePiece. tokenizer_config.json (add_bos_token, special tokens) and the
    chat template are respected. Without tokenizer.json, another file is converted; see
    `conversion`.

    Raises:
      errors.UserError: the tokenizer is missing or unreadable, or a package that converts it is not
        installed.
    """
    extras.require("transformers", "tokenizers")  # older ones add bos and eos in other ways
    if chat_template is not None:
        templates = _templates_of(chat_template)
        reader = load(folder, adapter)
        _use(reader, templates)
        return reader
    folder = pathlib.Path(folder)
    if adapter is not None:
        own = pathlib.Path(adapter)
        if any((own / name).is_file() for name in _TOKENIZERS):
            return load(own)
        reader = load(folder)
        if templates := _chat_templates(own):
            if "default" not in templates:
                templates = _chat_templates(folder) | templates
            _use(reader, templates)
        return reader
    for name in _TOKENIZERS:
        if (folder / name).is_file():
            hub.refuse_lfs_pointer(folder / name)
    if (folder / "tokenizer.json").is_file():
        return _with_template(_from_json(folder, folder), folder)
    if any((folder / name).is_file() for name in conversion.FILES):
        return _with_template(_converted(folder), folder)
    raise errors.UserError(
        expected="tokenizer.json or tokenizer.model, or vocab.json and merges.txt, or tekken.json",
        found="none of them",
        where=str(folder),
        do="copy the tokenizer files of the base model into the folder",
    )


def save(
    reader: "transformers.PreTrainedTokenizerBase",
    folder: str | pathlib.Path,
    into: str | pathlib.Path,
) -> None:
    """Writes a tokenizer that has more tokens than that of the model in `folder`, with the chat
    templates of that folder."""
    folder, into = pathlib.Path(folder), pathlib.Path(into)
    with tempfile.TemporaryDirectory() as temporary:
        reader.save_pretrained(temporary)
        shutil.copyfile(pathlib.Path(temporary) / "tokenizer.json", into / "tokenizer.json")
        config = read_json(pathlib.Path(temporary) / "tokenizer_config.json")
    config = {name: value for name, value in config.items() if name not in _OF_READER}
    own = read_json(folder / "tokenizer_config.json")
    if "model_max_length" in own:
        config["model_max_length"] = own["model_max_length"]
    # The class that reads tokenizer.json as it is. Its new name is unknown to transformers 4.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path = into / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _write(_chat_templates(folder), into)


def copy(adapter: str | pathlib.Path, into: str | pathlib.Path) -> None:
    """Replaces the files of a model by what `load` takes from an adapter's folder."""
    own, into = pathlib.Path(adapter), pathlib.Path(into)
    if any((own / name).is_file() for name in _TOKENIZERS):
        for name in (*_TOKENIZERS, "merges.txt", *_BESIDE):
            (into / name).unlink(missing_ok=True)
            if (own / name).is_file():
                shutil.copyfile(own / name, into / name)
    _write(_chat_templates(own), into)


def copy_chat_template(source: str | pathlib.Path, into: str | pathlib.Path) -> None:
    """Copies what `load` takes as chat_template into a folder."""
    _write(_templates_of(str(source)), pathlib.Path(into))


def _with_template(
    reader: "transformers.PreTrainedTokenizerBase", folder: pathlib.Path
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer, which has the chat template of a processor if it has none of its own."""
    if not reader.chat_template and (templates := _chat_templates(folder)):
        _use(reader, templates)
    return reader


def _use(reader: "transformers.PreTrainedTokenizerBase", templates: dict[str, str]) -> None:
    only = [*templates] == ["default"]
    reader.chat_template = templates["default"] if only else templates


def _write(templates: dict[str, str], into: pathlib.Path) -> None:
    """Writes chat templates over those of a model or an adapter."""
    if "default" in templates:  # which precedes all that are there
        shutil.rmtree(into / _TEMPLATES, ignore_errors=True)
    for name, source in templates.items():
        path = into / (_TEMPLATE if name == "default" else f"{_TEMPLATES}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")


def _templates_of(source: str) -> dict[str, str]:
    """{name: chat template} of a Jinja file, or of a model's folder or hub id; or the source."""
    if "{{" in source or "{%" in source:  # as it stands in YAML files of axolotl and others
        return {"default": source}
    path = pathlib.Path(source).expanduser()
    if os.path.isfile(path) and path.suffix == ".json":  # tokenizer_config.json
        found = _chat_templates(path.parent)
    elif os.path.isfile(path):
        try:
            found = {"default": path.read_text(encoding="utf-8-sig")}
        except (OSError, ValueError) as error:
            raise errors.UserError(
                expected="a chat template in Jinja", found=str(error), where=source
            ) from error
    elif not os.path.isdir(path) and (
        "/" not in source or hub.looks_like_path(source) or path.suffix in (".jinja", ".json")
    ):
        raise errors.UserError(
            expected="a Jinja file, or the folder or hub id of a model with a chat template",
            found=source,
            where="--chat-template",
            do=errors.similar_path(source)
            or "such as chat_template.jinja, or Qwen/Qwen3-4B-Instruct-2507 for ChatML",
        )
    else:
        found = _chat_templates(hub.tokenizer_folder(source))
    if not any(found.values()):
        raise errors.UserError(
            expected="a chat template", found="none", where=source,
            do="pass the chat variant of the model, or a Jinja file",
        )  # fmt: skip
    return found


def _chat_templates(folder: pathlib.Path) -> dict[str, str]:
    """{name: chat template} of a folder, which may have no tokenizer.

    Files precede tokenizer_config.json, and that the template of a processor. Raises: UserError if
    one cannot be read.
    """
    paths = {path.stem: path for path in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    if (folder / _TEMPLATE).is_file():
        paths["default"] = folder / _TEMPLATE
    try:
        found: typing.Any = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
        for beside in ("tokenizer_config.json", _OF_PROCESSOR):
            found = found or read_json(folder / beside).get("chat_template")
        if isinstance(found, list):
            found = {each["name"]: each["template"] for each in found}
        templates = {"default": found} if isinstance(found, str) else dict(found or {})
        for name, template in templates.items():
            if not isinstance(template, str) or pathlib.PurePath(name).name != name:
                raise TypeError(f"a {type(template).__name__} of the name {name!r}")
        return {name: template for name, template in templates.items() if template}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise errors.UserError(
            expected="a chat template, or several with their names",
            found=f"{type(error).__name__}: {error}",
            where=[f"{folder}/{_TEMPLATE}", f"{folder}/tokenizer_config.json"],
            do="copy the file again",
        ) from error


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file, {} if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise errors.UserError(
            expected="a JSON object",
            found=str(error),
            where=str(path),
            do="copy the file from the base model again",
        ) from error


def _from_json(
    folder: pathlib.Path, origin: pathlib.Path
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer in `folder`/tokenizer.json. origin: the folder that error messages name."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    import transformers

    config = read_json(folder / "tokenizer_config.json")
    # transformers 5 ignores these two if there is a tokenizer.json. Older versions did not, and
    # models were trained with them, so explicit values are passed on.
    explicit = {k: config[k] for k in ("add_bos_token", "add_eos_token") if k in config}
    _chat_templates(origin)  # which raises what is wrong with them
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        # model_max_length has no effect but a warning that the model cannot take longer texts. The
        # model's own limits count, of which many tokenizers do not know.
        return transformers.PreTrainedTokenizerFast.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            model_max_length=sys.maxsize,
            **explicit,
        )
    except Exception as error:  # the Rust library raises bare Exceptions
        raise errors.UserError(
            expected="a tokenizer in the tokenizers library's format",
            found=f"{type(error).__name__}: {error}",
            where=str(origin),
            do="copy the tokenizer files of the base model again",
        ) from error
    finally:
        transformers.logging.set_verbosity(before)


def _converted(folder: pathlib.Path) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of a folder without tokenizer.json, from the other files that it may have."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = pathlib.Path(temporary)
        for name in (*_BESIDE, _TEMPLATE):
            if (folder / name).is_file():
                shutil.copy(folder / name, copy / name)
        if (folder / _TEMPLATES).is_dir():
            shutil.copytree(folder / _TEMPLATES, copy / _TEMPLATES)
        backend, settings = conversion.convert(folder)
        backend.save(str(copy / "tokenizer.json"))
        path = copy / "tokenizer_config.json"
        path.write_text(json.dumps(settings | read_json(path)), encoding="utf-8")
        return _from_json(copy, folder)
