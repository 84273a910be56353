"""Which calls of a training step belong to which part, and putting a clock around them for a few steps.

Nothing in the step's own code asks whether it is profiled: one that is not runs as if there were no profile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from dsmixer.data.collate import MicroBatch
from dsmixer.model.inject import Mixture
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.placement import groups
from dsmixer.placement.exchange import TokenExchange
from dsmixer.training.ahead import Ahead
from dsmixer.training.loop import Loop
from dsmixer.training.profile.backward import BASE, Origins, watched
from dsmixer.training.profile.clock import PROFILING, REST, Ranges

Call = tuple[Any, str, str]
"""Owner (an object, a class or a module), name of a function that it has, and the part."""


def calls_of_loop(loop: Loop) -> Iterator[Call]:
    """The calls of a step that begin a part; what is in none of them is ``loop``."""
    stage, engine = loop.stage, loop.engine
    yield Ahead, "__call__", "data"  # the waiting; the batch itself is made beside the step
    yield MicroBatch, "to", "data"
    yield type(loop), "_forward_backward", BASE
    yield from ((stage, name, REST) for name in ("batch_routing", "token_weights", "router_loss"))
    yield from ((owner, name, "exchange") for owner, name in groups.transfers(engine.engine))
    yield type(loop), "_update", "optimizer"
    yield engine.optimizer, "prepare", "optimizer"
    yield engine.engine, "step", "optimizer"


def calls_of_model(mixture: Mixture) -> Iterator[Call]:
    """Those inside the model's passes; what is in none of them is ``base``."""
    yield MixedLinear, "forward", "mixers"
    yield from ((module, "forward", BASE) for module in _frozen(mixture))
    yield from ((mixture.context, name, "router") for name in ("assign", "take_outputs"))
    yield from ((TokenExchange, name, "exchange") for name in ("dispatch", "combine"))


def _frozen(mixture: Mixture) -> Iterator[nn.Module]:
    """The projections under the mixers; and the modules around these, which activation checkpointing may run
    again while it is in the backward pass of a mixer."""
    paths = {path: path.count(".") + 1 for path in mixture.mixers}
    around = {path.rsplit(".", depth)[0] for path, parts in paths.items() for depth in range(1, parts)}
    yield from (mixture.model.get_submodule(path) for path in sorted(around))
    for mixer in mixture.mixers.values():
        yield mixer.base


def origins_of(mixture: Mixture) -> Origins:
    """For the nodes that add up the gradients of what trains."""
    experts = {id(parameter): "mixers" for _, parameter in mixture.expert_parameters()}
    return Origins({**experts, **{id(parameter): "router" for _, parameter in mixture.router_parameters()}})


@contextmanager
def timed(loop: Loop, ranges: Ranges, more: Sequence[Call] = ()) -> Iterator[None]:
    """Tell ``ranges`` of the parts of every step in it, those of ``more`` too."""
    mixture = loop.engine.mixture
    calls = (*calls_of_loop(loop), *calls_of_model(mixture), *more)
    with timed_calls(calls, loop.engine.engine, origins_of(mixture), ranges):
        yield


@contextmanager
def timed_calls(calls: Iterable[Call], engine: Any, origins: Origins, ranges: Ranges) -> Iterator[None]:
    """The same of some calls, and of the nodes that ``engine.backward`` goes through."""
    with ExitStack() as stack:
        stack.enter_context(replaced(engine, "backward", lambda f: watched(f, origins, ranges, PROFILING)))
        for owner, name, part in calls:
            enter = functools.partial(_ranged, part=part, ranges=ranges, origins=origins)
            stack.enter_context(replaced(owner, name, enter))
        yield


def _ranged(
    function: Callable[..., Any], *, part: str, ranges: Ranges, origins: Origins
) -> Callable[..., Any]:
    """The function, with the part told before and after it, and whose nodes it makes."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        depth, first = ranges.enter(part), origins.begin()
        try:
            return function(*args, **kwargs)
        finally:
            origins.end(first, part)
            ranges.leave(depth)

    return run


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """Another function in the place of an owner's, for a while."""
    own = vars(owner).get(name)
    setattr(owner, name, make(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
