"""Draws the verdicts on the claims of a sweep, after `prism-deco report` of it:

    python runs/reference/study/report_claims.py runs/study --split test

It writes `claims.md` and `claims.html`, the forest plots, and `claims.csv` with every contrast; `ladder.csv` with the
settings that parts of the sweep chose, and `compute.csv` with what each line of them cost.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from claim_tables import SCOPE, claims_table, contrasts_table
from claims import parse_claims
from contrasts import Study, contrast_records
from forest_plot import forests
from part_settings import COMPUTE_CAPTION, SEARCH_CAPTION, compute_records, search_records

from prism_deco.config import read_yaml
from prism_deco.errors import UsageError
from prism_deco.report.assemble import choose_split, write_files
from prism_deco.report.benchmarks import benchmarks_of
from prism_deco.report.collect import collect
from prism_deco.report.grid import score_tables
from prism_deco.report.page import PageSection, document, render
from prism_deco.report.tabular import comma_separated, records_table


def report_claims(folder: Path, out: Path, split: str | None = None) -> None:
    """Writes the files.

    Raises:
        UsageError: the folder is not a sweep's with claims; claims that cannot be read.
    """
    path = folder / "sweep.yaml"
    sweep = read_yaml(path) if path.is_file() else {}
    claims = parse_claims(sweep.get("claims") or [])
    if not claims:
        raise UsageError(f"{path} states no claims.")
    cells = collect([folder])
    chosen, _ = choose_split(cells, split)
    contrasts = contrast_records(claims, Study(cells, benchmarks_of(cells, None), chosen))
    searches = search_records(sweep, cells)
    of_parts = [table for table in score_tables(cells, chosen) if table.part]
    costs = compute_records([group for table in of_parts for group in table.groups])

    sections = [
        PageSection([claims_table(claims, contrasts)], forests(contrasts)),
        PageSection([contrasts_table(contrasts)]),
    ]
    files: dict[str, str | bytes] = {"claims.csv": comma_separated(contrasts)}
    for title, name, records, caption in (
        ("Settings chosen on the validation split", "ladder.csv", searches, SEARCH_CAPTION),
        ("Steps and compute", "compute.csv", costs, COMPUTE_CAPTION),
    ):
        if records:
            sections.append(PageSection([records_table(title, records, caption)]))
            files[name] = comma_separated(records)
    text, figures = document(f"The claims of {folder.resolve().name}", [SCOPE], sections)
    write_files(out, files | figures | {"claims.md": text, "claims.html": render(text, figures)})


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path, help="a sweep's folder")
    parser.add_argument("--out", type=Path, help="folder to write to (default: FOLDER/report)")
    parser.add_argument("--split", help="of the benchmarks: own | test | ... (default: own)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = arguments.out or arguments.folder / "report"
    try:
        report_claims(arguments.folder, out, arguments.split)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Open {out / 'claims.html'} in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
