"""Import of tokenizers that other programs made."""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import Path

import tokenizers

from tostlm.data.tokenizers.base import Tokenizer
from tostlm.data.tokenizers.fast import BYTE_CHARACTERS, FastTokenizer, appended_token, parse_tokenizer_json
from tostlm.errors import UserError

TIKTOKEN_FILE = re.compile(rb"\A(?:[A-Za-z0-9+/]+=* \d+\r?\n)+")  # lines of a token in base64 and its rank
GPT2_RANKS, GPT2_EOS = 50_256, "<|endoftext|>"
VOCABULARY, MERGES = "vocab.json", "merges.txt"  # OpenAI's files of a byte-level BPE
COMMON_EOS_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


def import_tokenizer(source: Path, eos_token: str | None = None) -> Tokenizer:
    """Read a tokenizer of another program and give it an end-of-document token.

    Args:
        source: a SentencePiece .model, a tokenizer.json, a folder that holds one of them or OpenAI's vocab.json and
            merges.txt, or tiktoken's ranks file of GPT-2.
        eos_token: the end-of-document token. By default the one that a tokenizer.json appends to a text, else the
            `eos_token` of a tokenizer_config.json beside it, else the first of `COMMON_EOS_TOKENS` that it has. A
            SentencePiece model has its own.

    Raises:
        UserError: there is no tokenizer at `source`, or its end-of-document token is unknown.
    """
    path = _find_file(source) if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"{path} is no file; name a .model file, a tokenizer.json, a folder with one, or a ranks file")
    content = path.read_bytes()
    try:
        if path.name == VOCABULARY:
            content = _openai_tokenizer_json(path)
        elif TIKTOKEN_FILE.match(content):
            content = _gpt2_tokenizer_json(content)
        if FastTokenizer.recognizes(content):
            return _set_eos(content, eos_token, path.with_name("tokenizer_config.json"))
        tokenizer = Tokenizer.from_bytes(content)
        if eos_token not in (None, tokenizer.eos_token):
            raise UserError(
                f"--eos-token {eos_token} is not the model's end-of-document token, {tokenizer.eos_token}; "
                "leave the option out"
            )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tokenizer


def _set_eos(content: bytes, eos_token: str | None, config: Path) -> FastTokenizer:
    """Return a tokenizer.json's tokenizer with a post-processor that only appends its EOS, made a special token."""
    fast = parse_tokenizer_json(content)
    eos_token = eos_token or _find_eos(fast, config)
    eos_id = fast.token_to_id(eos_token)
    if eos_id is None:
        raise UserError(f"it has no token {eos_token!r}; name one that it has with --eos-token")
    fields = json.loads(content)
    others = [added for added in fields.get("added_tokens", ()) if added["id"] != eos_id]
    fields |= {
        "truncation": None,
        "padding": None,
        "added_tokens": sorted([*others, _special_token(eos_token, eos_id)], key=lambda entry: entry["id"]),
        "post_processor": _append_template(eos_token, eos_id),
    }
    return FastTokenizer(json.dumps(fields, ensure_ascii=False).encode())


def _find_eos(fast: tokenizers.Tokenizer, config: Path) -> str:
    """Return a tokenizer's end-of-document token: the appended one, that of tokenizer_config.json or a common one."""
    appended = appended_token(fast)
    if appended is not None:
        return str(fast.id_to_token(appended))
    if config.is_file():
        try:
            named = json.loads(config.read_bytes()).get("eos_token")
        except (ValueError, AttributeError):
            raise UserError(
                f"{config} is no JSON object; correct it, or name the end-of-document token with --eos-token"
            ) from None
        named = named.get("content") if isinstance(named, dict) else named
        if named:
            return str(named)
    for token in COMMON_EOS_TOKENS:
        if fast.token_to_id(token) is not None:
            return token
    common = ", ".join(COMMON_EOS_TOKENS)
    raise UserError(f"it has none of the common end-of-document tokens ({common}); name its own with --eos-token")


def _special_token(piece: str, token: int) -> dict[str, object]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": piece, **plain, "special": True}


def _append_template(piece: str, token: int) -> dict[str, object]:
    """Return the `post_processor` of a tokenizer.json that appends one token to a text."""
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [text, {"SpecialToken": {"id": piece, "type_id": 0}}],
        "pair": [text, other],
        "special_tokens": {piece: {"id": piece, "ids": [token], "tokens": [piece]}},
    }


def _find_file(folder: Path) -> Path:
    if (folder / VOCABULARY).is_file() and not any((folder / name).is_file() for name in Tokenizer.file_names()):
        return folder / VOCABULARY
    return Tokenizer.find_file(folder)


def _openai_tokenizer_json(vocabulary: Path) -> bytes:
    """Return the tokenizer.json of a byte-level BPE whose vocab.json has a merges.txt beside it.

    Raises:
        UserError: one of them is damaged or missing.
    """
    merges = vocabulary.with_name(MERGES)
    if not merges.is_file():
        raise UserError(f"its {MERGES} is not beside it; copy that too")
    try:
        bpe = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the package raises plain Exceptions
        raise UserError(f"it and its {MERGES} are no byte-level BPE: {error}") from None
    fast = tokenizers.Tokenizer(bpe)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    return fast.to_str().encode()


def _gpt2_tokenizer_json(ranks_file: bytes) -> bytes:
    """Return GPT-2's tokenizer.json, made from tiktoken's ranks file.

    Raises:
        UserError: the file is damaged or its ranks are not GPT-2's.
    """
    try:
        pairs = (line.split() for line in ranks_file.splitlines() if line)
        ranks = {base64.b64decode(data, validate=True): int(rank) for data, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UserError(f"the ranks file is damaged: {error}; download it again") from None
    if len(ranks) != GPT2_RANKS or set(ranks.values()) != set(range(GPT2_RANKS)):
        raise UserError(
            f"it holds {len(ranks):,} ranks up to {max(ranks.values()):,}; of tiktoken's files only GPT-2's, "
            f"{GPT2_RANKS:,} ranks from 0, can be imported: import this tokenizer from its tokenizer.json"
        )
    tokens = sorted(ranks, key=ranks.__getitem__)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    content = {
        "version": "1.0",
        "added_tokens": [_special_token(GPT2_EOS, len(ranks))],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {_byte_characters(token): ranks[token] for token in tokens},
            "merges": [[*map(_byte_characters, _last_merge(token, ranks))] for token in tokens if len(token) > 1],
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts that BPE merges last when it makes a token from bytes by merges of lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        if parts[best] + parts[best + 1] not in ranks:
            raise UserError(f"the ranks file is damaged: no lower ranks lead to {token!r}; download it again")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _byte_characters(data: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in data)
