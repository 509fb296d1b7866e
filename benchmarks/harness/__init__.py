"""How a benchmark measures: cases, timing, ceilings, records, plots."""
