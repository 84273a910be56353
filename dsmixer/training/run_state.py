"""What the stages of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsmixer.config.changes import rows_asked
from dsmixer.config.recipe import STAGES, LoadedRecipe
from dsmixer.model.inject import Mixture
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.data import RunData
from dsmixer.training.health import StopRequest
from dsmixer.training.lock import RunLock
from dsmixer.training.nonfinite import NonFinitePolicy
from dsmixer.training.profile.steps import ProfileRequest
from dsmixer.training.pulse import Pulse
from dsmixer.training.resume import TakeUp
from dsmixer.training.run_folder import RunFolder
from dsmixer.training.telling import tell, tell_problem
from dsmixer.training.together import keep_lock
from dsmixer.training.world import World


@dataclass
class RunState:
    """What the stages of a run share."""

    loaded: LoadedRecipe
    taken: TakeUp
    checkpoints: Checkpoints
    world: World
    mixture: Mixture
    data: RunData
    stop_request: StopRequest
    ds_path: str | None = None
    lock: RunLock | None = None
    pulse: Pulse = field(default_factory=Pulse)
    nonfinite: NonFinitePolicy = field(default_factory=NonFinitePolicy)
    profile: ProfileRequest = field(default_factory=ProfileRequest)

    @property
    def folder(self) -> RunFolder:
        """Of the run."""
        return self.checkpoints.folder

    @property
    def rows(self) -> dict[str, int]:
        """Global batch of each enabled stage."""
        enabled = [name for name in STAGES if self.loaded.stage(name).enabled]
        return {name: rows_asked(self.loaded, name, self.world.size) for name in enabled}

    def say(self, text: str) -> None:
        """A line on rank 0."""
        if self.world.rank == 0:
            tell(text)

    def keep_lock(self) -> None:
        """Raises ``LockLostError`` on all ranks where another job has the run folder; a collective."""
        keep_lock(self.world, self.lock)

    def warn(self, text: str) -> None:
        """A line on rank 0, on standard error."""
        if self.world.rank == 0:
            tell_problem(f"warning: {text}")
