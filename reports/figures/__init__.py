"""Figures: matplotlib's Agg canvas only, the same bytes for the same records."""

from reports.figures.run import plot_run

__all__ = ["plot_run"]
