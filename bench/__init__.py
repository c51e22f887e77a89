"""Benchmarks against the budgets of docs/performance.md.

Each module measures our side and its yardstick in one run, in turn, because machines are noisy and only ratios
travel. Nothing here is a test: no figure fails a build.
"""
