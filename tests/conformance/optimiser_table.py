"""Runs the conformance suite for optimisers and prints its outcome as optimiser x check.

    python tests/conformance/optimiser_table.py

How to read it: see `suite_table`.
"""

from suite_table import main

if __name__ == "__main__":
    main("test_optimisers.py", "optimiser_cases")
