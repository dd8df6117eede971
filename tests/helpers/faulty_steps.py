"""Steps of gpu_check that go wrong."""

import os
import signal
import time


def crashes(context):
    yield {"what": "before", "ok": True}
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(context):
    yield {"what": "before", "ok": True}
    time.sleep(600)


def raises(context):
    yield {"what": "before", "ok": True}
    raise RuntimeError("no luck")
