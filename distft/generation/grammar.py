"""Answers that keep to a JSON schema: which tokens may come next. The only door to llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distft.core.errors import MachineError, Problem, RecipeError

if TYPE_CHECKING:
    import llguidance
    from llguidance._lib import JsonCompileOptions

TIGHT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes, which training data mostly is: free whitespace lets a small model write blanks for ever."""


class TokenConstraint(Protocol):
    """Says which tokens may come next in one answer."""

    def allowed(self) -> Tensor:
        """Return bool [vocabulary] on the host."""
        ...

    def take(self, token: int) -> None:
        """Note the token that was chosen."""
        ...


class JsonGrammars:
    """Makes constraints for the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        """Read the vocabulary, which takes some seconds for a large one.

        Raises:
            MachineError: llguidance is not installed.
            RecipeError: it cannot read this tokenizer.
        """
        try:
            import llguidance.hf
        except ImportError:
            raise MachineError("response_format needs llguidance: pip install 'distft[serve]'") from None
        try:
            self._tokens = llguidance.hf.from_tokenizer(tokenizer, eos_token=sorted(stop_ids))
        except (ValueError, RuntimeError) as error:
            message = f"this model's tokenizer cannot be held to a grammar: {error}"
            raise RecipeError("response_format", [Problem(message=message)]) from None

    def constraint(self, schema: Mapping[str, Any]) -> JsonConstraint:
        """Return what an answer may be, from its first token.

        Raises:
            RecipeError: the schema is wrong, or says what cannot be kept to.
        """
        import llguidance

        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=TIGHT)
        except ValueError as error:
            raise _unfit(str(error)) from None
        is_wrong, remarks = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._tokens)
        if is_wrong or remarks:  # a remark names a keyword that would be passed over
            raise _unfit("; ".join(remarks))
        return JsonConstraint(llguidance.LLMatcher(self._tokens, grammar, log_level=0))


class JsonConstraint:
    """Follows one answer. A token that ends it is allowed where the JSON is whole."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> Tensor:
        """Return bool [vocabulary] on the host.

        Raises:
            RecipeError: the schema took more work than the library's limits allow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._raise_error()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(np.bool_))

    def take(self, token: int) -> None:
        """Note the token that was chosen.

        Raises:
            RecipeError: as `allowed`.
        """
        self._matcher.consume_token(token)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise _unfit(self._matcher.get_error())


def _unfit(message: str) -> RecipeError:
    problem = Problem(message=f"the schema cannot be kept to: {' '.join(message.split())}")
    return RecipeError("response_format.json_schema.schema", [problem])
