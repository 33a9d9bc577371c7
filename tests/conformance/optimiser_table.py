"""Runs the conformance suite for optimisers and prints its outcome as optimiser x check.

    python tests/conformance/optimiser_table.py

A `+` is a check that passes, a `-` one that the optimiser is known not to pass (the reason follows
the table), an `F` a failure. The exit code is pytest's.
"""

import collections
import pathlib
import sys

import pytest

SUITE = pathlib.Path(__file__).with_name("test_optimisers.py")


class Table:
    """A pytest plugin that collects the outcome of every (optimiser, check)."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, str]] = collections.defaultdict(dict)
        self.reasons: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        self.cells: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        from optimiser_cases import CASES

        names = {id(case): name for name, case in CASES.items()}
        for item in items:
            arguments = dict(item.callspec.params)  # pyright: ignore
            optimiser = names[id(arguments.pop("case"))]
            suffix = item.name.partition("[")[2].removesuffix("]").replace(optimiser, "").strip("-")
            check = item.originalname.removeprefix("test_")  # pyright: ignore
            self.cells[item.nodeid] = (optimiser, f"{check}: {suffix}" if suffix else check)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        optimiser, check = self.cells[report.nodeid]
        if report.when == "call" or report.failed:
            known = report.outcome == "skipped"
            self.outcomes[check][optimiser] = {"passed": "+", "failed": "F"}.get(
                report.outcome, "-"
            )
            if known:
                self.reasons[optimiser, getattr(report, "wasxfail", "")].append(check)

    def __str__(self) -> str:
        optimisers = list(dict.fromkeys(name for row in self.outcomes.values() for name in row))
        width = max(map(len, self.outcomes))
        lines = [f"{'':{width}}  {i + 1:2} {name}" for i, name in enumerate(optimisers)]
        lines.append(" " * width + "".join(f" {i + 1:2}" for i in range(len(optimisers))))
        for check, row in self.outcomes.items():
            cells = "".join(f"  {row.get(name, ' ')}" for name in optimisers)
            lines.append(f"{check:{width}}{cells}")
        lines += [f"- {name}: {', '.join(checks)}: {reason}"
                  for (name, reason), checks in self.reasons.items()]  # fmt: skip
        return "\n".join(lines)


if __name__ == "__main__":
    table = Table()
    code = pytest.main(["-q", "--no-header", "--no-summary", str(SUITE)], plugins=[table])
    print(table)
    sys.exit(code)
