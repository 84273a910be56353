"""Where the tokens of held-out data went."""

from __future__ import annotations

from dsmixer.report.figures import routing_figures
from dsmixer.report.frames import figures, note, section
from dsmixer.report.html import Markup
from dsmixer.report.run_folder import RunFolder


def routing(run: RunFolder) -> Markup:
    """Heat maps and lines by domain and by layer."""
    if run.routing is None:
        return Markup("")
    drawn = figures("routing", routing_figures(run.routing))
    if not drawn:
        return Markup("")
    remark = (
        "Tokens of held-out data. The first expert is the one a router puts first; p is a router's "
        "probability, before any choice; a cell is a mean over the routers in it."
    )
    return section("Routing", note(remark), drawn, key="routing")
