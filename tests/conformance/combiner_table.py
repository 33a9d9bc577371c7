"""Runs the conformance suite for combiners and prints its outcome as combiner x check.

    python tests/conformance/combiner_table.py

How to read it: see `suite_table`.
"""

from suite_table import main

if __name__ == "__main__":
    main("test_combiners.py", "combiner_cases")
