"""Comparisons between runs: ablations, equal-budget tables, the baseline. Nothing that ships depends on it."""
