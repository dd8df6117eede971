"""What several tests share."""

HANGS = 1200  # seconds after which a process is taken to hang; on a busy machine it is only slow
