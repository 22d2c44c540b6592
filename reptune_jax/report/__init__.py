"""From the results table of a study to tables, plots and one self-contained HTML page."""
