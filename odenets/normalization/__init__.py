"""Normalization of velocity fields: group norm, batch norm with statistics per stage, and its recalibration."""

from odenets.normalization.recalibration import recalibrate
from odenets.normalization.stage_batch_norm import StageBatchNorm, make_norm
from odenets.normalization.statistics import check_closing_statistics, known_statistics

__all__ = ["StageBatchNorm", "check_closing_statistics", "known_statistics", "make_norm", "recalibrate"]
