"""What a key allows, in words: every kind of constraint a Params class can state."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, create_model

from distft.core.registry import Params
from distft.recipe.schema_text import in_words


class Inner(Params):
    a: int = 1


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (int, "a whole number"),
        (Annotated[int, Field(gt=0, le=8)], "a whole number > 0 and <= 8"),
        (Annotated[int, Field(multiple_of=8)], "a whole number divisible by 8"),
        (Annotated[float, Field(ge=0.5)], "a number >= 0.5"),
        (str, "text"),
        (Annotated[str, Field(min_length=1)], "text that is not empty"),
        (Annotated[str, Field(pattern="^a+$")], "text that matches ^a+$"),
        (Literal["a"], '"a"'),
        (Literal["a", "b"], 'one of "a", "b"'),
        (Literal["off"] | int, '"off" or a whole number'),
        (int | None, "a whole number"),
        (list[str], "a list of text"),
        (tuple[int, ...], "a list of whole numbers"),
        (tuple[float, float], "a list of 2 numbers"),
        (tuple[int, str], "a list of a whole number, text"),
        (list[Inner], "a list of tables"),
        (Inner, "a table"),
        (dict[str, int], "a table"),
    ],
)
def test_in_words(annotation: Any, words: str) -> None:
    schema = create_model("Table", __base__=Params, key=(annotation, ...)).model_json_schema()
    assert in_words(schema, schema["properties"]["key"]) == words
