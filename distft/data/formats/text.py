"""`text`: one document per row, every token trained."""

from distft.data.samples import FormatSpec, Row, Text, text_column


def convert(row: Row) -> Text:
    """Return the row's document."""
    return Text(text=text_column(row, "text"))


SPEC = FormatSpec(
    name="text",
    needs='"text": a string',
    matches=lambda row: "text" in row,
    convert=convert,
    reads=("text",),
    example={"text": "Once upon a time there was a tokenizer."},
)
