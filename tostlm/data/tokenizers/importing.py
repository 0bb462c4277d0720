"""Tokenizers made elsewhere, brought into the form that prepared data and checkpoints carry."""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from tostlm.data.tokenizers.base import Tokenizer, tokenizer_file
from tostlm.data.tokenizers.fast import BYTE_CHARACTERS, FastTokenizer, appended_token, parse
from tostlm.errors import UserError

RANKS = re.compile(rb"\A(?:[A-Za-z0-9+/]+=* \d+\r?\n)+")
GPT2_RANKS, GPT2_END = 50_256, "<|endoftext|>"
USUAL_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


def import_tokenizer(source: Path, end_token: str | None = None) -> Tokenizer:
    """The tokenizer of a SentencePiece .model file, a tokenizer.json, a folder that holds one, or tiktoken's ranks.

    The document end is `end_token`; of a tokenizer.json without one what its post-processor appends, else the
    eos_token of a tokenizer_config.json beside it, else the usual name it has.

    Raises:
        UserError: there is none at `source`, or its document end is unknown.
    """
    path = tokenizer_file(source) if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"{path} is no file; name a .model file, a tokenizer.json, a folder with one, or a ranks file")
    content = path.read_bytes()
    try:
        if RANKS.match(content):
            content = gpt2_json(content)
        if content.lstrip()[:1] == b"{":
            return _with_end(content, end_token, path.with_name("tokenizer_config.json"))
        tokenizer = Tokenizer.from_bytes(content)
        if end_token not in (None, tokenizer.end_piece):
            raise UserError(
                f"--end-token {end_token} is not the model's document end, {tokenizer.end_piece}; leave it out"
            )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tokenizer


def _with_end(content: bytes, end_token: str | None, config: Path) -> FastTokenizer:
    """The tokenizer.json with a post-processor that appends the document end, a special token, and nothing else."""
    fast = parse(content)
    fast.no_truncation()
    fast.no_padding()
    end = end_token or _found_end(fast, config)
    token = fast.token_to_id(end)
    if token is None:
        raise UserError(f"it has no token {end!r}; name one that it has with --end-token")
    whole = json.loads(content)
    others = [added for added in whole.get("added_tokens", ()) if added["id"] != token]
    added = [*others, _special(end, token)]
    whole |= {
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda entry: entry["id"]),
        "post_processor": _appending(end, token),
    }
    return FastTokenizer(json.dumps(whole, ensure_ascii=False).encode())


def _found_end(fast: tokenizers.Tokenizer, config: Path) -> str:
    own = appended_token(fast)
    if own is not None:
        return str(fast.id_to_token(own))
    if config.is_file():
        try:
            named = json.loads(config.read_bytes()).get("eos_token")
        except (ValueError, AttributeError):
            raise UserError(f"{config} is no JSON object; mend it, or name the document end with --end-token") from None
        named = named.get("content") if isinstance(named, dict) else named
        if named:
            return str(named)
    known = [end for end in USUAL_ENDS if fast.token_to_id(end) is not None]
    if not known:
        raise UserError(
            f"it has none of the usual document ends ({', '.join(USUAL_ENDS)}); name its own with --end-token"
        )
    return known[0]


def _special(piece: str, token: int) -> dict[str, Any]:
    """A special token, as tokenizer.json spells it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": piece, **plain, "special": True}


def _appending(end: str, token: int) -> dict[str, Any]:
    """The post-processor "$A END", as tokenizer.json spells it."""
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {"id": end, "ids": [token], "tokens": [end]}
    return {
        "type": "TemplateProcessing",
        "single": [text, {"SpecialToken": {"id": end, "type_id": 0}}],
        "pair": [text, other],
        "special_tokens": {end: special},
    }


def gpt2_json(ranks_file: bytes) -> bytes:
    """GPT-2's tokenizer.json from tiktoken's file of its ranks, lines "base64 rank".

    Raises:
        UserError: the ranks are not GPT-2's in number, or damaged.
    """
    try:
        pairs = (line.split() for line in ranks_file.splitlines() if line)
        ranks = {base64.b64decode(data, validate=True): int(rank) for data, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UserError(f"the ranks file is damaged: {error}; get it again") from None
    if len(ranks) != GPT2_RANKS or set(ranks.values()) != set(range(GPT2_RANKS)):
        raise UserError(
            f"it holds {len(ranks):,} ranks up to {max(ranks.values()):,}; of tiktoken's files only GPT-2's is read, "
            f"{GPT2_RANKS:,} ranks from 0: import this one as a tokenizer.json"
        )
    tokens = sorted(ranks, key=ranks.__getitem__)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    content = {
        "version": "1.0",
        "added_tokens": [_special(GPT2_END, len(ranks))],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {_visible(token): ranks[token] for token in tokens},
            "merges": [[*map(_visible, _halves(token, ranks))] for token in tokens if len(token) > 1],
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that BPE joins last when it makes a token, which only lower ranks lead to."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        if parts[best] + parts[best + 1] not in ranks:
            raise UserError(f"the ranks file is damaged: no lower ranks lead to {token!r}; get it again")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _visible(data: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in data)
