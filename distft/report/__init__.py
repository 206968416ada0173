"""A run, or several side by side, as one HTML page that needs no network, no script and no library."""

from distft.report.data_card import with_care
from distft.report.page import run_page

__all__ = ["run_page", "with_care"]
