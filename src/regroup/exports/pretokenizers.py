"""Pre-tokenizers: how byte-pair tokenizers split text into words, by their names in GGUF files.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``) and llama.cpp implements each name. The table below says
what it does for each. Source: ggml-org/llama.cpp, src/llama-vocab.cpp (names, regular expressions, merges and
begin of sequence) and src/unicode.cpp (splitters written by hand, which replace some of the expressions), as released
in llama-cpp-python 0.3.36. The expressions here are written for Oniguruma, the engine of the tokenizers library, and
cut where llama.cpp does; that is not always where the tokenizer cuts that the name was given for (``original``).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

_SUFFIX = r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_LINES = r"\s*[\r\n]+|" + _SPACES

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIX}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_LINES}"
_QWEN2 = rf"{_SUFFIX}|{_WORDS}|\p{{N}}|{_SIGNS}[\r\n]*|{_LINES}"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DIGITS = r"\p{N}"
# Groups of three from the right. The first group takes what stands before it along, as in llama.cpp.
_THREES = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_DEEPSEEK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Where an expression names no class of Unicode's, llama.cpp takes spaces beyond ASCII for vertical tabs.
_CJK_WITHOUT_SPACES = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&[^\\s]]+"
_ASCII_SIGN_AND_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = (r"\p{N}{1,3}", _CJK, rf"{_ASCII_SIGN_AND_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}")


def _cased(letter: str, before: str, after: str) -> str:
    """Words of letters that are not a-z and then letters that are not A-Z, as llama.cpp tells cases apart."""
    upper, lower = rf"(?:(?={letter})[^a-z])", rf"(?:(?={letter})[^A-Z])"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return rf"{lead}{upper}*{lower}+{before}|{lead}{upper}+{lower}*{before}|{after}"


_THREE_AND_SIGNS = rf"\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_LINES}"
_TEKKEN = _cased(r"\p{L}", "", rf"\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}")
_GPT4O = _cased(r"\p{L}", f"(?:{_SUFFIX})?", _THREE_AND_SIGNS)
_GRANITE = _cased(r"[\p{L}\p{M}]", f"(?:{_SUFFIX})?", _THREE_AND_SIGNS)
# It has one class for all letters where the tokenizers have one for each case.
_UNCASED = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_SUFFIX})?"
_TINY_AYA = f"{_UNCASED}|{_THREE_AND_SIGNS}"
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|"
    + _CJK,
    rf"{_UNCASED}|\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}",
)
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ebef\U0002f800-\U0002fa1f"
_KIMI = (
    rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?(?:(?![{_HAN}])\p{{L}})+(?:{_SUFFIX})?|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_LINES}"
)
_AFMOE = (
    _THREES,
    # From U+8C48, as in llama.cpp, where U+F900 was meant.
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
    rf"{_ASCII_SIGN_AND_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}",
)
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+",
    r"\s+\z",
    _CJK_WITHOUT_SPACES,
)
_DEEPSEEK_LLM_ORIGINAL = (*_DEEPSEEK_LLM[:2], _DEEPSEEK_LLM[2].replace("\u3001", "\u3000-"), r"\s+$", _CJK_DEEPSEEK)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_WITHOUT_SPACES, _DIGITS)
_FALCON_SIGNS = r"[\p{P}\$\+<=>\^~\|`]+"
_LINE_RUNS = r"[^\n]+|\n+"


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp cuts text for one value of ``tokenizer.ggml.pre``.

    Attributes:
        name: that value.
        splits: expressions, each of which isolates its matches in every piece that the one before it left.
        ignore_merges: a word that is a token is that token, whatever its merges are.
        add_bos: whether a text begins with the begin of sequence where the file does not say.
        raw: tokens are text with ▁ for a space and <0x…> for other bytes, not text in GPT-2's spelling of bytes.
        original: expressions of the tokenizers that the name was given for, where they cut otherwise.
    """

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    raw: bool = False
    original: tuple[str, ...] = ()

    def build(self, splits: tuple[str, ...] | None = None) -> Any:
        """The same as a pre-tokenizer of the tokenizers library."""
        return _build(self.splits if splits is None else splits, self.raw)


