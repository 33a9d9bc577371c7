"""The table case x check that the conformance suites print: a pytest plugin.

A `+` is a check that passes, a `-` one that the case is known not to pass (the reason follows the
table), an `F` a failure.
"""

import collections
import importlib
import pathlib
import sys

import pytest


class Table:
    """Collects the outcome of every (case, check) of a suite whose tests take a `case`.

    Args:
      cases: module with the dictionary `CASES`; imported when the tests are.
    """

    def __init__(self, cases: str) -> None:
        self.module = cases
        self.outcomes: dict[str, dict[str, str]] = collections.defaultdict(dict)
        self.reasons: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        self.cells: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        cases = importlib.import_module(self.module).CASES
        names = {id(case): name for name, case in cases.items()}
        for item in items:
            arguments = dict(item.callspec.params)  # pyright: ignore
            name = names[id(arguments.pop("case"))]
            suffix = item.name.partition("[")[2].removesuffix("]").replace(name, "").strip("-")
            check = item.originalname.removeprefix("test_")  # pyright: ignore
            self.cells[item.nodeid] = (name, f"{check}: {suffix}" if suffix else check)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, check = self.cells[report.nodeid]
        if report.when == "call" or report.failed:
            known = report.outcome == "skipped"
            self.outcomes[check][name] = {"passed": "+", "failed": "F"}.get(report.outcome, "-")
            if known:
                self.reasons[name, getattr(report, "wasxfail", "")].append(check)

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self.outcomes.values() for name in row))
        width = max(map(len, self.outcomes))
        lines = [f"{'':{width}}  {i + 1:2} {name}" for i, name in enumerate(names)]
        lines.append(" " * width + "".join(f" {i + 1:2}" for i in range(len(names))))
        for check, row in self.outcomes.items():
            cells = "".join(f"  {row.get(name, ' ')}" for name in names)
            lines.append(f"{check:{width}}{cells}")
        lines += [f"- {name}: {', '.join(checks)}: {reason}"
                  for (name, reason), checks in self.reasons.items()]  # fmt: skip
        return "\n".join(lines)


def main(suite: str, cases: str) -> None:
    """Runs a suite of this directory, prints its table, and exits with pytest's code."""
    table = Table(cases)
    path = pathlib.Path(__file__).with_name(suite)
    code = pytest.main(["-q", "--no-header", "--no-summary", str(path)], plugins=[table])
    print(table)
    sys.exit(code)
