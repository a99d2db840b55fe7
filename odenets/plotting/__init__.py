"""Figures of records, of points and their displacements, and of detectors, for matplotlib; :func:`save` writes them.

Each function takes arrays or records and returns a ``matplotlib.figure.Figure``, which ``pyplot`` does not know:
``plt.show()`` and ``plt.savefig()`` leave it out, and there is nothing to close. A notebook shows the one that is the
last value of a cell, or ``display(figure)``; elsewhere ``figure.savefig("blocks.png")`` writes it, or
``save({"blocks": figure}, "figures")``:

>>> import torch, odenets
>>> from odenets import measures, plotting
>>> flow = odenets.Flow(odenets.MLPField(2), depth=6)
>>> _, records = flow.record(torch.randn(40, 2), action=measures.action)
>>> figure = plotting.blocks_by_samples(records)  # in a notebook the last value of a cell is shown
>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     [path.name for path in plotting.save({"blocks": figure}, folder)]
['blocks.png']

matplotlib comes with ``pip install 'odenets[plot]'``; without it a function raises ModuleNotFoundError.
"""

from odenets.plotting.detection import histograms, operating_characteristics
from odenets.plotting.figures import save
from odenets.plotting.monitor_report import monitor_report
from odenets.plotting.monitoring import monitor_scores, surest_images
from odenets.plotting.records import blocks_by_samples
from odenets.plotting.transport import action_against_accuracy, clouds, displacements, pictures, refinement_by_block

__all__ = [
    "action_against_accuracy", "blocks_by_samples", "clouds", "displacements", "histograms", "monitor_report",
    "monitor_scores", "operating_characteristics", "pictures", "refinement_by_block", "save", "surest_images",
]  # fmt: skip
