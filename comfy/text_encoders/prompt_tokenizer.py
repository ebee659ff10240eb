"""From prompts to token ids with weights, in sections of a fixed length (`SDTokenizer`)."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from comfy.text_encoders.embeddings import load_embed
from comfy.text_encoders.prompts import escape_important, token_weights, unescape_important
from comfy.text_encoders.raw_tokenizers import DATA, CLIPTokenizer

# (id or vector, weight, number of the word it belongs to; 0 for special tokens)
Token = tuple[Any, float, int]


class SDTokenizer:
    """A prompt as rows of (id, weight).

    max_length: tokens per row, special ones included. A prompt that is longer continues in another row.
    pad_to_max_length, min_length, min_padding: how far rows are filled; with `pad_token`, else with the end token
        (`pad_with_end`) or 0.
    has_start_token, has_end_token: whether rows begin and end with the tokenizer's special tokens.
    embedding_directory, embedding_size, embedding_key: where `embedding:name` is looked up; without a directory such
        words are ordinary text.
    tokenizer_class: makes the raw tokenizer (see `comfy.text_encoders.raw_tokenizers`) from `tokenizer_path`.
    """

    def __init__(
        self,
        tokenizer_path: Any = None,
        max_length: int = 77,
        pad_with_end: bool = True,
        embedding_directory: Any = None,
        embedding_size: int = 768,
        embedding_key: str = "clip_l",
        tokenizer_class: Any = CLIPTokenizer,
        has_start_token: bool = True,
        has_end_token: bool = True,
        pad_to_max_length: bool = True,
        min_length: int | None = None,
        pad_token: int | None = None,
        end_token: int | None = None,
        min_padding: int | None = None,
        tokenizer_data: dict[str, Any] | None = None,
        tokenizer_args: dict[str, Any] | None = None,
    ) -> None:
        if tokenizer_path is None:
            tokenizer_path = os.path.join(DATA, "clip")
        self.tokenizer = tokenizer_class.from_pretrained(tokenizer_path, **(tokenizer_args or {}))
        data = tokenizer_data or {}
        self.max_length = data.get(f"{embedding_key}_max_length", max_length)
        self.min_length = data.get(f"{embedding_key}_min_length", min_length)
        self.min_padding = min_padding
        self._find_special_tokens(has_start_token, has_end_token, end_token)
        if pad_token is not None:
            self.pad_token = pad_token
        else:
            self.pad_token = self.end_token if pad_with_end and self.end_token is not None else 0
        self.pad_with_end = pad_with_end
        self.pad_to_max_length = pad_to_max_length
        self.embedding_directory = embedding_directory
        self.embedding_identifier = "embedding:"
        self.embedding_size = embedding_size
        self.embedding_key = embedding_key
        # Runs of one weight shorter than this are not divided between two rows.
        self.max_word_length = 8

    def _find_special_tokens(self, has_start: bool, has_end: bool, end_token: int | None) -> None:
        """Start and end are what the raw tokenizer puts around an empty text."""
        empty = self.tokenizer("")["input_ids"]
        self.tokenizer_adds_end_token = has_end
        self.tokens_start = 1 if has_start else 0
        self.start_token = empty[0] if has_start else None
        if end_token is not None or not has_end:
            self.end_token = end_token
        else:
            self.end_token = empty[self.tokens_start]

    @property
    def inv_vocab(self) -> dict[int, str]:
        """{id: token}."""
        return {index: token for token, index in self.tokenizer.get_vocab().items()}

    def _try_get_embedding(self, embedding_name: str) -> tuple[Any, str]:
        """(vectors or None, text that follows the name). A comma after the name is text."""
        words = embedding_name.split()
        name, rest = (words[0], " ".join(words[1:])) if words else ("", "")
        arguments = (self.embedding_directory, self.embedding_size, self.embedding_key)
        vectors = load_embed(name, *arguments)
        stripped = name.strip(",")
        if vectors is None and len(stripped) < len(name):
            vectors = load_embed(stripped, *arguments)
            rest = f"{name[len(stripped) :]} {rest}"
        return vectors, rest

    def _plain(self, text: str, weight: float) -> list[tuple[Any, float]]:
        ids = self.tokenizer(text)["input_ids"]
        return [(token, weight) for token in ids[self.tokens_start : -1 if self.tokenizer_adds_end_token else None]]

    def _groups(self, text: str) -> list[list[tuple[Any, float]]]:
        """Tokens with weights, one list per run of text and per embedding."""
        groups = []
        for run, weight in token_weights(escape_important(text), 1.0):
            # `embedding:` starts a word at the beginning, or after a space or a line break that it swallows.
            pieces = re.split(rf"[ \n](?={re.escape(self.embedding_identifier)})", unescape_important(run))
            for piece in filter(None, pieces):
                if self.embedding_directory is not None and piece.startswith(self.embedding_identifier):
                    name = piece[len(self.embedding_identifier) :].strip("\n")
                    vectors, piece = self._try_get_embedding(name)
                    if vectors is None:
                        logging.warning("embedding %r not found in %s; left out", name.split(" ")[0],
                                        self.embedding_directory)  # fmt: skip
                    else:
                        groups.append([(vector, weight) for vector in vectors.reshape(-1, vectors.shape[-1])])
                    if not piece:
                        continue
                groups.append(self._plain(piece, weight))
        return groups

    def pad_tokens(self, tokens: list[Token], amount: int) -> None:
        """Append `amount` padding tokens."""
        tokens.extend([(self.pad_token, 1.0, 0)] * amount)

    def _new_row(self, rows: list[list[Token]]) -> list[Token]:
        row: list[Token] = [] if self.start_token is None else [(self.start_token, 1.0, 0)]
        rows.append(row)
        return row

    def _end_row(self, row: list[Token]) -> None:
        if self.end_token is not None:
            row.append((self.end_token, 1.0, 0))

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, tokenizer_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[list[Any]]:
        """Rows of (id or vector, weight), with `return_word_ids` (id or vector, weight, word number)."""
        options = (tokenizer_options or {}).get(self.embedding_key, {})
        room = self.max_length - (self.end_token is not None)
        rows: list[list[Token]] = []
        row = self._new_row(rows)
        for number, group in enumerate(self._groups(text), start=1):
            left = [(token, weight, number) for token, weight in group]
            divisible = len(left) >= self.max_word_length
            while left:
                free = room - len(row)
                if len(left) <= free:
                    row.extend(left)
                    break
                if divisible:
                    row.extend(left[:free])
                    left = left[free:]
                    self._end_row(row)
                else:
                    self._end_row(row)
                    if self.pad_to_max_length:
                        self.pad_tokens(row, free)
                row = self._new_row(rows)
        self._end_row(row)
        if self.min_padding is not None:
            self.pad_tokens(row, self.min_padding)
        if self.pad_to_max_length:
            self.pad_tokens(row, self.max_length - len(row))
        shortest = options.get("min_length", self.min_length)
        if shortest is not None:
            self.pad_tokens(row, shortest - len(row))
        if return_word_ids:
            return rows
        return [[(token, weight) for token, weight, _ in row] for row in rows]

    def untokenize(self, token_weight_pair: list[Any]) -> list[tuple[Any, str]]:
        """Each pair with the token's text."""
        names = self.inv_vocab
        return [(pair, names[pair[0]]) for pair in token_weight_pair]

    def state_dict(self) -> dict[str, Any]:
        """What a file with the encoder must carry for the tokenizer; nothing here."""
        return {}


