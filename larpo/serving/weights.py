"""Which weights a server has. It is told to load a policy's weights before the policy's first completion."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import tempfile
from dataclasses import dataclass, field

from ..runs.secrets import masked
from ..runs.servers import without_key
from .client import ServerError
from .settings import CHECKPOINT, ServerSettings

logger = logging.getLogger(__name__)


@dataclass
class ServedWeights:
    """What this process has told a server. Where it stands before is not relied on: another run may have been there."""

    settings: ServerSettings
    told: str | None = field(default=None, init=False)

    def tell(self, checkpoint: str, iteration: int) -> bool:
        """Makes the server sample from a checkpoint: that of the policy after an iteration. Returns whether the server may
        still be loading it.

        Raises ServerError where the command failed.
        """
        if self.told == checkpoint or (iteration == 0 and self.settings.initial_model is not None):
            return False
        if self.settings.reload_command is not None:
            self._reload(checkpoint, iteration)
        elif self.settings.is_stale(iteration):
            logger.warning(
                "nobody tells the server at %s of the weights after iteration %d (allow_stale_weights): its completions are of "
                "the weights that it was started with",
                self.settings.base_url,
                iteration,
            )
        self.told = checkpoint
        return self.settings.reload_command is not None

    def _reload(self, checkpoint: str, iteration: int) -> None:
        settings = self.settings
        command = settings.reload_command.replace(CHECKPOINT, shlex.quote(checkpoint)).replace("{iteration}", str(iteration))
        with tempfile.TemporaryFile() as output:  # not a pipe: a server that it leaves running would hold that open
            pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            try:
                code = subprocess.run(command, shell=True, timeout=settings.reload_timeout, env=_alone(), **pipes).returncode
            except subprocess.TimeoutExpired:
                raise ServerError(f"reload_command took more than {settings.reload_timeout:g} s (reload_timeout)") from None
            output.seek(0)
            said = output.read().decode(errors="replace").strip()[-500:]
        if code != 0:
            said = masked(without_key(said, settings.api_key_env)) or "it said nothing"
            raise ServerError(f"reload_command for the weights after iteration {iteration} ended with code {code}: {said}")


def _alone() -> dict[str, str]:
    """The environment without the variables of `torchrun` and `accelerate launch`: a server that the command starts is no rank
    of the loop, and would wait for the other ranks."""
    of_a_rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    of_a_launcher = ("TORCHELASTIC_", "GROUP_", "ROLE_")
    return {name: x for name, x in os.environ.items() if name not in of_a_rank and not name.startswith(of_a_launcher)}
