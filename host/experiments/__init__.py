"""Comparisons between runs: tables at equal cost, the baseline. Nothing that ships depends on it."""
