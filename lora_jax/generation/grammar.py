"""Grammars that a text must follow, and which tokens they allow next. Imports no jax.

llguidance does the work. A grammar is a text, so that it can be part of a request's settings:
config.Sampling(grammar=grammar.json_schema({"type": "object"})).
"""

import functools
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lora_jax import errors
from lora_jax.generation import schemas

if typing.TYPE_CHECKING:
    import llguidance

# Between the parts of JSON. Without a bound, a small model may write spaces until its text is cut.
_SPACES = r"[ \n\r\t]{1,40}"
# Limits of the parser's work. It takes a step for each character, whose time grows with the square
# of its items if rules are ambiguous, and no other Python thread can run meanwhile: with 500, a
# token takes up to 12 ms, with llguidance's 2,000 up to 180 ms. Unambiguous rules need one or two
# for each alternative. JSON schemas need four for each optional property, and are hardly ambiguous:
# with 2,000, a token takes up to 4 ms.
_MOST_IN_STEP, _MOST_OF_SCHEMAS = 500, 2_000
# For the mask of a token, during which other threads can run. Grammars that people write need below
# 1,000 with 49,000 tokens, also with a rule for each character; llguidance's own limit is 50,000.
_MOST_IN_MASK = 20_000
_MOST_COMPILED = 32  # grammars kept, each with its automaton
_MOST_CHARACTERS = 1_000_000


def json_schema(schema: Any, *, lenient: bool = False) -> str:
    """The grammar of JSON that is valid by `schema`: an object, true or false.

    Objects have only the properties that their schema lists, unless `additionalProperties` says
    that they may have others.
    lenient: keywords that cannot be enforced, such as `uniqueItems` or `not`, have no effect, and
    `oneOf` means `anyOf`. Otherwise they are an error when the grammar is compiled.
    """
    return _checked(f'{{"grammars": [{{"json_schema": {schema_text(schema, lenient=lenient)}}}]}}')


