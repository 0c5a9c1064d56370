"""rank_llm's histories: the prompts and the LLM's raw responses in, the order that our own parser makes of them out.

A prompt shows a window of a query's list, and every window begins from the order that the answers before it made. So
the prompts alone tell the list: a window shows neighbours of the order so far, or new documents before its head and
how it goes on. Documents are the same where the letters and digits of one text begin those of the other, as prompts
cut long texts and mend their characters.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastrank.data.permutations import apply_window, parse_permutation

_PASSAGE = re.compile(r"\[(\d+|[A-Z])\](?: (?!> \[)(.*)|)")  # a line; prompts have [1] in a passage as (1)
_ANNOUNCED = re.compile(r"I will provide you with (\d+) ")
_QUERIES = (re.compile(r"Search Query: (.*?)\.?\s*$", re.MULTILINE), re.compile(r"\[querystart\] (.*?) \[queryend\]"))
_FUSED = re.compile(r"Search Query: (.*?) Passage: \[\d+\] ?(.*?) ?Relevance Ranking:\s*", re.DOTALL)
_AROUND_ANSWERS = re.compile(r"\[rank(?:start|end)\]|</?answer>")
_LETTER = re.compile(r"\[?\b([A-Z])\]")
_TITLED = re.compile(r"Title: (.*?) ?Content: ", re.DOTALL)
_ALIKE = 0.9  # the share of what must fit: mended texts have more, other documents far less
_FORMS = "passages in lines '[1] ...', or messages or texts with one each"


@dataclass(frozen=True, slots=True)
class Window:
    """One call: the query where the prompt names it, the passages as the prompt shows them, the response in numbers."""

    query: str | None
    texts: tuple[str, ...]
    response: str


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the answers to all windows of a query make of its list.

    texts: its documents in the order before the first answer. ranks: from 0; None where the policy drops the list.
    named: whether the last answer about a document named it. policy: of parse_permutation. counts: {status: answers}.
    """

    texts: tuple[str, ...]
    ranks: tuple[int, ...] | None
    named: tuple[bool, ...]
    policy: str
    counts: Counter[str]

    def labels(self) -> tuple[float, ...]:
        """One label for each of the texts, by rank, as Permutation.labels has them."""
        return self.labels_among(self.texts)

    def labels_among(self, texts: Sequence[str]) -> tuple[float, ...]:
        """Labels of a list's documents, given whole and in any order.

        Those that no prompt shows follow the others, or share the last place under the policy "tier". Raises ValueError
        where a passage of the prompts is none of the documents.
        """
        places = range(len(texts)) if texts is self.texts else _places(self.texts, self.ranks, texts)
        ranks = dict(zip(places, self.ranks, strict=True))
        named = dict(zip(places, self.named, strict=True))
        for place in range(len(texts)):
            ranks.setdefault(place, len(ranks))
        return tuple(
            0.0 if self.policy == "tier" and not named.get(place) else float(len(texts) - ranks[place])
            for place in range(len(texts))
        )


def read_window(invocation: Mapping) -> Window:
    """Reads one of rank_llm's {prompt, response}.

    The prompt is a text with the passages in lines that begin with [1], [2], ... or [A], [B], ...; chat messages
    {role, content}, all passages in one or one in each; or LiT5's {text}, one for each passage. Of examples in a prompt
    only the last, the question itself, counts. Raises KeyError, TypeError or ValueError for anything else.
    """
    if not isinstance(invocation, Mapping):
        raise TypeError(f"expected an object with prompt and response, not {type(invocation).__name__}")
    prompt, response = invocation["prompt"], invocation["response"]
    if not isinstance(response, str):
        raise TypeError(f"'response' must be a string, not {type(response).__name__}")
    if isinstance(prompt, list) and prompt and all(isinstance(one, Mapping) and "text" in one for one in prompt):
        fused = [_FUSED.fullmatch(_text(one["text"])) for one in prompt]
        if not all(fused):
            raise ValueError(f"the prompt has none of the forms that are known: {_FORMS}")
        return Window(fused[0][1], tuple(one[2] for one in fused), _plain(response, lettered=False))
    if isinstance(prompt, list):
        if not all(isinstance(one, Mapping) for one in prompt):
            raise TypeError("'prompt' must be a string or an array of messages {role, content}")
        prompt = "\n".join(_content(one["content"]) for one in prompt if one["role"] != "assistant")
    if not isinstance(prompt, str):
        raise TypeError(f"'prompt' must be a string or an array of messages, not {type(prompt).__name__}")
    texts: list[str] = []
    lettered = False
    for line in prompt.split("\n"):
        found = _PASSAGE.fullmatch(line.strip("\r"))
        if found is None:
            continue
        if found[1] in ("1", "A"):
            texts, lettered = [], found[1] == "A"
        if found[1] == (chr(ord("A") + len(texts)) if lettered else str(len(texts) + 1)):
            texts.append((found[2] or "").strip())
    if not texts:
        raise ValueError(f"the prompt has none of the forms that are known: {_FORMS}")
    announced = _ANNOUNCED.findall(prompt)
    if announced and announced[-1] != str(len(texts)):
        raise ValueError(f"the prompt announces {announced[-1]} passages and shows {len(texts)}")
    queries = next((found for form in _QUERIES if (found := form.findall(prompt))), [None])
    return Window(queries[-1], tuple(texts), _plain(response, lettered))


