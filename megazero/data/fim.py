"""Fill in the middle (Bavarian et al. 2022): documents of training samples rearranged
so that a model learns to fill gaps.

A document's text is cut at two characters into prefix, middle and suffix, and becomes, at the rate `rate`,

    prefix-suffix-middle  <prefix> prefix <suffix> suffix <middle> middle
    suffix-prefix-middle  <prefix> <suffix> suffix <middle> prefix middle    at the rate `spm_rate` of those (section 3)

It keeps its number of tokens: the suffix gives up what the three special tokens take. So ends of documents stay where
they were, and a sample is as long as any other. What happens to a document is a pure function of
(seed, sample, its place).
"""

from collections.abc import Sequence

import numpy as np

from megazero.base import UserError, said
from megazero.data.dataset import SampleSource
from megazero.data.order import stable_hash
from megazero.data.tokenizer_base import Tokenizer, is_text


class FillInTheMiddle:
    """A source of samples around another. Evaluation in file order is left as it is."""

    def __init__(
        self, inner: SampleSource, tokenizer: Tokenizer, seed: int, rate: float, spm_rate: float, names: Sequence[str]
    ) -> None:
        """`names` of the special tokens: prefix, middle, suffix.
        Raises UserError when the tokenizer has no such tokens."""
        self.inner, self.tokenizer, self.seed, self.rate, self.spm_rate = inner, tokenizer, seed, rate, spm_rate
        self.sequence_length = inner.sequence_length
        ids = [tokenizer.id_of(name) if is_text(name) else None for name in names]
        missing = [f"--fim-{part}-token {said(name)}: is no token of this tokenizer; name the one it was trained with."
                   for part, name, i in zip(("prefix", "middle", "suffix"), names, ids, strict=True) if i is None]
        if missing:
            raise UserError(*missing)
        self._prefix, self._middle, self._suffix = (i for i in ids if i is not None)
        pieces = tokenizer.encode_batch(["one w", "ord and an", "other"])
        if tokenizer.decode([i for piece in pieces for i in piece]) != "one word and another":
            raise UserError(f"--fim-rate {rate:g}: this tokenizer puts something before every text, so the pieces of a "
                            "document would not join; leave it out, or take a tokenizer without a prefix.")

    def sample(self, k: int) -> np.ndarray:
        """Sample k of the inner source, its documents rearranged, int64 [S + 1]."""
        tokens = self.inner.sample(k)
        ends = np.flatnonzero(tokens == self.tokenizer.eod) if self.tokenizer.eod is not None else np.empty(0, np.int64)
        bounds = [0, *(int(end) + 1 for end in ends), len(tokens) + 1]
        for place, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
            tokens[low:high - 1] = self._rearranged(tokens[low:high - 1], stable_hash("fim", self.seed, k, place))
        return tokens

    def full_pass(self) -> int:
        return self.inner.full_pass()

    def in_order(self, i: int) -> np.ndarray:
        return self.inner.in_order(i)

    def describe(self) -> str:
        return (f"{self.inner.describe()}\n"
                f"{self.rate:.0%} of the documents with a gap to fill, {self.spm_rate:.0%} of those suffix first")

    def _rearranged(self, document: np.ndarray, key: int) -> np.ndarray:
        """The document, or its pieces in another order [same length]."""
        random = np.random.Generator(np.random.Philox(key=key))
        if random.random() >= self.rate or len(document) < 4:
            return document
        text = self.tokenizer.decode(document.tolist())
        if "\ufffd" in text:                    # a sample can begin or end within a character: its bytes would be lost
            return document
        a, b = sorted(int(random.integers(len(text) + 1)) for _ in range(2))
        prefix, middle, suffix = self.tokenizer.encode_batch([text[:a], text[a:b], text[b:]])
        room = len(document) - len(prefix) - len(middle) - 3
        if not 0 < room <= len(suffix):
            return document
        suffix = suffix[:room]
        if random.random() < self.spm_rate:
            return np.array([self._prefix, self._suffix, *suffix, self._middle, *prefix, *middle], np.int64)
        return np.array([self._prefix, *prefix, self._suffix, *suffix, self._middle, *middle], np.int64)
