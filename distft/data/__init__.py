"""Rows become optimizer steps: read, converted, rendered and prepared once, packed, dealt out in a fixed order."""
