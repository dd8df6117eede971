"""Processes that need no start: a copy of this one, which has imported everything, runs the step's command line."""

import gc
import os
import subprocess
import sys
import time
import traceback


class Forked:
    """What benchmarks.gpu.steps uses of subprocess.Popen."""

    def __init__(self, step, output, run):
        reading, writing = os.pipe()
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(writing)
            self._child(step, output, reading, run)
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb")

    def _child(self, step, output, reading, run):
        code = 1
        try:
            os.setsid()
            gc.freeze()  # a collection would visit, and so copy, all that the parent has
            os.environ.update(step.environment)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            sys.stdin = os.fdopen(reading)
            code = run(step.command[2:])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)
        return self.returncode