def schema_text(schema: Any, *, lenient: bool = False) -> str:
    """A schema as llguidance takes it, such as after %json in a grammar of `lark`."""
    if not isinstance(schema, Mapping | bool):
        raise errors.UserError(
            expected="a JSON schema: an object, true or false", found=_shown(schema)
        )
    options: dict[str, Any] = {"whitespace_pattern": _SPACES}
    if lenient:
        options |= {"lenient": True, "coerce_one_of": True}
    try:
        known = schemas.followable(schema, _is_beyond if lenient else lambda _: False)
        if isinstance(known, bool):  # options need an object
            known = {} if known else {"type": []}
        own = known.get("x-guidance")
        known["x-guidance"] = (dict(own) if isinstance(own, Mapping) else {}) | options
        return json.dumps(known, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.UserError(expected="a JSON schema", found=str(error)) from None


def json_object() -> str:
    """The grammar of any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> str:
    """The grammar of texts that the whole pattern matches, as re.fullmatch does.

    The syntax is that of Rust's crate regex: no references back, no looking around. \\d is 0 to 9.
    """
    inside = _library().regex_to_lark(_checked(pattern), "d")
    return lark(f"start: /{inside}/" if inside else 'start: ""')


def lark(grammar: str) -> str:
    """The grammar in llguidance's form of Lark's syntax; its first rule is `start`."""
    if not grammar.strip():
        raise errors.UserError(expected="a grammar with a rule `start`", found=_shown(grammar))
    return json.dumps({"grammars": [{"lark_grammar": _checked(grammar)}]})


def choice(texts: Sequence[str]) -> str:
    """The grammar of these texts alone."""
    if isinstance(texts, str) or not texts:
        raise errors.UserError(expected="a list of texts to choose from", found=_shown(texts))
    options = " | ".join(map(quoted, dict.fromkeys(texts)))
    return lark(f"start: TEXT\nTEXT: {options}")  # a rule could not have thousands of them


def quoted(text: str) -> str:
    """A text as it is written in a grammar of `lark`."""
    return json.dumps(text, ensure_ascii=False)


class Grammar:
    """Compiles grammars for a tokenizer; the last few are kept.

    reader: the tokenizer. num_tokens: the rows of the model's head. Ids beyond the tokenizer's
    vocabulary, with which heads are padded, are never allowed. eos_ids: allowed where a text may
    end.
    Raises: UserError if llguidance is not installed, or does not know this kind of tokenizer.
    """

    def __init__(
        self,
        reader: Any,
        num_tokens: int,
        eos_ids: Collection[int],
    ):
        library = _library()
        size = max(num_tokens, len(reader))
        try:
            self._tokenizer = library.LLTokenizer(
                reader.backend_tokenizer.to_str(),
                n_vocab=size,
                eos_token=sorted({each for each in eos_ids if each < size}),
            )
        except Exception as error:  # the Rust library raises bare Exceptions
            raise errors.UserError(
                expected="a tokenizer that llguidance can read: byte-level BPE, or SentencePiece "
                "with byte fallback",
                found=str(error),
                where=str(reader.name_or_path),
                do="ask for text without a grammar",
            ) from error
        self._num_tokens, self._is_cut = num_tokens, size > num_tokens
        self._compiled = functools.lru_cache(maxsize=_MOST_COMPILED)(self._compile)

    def matcher(self, grammar: str) -> "Matcher":
        """A matcher at the beginning of a text. Compiling takes milliseconds, of the largest
        grammars a second; another thread can run in the meantime.

        Raises: UserError if the grammar has an error, is too large, or has no text.
        """
        return Matcher(self._compiled(grammar).deep_copy(), self._num_tokens, self._is_cut)

    def _compile(self, grammar: str) -> "llguidance.LLMatcher":
        library = _library()
        has_schema = re.search(r'"json_schema": |%json\b', grammar)
        limits = library.LLParserLimits(
            max_lexer_states=50_000,
            max_items_in_row=_MOST_OF_SCHEMAS if has_schema else _MOST_IN_STEP,
            step_max_items=_MOST_IN_MASK,
            verbose_errors=False,
        )
        made = library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if not made.is_error():
            first = made.deep_copy()
            first.compute_bitmask()
            if not first.is_error() and (first.is_accepting() or not first.is_stopped()):
                return made
            made = first
        raise errors.UserError(
            expected="a grammar that llguidance can compile", found=_reason(made), where="grammar"
        )


class Matcher:
    """A grammar at a place in a text: which tokens may come next."""

    def __init__(self, matcher: "llguidance.LLMatcher", num_tokens: int, is_cut: bool):
        self._matcher, self._num_tokens, self._is_cut = matcher, num_tokens, is_cut

    def mask(self, out: Int[np.ndarray, " words"]) -> None:
        """Writes bit i % 32 of out[i // 32] for each token i: 1 where it is allowed.

        out: int32 [⌈num_tokens / 32⌉], such as a row of the batch's masks.
        Raises: UserError if the grammar is too complex here, or no token of the vocabulary fits.
        """
        if out.dtype != np.int32 or out.shape != (-(-self._num_tokens // 32),):
            raise ValueError(f"a mask of int32 is expected, and this is {out.dtype}{out.shape}")
        if self._is_cut or not out.flags.c_contiguous:
            whole = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
            out[:] = whole[: len(out)]
            if rest := self._num_tokens % 32:
                out[-1] &= (1 << rest) - 1
        else:
            self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        stuck = self._matcher.is_stopped() and not self._matcher.is_accepting()
        if self._matcher.is_error() or stuck or not out.any():
            raise errors.UserError(
                expected="a grammar that can be continued with the model's tokens",
                found=_reason(self._matcher),
                where="grammar",
            )

    def accept(self, token: int) -> bool:
        """Moves on by a token, an EOS included; False if the grammar does not allow it here."""
        return bool(self._matcher.consume_token(token))

    @property
    def finished(self) -> bool:
        """Whether the text is complete, and nothing can follow but EOS."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise errors.UserError(
            expected="the package llguidance, which grammars need",
            found="not installed",
            do='pip install "lora-jax[serve]"',
        ) from None
    return llguidance


@functools.lru_cache(maxsize=1024)
def _is_beyond(pattern: str) -> bool:
    """Whether llguidance does not support a pattern, such as one that looks ahead."""
    schema = {"type": "string", "pattern": pattern}
    grammar = json.dumps({"grammars": [{"json_schema": schema}]})
    return "not supported" in _library().LLMatcher.validate_grammar(grammar)


def _checked(grammar: str) -> str:
    if len(grammar) > _MOST_CHARACTERS:
        raise errors.UserError(
            expected=f"a grammar of at most {_MOST_CHARACTERS} characters", found=str(len(grammar))
        )
    if any("\ud800" <= each <= "\udfff" for each in grammar):
        raise errors.UserError(expected="a grammar in UTF-8", found="half a surrogate pair")
    return grammar


def _shown(given: object) -> str:
    return repr(given)[:100]


def _reason(matcher: "llguidance.LLMatcher") -> str:
    """llguidance's message, without the state of its parser."""
    text = matcher.get_error() or f"no text follows it ({matcher.stop_reason()})"
    return text.partition("\n<")[0].strip()[:500]
