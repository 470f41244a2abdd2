"""Measurements. Each script prints JSON lines; figures are ratios within one run, from interleaved rounds."""
