"""What an LLM answers when asked to rank: a response in, the order of the documents out, and how well it was formed.

Nothing of a response is lost but what no one can use: the first occurrence of each number counts, and documents that
were left out follow in their previous order. Sliding windows (Sun et al. 2023, arXiv 2304.09542) apply such answers to
a list that is too long for one prompt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

POLICIES = ("repair", "drop", "tier")
STATUSES = ("ok", "wrong_format", "repetition", "missing_documents")
_FORM = re.compile(r"[\d\[\]>,;\s]*")
_NUMBER = re.compile(r"\d+")
_MOST_DIGITS = 9  # longer numbers name no document of a window


@dataclass(frozen=True, slots=True)
class Permutation:
    """An LLM's answer, read.

    order: 0-based positions of all documents of the window, best first; None where the policy drops the answer.
    status: "ok"; "wrong_format" (text around the numbers, a number that names no document, or none at all);
    "missing_documents" (fewer numbers than documents); "repetition".
    num_ranked: how many documents at the head of the order the model named itself.
    policy: what was asked of the reader.
    """

    order: tuple[int, ...] | None
    status: str
    num_ranked: int
    policy: str = "repair"

    def labels(self) -> tuple[float, ...] | None:
        """One label a document, higher is better: its distance from the end of the order. Under the policy "tier" the
        documents that the model left out share the label 0. None where the answer was dropped."""
        if self.order is None:
            return None
        labels = [0.0] * len(self.order)
        for rank, position in enumerate(self.order):
            if self.policy != "tier" or rank < self.num_ranked:
                labels[position] = float(len(self.order) - rank)
        return tuple(labels)


def parse_permutation(response: str, num_documents: int, *, policy: str = "repair") -> Permutation:
    """Reads a response such as "[2] > [1] > [3]".

    response: what the model said; what stands before a closing think tag is left out, and digits of any script, raised
    or circled, count as digits. num_documents: documents in the window, numbered from 1 in the prompt. policy: "repair"
    (documents that were left out follow in their previous order), "drop" (an answer that is not "ok" gives no order) or
    "tier" (as repair; labels() puts what was left out into one tier). Raises TypeError for a response that is no str
    and ValueError for an unknown policy.
    """
    if not isinstance(response, str):
        raise TypeError(f"the response must be a str, not {type(response).__name__}")
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r}: choose one of {', '.join(POLICIES)}")
    text = _with_plain_digits(response.rsplit("</think>", 1)[-1]).strip()
    numbers = [int(word) if len(word) <= _MOST_DIGITS else 0 for word in _NUMBER.findall(text)]
    named = list(dict.fromkeys(number - 1 for number in numbers if 1 <= number <= num_documents))
    foreign = any(not 1 <= number <= num_documents for number in numbers)
    if foreign or not _FORM.fullmatch(text) or (not numbers and num_documents):
        status = "wrong_format"
    elif len(numbers) < num_documents:
        status = "missing_documents"
    elif len(numbers) > len(named):
        status = "repetition"
    else:
        status = "ok"
    if policy == "drop" and status != "ok":
        return Permutation(None, status, len(named), policy)
    left_out = sorted(set(range(num_documents)).difference(named))
    return Permutation((*named, *left_out), status, len(named), policy)


def window_starts(num_documents: int, window: int = 20, stride: int = 10) -> tuple[int, ...]:
    """Where the windows begin that rank a list from its tail to its head.

    The first one ends with the list, the last one always begins at 0; () for no documents. Raises ValueError for a
    window or a stride below 1, and for a stride over the window, which would leave documents out.
    """
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(f"window={window} and stride={stride}: both must be at least 1, the stride at most the window")
    if num_documents < 1:
        return ()
    return (*range(num_documents - window, 0, -stride), 0)


def apply_window(order: Sequence, start: int, permutation: Permutation | Sequence[int]) -> tuple:
    """The order of a list after one window was ranked.

    order: documents, or anything that stands for them, best first. start: where the window begins. permutation: an
    answer or its positions; as many documents from `start` on as it holds are put into its order. A dropped answer
    changes nothing. Raises ValueError for one that does not fit.
    """
    positions = permutation.order if isinstance(permutation, Permutation) else tuple(permutation)
    if positions is None:
        return tuple(order)
    end = start + len(positions)
    if start < 0 or end > len(order) or sorted(positions) != list(range(len(positions))):
        raise ValueError(
            f"{len(positions)} positions from {start} on do not permute a part of a list of {len(order)} documents"
        )
    return (*order[:start], *(order[start + position] for position in positions), *order[end:])


def _with_plain_digits(text: str) -> str:
    if text.isascii():
        return text
    return "".join(_plain(character) for character in text)


def _plain(character: str) -> str:
    if character.isascii() or unicodedata.category(character) not in ("Nd", "No"):
        return character
    value = unicodedata.numeric(character)
    return str(int(value)) if value.is_integer() else character
