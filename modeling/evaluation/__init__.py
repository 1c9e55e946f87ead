"""Metrics, statistics, tables; MTEB; every way to make an index smaller."""