def _content(content: object) -> str:
    """A message's text, which may come in parts."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        return "\n".join(_text(part["text"]) for part in content if part.get("type", "text") == "text")
    return _text(content)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a prompt's text must be a string, not {type(value).__name__}")
    return value


def replay(windows: Iterable[Window], policy: str = "repair") -> Replayed:
    """Applies the answers to the windows of one query, in the order of the calls.

    policy: of parse_permutation; "drop" gives no ranks as soon as one answer is not well formed. Raises ValueError for
    windows that do not slide: each must show neighbours of the order so far, or new documents before its head.
    """
    windows = list(windows)
    answers = [parse_permutation(one.response, len(one.texts), policy=policy) for one in windows]
    counts = Counter(answer.status for answer in answers)
    if any(answer.order is None for answer in answers):
        return Replayed((), None, (), policy, counts)
    texts: list[str] = []  # by a document's number, which it gets when it is first shown
    keys: list[str] = []
    before: tuple[int, ...] = ()  # the order without any answer
    order: tuple[int, ...] = ()
    named: set[int] = set()
    for place, (window, answer) in enumerate(zip(windows, answers, strict=True), start=1):
        shown = [_key(text) for text in window.texts]
        start = _start(shown, [keys[number] for number in order])
        if start is None:
            raise ValueError(f"call {place} of the query shows documents that are no window of the order so far")
        new = tuple(range(len(texts), len(texts) - min(start, 0)))
        before, order, start = (*new, *before), (*new, *order), max(start, 0)
        texts += [""] * len(new)
        keys += [""] * len(new)
        for number, text, key in zip(order[start:], window.texts, shown, strict=False):
            if len(key) >= len(keys[number]):  # of two cuts the longer
                texts[number], keys[number] = text, key
        order = apply_window(order, start, answer)
        for rank, number in enumerate(order[start : start + len(shown)]):
            (named.add if rank < answer.num_ranked else named.discard)(number)
    ranks = {number: rank for rank, number in enumerate(order)}
    return Replayed(
        tuple(texts[number] for number in before),
        tuple(ranks[number] for number in before),
        tuple(number in named for number in before),
        policy,
        counts,
    )


def query_key(query: str) -> str:
    """Equal for the text of a query and what prompts make of it."""
    return _key(query) or query.strip()


def _start(shown: Sequence[str], order: Sequence[str]) -> int | None:
    """Where the window begins in the order; below 0 where its first documents are new."""
    width = len(shown)
    for start in range(len(order) - width, -1, -1):
        if all(map(_same, shown, order[start:])):
            return start
    known = set(order)
    for overlap in range(min(width - 1, len(order)), -1, -1):
        if all(map(_same, shown[width - overlap :], order)):
            num_new = width - overlap
            # A few may have the text of another document; most of them, and the windows do not slide.
            num_known = sum(key in known for key in shown[:num_new])
            return None if num_known > (num_new // 2 if overlap else 0) else -num_new
    return None


def _same(one: str, other: str) -> bool:
    return one == other or bool(one and other and (one.startswith(other) or other.startswith(one)))


def _places(cut: Sequence[str], ranks: Sequence[int], whole: Sequence[str]) -> list[int]:
    """The place among the whole texts of each that may be cut, all different."""
    keys, wanted = [_key(text) for text in whole], [_key(text) for text in cut]
    places: dict[int, int] = {}
    # In place, where the whole texts stand as before or after all answers: two passages may be cut to the same text.
    for assumed in (range(len(cut)), ranks):
        fits = {i: at for i, at in enumerate(assumed) if at < len(whole) and _begins(wanted[i], keys[at])}
        if len(fits) >= _ALIKE * len(cut):
            places = fits
            break
    free = sorted(set(range(len(whole))).difference(places.values()), key=lambda place: (len(keys[place]), place))
    for fit in (_begins, _resembles):
        # The longest cut first, as it begins the fewest texts, and of them the shortest: none is taken from another.
        for i in sorted(set(range(len(cut))).difference(places), key=lambda i: -len(wanted[i])):
            best = max(free, key=lambda place: fit(wanted[i], keys[place]), default=None)
            if best is not None and fit(wanted[i], keys[best]) >= _ALIKE:
                places[i] = best
                free.remove(best)
    for i, text in enumerate(cut):
        if i not in places:
            raise ValueError(f"no document begins as the passage {text[:60]!r} of its prompts")
    return [places[i] for i in range(len(cut))]


def _begins(cut: str, whole: str) -> float:
    return float(whole.startswith(cut) if cut else not whole)


def _resembles(cut: str, whole: str) -> float:
    """The share of the cut text that the whole one has, for what mending makes of a text beyond signs: ligatures."""
    pieces = {cut[i : i + 4] for i in range(len(cut) - 3)}
    return sum(piece in whole for piece in pieces) / max(1, len(pieces))


def _key(text: str) -> str:
    text = _TITLED.sub(r"\1 ", text, count=1) if text.startswith("Title: ") else text
    text = html.unescape(text)
    plain = re.sub(r"[^0-9A-Za-z]+", "", text)
    if text.isascii():
        return plain
    # Prompts have mojibake and typographic signs mended, which are not ASCII; other scripts have little else.
    letters = re.sub(r"[\W_]+", "", text)
    return plain if 2 * len(plain) >= len(letters) else letters


def _plain(response: str, lettered: bool) -> str:
    """The response without the tags that templates ask for, and with numbers for letters."""
    response = _AROUND_ANSWERS.sub("", response.rsplit("</think>", 1)[-1])
    return _LETTER.sub(lambda found: f"[{ord(found[1]) - ord('A') + 1}]", response) if lettered else response
