"""Benchmarks. Each script prints JSON lines. Figures are ratios within one run, from interleaved rounds."""

import atexit
import gc

# At exit the interpreter runs one more garbage collection, over all of torch: half a second of processor time.
atexit.register(gc.freeze)
