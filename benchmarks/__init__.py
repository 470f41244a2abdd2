"""Measurements. Each script prints JSON lines; figures are ratios within one run, from interleaved rounds."""

import atexit
import gc

# A process that ends looks for garbage once more, in all of torch: half a second of its processor.
atexit.register(gc.freeze)