@functools.lru_cache(maxsize=128)
def _build(splits: tuple[str, ...], raw: bool) -> Any:
    steps: list[Any] = []
    plain = splits[-1] == _GPT2
    for split in splits[:-1] if plain else splits:
        if split == _DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    if not raw:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


# Words with a capital inside are two in these tokenizers, in any script; llama.cpp knows case in ASCII alone.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


def _cased_original(suffix: str, rest: str) -> str:
    return rf"{_LEAD}{_UPPER}*{_LOWER}+{suffix}|{_LEAD}{_UPPER}+{_LOWER}*{suffix}|{rest}"


_ANY_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_ORIGINAL = _cased_original(_ANY_SUFFIX, _THREE_AND_SIGNS)
_THREES_ORIGINAL = r"\d{1,3}(?=(?:\d{3})*\b)"


def _rows() -> Iterator[PreTokenizer]:
    def row(names: str, *splits: str, **more: Any) -> Iterator[PreTokenizer]:
        return (PreTokenizer(name, splits, **more) for name in names.split())

    # Of names that cut alike the first is the one that is written.
    yield from row(
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
        "roberta-bpe mpt olmo jais trillion granite-docling exaone4",
        _GPT2,
    )
    yield from row("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _DIGITS, _GPT2)
    yield from row("dbrx smaug-bpe chatglm-bpe", _LLAMA3)
    yield from row("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3,
                   ignore_merges=True, add_bos=True)  # fmt: skip
    yield from row("glm4 glm5", _LLAMA3, ignore_merges=True)
    yield from row("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN2)
    yield from row("qwen35", rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+"
                   rf"[\r\n]*|{_LINES}")  # fmt: skip
    yield from row("ufakzeka", rf"{_WORDS}|\p{{N}}|{_SIGNS}[\r\n]*|{_LINES}")
    yield from row("seed-coder", rf"{_SUFFIX}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}")
    yield from row("bailingmoe bailingmoe2 llada-moe", rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORDS}|\p{{N}}|"
                   rf"{_SIGNS}[\r\n]*|\s*[\r\n]|{_SPACES}")  # fmt: skip
    yield from row("exaone-moe", rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
                   rf"{_SIGNS}[\r\n/]?|\s*[\r\n]|{_SPACES}")  # fmt: skip
    yield from row("minicpm5", r"\p{N}{1,3}", rf"{_SUFFIX}|{_WORDS}|\p{{N}}+|{_SIGNS}[\r\n]*|{_LINES}",
                   ignore_merges=True)  # fmt: skip
    yield from row("laguna", _LINE_RUNS, _QWEN2)
    cascade = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
    yield from row("jais-2", rf"{_SUFFIX}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|\s*[\r\n]+|{cascade}|\s{{1}}")
    yield from row("bloom poro-chat gpt3-finnish", _BLOOM)
    yield from row("viking", _BLOOM, _DIGITS)
    yield from row("deepseek-llm", *_DEEPSEEK_LLM, r"\p{N}+", original=(*_DEEPSEEK_LLM_ORIGINAL, _DIGITS))
    yield from row("deepseek-coder", *_DEEPSEEK_CODER, original=(*_DEEPSEEK_CODER[:3], _CJK_DEEPSEEK, _DIGITS))
    yield from row("deepseek-v3 hunyuan-dense joyai-llm hy_v4", *_DEEPSEEK3)
    yield from row("spark2_5", r"\p{N}{1,3}", _CJK, rf"{_ASCII_SIGN_AND_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
                   _DIGITS)  # fmt: skip
    yield from row("falcon", _FALCON_SIGNS, _GPT2[: -len(r"|\s+")], "[0-9][0-9][0-9]",
                   original=(_FALCON_SIGNS, _GPT2[: -len(r"|\s+")], r"\p{N}+", "[0-9][0-9][0-9]"))  # fmt: skip
    yield from row("default", r"[\p{P}\$\+<=>\^~\|]+", _GPT2[: -len(r"|\s+")], r"\p{N}+", "[0-9][0-9][0-9]")
    yield from row("chameleon", "<sentinel:[0-9]+>", r"(?:IMGIMG)(?:[A-I]{1,4})Z", r"[\t\n]|    |  ", r"\p{N}",
                   r"[\p{P}!-/:-@\[-`{-~]", _GPT2, add_bos=True)  # fmt: skip
    yield from row("tekken", _TEKKEN, ignore_merges=True, add_bos=True,
                   original=(_cased_original("", rf"\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}"),))  # fmt: skip
    yield from row("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O, original=(_GPT4O_ORIGINAL,))
    yield from row("granite-embed-multi-97m", _GRANITE, ignore_merges=True, original=(_GPT4O_ORIGINAL,))
    yield from row("tiny_aya cohere2moe", _THREES, _TINY_AYA, original=(_THREES_ORIGINAL, _GPT4O_ORIGINAL))
    words = _cased_original(_ANY_SUFFIX, rf"\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}")
    yield from row("youtu", *_YOUTU, ignore_merges=True, original=(_YOUTU[0], words))
    yield from row("kimi-k2", _KIMI)
    yield from row("superbpe", r"\p{N}+", "(?=(?:[0-9]{3})+(?![0-9]))")
    yield from row("afmoe", *_AFMOE)
    yield from row("sarvam-moe", _LINE_RUNS, raw=True)
    yield from row("gemma4 granite-embed-multi-311m", _LINE_RUNS, raw=True, add_bos=True)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {row.name: row for row in _rows()}
# The one name of llama.cpp's that is left out: it ends the process at two spaces in a row, except for a tokenizer of
# another model that is not handled either.
REFUSED = ("whitespace",)

# Text on which any two rows above that cut differently do so.
PROBE = (
    "Hello World! I'll we'RE don'T, he'd it's\tI'M 'Straße' O'Neill Ali'den \n\n"
    "  x = foo(bar[1234567], 'a_b')  # 3.14159e-10\r\n"
    "\tif (camelCase && HTMLParser2Go) return x++ / 12 ** 345;\n\n\n    //  C:\\dir\\file.txt\n/\n a/b//\n"
    "  12 12345 $99.95 1,000,000 ½ ² Ⅷ ٣٤٥ 1st 2nd\n \n\n"
    "ÉCOLE École éÉé ПриветМир ΑΒγδ ǅ naïve nai\u0308ve Zoë\u0301x हिन्दी नमस्ते ไทย ภาษาไทย አማርኛ العربية، עברית\n"
    "你好，世界。日本語のテキスト、カタカナ ｶﾅ한국어 ㄅㄆ 𠀀𠀁abc中文def ！… “quoted” ‘q’ —dash— ：；\n"
    "🙂🙂 👩‍👩‍👧 ☕\ufe0f €£ ©®™ a\u00a0b\u2003c\u3000d   e     f         g\n"
    "<sentinel:12> IMGIMGABCZ <b>`code`</b> ^~|=+ a|b (c) ...!!!??? -- #$%&'()*+,-./:;<=>?@[\\]^_`{|}~ \\ "
    "end 'S 's' l'été d'Eau x'y " + " " * 20 + "z" + " " * 700 + "tail  \n   \n  "
)


@functools.lru_cache(maxsize=256)
def _pieces(splits: tuple[str, ...], raw: bool) -> tuple[Any, ...]:
    return tuple(_build(splits, raw).pre_tokenize_str(PROBE))


def recognise(pre_tokenizer: Any, *, ignore_merges: bool, raw: bool = False) -> tuple[PreTokenizer, bool] | None:
    """The row that cuts text as a pre-tokenizer of the tokenizers library does, tried on ``PROBE``.

    Args:
        pre_tokenizer: that library's, or None for one that does not cut.
        ignore_merges: see ``PreTokenizer``.
        raw: see ``PreTokenizer``.

    Returns:
        The first row that cuts alike, and True; the first one whose ``original`` does so, and False; else None.
    """
    if pre_tokenizer is None:
        return None
    found = tuple(pre_tokenizer.pre_tokenize_str(PROBE))
    rows = [row for row in PRE_TOKENIZERS.values() if (row.ignore_merges, row.raw) == (ignore_merges, raw)]
    for row in rows:
        if _pieces(row.splits, raw) == found:
            return row, True
    for row in rows:
        if row.original and _pieces(row.original, raw) == found:
            return row, False
    return None


def composed(text: str) -> bool:
    """Whether Unicode's composed form (NFC) of a text is the text."""
    return unicodedata.is_normalized("NFC", text)
