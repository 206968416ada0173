"""What should be known of rows before they are trained on: repeats, overlap with evaluation, personal data, balance."""

from distft.care.card import card
from distft.care.examine import examine, refuse_overlap
from distft.care.report import CareReport
from distft.care.summary import summary

__all__ = ["CareReport", "card", "examine", "refuse_overlap", "summary"]
