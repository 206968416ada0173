"""`python -m distft.merge SOURCE --out DIR`: an adapter becomes part of its base, compared with it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distft.core.ending import exit_code, report_error
from distft.core.errors import DONE
from distft.core.log import quiet_libraries
from distft.merge_options import parser
from distft.merging.adapter_config import adapter_mistake
from distft.merging.merging import DTYPES, MergeReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    options = parser().parse_args(argv)
    quiet_libraries()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there, and it is for the result alone
            report = merge_source(options)
    except (Exception, KeyboardInterrupt) as error:
        report_error(error, 0)
        return exit_code(error)
    print(json.dumps(report.to_json(), indent=1) if options.json else "\n".join(show(report, options.out)))
    return DONE


def merge_source(options: argparse.Namespace) -> MergeReport:
    """Merge what the flags of the command name, and return what was found.

    Raises:
        DistftError: it cannot be merged, or the merged model is another one than the adapter's.
    """
    from distft.adapter_sources import find_source, held_out_rows
    from distft.merging import merging

    given = vars(options)
    if given["max_kl"] is not None and not given["max_kl"] > 0:
        raise adapter_mistake("--max-kl", f"{given['max_kl']} is no bound", "a number above 0, such as 0.01")
    if given["max_kl"] is not None and given["rows"] == "none":
        raise adapter_mistake("--max-kl", "has no effect with --rows none", "leave one of the two out")
    for flag in ("rows", "base"):
        if given[flag] == "":
            raise adapter_mistake(f"--{flag}", "is empty", "name a file or folder, or leave the flag out")
    source = find_source(given["source"], given["base"])
    rows = None if given["rows"] == "none" else held_out_rows(source, given["rows"])
    dtype = None if given["dtype"] is None else DTYPES[given["dtype"]]
    return merging.merge(
        source, given["out"], rows=rows, dtype=dtype, max_kl=given["max_kl"], quantize=given["quantize"]
    )


def show(report: MergeReport, out: Path) -> Iterator[str]:
    """Yield the report as lines for people."""
    yield f"merged {report.source} into {report.base}: {out} ({report.dtype})"
    for formula, count in report.formulas.items():
        yield f"  {count:>5} tensors  {formula}"
    if report.base_in_4bit:
        yield f"  {report.base_in_4bit} tensors of the base as the run had them: quantised to 4 bits and dequantised"
    if report.untied:
        yield "  the head is no longer tied to the embedding: the adapter changed one of the two"
    if report.quantized:
        worst = max(report.quantized, key=lambda error: error.relative_error)
        shares = sorted(error.share_of_change for error in report.quantized)
        yield (
            f"  stored in 4 bits again: {len(report.quantized)} matrices, relative error up to "
            f"{worst.relative_error:.1%} ({worst.name}); rounding over change, median {shares[len(shares) // 2]:.2g}"
        )
    found = report.comparison
    if found is None:
        yield "  not compared with the adapter (--rows none)"
    else:
        yield (
            f"  KL(adapter || merged) {found.kl:.3g} nats a token (allowed {report.max_kl:.3g}), largest "
            f"{found.largest_kl:.3g}; same greedy choice at {found.agreement:.2%} of {found.num_tokens} positions"
        )


if __name__ == "__main__":
    sys.exit(main())
