"""Text from tokens as they come: never half a character, and nothing that a stop string may still take back.

A tokenizer's decoding is not local: a character may be spread over tokens, and whether a space belongs between two
words may depend on what follows. All tokens so far are decoded each time, and held back is what may still change:

    - U+FFFD at the end, which stands for the bytes of an incomplete character
    - white space at the end, as answers are stripped
    - the beginning of a stop string
    - the last words, for a tokenizer that moves punctuation to the word before it (clean_up_tokenization_spaces)
"""

from collections.abc import Iterable, Sequence
from typing import Any

INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text of one answer. All ``add`` and ``finish`` return, joined, is ``text``: stripped, and without the first
    stop string and what follows."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()):
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._tokens: list[int] = []
        self._finished = False
        self.text = ""
        self.stopped = False  # whether a stop string was found

    def add(self, tokens: Iterable[int]) -> str:
        """The text that is certain after the further ``tokens``, and was not before. After a stop string: nothing."""
        pieces = []
        for token in tokens:  # one at a time: where an answer ends must not depend on how its tokens are grouped
            if self.stopped:
                break
            self._tokens.append(token)
            pieces.append(self._settle(self._decoded().rstrip(INCOMPLETE), last=False))
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back, as no further token comes."""
        if self.stopped or self._finished:
            return ""
        self._finished = True
        return self._settle(self._decoded(), last=True)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens so far, up to and with the one that completed a stop string."""
        return tuple(self._tokens)

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)

    def _settle(self, raw: str, last: bool) -> str:
        found = [at for at in map(raw.find, self._stop_strings) if at >= 0]
        if found:
            self.stopped, raw = True, raw[: min(found)]
        elif not last:
            raw = raw[: len(raw) - self._doubtful(raw)]
        certain = raw.strip()
        if not certain.startswith(self.text):  # bytes of an incomplete character spoil those before them, for a moment
            return ""
        piece, self.text = certain[len(self.text) :], certain
        return piece

    def _doubtful(self, raw: str) -> int:
        """How many characters at the end of ``raw`` the next tokens may change or take back."""
        longest = max(map(len, self._stop_strings), default=1) - 1
        starts = (
            n for n in range(min(longest, len(raw)), 0, -1) if any(s.startswith(raw[-n:]) for s in self._stop_strings)
        )
        words = len(raw) - len(raw.rsplit(" ", 2)[0]) if self._tidies else 0
        return max(next(starts, 0), words)
