import atexit
import gc

# A process that ends looks for garbage once more, in all of torch: half a second, and tests start many.
atexit.register(gc.freeze)
