"""The data formats a source can name. A new one is one file here and one line below."""

from distft.core.registry import Registry
from distft.data.formats import alpaca, messages, preference, prompt, prompt_completion, sharegpt, text, unpaired
from distft.data.samples import FormatSpec

FORMATS: Registry[FormatSpec] = Registry("data format")
FORMATS.add(messages.SPEC)
FORMATS.add(sharegpt.SPEC)
FORMATS.add(alpaca.SPEC)
FORMATS.add(prompt_completion.SPEC)
FORMATS.add(prompt.SPEC)
FORMATS.add(text.SPEC)
FORMATS.add(preference.SPEC)
FORMATS.add(unpaired.SPEC)