class SD1Tokenizer:
    """The tokenizer of a text encoder with a name: {name: rows}."""

    def __init__(
        self,
        embedding_directory: Any = None,
        tokenizer_data: dict[str, Any] | None = None,
        clip_name: str = "l",
        tokenizer: Any = SDTokenizer,
        name: str | None = None,
    ) -> None:
        data = tokenizer_data or {}
        self.clip_name = clip_name if name is None else name
        self.clip = f"clip_{clip_name}" if name is None else name
        make = data.get(f"{self.clip}_tokenizer_class", tokenizer)
        setattr(self, self.clip, make(embedding_directory=embedding_directory, tokenizer_data=data))

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, tokenizer_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, list[list[Any]]]:
        """{name: rows of the encoder's tokenizer}."""
        rows = getattr(self, self.clip).tokenize_with_weights(
            text, return_word_ids, tokenizer_options=tokenizer_options or {}, **kwargs
        )
        return {self.clip_name: rows}

    def untokenize(self, token_weight_pair: list[Any]) -> list[tuple[Any, str]]:
        """Each pair with the token's text."""
        return getattr(self, self.clip).untokenize(token_weight_pair)

    def state_dict(self) -> dict[str, Any]:
        """See `SDTokenizer.state_dict`."""
        return getattr(self, self.clip).state_dict()
