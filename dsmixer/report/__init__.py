"""Tables, plots and one self-contained HTML page, made from a run folder alone."""
