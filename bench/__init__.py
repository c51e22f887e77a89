"""Benchmarks against the budgets of docs/performance.md."""
