"""Personal data and secrets by their shape. What is found is never repeated, only masked: kind, first letters, length.

A shape is no proof: numbers with a check digit are checked, addresses that documents reserve for examples pass, and the
rest is for a person to look at. A model repeats what it was trained on (Carlini et al. 2021,
https://arxiv.org/abs/2012.07805), most of all what it saw more than once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One kind of thing that should not be trained on unawares."""

    kind: str
    secret: bool
    """Gives access to something: to be revoked, not only removed."""
    regex: re.Pattern[str]
    hint: tuple[str, ...]
    """Texts of which a match holds one: looked for first, as that is a hundred times faster."""
    shown: int
    """Leading characters that a masked form keeps: those that all of the kind share."""
    holds: Callable[[str], bool] = lambda text: True
    """Whether a match is one: check digits, reserved names."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A find."""

    kind: str
    secret: bool
    masked: str


def find(text: str) -> Iterator[Hit]:
    """Yield what is in a text, kind by kind; secrets first. No place is counted under two kinds."""
    taken: list[tuple[int, int]] = []
    digits = None
    for pattern in PATTERNS:
        if pattern.hint:
            if not any(hint in text for hint in pattern.hint):
                continue
        else:  # numbers: most texts have no run of so many digits
            digits = _MANY_DIGITS.search(text) is not None if digits is None else digits
            if not digits:
                continue
        for match in pattern.regex.finditer(text):
            begin, end = match.span()
            if any(begin < other_end and other_begin < end for other_begin, other_end in taken):
                continue
            if pattern.holds(match.group()):
                taken.append((begin, end))
                yield Hit(kind=pattern.kind, secret=pattern.secret, masked=masked(match.group(), pattern.shown))


def masked(text: str, shown: int) -> str:
    """Return `AKIA… (20 characters)`; never more than a quarter of it."""
    return f"{text[: min(shown, len(text) // 4)]}… ({len(text)} characters)"


def luhn(text: str) -> bool:
    """Return whether digits are a card number: an issuer's first digits and length, and a right check digit."""
    digits = [int(char) for char in text if char.isdigit()]
    issuer = _ISSUERS.fullmatch("".join(map(str, digits)))
    if issuer is None or len(set(digits)) < 4:  # 4000000000000002 is nobody's
        return False
    doubled = [
        digit if position % 2 == 0 else sum(divmod(2 * digit, 10)) for position, digit in enumerate(reversed(digits))
    ]
    return sum(doubled) % 10 == 0


def iban(text: str) -> bool:
    """Return whether the check digits of an IBAN are right (ISO 13616: the number modulo 97 is 1)."""
    compact = re.sub(r"\s", "", text)
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def _real_address(text: str) -> bool:
    """Return whether an address is not one that RFC 2606 reserves for examples."""
    domain = text.rpartition("@")[2].lower()
    return not re.search(r"(^|\.)(example\.(com|org|net)|example|test|invalid|localhost)$", domain)


def _phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 8 <= len(digits) <= 15 and not re.search(r"555\D?01\d\d$", text) and len(set(digits)) > 2


_ISSUERS = re.compile(r"4\d{15}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|(?:6011|65\d\d)\d{12}|35\d{14}|62\d{14,17}")
"""Visa, Mastercard (twice), American Express, Discover, JCB, UnionPay."""
_MANY_DIGITS = re.compile(r"\d[\d .()-]{6,}\d|[A-Z]{2}\d\d ?[A-Z0-9]{4}")


def _pattern(kind: str, regex: str, *hint: str, secret: bool = True, shown: int, holds=lambda text: True) -> Pattern:
    return Pattern(kind=kind, secret=secret, regex=re.compile(regex), hint=hint, shown=shown, holds=holds)


PATTERNS = (
    _pattern("private key", r"-----BEGIN (?:[A-Z]+ ){0,2}PRIVATE KEY(?: BLOCK)?-----[^-]*", "PRIVATE KEY", shown=0),
    _pattern("AWS access key", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", "AKIA", "ASIA", shown=4),
    _pattern(
        "GitHub token",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{50,255})\b",
        *("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        shown=4,
    ),
    _pattern("Hugging Face token", r"\bhf_[A-Za-z0-9]{30,60}\b", "hf_", shown=3),
    _pattern("API key (sk-…)", r"\bsk-[A-Za-z0-9_-]{20,250}\b", "sk-", shown=3),
    _pattern("Google API key", r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", "AIza", shown=4),
    _pattern("Slack token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,250}", "xox", shown=4),
    _pattern("JSON web token", r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}", "eyJ", shown=3),
    _pattern(
        "e-mail address",
        r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b",
        "@",
        secret=False,
        shown=1,
        holds=_real_address,
    ),
    _pattern("IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", secret=False, shown=2, holds=iban),
    _pattern("card number", r"(?<![\w.,-])\d(?:[ -]?\d){13,18}(?![\w-]|[.,]\d)", secret=False, shown=0, holds=luhn),
    _pattern(
        "phone number",
        r"(?<![\w.+])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}(?!\w)"
        r"|(?<![\w.(-])(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])",
        secret=False,
        shown=0,
        holds=_phone,
    ),
)
"""Secrets first: a token may hold what looks like a number."""
