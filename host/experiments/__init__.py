"""Comparisons between runs: ablations, equal-budget tables, the textbook baseline. Nothing that ships depends on it."""
