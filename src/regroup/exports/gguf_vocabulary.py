"""The tokenizer that a GGUF file describes, rebuilt with the tokenizers library to split text as llama.cpp does."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ..checkpoint import GGUFFile
from ..errors import RegroupError
from .pretokenizers import PRE_TOKENIZERS, REFUSED, PreTokenizer

SPACE = "▁"
_KEY = "tokenizer.ggml."
# Values of tokenizer.ggml.model: byte-pair encoding, SentencePiece's byte-pair encoding, and no tokenizer at all.
_BPE, _SPM, _NONE = ("gpt2", "gemma4"), ("llama",), ("no_vocab", "none")
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# What llama.cpp takes these to be in a SentencePiece vocabulary whose file does not say.
_SPM_IDS = {"bos": 1, "eos": 2, "unk": 0}
_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def tokenizer_of(file: GGUFFile) -> Any:
    """A transformers tokenizer that gives the token ids that llama.cpp gives for this file.

    Args:
        file: the file's header.

    Returns:
        A fast tokenizer; None where the file has none.

    Raises:
        RegroupError: its kind, its pre-tokenizer or its vocabulary cannot be rebuilt; named.
    """
    import transformers

    kind = file.values.get(f"{_KEY}model")
    if kind in _NONE or (kind is None and f"{_KEY}tokens" not in file.values):
        return None
    if kind not in _BPE + _SPM:
        raise _refused(file, f"{_KEY}model", " or ".join(_BPE + _SPM), kind)
    tokens = _tokens(file)
    types = _numbers(file, "token_type", len(tokens), int(TokenType.NORMAL)).astype(int).tolist()
    special = _special_ids(file, kind, len(tokens))
    pre = _pre_tokenizer(file) if kind in _BPE else None
    made = _spm(file, tokens, types, special) if pre is None else _bpe(file, tokens, pre)
    added = [(n, token, types[n]) for n, token in enumerate(tokens) if types[n] in _ADDED]
    # In the order of their ids, so that each keeps the id that it has in the vocabulary.
    made.add_tokens(
        [AddedToken(token, special=kind != TokenType.USER_DEFINED, normalized=False) for _, token, kind in added]
    )
    _add_ends(file, made, tokens, special, pre)
    if made.get_vocab(with_added_tokens=True) != {token: number for number, token in enumerate(tokens)}:
        raise _refused(file, f"{_KEY}tokens", "tokens that keep their ids", "others")
    template = file.values.get("tokenizer.chat_template")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        # What llama.cpp tidies up when it shows text is left out: text comes back as it was.
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[number] for name, number in special.items()},
        **({"chat_template": template} if isinstance(template, str) else {}),
    )


def described(file: GGUFFile) -> str:
    """The kind of a file's tokenizer, in words."""
    kind, pre = (file.values.get(f"{_KEY}{key}") for key in ("model", "pre"))
    return f"{kind}, pre-tokenizer {pre}" if kind in _BPE and pre else str(kind)


def _tokens(file: GGUFFile) -> list[str]:
    tokens = _strings(file, "tokens")
    # llama.cpp has these names for tokens without text.
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise _refused(file, f"{_KEY}tokens", "each token once", repr(twice))
    return tokens


def _strings(file: GGUFFile, key: str) -> list[str]:
    found = file.values.get(_KEY + key)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise _refused(file, _KEY + key, "a list of strings", type(found).__name__)
    return found


def _numbers(file: GGUFFile, key: str, count: int, default: float) -> np.ndarray:
    """One number for each token."""
    found = file.values.get(_KEY + key)
    if found is None:
        return np.full(count, default)
    if not isinstance(found, np.ndarray) or len(found) != count or not np.isfinite(found).all():
        raise _refused(file, _KEY + key, f"{count} numbers, as there are tokens", np.shape(found))
    return found


