"""The style of the figures in tutorials, set anew before each."""

from pathlib import Path
from typing import Any

import matplotlib.style

STYLE = Path(__file__).parents[1] / "static" / "figures.mplstyle"


def reset(gallery_conf: dict[str, Any], script: str) -> None:
    """Set it."""
    matplotlib.rcdefaults()
    matplotlib.use("Agg")
    matplotlib.style.use(STYLE)
