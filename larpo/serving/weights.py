"""Which weights a server has: it is told of new ones before the first completion that is asked of them."""

from __future__ import annotations

import logging
import shlex
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

from ..runs.secrets import masked
from .client import ServerError
from .settings import CHECKPOINT, ServerSettings, without_key

logger = logging.getLogger(__name__)


@dataclass
class ServedWeights:
    """What this process has told a server. Where it stands before is not relied on: another run may have been there."""

    settings: ServerSettings
    told: str | None = field(default=None, init=False)

    def tell(self, checkpoint: str, iteration: int) -> dict[str, Any]:
        """Sees to it that the server samples from a checkpoint, and returns what is known of it, to be written down.

        Raises ServerError where the command failed; the server's answers are waited for by who asks next.
        """
        settings = self.settings
        if settings.reload_command is None:
            named = CHECKPOINT in settings.model
            if not named and iteration > 0 and self.told != checkpoint:
                logger.warning(
                    "nobody tells the server at %s of the weights after iteration %d (allow_stale_weights): its completions "
                    "are those of the weights it was started with",
                    settings.base_url, iteration,
                )  # fmt: skip
                self.told = checkpoint
            how = "named in the request" if named else "as the server was started"
            return {"how": how, "stale": not named and iteration > 0}
        if self.told != checkpoint:
            self._reload(checkpoint, iteration)
            self.told = checkpoint
        return {"how": "reload_command", "stale": False}

    def _reload(self, checkpoint: str, iteration: int) -> None:
        settings = self.settings
        command = settings.reload_command.replace(CHECKPOINT, shlex.quote(checkpoint)).replace("{iteration}", str(iteration))
        with tempfile.TemporaryFile() as output:  # not a pipe: a server that it leaves running would hold that open
            pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            try:
                code = subprocess.run(command, shell=True, timeout=settings.reload_timeout, **pipes).returncode
            except subprocess.TimeoutExpired:
                raise ServerError(f"reload_command took more than {settings.reload_timeout:g} s (reload_timeout)") from None
            output.seek(0)
            said = output.read().decode(errors="replace").strip()[-500:]
        if code != 0:
            said = masked(without_key(said, settings)) or "it said nothing"
            raise ServerError(f"reload_command for the weights after iteration {iteration} ended with code {code}: {said}")