def _special_ids(file: GGUFFile, kind: Any, count: int) -> dict[str, int]:
    found = dict(_SPM_IDS) if kind in _SPM else {}
    found = {name: number for name, number in found.items() if number < count}
    for name, spelled in _SPECIAL.items():
        number = file.values.get(f"{_KEY}{spelled}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < count:
            raise _refused(file, f"{_KEY}{spelled}_token_id", f"a token of {count}", number)
        found[name] = number
    return found


def _pre_tokenizer(file: GGUFFile) -> PreTokenizer:
    name = file.values.get(f"{_KEY}pre", "default")
    if file.values[f"{_KEY}model"] == "gemma4":
        name = "gemma4"
    found = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if found is None or name in REFUSED:
        raise _refused(file, f"{_KEY}pre", "a pre-tokenizer of llama.cpp's that is known here", name)
    return found


def _bpe(file: GGUFFile, tokens: list[str], pre: PreTokenizer) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = []
    for merge in _strings(file, "merges"):
        # A token can begin with a space in a vocabulary of plain text.
        left, space, right = merge[:1] + merge[1:].partition(" ")[0], *merge[1:].partition(" ")[1:]
        if not space or any(part not in vocabulary for part in (left, right, left + right)):
            raise _refused(file, f"{_KEY}merges", "two tokens that make a third", repr(merge))
        merges.append((left, right))
    made = Tokenizer(
        models.BPE(vocabulary, merges, ignore_merges=pre.ignore_merges, byte_fallback=pre.raw, fuse_unk=False)
    )
    made.pre_tokenizer = pre.build()
    made.decoder = decoders.ByteLevel()
    if pre.raw:
        made.normalizer = normalizers.Replace(" ", SPACE)
        made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        _check_line_runs(file, made, tokens)
    return made


def _check_line_runs(file: GGUFFile, made: Tokenizer, tokens: list[str]) -> None:
    """llama.cpp looks a run of newlines up before it merges anything."""
    for token in tokens:
        if token.strip("\n") == "" and made.encode(token, add_special_tokens=False).tokens != [token]:
            raise _refused(file, f"{_KEY}merges", f"merges that lead to {len(token)} newlines", "none")


def _spm(file: GGUFFile, tokens: list[str], types: list[int], special: dict[str, int]) -> Tokenizer:
    scores = _numbers(file, "scores", len(tokens), 0.0).astype(float)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    for number, token in enumerate(tokens):
        if types[number] in (TokenType.CONTROL, TokenType.UNKNOWN):
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[number], vocabulary[left], vocabulary[right], left, right))
    # What scores higher is merged first.
    merges.sort()
    unknown = special.get("unk")
    made = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(file, "add_space_prefix", True)
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefix else spaces)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return made


def _flag(file: GGUFFile, key: str, default: bool) -> bool:
    found = file.values.get(_KEY + key, default)
    if not isinstance(found, bool):
        raise _refused(file, _KEY + key, "true or false", found)
    return found


def _add_ends(
    file: GGUFFile, made: Tokenizer, tokens: list[str], special: dict[str, int], pre: PreTokenizer | None
) -> None:
    """Begin and end of sequence, where the file puts them around a text."""
    # llama.cpp overrides the file for this one.
    forced = pre is not None and pre.raw and pre.add_bos
    begins = forced or _flag(file, "add_bos_token", pre is None or pre.add_bos)
    around = {"bos": begins, "eos": _flag(file, "add_eos_token", False)}
    wanted = [name for name, asked in around.items() if asked]
    for name in wanted:
        if name not in special:
            raise _refused(file, f"{_KEY}{name}_token_id", "an id, as the token is put around texts", "none")
    if wanted:
        text = [tokens[special[name]] if name != "text" else "$A" for name in ("bos", "text", "eos")
                if name == "text" or around[name]]  # fmt: skip
        pairs = [(tokens[special[name]], special[name]) for name in wanted]
        made.post_processor = processors.TemplateProcessing(single=text, special_tokens=pairs)


def _refused(file: GGUFFile, key: str, expected: str, got: object) -> RegroupError:
    return RegroupError(
        "the tokenizer of this GGUF file cannot be rebuilt",
        file=file.path,
        expected=f"{key}: {expected}",
        got=str(got)[:200],
        remedy="start from the checkpoint that the file was made of",
    )
