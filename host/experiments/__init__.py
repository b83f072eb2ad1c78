"""Comparisons between runs: tables at equal cost, the baseline. Nothing that ships depends on it.

Figures of one run are in `host.evaluate`, times in `host.bench`.
"""
