"""How a rank leaves, what the others are told, and what becomes of a disk's refusal."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import suppress

import pytest

from dsmixer.checkpoint.verify import UnreadableError
from dsmixer.config.errors import RefusedError, RunError, UserError, from_os_error
from dsmixer.training.health import Stopped, StopRequest
from dsmixer.training.leaving import telling_disks, way_out, what_it_says
from dsmixer.training.lock import LockLostError
from dsmixer.training.nonfinite import NonFiniteError
from dsmixer.training.pulse import Pulse
from dsmixer.training.saving import SaveError


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        (None, "done"),
        (Stopped, "stopped"),
        (UserError, "refused"),
        (RefusedError, "refused"),
        (RunError, "ended"),
        (SaveError, "ended"),
        (NonFiniteError, "ended"),
        (UnreadableError, "ended"),
        (LockLostError, "ended"),
        (RuntimeError, "failed"),
        (OSError, "failed"),
        (KeyboardInterrupt, "failed"),
    ],
)
def test_what_all_ranks_raise_together_is_no_failure(kind: type[BaseException] | None, way: str) -> None:
    assert way_out(kind) == way


def test_a_stop_in_the_middle_of_a_library_s_work_is_none_of_its_errors() -> None:
    stop_request = StopRequest()
    stop_request.at_once = "stopped before training"
    with pytest.raises(Stopped), suppress(Exception), stop_request.listening():
        signal.raise_signal(signal.SIGTERM)


def test_a_message_for_people_is_told_whole_and_one_with_a_traceback_by_its_first_line() -> None:
    refused = UserError("no completion", where="law.jsonl:3", fix="add it")
    assert what_it_says(UserError, refused) == "law.jsonl:3: no completion; Fix: add it"
    assert what_it_says(OSError, OSError("disk gone\nat length")) == "OSError: disk gone"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT])
def test_what_the_user_can_mend_is_wrong_input_before_the_run_has_begun_and_not_after(number: int) -> None:
    error = OSError(number, os.strerror(number), "/runs/mini")
    pulse = Pulse()
    with pytest.raises(RefusedError, match="/runs/mini: "), telling_disks(pulse):
        raise from_os_error(error)
    pulse.begun = True
    with pytest.raises(RunError, match="run the same command again"), telling_disks(pulse):
        raise from_os_error(error)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_disk_that_fails_is_not_the_user_s_mistake(number: int) -> None:
    told = from_os_error(OSError(number, os.strerror(number), "/runs/mini"))
    assert isinstance(told, RunError) and str(told).startswith(f"/runs/mini: {os.strerror(number)}")


def test_a_disk_that_fills_up_under_one_rank_is_told_without_a_traceback_once_the_run_has_begun() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/mini/metrics.jsonl")
    pulse = Pulse()
    with pytest.raises(OSError, match="No space left"), telling_disks(pulse):
        raise full
    pulse.begun = True
    with pytest.raises(RunError, match="make room"), telling_disks(pulse):
        raise full
    with pytest.raises(OSError, match="Stale"), telling_disks(pulse):
        raise OSError(errno.ESTALE, "Stale file handle")
