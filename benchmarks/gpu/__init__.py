"""The steps of gpu_check: what only a GPU can show."""

import time

BEGIN = time.monotonic()  # before torch is imported, which a bare machine reads from its disk for the first time
