"""Examines rows before they are trained on: duplicates, contamination, personal data, balance; returns a report."""

from distft.data_quality.card import card
from distft.data_quality.examine import examine, refuse_overlap
from distft.data_quality.findings import DataQualityReport
from distft.data_quality.summary import summary

__all__ = ["DataQualityReport", "card", "examine", "refuse_overlap", "summary"]
