"""A tokenizer in GGUF's terms. llama.cpp has its own tokenizers and picks one by name, so what it lacks is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from ..errors import RegroupError

SPACE = "▁"
# Regular expressions by which byte-level tokenizers split text, and llama.cpp's names for its versions of them.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
}


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
    tokens = [f"[PAD{number}]" for number in range(size)]
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
    if model["byte_fallback"]:
        scores = [0.0] * size
        for rank, (left, right) in enumerate(merges):
            number = ids.get(left + right)
            if number is not None and scores[number] == 0.0:
                scores[number] = -float(rank + 1)
        return Vocabulary("llama", "default", scores=scores, add_space_prefix=_prefixes(data), **common)
    return Vocabulary("gpt2", _pre(data), merges=[" ".join(pair) for pair in merges], **common)


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
    steps = [step for part in ("normalizer", "pre_tokenizer") for step in _steps(data.get(part))]
    known = {"Prepend", "Replace", "Metaspace"}
    if unknown := [step["type"] for step in steps if step["type"] not in known]:
        raise _refused("SentencePiece's way with spaces alone", ", ".join(unknown))
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _pre(data: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which byte-level BPE splits a text, which it otherwise takes as it is."""
    normalizers = [step["type"] for step in _steps(data.get("normalizer"))]
    # Nearly every text is composed already (NFC), and there is no word in GGUF for it.
    if unknown := [name for name in normalizers if name != "NFC"]:
        raise _refused("text that is not changed before it is split", ", ".join(unknown))
    if affixes := [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if data["model"].get(name)]:
        raise _refused("tokens without affixes", ", ".join(affixes))
    steps = list(_steps(data.get("pre_tokenizer")))
    if any(step.get("add_prefix_space") for step in steps):
        raise _refused("byte-level BPE without a space in front of a text", "add_prefix_space")
    name = _split(steps)
    if data["model"].get("ignore_merges") and name != "llama-bpe":
        raise _refused(f"tokens that are merged step by step, as llama.cpp's {name} does", "ignore_merges")
    return name


def _split(steps: list[dict[str, Any]]) -> str:
    if [step["type"] for step in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if [step["type"] for step in steps] == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in _SPLITS:
            return _SPLITS[pattern]
        raise _refused("a way to split text that llama.cpp has: Llama 3's, Qwen 2's or GPT-2's", pattern)
    raise _refused("byte-level BPE", " then ".join(step["type"] for step in steps) or "no pre-tokenizer")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part.get("normalizers") or part.get("pretokenizers") or [part]


def _refused(expected: str, got: object) -> RegroupError:
    return RegroupError(
        "llama.cpp has no tokenizer like this one",
        expected=expected,
        got=str(got)[:200],
        remedy="remove the tokenizer's files for a GGUF file without one, and give the engine token ids",
    )
