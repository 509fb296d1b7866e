"""Measurement code of the benchmarks: cases, timing, ceilings, records and plots."""
