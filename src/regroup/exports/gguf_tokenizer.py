"""A tokenizer in GGUF's terms. llama.cpp picks one of its own tokenizers by name; what it lacks is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, pre_tokenizers

from ..errors import RegroupError
from .pretokenizers import PRE_TOKENIZERS, recognise


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model, pre: llama.cpp's tokenizer (``"llama"`` is SentencePiece's, ``"gpt2"`` byte-level BPE) and how it splits
            text first.
        tokens, types: by token id, the vocabulary filled up to the size of the embedding.
        scores: by token id, for ``"llama"``: a token that is merged earlier scores higher.
        merges: for ``"gpt2"``.
        special: such as ``{"bos": 1}``.
        add_bos, add_eos, add_space_prefix: what an encoded text begins and ends with.
        chat_template: or None.
        differences: in what llama.cpp's tokenizer of this name is known to differ, in words.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = True
    chat_template: str | None = None
    differences: tuple[str, ...] = ()

    def predicted(self, tokenizer: Any) -> Tokenizer:
        """The tokenizer that was described, with llama.cpp's way to cut text in place of its own."""
        made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        if self.model == "gpt2":
            row = PRE_TOKENIZERS[self.pre]
            made.pre_tokenizer = row.build()
            if not row.raw:
                made.normalizer = None
        made.no_truncation()
        made.no_padding()
        return made

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for kind, number in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.model == "llama":
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Describe a transformers tokenizer to llama.cpp.

    Args:
        tokenizer: a fast tokenizer.
        size: rows of the embedding.

    Raises:
        RegroupError: it is of a kind that llama.cpp does not have, or splits text in a way that it does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("a tokenizer of the tokenizers library", type(tokenizer).__name__)
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise _refused("a BPE tokenizer", model["type"])
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise _refused(f"at most {size} tokens, as the embedding has rows", max(ids.values()) + 1)
    added = {token["id"]: token for token in data["added_tokens"]}
    if model.get("dropout"):
        raise _refused("the same ids for the same text each time", f"dropout {model['dropout']}")
    tokens = [_filler(number, ids) for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, number in ids.items():
        tokens[number] = token
        types[number] = int(_type(token, added.get(number), model))
    begin, end = _ends(tokenizer)
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": _special(tokenizer),
        "add_bos": begin,
        "add_eos": end,
        "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    }
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    differences = [*_strips(added.values())]
    raw = None
    if model["byte_fallback"]:
        raw = recognise(backend.pre_tokenizer, ignore_merges=bool(model.get("ignore_merges")), raw=True)
    if raw is not None:
        _check_raw(data, raw[0].name)
        spelled = [" ".join(pair) for pair in merges]
        return Vocabulary("gpt2", raw[0].name, merges=spelled, differences=tuple(differences), **common)
    if model["byte_fallback"]:
        scores = [0.0] * size
        for rank, (left, right) in enumerate(merges):
            number = ids.get(left + right)
            if number is not None and scores[number] == 0.0:
                scores[number] = -float(rank + 1)
        prefix = _prefixes(data)
        if prefix and any(step.get("prepend_scheme") == "first" for step in _all_steps(data)):
            differences.append("puts a space in front of text after a special token")
        common["differences"] = tuple(differences)
        return Vocabulary("llama", "default", scores=scores, add_space_prefix=prefix, **common)
    name, exact = _pre(data, backend)
    if not exact:
        differences.append(
            f"cuts some words elsewhere under the name {name}, as in languages with accents or no spaces"
        )
    if any(step["type"] == "NFC" for step in _steps(data.get("normalizer"))):
        differences.append("does not compose characters (NFC) first")
    _check_bytes(model, ids)
    spelled = [" ".join(pair) for pair in merges]
    return Vocabulary("gpt2", name, merges=spelled, differences=tuple(differences), **common)


def _filler(number: int, ids: dict[str, int]) -> str:
    """A name for a row of the embedding that no token has; names must differ."""
    name = f"[PAD{number}]"
    while name in ids:
        name = f"[{name}]"
    return name


def _strips(added: Any) -> Iterator[str]:
    """llama.cpp takes special tokens as they stand."""
    odd = [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if odd:
        yield f"keeps the spaces around {', '.join(odd[:3])}{' and others' if len(odd) > 3 else ''}"


def _check_bytes(model: dict[str, Any], ids: dict[str, int]) -> None:
    """What no token spells is left out by llama.cpp."""
    missing = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in ids]
    if missing and model.get("unk_token") is not None:
        raise _refused(f"a token for each byte, or none for what is unknown ({model['unk_token']})",
                       f"no token for {len(missing)} bytes")  # fmt: skip


def _check_raw(data: dict[str, Any], name: str) -> None:
    """Tokens of plain text stand for themselves, with ▁ for a space."""
    steps = list(_steps(data.get("normalizer")))
    if [step["type"] for step in steps] != ["Replace"] or steps[0].get("content") != "▁":
        raise _refused(f"spaces that are replaced by ▁, as llama.cpp's {name} does", [step["type"] for step in steps])


def _type(token: str, added: dict[str, Any] | None, model: dict[str, Any]) -> TokenType:
    if token == model.get("unk_token"):
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if model["byte_fallback"] and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _special(tokenizer: Any) -> dict[str, int]:
    found = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")}
    return {kind: number for kind, number in found.items() if isinstance(number, int)}


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether encoding a text puts a begin and an end of sequence around it."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    begin = whole[0] == tokenizer.bos_token_id and plain[:1] != whole[:1]
    end = whole[-1] == tokenizer.eos_token_id and plain[-1:] != whole[-1:]
    if len(whole) != len(plain) + begin + end:
        raise _refused("at most a begin and an end of sequence around a text", whole)
    return begin, end


def _prefixes(data: dict[str, Any]) -> bool:
    """Whether a text gets a space in front, as SentencePiece puts one."""
    steps = _all_steps(data)
    known = {"Prepend", "Replace", "Metaspace"}
    if unknown := [step["type"] for step in steps if step["type"] not in known]:
        raise _refused("SentencePiece's way with spaces alone", ", ".join(unknown))
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _pre(data: dict[str, Any], backend: Any) -> tuple[str, bool]:
    """llama.cpp's name for the way in which byte-level BPE cuts text, and whether llama.cpp cuts it so everywhere."""
    normalizers = [step["type"] for step in _steps(data.get("normalizer"))]
    # Nearly every text is composed already (NFC), and there is no word in GGUF for it.
    if unknown := [name for name in normalizers if name != "NFC"]:
        raise _refused("text that is not changed before it is split", ", ".join(unknown))
    if affixes := [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if data["model"].get(name)]:
        raise _refused("tokens without affixes", ", ".join(affixes))
    steps = list(_steps(data.get("pre_tokenizer")))
    if any(step.get("add_prefix_space") for step in steps):
        raise _refused("byte-level BPE without a space in front of a text", "add_prefix_space")
    ignores = bool(data["model"].get("ignore_merges"))
    found = recognise(backend.pre_tokenizer, ignore_merges=ignores)
    if found is not None:
        return found[0].name, found[1]
    other = recognise(backend.pre_tokenizer, ignore_merges=not ignores)
    if other is not None:
        how = "merged step by step" if ignores else "taken whole before any merge"
        raise _refused(f"words that are {how}, as llama.cpp's {other[0].name} does", f"ignore_merges: {ignores}")
    raise _refused("a way to cut text that llama.cpp has a name for", _described(steps))


def _described(steps: list[dict[str, Any]]) -> str:
    """A pre-tokenizer in words."""

    def one(step: dict[str, Any]) -> str:
        pattern = step.get("pattern")
        return step["type"] + (f" {next(iter(pattern.values()))!r}" if isinstance(pattern, dict) and pattern else "")

    return " then ".join(map(one, steps)) or "no pre-tokenizer"


def _all_steps(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for part in ("normalizer", "pre_tokenizer") for step in _steps(data.get(part))]


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part.get("normalizers") or part.get("pretokenizers") or [part]


def _refused(expected: str, got: object) -> RegroupError:
    return RegroupError(
        "llama.cpp has no tokenizer like this one",
        expected=expected,
        got=str(got)[:600],
        remedy="remove the tokenizer's files for a GGUF file without one, and give the engine token ids",
    )
