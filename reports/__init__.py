"""Run folders in; tables, figures, CSV and HTML out. Never imports torch."""
