"""Comparisons between runs: tables at equal cost, the baseline; sampling by other rules. None of it ships.

Figures of one run are in `host.evaluate`, times in `host.bench`.
"""
